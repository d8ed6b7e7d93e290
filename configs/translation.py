"""Translation of picture captions (Multi30k, Elliott et al. 2016; non-commercial research only).

A small Marian that starts from random weights shows the mechanics, not what translation can be:

    RAW=../shared/data/translation-multi30k/raw
    python scripts/prepare.py --texts=$RAW/train.en.gz,$RAW/train.de.gz --output=runs/marian-en-de
    python scripts/train.py --config=configs/translation.py --workdir=runs/translation

pretrained: a folder with T5, BART, Marian, mBART or M2M100 to adapt, in place of the one made
  above, with prefix (T5: "translate English to German: ") or with languages, as
  task.source_language and task.target_language; lower rate and epochs then (rate=3e-5,epochs=1).
source, target: en, de, fr, cs. dialect: a second test set (2017_flickr, 2017_mscoco, 2018_flickr).
glossary: file of lines `source term<TAB>target term`. folder: where the data lies.
Baselines are the source as it is and the model before training; BLEU is sacrebleu's.

Measured, en to de from random weights, seed 0, two busy CPU cores, 15 minutes of work, with 95 %
intervals, on 1,000 captions each:

                   2016 test                           2017_flickr
  fine-tuned       BLEU 32.4 [30.8, 33.8], chrF 56.7   24.3 [22.8, 25.8], chrF 50.9
  source as it is  BLEU 0.5, chrF 16.3                 0.1, chrF 15.1
"""


def get_config(pretrained="runs/marian-en-de", source="en", target="de", dialect="2017_flickr",
               prefix="", glossary="", rate=1e-3, epochs=4.0, folder="../shared/data"):
  raw = f"{folder}/translation-multi30k/raw"
  pair = lambda name: f"{raw}/{name}.{source}.gz,{raw}/{name}.{target}.gz"  # noqa: E731
  return dict(
    title=f"Captions, {source} to {target}",
    notes=("Multi30k is for non-commercial research: a benchmark, no base for a product.",),
    model=dict(source=pretrained),
    data=dict(
      train=pair("train"), validation=pair("val"), test=pair("test_2016_flickr"),
      extra={dialect: pair(f"test_{dialect}")} if dialect else {},
      max_length=64, buckets=(16, 24, 32),
    ),
    task=dict(
      name="seq2seq", metric="bleu", scores=("bleu", "chrf"), prefix=prefix, glossary=glossary,
      max_target=64, label_smoothing=0.1, generate_rows=1014,
    ),
    optim=dict(rate=float(rate), warmup=0.1),
    train=dict(batch=64, epochs=float(epochs), eval_every=0.25, eval_batch=64, train_sample=256),
  )
