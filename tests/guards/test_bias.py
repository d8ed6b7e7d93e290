"""The bias guard on published counts, planted groups, chance alone, and what is not there."""

import numpy as np
import pytest

from ft import fairness, guards
from ft.card.evidence import bias as page
from ft.guards import bias

# Confusion counts of the two-year COMPAS audit by ProPublica (Larson et al. 2016): n = 7,214.
COMPAS = {"African-American": dict(tp=1369, fp=805, fn=532, tn=990),
          "Caucasian": dict(tp=505, fp=349, fn=461, tn=1139),
          "others": dict(tp=161, fp=128, fn=223, tn=552)}


def compas():
  cells = [(said, truth, name) for name, count in COMPAS.items()
           for key, said, truth in (("tp", 1, 1), ("fp", 1, 0), ("fn", 0, 1), ("tn", 0, 0))
           for _ in range(count[key])]
  said, truth, group = zip(*cells, strict=True)
  return np.array(said), np.array(truth), np.array(group)


class Rows:
  """Rows of a split, with attributes."""

  def __init__(self, **columns):
    self.columns = columns

  def __len__(self):
    return len(next(iter(self.columns.values()), ()))

  def __getitem__(self, i):
    return {"attributes": {key: str(value[i]) for key, value in self.columns.items()}}


def measured(said, truth, rows=None, classes=2, features=None, validation=None, **changes):
  config = guards.defaults("bias")
  vars(config).update(changes)
  n = len(truth)
  logits = np.full((n, classes), -2.0)
  logits[np.arange(n), said] = 2.0
  outputs = {"logits": logits, "label": np.asarray(truth), "index": np.arange(n)}
  known = {"validation": validation} if validation else {}
  evidence = guards.Evidence(
    metric="accuracy", outputs={"test": {guards.TUNED: outputs},
                                "validation": {guards.TUNED: outputs}},
    score=lambda out: (np.argmax(out["logits"], 1) == out["label"]).astype(float),
    labels=tuple("abcdefghij"[:classes]),
    rows={} if rows is None else {"test": rows} | known,
    features={} if features is None else {
      "test": {"features": features, "label": truth, "index": np.arange(n)}})
  return bias.measure(config, evidence)


def test_the_published_rates_of_compas():
  said, truth, group = compas()
  rates = {row["group"]: row for row in fairness.rates(said, truth, group)}
  assert sum(row["n"] for row in rates.values()) == 7214
  percent = {name: (round(100 * row["fpr"], 2), round(100 * row["fnr"], 2))
             for name, row in rates.items()}
  assert percent["African-American"] == (44.85, 27.99)
  assert percent["Caucasian"] == (23.45, 47.72)
  two = [rates["African-American"], rates["Caucasian"]]
  apart = fairness.differences(two)
  assert apart["equalised_odds"] == pytest.approx(805 / 1795 - 349 / 1488, abs=1e-12)
  assert apart["equal_opportunity"] == pytest.approx(1369 / 1901 - 505 / 966, abs=1e-12)
  assert apart["demographic_parity"] == pytest.approx(2174 / 3696 - 854 / 2454, abs=1e-12)


def test_the_guard_reports_compas():
  said, truth, group = compas()
  found = measured(said, truth, Rows(race=group))
  by, = found["numbers"]["by"]
  assert {row["group"]: round(100 * row["fpr"], 2) for row in by["groups"]} == {
    "African-American": 44.85, "Caucasian": 23.45, "others": 18.82}
  black = next(row for row in by["groups"] if row["group"] == "African-American")
  low, high = black["fpr_interval"]
  assert 0.42 < low < 0.4485 < high < 0.48
  assert by["equalised_odds"] == pytest.approx(1369 / 1901 - 161 / 384)
  assert by["equalised_odds"] > by["chance"] and found["verdict"] != "ok"
  assert "points apart by race" in found["words"]


def test_equalised_odds_equal_a_count_by_hand():
  rng = np.random.default_rng(0)
  said, truth = rng.integers(0, 2, (2, 500))
  group = rng.choice(["x", "y", "z"], 500)
  shares = [[said[(group == g) & (truth == t)].mean() for g in "xyz"] for t in (0, 1)]
  want = max(max(part) - min(part) for part in shares)
  rates = fairness.rates(said, truth, group)
  assert fairness.differences(rates)["equalised_odds"] == pytest.approx(want)
  assert fairness.differences(rates, fewest=10**6)["equalised_odds"] != want


def test_chance_alone_is_no_finding():
  """Groups, classes and clusters that mean nothing: hardly ever a warning in 40 draws."""
  warned = 0
  for seed in range(40):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 600)
    said = np.where(rng.random(600) < 0.8, truth, 1 - truth)
    found = measured(said, truth, Rows(a=rng.integers(0, 8, 600)),
                     features=rng.normal(size=(600, 3)), clusters=5, gap=0.0, part_gap=0.0,
                     odds=0.0)
    warned += found["verdict"] != "ok"
  assert warned <= 14  # four tests at 5 % each, at thresholds of zero


def test_planted_groups_and_their_crossing_are_found():
  rng = np.random.default_rng(1)
  sex, race = rng.choice(["f", "m"], 4000), rng.choice(["p", "q"], 4000)
  truth = rng.integers(0, 2, 4000)
  bad = (sex == "f") & (race == "q")
  said = np.where(rng.random(4000) < np.where(bad, 0.6, 0.95), truth, 1 - truth)
  numbers = measured(said, truth, Rows(sex=sex, race=race))["numbers"]
  by = {found["by"]: found for found in numbers["by"]}
  assert by["sex × race"]["worst"]["group"] == "f, q"
  assert by["sex × race"]["worst"]["p"] < 0.01
  assert by["sex × race"]["worst"]["value"] == pytest.approx(
    (said == truth)[bad].mean())
  assert {"sex", "race", "sex × race"} == set(by)


def test_a_blind_cluster_and_a_weak_class_are_found_without_groups():
  rng = np.random.default_rng(2)
  truth = rng.integers(0, 3, 2000)
  place = rng.integers(0, 5, 2000)
  features = np.eye(5)[place] * 10 + rng.normal(size=(2000, 5))
  right = np.where(place == 3, 0.5, 0.97) * np.where(truth == 2, 0.8, 1.0)
  said = np.where(rng.random(2000) < right, truth, (truth + 1) % 3)
  found = measured(said, truth, classes=3, features=features, clusters=5)
  worst = found["numbers"]["clusters"]["worst"]
  assert worst["n"] == pytest.approx((place == 3).sum(), abs=20) and worst["p"] < 0.01
  assert found["numbers"]["worst_class"]["group"] == "c"
  assert found["verdict"] != "ok" and "cluster" in found["words"]


def test_few_rows_are_flagged_and_in_no_difference():
  rng = np.random.default_rng(3)
  truth = rng.integers(0, 2, 400)
  group = np.array(["many"] * 190 + ["more"] * 190 + ["few"] * 20)
  said = np.where(group == "few", 1 - truth, truth)
  by, = measured(said, truth, Rows(g=group))["numbers"]["by"]
  assert {row["group"]: row["few"] for row in by["groups"]} == {
    "few": True, "many": False, "more": False}
  assert by["worst"]["group"] != "few" and by["equalised_odds"] == 0


def test_a_threshold_a_group_mends_what_a_shifted_score_broke():
  rng = np.random.default_rng(5)
  truth, group = rng.integers(0, 2, 6000), rng.choice(["x", "y"], 6000)
  logit = 3 * truth - 1.5 + rng.normal(size=6000) - 2.0 * (group == "y")
  scores = 1 / (1 + np.exp(-logit))
  first, last = slice(0, 3000), slice(3000, None)
  at = fairness.thresholds(scores[first], truth[first], group[first], 30)
  assert at["y"] < at["x"]
  # The shift is 2 on the logit scale, and so is what the thresholds undo.
  apart = np.log(at["x"] / (1 - at["x"])) - np.log(at["y"] / (1 - at["y"]))
  assert apart == pytest.approx(2.0, abs=0.3)
  said = fairness.decided(scores[last], group[last], at)

  def odds(said):
    return fairness.differences(fairness.rates(said, truth[last], group[last]))["equalised_odds"]

  assert odds(scores[last] > 0.5) > 0.4 and odds(said) < 0.06


def test_numbers_become_bands():
  names = fairness.bands([str(v) for v in range(100)])
  assert len(set(names)) == 4 and all((names == name).sum() == 25 for name in set(names))


def test_a_missing_value_is_a_group_of_its_own_beside_the_bands():
  values = [str(v) for v in range(100)] + ["", "nan"]
  names = fairness.bands(values)
  assert sorted(set(names)) == ["(none)", "24.75 to 49.5", "49.5 to 74.25", "below 24.75",
                                "from 74.25"]
  assert list(names[100:]) == ["(none)"] * 2 and names[0] == "below 24.75"
  mostly = fairness.bands([str(v) for v in [0] * 300 + list(range(1, 51))])
  assert set(mostly) == {"below 1", "from 1"} and (mostly == "below 1").sum() == 300


def test_too_many_groups_are_left_out():
  rng = np.random.default_rng(7)
  truth = rng.integers(0, 2, 3000)
  town = np.array([f"town {i}" for i in rng.integers(0, 60, 3000)])
  trade = np.array([f"trade {i}" for i in rng.integers(0, 30, 3000)])
  sex = rng.choice(["f", "m"], 3000)
  numbers = measured(truth, truth, Rows(town=town, trade=trade, sex=sex))["numbers"]
  assert [found["by"] for found in numbers["by"]] == ["trade", "sex"]
  assert "town has 60 values, more than 50 groups" in numbers["missing"]
  assert "trade × sex has 60 values, more than 50 groups" in numbers["missing"]


def test_bands_are_those_of_validation_so_that_thresholds_are_found():
  rng = np.random.default_rng(8)
  truth = rng.integers(0, 2, 3000)
  said = np.where(rng.random(3000) < 0.8, truth, 1 - truth)
  age, other = (rng.normal(40, 10, 3000).round(1) for _ in range(2))
  by, = measured(said, truth, Rows(age=age), validation=Rows(age=other))["numbers"]["by"]
  quarters = [f"{edge:g}" for edge in np.quantile(other, [0.25, 0.5, 0.75])]
  assert {row["group"] for row in by["groups"]} == {
    f"below {quarters[0]}", f"{quarters[0]} to {quarters[1]}", f"{quarters[1]} to {quarters[2]}",
    f"from {quarters[2]}"} == set(by["thresholds"]["at"])
  group = np.where(age > 40, "old", "young")
  by, = measured(said, truth, Rows(g=group), validation=Rows(g=["old"] * 3000))["numbers"]["by"]
  assert by["thresholds"] is None and by["untold"] == "validation has no groups by g"
  three = np.where(age > 55, "oldest", group)
  by, = measured(said, truth, Rows(g=three), validation=Rows(g=group))["numbers"]["by"]
  assert by["untold"] == "validation has no rows of oldest"
  assert "no rows of oldest" in str(page._apart(by))


def test_only_what_was_compared_is_listed():
  truth = np.arange(200) % 2
  group = np.array([f"g{i}" for i in np.arange(200) % 10])
  found = measured(truth, truth, Rows(g=group, h=["x", "y"] * 100), crossed=False)
  assert "compared were groups by h, classes" in found["words"]
  assert "by g: fewer than two groups have 30 rows" in found["words"]
  alone = measured(truth * 0, truth * 0, Rows(g=group))
  assert alone["verdict"] == "not measured" and "fewer than two groups" in alone["words"]
  assert "g0" in str(page.section(alone["numbers"], {}))


def test_a_misspelt_attribute_is_named(tmp_path):
  from ft import config
  from ft.data import sources
  lines = [f"{i},{'fm'[i % 2]},{'ab'[i // 2 % 2]}" for i in range(400)]
  (tmp_path / "t.csv").write_text("x,sex,label\n" + "\n".join(lines) + "\n")
  data = config.complete({"data.modality": "table", "data.train": "t.csv",
                          "data.attributes": ("sex", "rase", "sexx"),
                          "model.source": "scratch:tabular"}).data
  rows = sources.read(data, "t.csv", name="test", base=tmp_path)
  truth = np.arange(400) // 2 % 2
  found = measured(truth, truth, rows)
  assert [of["by"] for of in found["numbers"]["by"]] == ["sex"]
  assert ("sexx of data.attributes is no column of the test rows (did you mean 'sex'?)"
          in found["words"])
  assert "rase of data.attributes is no column of the test rows;" in found["words"]


def test_a_metric_that_is_no_mean_over_rows():
  evidence = guards.Evidence(metric="auroc", outputs={"test": {guards.TUNED: {}}})
  found = bias.measure(guards.defaults("bias"), evidence)
  assert "auroc is no mean over rows" in found["words"]


def test_what_is_not_there_is_said():
  truth = np.arange(200) % 2
  one = measured(truth, truth, Rows(a=["x"] * 200))
  assert "a has one value only, x" in one["words"] and one["numbers"]["by"] == []
  none = measured(truth, truth, Rows(), attributes=("b",))
  assert "Not measured" in none["words"]
  wrong = measured(truth, truth, Rows(a=truth), attributes=("b",))
  assert "b is no column" in wrong["words"]
  few = measured(truth[:20], truth[:20])
  assert few["verdict"] == "not measured" and "20 rows" in few["words"]
  empty = bias.measure(guards.defaults("bias"), guards.Evidence())
  assert empty["verdict"] == "not measured"


def test_errors_of_numbers_are_compared_too():
  rng = np.random.default_rng(4)
  group = rng.choice(["x", "y"], 1000)
  error = rng.random(1000) * np.where(group == "y", 2.0, 1.0)
  evidence = guards.Evidence(
    metric="mae", mode="min", score=lambda out: out["error"], rows={"test": Rows(g=group)},
    outputs={"test": {guards.TUNED: {"error": error, "index": np.arange(1000)}}})
  found = bias.measure(guards.defaults("bias"), evidence)
  assert found["numbers"]["by"][0]["worst"]["group"] == "y"
  assert found["verdict"] == "warning" and "mae" in found["words"]
  assert found["numbers"]["classes"] == []


def test_the_page_shows_groups_and_escapes_them():
  said, truth, group = compas()
  group = np.where(group == "others", "<script>x</script>", group)
  found = measured(said, truth, Rows(race=group), features=np.random.default_rng(0).normal(
    size=(len(said), 2)))
  html = str(page.section(found["numbers"], {}))
  assert "44.8" in html and "African-American" in html and "<svg" in html
  assert "<script>" not in html and "&lt;script&gt;" in html
