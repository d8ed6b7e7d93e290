"""What stands behind verdicts: the parts of the page for calibration, cost and forgetting."""

from xml.etree import ElementTree

import numpy as np
from card import fake_runs

from ft import guards, stats
from ft.card import html, schema
from ft.card.evidence import calibrate, cost, forget

HOSTILE = "</td><script>alert(1)</script>&"


def read(markup):
  """The text of a part, which has to nest; a planted tag would be one of its elements."""
  tree = ElementTree.fromstring(f"<div>{markup}</div>")
  assert not list(tree.iter("script"))
  return " ".join(tree.itertext())


def test_sets_and_abstention_of_a_classifier():
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(900, 3))
  label = (stats.softmax(logits).cumsum(axis=1) > rng.random((900, 1))).argmax(axis=1)
  rows = {split: {guards.TUNED: {"logits": logits[part], "label": label[part]}}
          for split, part in (("validation", slice(400)), ("test", slice(400, 900)))}
  numbers = guards.measure(None, guards.Evidence(outputs=rows, labels=(HOSTILE, "b", "c")),
                           ["calibrate"])["calibrate"]["numbers"]
  said = read(calibrate.section(schema.normalise({"guards": numbers})["guards"], {}))
  made = numbers["conformal"][0]
  for words in (f"{100 * made['coverage']:.1f}", f"{made['size']:.3f}", "after vector scaling",
                "Sets on test, n = 500", HOSTILE, "If unsure rows go to a person",
                f"{100 * numbers['abstention']['area']:.1f} %"):
    assert words in said


def test_intervals():
  made = {"method": "split conformal", "asked": 0.9, "coverage": 0.874, "interval": [0.85, 0.89],
          "band": [0.88, 0.92], "width": 3.21, "fitted_on": 100, "n": 1200}
  said = read(calibrate.section({"intervals": made}, {}))
  for words in ("90.0", "87.4", "[85.0, 89.0]", "[88.0, 92.0]", "3.21", "1,200"):
    assert words in said


def test_cost_beside_the_baselines_and_from_random_weights():
  numbers = {
      "phases": {"training": 90.0, "baselines": 10.0}, "flops": 2.5e12, "flops_by": "formula",
      "tokens": 12_345, "utilisation": 0.31,
      "energy": {"joules": 7200.0, "measured": False, "source": "estimate: 10 W"},
      "beside": [{"name": "probe", "metric": "accuracy", "value": 0.81, "n": 500, "seconds": 10.0,
                  "what": HOSTILE},
                 {"name": "fine-tuned", "metric": "accuracy", "value": 0.9, "n": 500,
                  "seconds": 90.0, "what": "training"}],
      "scratch": {"metric": "accuracy", "value": 0.6, "interval": [0.55, 0.65], "n": 500,
                  "seconds": 88.0, "difference": 0.3, "lo": 0.25, "hi": 0.35, "best": 0.6,
                  "chosen_by": "accuracy", "steps": 400, "reached_at": 100}}
  said = read(cost.section(numbers, {}))
  for words in ("2.5 TFLOP", "12,345", "31 %", "2 Wh", "energy, an estimate", "frozen probe",
                "81.0", HOSTILE, "60.0 [55.0, 65.0]", "+30.0 points [25.0, 35.0]",
                "by step 100 of 400"):
    assert words in said


def test_forgetting_before_and_after():
  numbers = {
      "text": {"source": HOSTILE, "n": 64, "tokens": 1800, "before": 4.8, "after": 5.8,
               "difference": 1.0, "interval": [0.8, 1.2]},
      "retention": [{"split": HOSTILE, "metric": "mse", "before": 0.4, "after": 0.5,
                     "difference": 0.1, "lo": 0.05, "hi": 0.15, "n": 90, "verdict": "lost"}],
      "divergence": {"kind": "answers", "unit": "nats a token", "value": 0.123,
                     "interval": [0.1, 0.15], "n": 30},
      "cka": {"inputs": "validation rows", "n": 512, "chance": 0.04,
              "layers": [{"layer": "encoder/layer_0", "cka": 0.993}]},
      "weights": [{"layer": "encoder/layer_0", "relative": 0.0123}], "missing": ["probe: none"],
      "tradeoff": [{"alpha": 0.5, "chosen": True, "values": {}}], "seconds": 3.4}
  said = read(forget.section(numbers, {}))
  for words in ("4.800", "5.800", "+1.000 nats/token [0.800, 1.200]", HOSTILE, "0.123", "0.99",
                "0.04", "1.2 %", "encoder · layer 0", "probe: none", "3.4 s", "under Results"):
    assert words in said
  assert "bit for bit" in read(forget.section({"only_head": True}, {}))


def test_a_guard_without_numbers_says_why_in_its_part():
  record = schema.normalise(fake_runs.quality())
  record["guards"]["forget"] = guards.not_measured("nothing was pretrained")
  assert "Not measured: nothing was pretrained." in html.page(record)
