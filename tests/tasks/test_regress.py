"""Regression: losses against torch, metrics against scikit-learn and scipy, a run to its end."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from commands import script
from ml_collections import config_dict
from scipy import stats
from sklearn import metrics

from ft import errors
from ft.tasks import regress

ROOT = __file__.rpartition("/tests/")[0]


class Rows(list):
  name = "train"

  def where(self, i):
    return f"a.csv: line {i + 2}"


def make(targets, loss="mse", metric="mae", columns=("text", "target")):
  rows = Rows({"text": f"row {i}", "target": target} for i, target in enumerate(targets))
  data = types.SimpleNamespace(splits={"train": rows}, columns=dict.fromkeys(columns, "rating"))
  preprocess = lambda row: {"input_ids": np.arange(3)}  # noqa: E731
  preprocess.finish = lambda batch: batch
  return regress.Task(config_dict.ConfigDict({"loss": loss, "metric": metric}), data, preprocess)


def batch(targets, weight=None):
  return {"input_ids": np.ones((len(targets), 3)), "target": np.float32(targets),
          "weight": np.float32(weight or np.ones(len(targets)))}


def constant(values):
  return lambda variables, inputs, rng: {"logits": jnp.asarray(values, jnp.float32)[:, None],
                                         "features": jnp.ones((len(values), 2))}


def test_the_target_is_standardised_by_train():
  task = make(["10", "20", "", "60"])
  example = task.example({"text": "x", "target": "20"})
  assert float(example["target"]) == pytest.approx(-10 / np.std([10, 20, 60]))
  assert example["target"].dtype == np.float32
  with pytest.raises(errors.RowError, match="no target"):
    task.example({"text": "x", "target": " "})
  assert task.describe({"prediction": np.float32(0)}, {}) == {"prediction": 30.0}
  assert task.model_args == {"head": "classify", "num_labels": 1, "labels": ["rating"]}
  again = regress.Task.from_spec(task.spec(), task.preprocess)
  assert again.describe({"prediction": np.float32(1)}, {})["prediction"] == pytest.approx(
    30 + np.std([10, 20, 60]))


@pytest.mark.parametrize("loss,function", [
  ("mse", "mse_loss"), ("mae", "l1_loss"), ("huber", "huber_loss")])
def test_losses_equal_torch(loss, function):
  torch = pytest.importorskip("torch")
  said, wanted = np.float32([0.2, -3, 1.5, 9]), np.float32([0.1, 2, 1.0, 0])
  task = make([0, 2], loss)
  total, weight, aux = task.loss(constant(said), {}, batch(wanted, [1, 1, 1, 0]), None)
  want = getattr(torch.nn.functional, function)(torch.tensor(said[:3]), torch.tensor(wanted[:3]))
  assert float(total / weight) == pytest.approx(want.item(), rel=1e-5)
  assert float(aux["mae"] / weight) == pytest.approx(np.abs(said - wanted)[:3].mean(), rel=1e-5)


def test_metrics_equal_scikit_learn_and_scipy():
  rng = np.random.default_rng(0)
  task = make([1000.0, 1004.0, 1010.0])
  out = {"target": rng.normal(size=50).round(1), "prediction": rng.normal(size=50).round(1)}
  real = {key: task._mean + task._deviation * value for key, value in out.items()}
  found = task.metrics(out)
  pair = real["target"], real["prediction"]
  assert found["mae"] == pytest.approx(metrics.mean_absolute_error(*pair))
  assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(*pair))
  assert found["r2"] == pytest.approx(metrics.r2_score(*pair))
  assert found["spearman"] == pytest.approx(stats.spearmanr(*pair).statistic)
  assert task.score(out).mean() == pytest.approx(found["mae"]) == task.value(out)
  assert make([0, 1], metric="r2").metric == ("r2", "max")
  assert make([0, 1], metric="r2").score is None
  flat = {**out, "prediction": np.zeros(50)}
  assert np.isnan(task.metrics(flat)["spearman"])


def test_baselines_are_the_mean_and_a_ridge_regression():
  rng = np.random.default_rng(0)
  parts = {name: rng.normal(size=(n, 5)) for name, n in (("train", 80), ("validation", 40),
                                                         ("test", 40))}
  features = {name: {"features": x.astype(np.float32), "target": x @ [1, -1, 2, 0, 0]}
              for name, x in parts.items()}
  task = make([0.0, 2.0])
  made = task.baselines(features)
  found = {name: task.metrics(of["test"]) for name, of in made.items()}
  assert found["mean"]["mae"] == pytest.approx(np.abs(features["test"]["target"]).mean())
  assert found["probe"]["r2"] > 0.99 > found["mean"]["r2"]


@pytest.mark.parametrize("targets,columns,message", [
  (["1", "two"], ("text", "target"), "a.csv: line 3: the target 'two' is no finite number"),
  (["1", "inf"], ("text", "target"), "line 3: the target 'inf' is no finite number"),
  ([3, 3, 3], ("text", "target"), "every target is 3"),
  (["", ""], ("text", "target"), "every target is missing"),
  ([1, 2], ("text", "label"), "name its column in data.columns.target")])
def test_messages(targets, columns, message):
  with pytest.raises(errors.UserError, match=message):
    make(targets, columns=columns)


def test_a_run_from_file_to_prediction(tiny, tmp_path):
  rng = np.random.default_rng(0)
  good = {"great": 2.0, "good": 1.0, "poor": -2.0, "dull": -1.0}
  lines = ["text,stars"]
  for _ in range(200):
    words = rng.choice([*good, "movie", "plot", "the"], 4)
    lines.append(f"{' '.join(words)},{3 + sum(good.get(w, 0) for w in words):.1f}")
  (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
  (tmp_path / "regress.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(tiny.model)!r}),
    data=dict(train={str(tmp_path / 'a.csv')!r}, columns=dict(target="stars"), max_length=16),
    task=dict(name="regress"), optim=dict(rate=3e-3), guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=16, steps=60, eval_every=30, log_every=5, train_sample=16),
  )
""")
  out = tmp_path / "out"
  script("train", f"--config={tmp_path / 'regress.py'}", f"--workdir={out}")
  card = json.loads((out / "card.json").read_text())
  rows = card["results"]["test"]
  assert set(rows) == {"mean", "probe", "fine-tuned"}
  assert rows["fine-tuned"]["metrics"]["mae"] < rows["mean"]["metrics"]["mae"]
  assert card["differences"]["test"]["fine-tuned - mean"]["verdict"] == "gained"
  assert card["task"]["mode"] == "min"
  (tmp_path / "rows.txt").write_text("great great movie\npoor poor plot\n")
  said = script("predict", f"--run={out}", f"--input={tmp_path / 'rows.txt'}").stdout
  high, low = (json.loads(line)["prediction"] for line in said.splitlines())
  assert high > 3 > low
  said = script("evaluate", f"--run={out}", f"--data={tmp_path / 'a.csv'}").stdout
  found = json.loads(said)
  assert found["n"] == 200 and found["metrics"]["mae"] < rows["mean"]["metrics"]["mae"]
