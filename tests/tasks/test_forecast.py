"""Forecasting: scores against gluonts, losses against torch, the future out of reach, a run."""

import datetime
import functools
import importlib.util
import json
import pathlib
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import script
from ml_collections import config_dict

from ft import config as config_lib
from ft import errors, forecasts, models
from ft.data import series
from ft.tasks import forecast
from ft.weights import names, resolve

ROOT = __file__.rpartition("/tests/")[0]
CONTEXT, HORIZON, LEVELS = 16, 4, (0.1, 0.5, 0.9)
FAMILIES = {
  "ttm": dict(context_length=CONTEXT, patch_length=4, patch_stride=4, prediction_length=HORIZON,
              d_model=8, num_layers=1, decoder_num_layers=1, decoder_d_model=8, dropout=0.0,
              head_dropout=0.0),
  "patchtst": dict(context_length=CONTEXT, patch_length=4, patch_stride=4, d_model=8, ffn_dim=16,
                   prediction_length=HORIZON, num_hidden_layers=1, num_attention_heads=2),
  "chronos_bolt": dict(context_length=CONTEXT, prediction_length=HORIZON, input_patch_size=4,
                       input_patch_stride=4, quantiles=LEVELS, d_model=8, d_kv=4, d_ff=16,
                       num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=2,
                       model_type="t5"),
}


@functools.cache
def export(folder, family, seed=3):
  """Writes a random model and returns it as loaded from there."""
  module = models.family_module(family)
  config = module.Config(head="forecast", **{k: v for k, v in FAMILIES[family].items()
                                             if k != "head"})
  model = module.Model(config)
  variables = model.init(jax.random.PRNGKey(seed), **module.probe_inputs(config))
  models.export(models.Pretrained(family, model, variables, names.Report(), {}, config, "series",
                                  ()), folder)
  return models.load(str(folder), head="forecast")


def table(path, steps=160, channels=3, seed=0, change=lambda values: values):
  """Writes a wide CSV: waves of 8 hours with noise."""
  rng = np.random.default_rng(seed)
  t = np.arange(steps)[:, None]
  values = 20 + 5 * np.sin(2 * np.pi * t / 8 + np.arange(channels)) + rng.normal(
    size=(steps, channels))
  values = change(values)
  first = datetime.datetime(2020, 1, 1)
  lines = ["date," + ",".join("abcdefg"[:channels])]
  lines += [f"{first + i * datetime.timedelta(hours=1)}," + ",".join(f"{v:.5f}" for v in row)
            for i, row in enumerate(values)]
  path.write_text("\n".join(lines) + "\n")
  return path


@functools.cache
def _folder():
  return tempfile.TemporaryDirectory()


def zoo():
  """Returns the folder of the random models, which are made once."""
  return pathlib.Path(_folder().name)


def make(family, path, task=(), **data):
  """Returns (task, data, model) of a table."""
  folder = zoo()
  pretrained = export(folder / family, family)
  section = config_lib.complete({
    "data.modality": "series", "task.name": "forecast", "data.train": str(path),
    **{f"data.{key}": value for key, value in data.items()}}).data
  preprocess = series.Preprocess(section, models.inspect(str(folder / family)))
  rows = preprocess.load(section)
  keys = {"loss": "auto", "metric": "mse", "steps": (), "neighbours": 0.0, "lookback": 8}
  return (forecast.Task(config_dict.ConfigDict({**keys, **dict(task)}), rows, preprocess), rows,
          pretrained)


def batch(task, rows, count=5):
  examples = [task.example(rows[i]) for i in range(count)]
  stacked = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
  return {**stacked, "weight": np.ones(count, np.float32)}


def call(pretrained):
  run = jax.jit(lambda variables, inputs: pretrained.module.apply(variables, **inputs))
  return lambda variables, inputs, rng=None: run(variables, inputs)


# ---- Scores --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gluonts():
  """gluonts's own definitions: two files of its wheel that need numpy alone."""
  try:
    wheel = resolve.resolve("pypi:gluonts==0.17.0")
  except errors.UserError as e:
    pytest.skip(f"needs gluonts from a package index: {e}")
  found = {}
  for name in ("stats", "ts_stats"):
    spec = importlib.util.spec_from_file_location(name, wheel / "gluonts" / "ev" / f"{name}.py")
    found[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found[name])
  return types.SimpleNamespace(**found)


def outputs(n=6, channels=2, seed=0):
  rng = np.random.default_rng(seed)
  shape = (n, HORIZON, channels)
  spread = np.sort(rng.normal(size=(n, len(LEVELS), HORIZON, channels)), 1)
  return {"target": rng.normal(size=shape), "forecast": spread[:, 1], "quantiles": spread,
          "observed": np.ones(shape), "mean": rng.normal(3, 1, (n, channels)),
          "std": rng.uniform(0.5, 2, (n, channels)),
          "seasonal_error": rng.uniform(0.5, 2, (n, channels))}


def test_scores_are_those_of_gluonts(gluonts):
  out = outputs()
  found = forecasts.summary(out, LEVELS, (2,))
  mean, std = out["mean"][:, None], out["std"][:, None]
  data = {"label": out["target"] * std + mean,
          **{str(q): out["quantiles"][:, i] * std + mean for i, q in enumerate(LEVELS)},
          "seasonal_error": out["seasonal_error"][:, None] * std}
  stats = gluonts.stats
  assert found["mase"] == pytest.approx(stats.absolute_scaled_error(data, "0.5").mean())
  assert found["mae_original"] == pytest.approx(stats.absolute_error(data, "0.5").mean())
  assert found["rmse_original"] == pytest.approx(stats.squared_error(data, "0.5").mean()**0.5)
  assert found["mape"] == pytest.approx(100 * stats.absolute_percentage_error(data, "0.5").mean())
  losses = [stats.quantile_loss(data, q) for q in LEVELS]
  weighted = [loss.sum() / stats.absolute_label(data).sum() for loss in losses]
  assert found["wql"] == pytest.approx(np.mean(weighted))
  scaled = {"label": out["target"],
            **{str(q): out["quantiles"][:, i] for i, q in enumerate(LEVELS)}}
  crps = np.mean([stats.quantile_loss(scaled, q).mean() for q in LEVELS])
  assert found["crps"] == pytest.approx(crps)
  inside = stats.coverage(scaled, 0.9).mean() - stats.coverage(scaled, 0.1).mean()
  assert found["coverage_80"] == pytest.approx(inside)
  assert found["mae_at_2"] == pytest.approx(stats.absolute_error(data, "0.5")[:, 1].mean())
  # Of points: gluonts's normalised deviation.
  points = forecasts.summary({k: v for k, v in out.items() if k != "quantiles"}, (), ())
  total = stats.absolute_error(data, "0.5").sum() / stats.absolute_label(data).sum()
  assert points["wql"] == pytest.approx(total) and "crps" not in points


def test_the_seasonal_error_is_that_of_gluonts(gluonts, tmp_path):
  task, rows, _ = make("ttm", table(tmp_path / "a.csv"), seasonality=8)
  for i in (0, 20):
    row = rows.splits["test"][i]
    window = row["window"]
    past = window.series.actual[:window.origin]
    want = gluonts.ts_stats.seasonal_error(past, 8)[0]
    np.testing.assert_allclose(task.example(row)["seasonal_error"], want, rtol=1e-4)


def test_scores_by_hand():
  out = {"target": np.array([[[1.0], [3.0]], [[0.0], [2.0]]]),
         "forecast": np.array([[[2.0], [1.0]], [[5.0], [2.5]]]),
         "observed": np.array([[[1.0], [1.0]], [[0.0], [1.0]]]),
         "mean": np.array([[-1.0], [0.0]]), "std": np.array([[1.0], [2.0]]),
         "seasonal_error": np.array([[0.5], [np.nan]])}
  found = forecasts.summary(out, (), (1,))
  assert found["mse"] == (2.5 + 0.25) / 2  # each window counts once
  assert found["mae"] == (1.5 + 0.5) / 2
  assert found["mase"] == 3.0  # the second has no history
  assert found["mae_original"] == pytest.approx((1 + 2 + 1) / 3)
  # Targets in their own units: 0 (left out), 2, missing, 4.
  assert found["mape"] == pytest.approx(100 * (2 / 2 + 1 / 4) / 2)
  assert found["wql"] == pytest.approx((1 + 2 + 1) / (0 + 2 + 4))
  assert found["mae_at_1"] == 1.0 and np.isnan(found["mape_at_1"])
  np.testing.assert_allclose(forecasts.per_window("mse", out), [2.5, 0.25])


# ---- Losses and predictions ----------------------------------------------------------------------


@pytest.mark.parametrize("loss,function", [
  ("mse", "mse_loss"), ("mae", "l1_loss"), ("huber", "huber_loss")])
def test_point_losses_equal_torch(loss, function, tmp_path):
  torch = pytest.importorskip("torch")
  task, rows, _ = make("ttm", table(tmp_path / "a.csv"), {"loss": loss})
  rows = batch(task, rows.splits["train"])
  rows["weight"][4] = 0
  said = np.random.default_rng(0).normal(size=rows["future_values"].shape).astype(np.float32)
  total, weight, aux = task.loss(
    lambda variables, inputs, rng: {"prediction_outputs": jnp.asarray(said)}, {}, rows, None)
  pair = torch.tensor(said[:4]), torch.tensor(rows["future_values"][:4])
  want = getattr(torch.nn.functional, function)(*pair).item()
  assert float(total / weight) == pytest.approx(want, rel=1e-5) and float(weight) == 4
  assert float(aux["mae"] / weight) == pytest.approx(
    torch.nn.functional.l1_loss(*pair).item(), rel=1e-5)


def test_missing_targets_carry_no_loss(tmp_path):
  task, rows, _ = make("ttm", table(tmp_path / "a.csv"))
  rows = batch(task, rows.splits["train"], 2)
  rows["future_observed"] = rows["future_observed"].copy()
  rows["future_observed"][0, 1:] = 0
  said = jnp.zeros(rows["future_values"].shape)
  apply = lambda variables, inputs, rng: {"prediction_outputs": said}  # noqa: E731
  total, _, _ = task.loss(apply, {}, rows, None)
  first, second = np.square(rows["future_values"])
  assert float(total) == pytest.approx(first[0].mean() + second.mean(), rel=1e-5)
  spoilt = {**rows, "future_values": np.where(rows["future_observed"] > 0,
                                             rows["future_values"], 1e6).astype(np.float32)}
  assert float(task.loss(apply, {}, spoilt, None)[0]) == float(total)


def test_the_loss_of_quantiles_is_the_crps(tmp_path):
  task, rows, pretrained = make("chronos_bolt", table(tmp_path / "a.csv"),
                                {"metric": "crps"})
  assert task.levels == LEVELS
  rows = batch(task, rows.splits["train"])
  apply, variables = call(pretrained), pretrained.variables
  total, weight, _ = task.loss(apply, variables, rows, None)
  made = task._forecast(apply, variables, rows, None)
  out = {"forecast": made[:, 1], "quantiles": made, "target": rows["future_values"],
         "observed": rows["future_observed"]}
  assert float(total / weight) == pytest.approx(forecasts.per_window("crps", out, LEVELS).mean(),
                                                rel=1e-5)
  # Each channel is a series of its own.
  alone = pretrained.module.apply(variables, context=rows["past_values"][2, :, 1][None])
  np.testing.assert_allclose(made[2, :, :, 1], alone["quantile_preds"][0], atol=1e-5)
  found = task.predict(apply, variables, rows)
  assert np.all(np.diff(found["quantiles"], axis=1) >= 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_future_values_cannot_reach_a_forecast(family, tmp_path):
  """Forecasts are bitwise the same whatever follows, in the batch and in the file."""
  adjacency = tmp_path / "near.csv"
  adjacency.write_text("from,to\na,b\nb,c\nc,a\n")
  made = {}
  for name, change in (("real", lambda v: v), ("other", lambda v: np.where(
      np.arange(len(v))[:, None] >= 140, 1e4 * np.cos(np.arange(len(v)))[:, None], v))):
    path = table(tmp_path / f"{name}.csv", change=change)
    task, rows, pretrained = make(family, path, {"neighbours": 0.3},
                                  adjacency=str(adjacency))
    test = rows.splits["test"]
    near = test.select(np.flatnonzero((test.places[:, 1] > 130) & (test.places[:, 1] <= 140)))
    predict = jax.jit(lambda v, b, t=task, p=pretrained: t.predict(call(p), v, b))
    found = batch(task, near, len(near))
    made[name] = predict(pretrained.variables, found)
    if name == "real":
      found["future_values"] = np.full_like(found["future_values"], np.nan)
      spoilt = predict(pretrained.variables, found)
      del found["future_values"], found["future_observed"]
      alone = predict(pretrained.variables, found)
  keys = ["forecast"] + ["quantiles"] * (family == "chronos_bolt")
  for key in keys:
    assert np.isfinite(made["real"][key]).all()
    assert np.array_equal(made["real"][key], made["other"][key])
    assert np.array_equal(made["real"][key], spoilt[key])
    assert np.array_equal(made["real"][key], alone[key])
  assert not np.array_equal(made["real"]["target"], made["other"]["target"])


def test_a_shorter_context_and_horizon(tmp_path):
  task, rows, pretrained = make("patchtst", table(tmp_path / "a.csv"), context=10,
                                horizon=3)
  rows = batch(task, rows.splits["train"])
  assert rows["past_values"].shape[1] == 10 and rows["future_values"].shape[1] == 3
  made = task.predict(call(pretrained), pretrained.variables, rows)["forecast"]
  past = np.pad(rows["past_values"], ((0, 0), (6, 0), (0, 0)))
  want = pretrained.module.apply(pretrained.variables, past_values=past,
                                 past_observed_mask=np.arange(16)[None, :, None] >= 6
                                 + np.zeros(past.shape))["prediction_outputs"][:, :3]
  np.testing.assert_allclose(made, want, atol=1e-6)


def test_neighbours_are_mixed_in_and_the_level_stays(tmp_path):
  (tmp_path / "near.csv").write_text("from,to,weight\na,b,1\na,c,3\nb,a,1\n")
  task, _, _ = make("ttm", table(tmp_path / "a.csv"), {"neighbours": 0.5},
                    adjacency=str(tmp_path / "near.csv"))
  past = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  mixed = np.asarray(task._mixed(jnp.asarray(past)))
  centred = past - past[:, -1:]
  want = past[..., 0] + 0.5 * (0.25 * centred[..., 1] + 0.75 * centred[..., 2] - centred[..., 0])
  np.testing.assert_allclose(mixed[..., 0], want, atol=1e-6)
  assert np.array_equal(mixed[..., 2], past[..., 2])  # it has no neighbours
  np.testing.assert_allclose(mixed[:, -1], past[:, -1], atol=1e-6)


def test_divergence_is_zero_at_the_base(tmp_path):
  task, rows, pretrained = make("ttm", table(tmp_path / "a.csv"))
  rows = batch(task, rows.splits["train"])
  moved = jax.tree.map(lambda x: x + 0.1, pretrained.variables)
  apply = call(pretrained)
  assert float(task.divergence(apply, moved, moved, rows)[0]) == 0
  total, weight = task.divergence(apply, moved, pretrained.variables, rows)
  a, b = (task.predict(apply, v, rows)["forecast"] for v in (moved, pretrained.variables))
  assert float(total / weight) == pytest.approx(float(0.5 * jnp.mean(jnp.square(a - b))), rel=1e-4)


# ---- Baselines, calibration, answers -------------------------------------------------------------


def test_simple_forecasts():
  past = np.arange(10.0)[None, :, None]
  assert forecasts.last_value(past, 3)[0, :, 0].tolist() == [9, 9, 9]
  assert forecasts.seasonal(past, 5, 3)[0, :, 0].tolist() == [7, 8, 9, 7, 8]
  assert forecasts.seasonal(past, 2, 11)[0, :, 0].tolist() == [9, 9]


@pytest.mark.parametrize("near", [False, True])
def test_the_ridge_is_that_of_scikit_learn(near):
  from sklearn import linear_model
  rng = np.random.default_rng(0)
  values = np.cumsum(rng.normal(size=(80, 2)), 0)
  observed = np.ones_like(values)
  observed[30, 1] = 0  # windows of which this is a target are left out, of this channel
  adjacency = np.array([[0, 1.0], [1, 0]]) if near else None
  x, y = [], []
  for origin in range(6, 80 - 3 + 1):
    for c in range(2):
      if not (c == 1 and origin <= 30 < origin + 3):
        last = values[origin - 1]
        own = [values[origin - 6:origin, c] - last[c]]
        own += [values[origin - 6:origin, 1 - c] - last[1 - c]] if near else []
        x.append(np.concatenate(own))
        y.append(values[origin:origin + 3, c] - last[c])
  x, y = np.array(x), np.array(y)
  made = list(forecasts.ridges([(values, observed)], 6, 3, adjacency))
  for strength, ridge in zip(forecasts.STRENGTHS, made, strict=True):
    alpha = strength * np.trace(x.T @ x) / x.shape[1]
    want = linear_model.Ridge(alpha=alpha, fit_intercept=False).fit(x, y)
    np.testing.assert_allclose(ridge.weights, want.coef_.T, atol=1e-6)
  past = values[None, -9:]
  found = made[0](past)
  first = np.concatenate([past[0, -6:, 0] - past[0, -1, 0], past[0, -6:, 1] - past[0, -1, 1]])
  want = first[:6 + 6 * near] @ made[0].weights + past[0, -1, 0]
  np.testing.assert_allclose(found[0, :, 0], want, rtol=1e-5)


def test_baselines_of_etth1_are_the_published_ones(shared):
  """NLinear in closed form, look-back 336: MSE .3701 and MAE .3914 on the test windows."""
  table = np.genfromtxt(shared / "data/forecast-ett/ETTh1.csv", delimiter=",", skip_header=1,
                        usecols=range(1, 8))
  values = ((table - table[:8640].mean(0)) / table[:8640].std(0)).astype(np.float32)
  ridge = next(forecasts.ridges([(values[:8640], np.ones((8640, 7)))], 336, 96))
  origins = np.arange(11520, 14400 - 96 + 1)[:, None]
  away = ridge(values[origins + np.arange(-336, 0)]) - values[origins + np.arange(96)]
  assert len(origins) == 2785
  assert np.square(away).mean() == pytest.approx(0.3701, abs=3e-4)
  assert np.abs(away).mean() == pytest.approx(0.3914, abs=3e-4)


def test_baselines_are_judged_on_the_same_windows(tmp_path):
  task, rows, pretrained = make("ttm", table(tmp_path / "a.csv"), train_share=0.1)
  known = {}
  for name in ("validation", "test"):
    part = rows.splits[name]
    found = task.predict(call(pretrained), pretrained.variables, batch(task, part, len(part)))
    known[name] = {**jax.device_get(found), "index": np.arange(len(part))}
  made = task.baselines(known)
  assert set(made) == {"zero-shot", "ridge", "seasonal-naive", "last-value"}
  on_validation = [task.value(of["validation"]) for of in made.values()]
  assert on_validation == sorted(on_validation)
  part, values = rows.splits["test"], rows.splits["test"].series[0].actual
  origin = int(part.places[3, 1])
  assert np.array_equal(made["last-value"]["test"]["forecast"][3],
                        np.repeat(values[origin - 1:origin], HORIZON, 0))
  for of in made.values():
    assert np.array_equal(of["test"]["target"], known["test"]["target"])
  # The ridge is fitted to the training part alone, and to all of it.
  start = int(rows.splits["validation"].places[0, 1])
  trained = [(values[:start], np.ones((start, 3), np.float32))]
  wanted = [r(values[None, origin - CONTEXT:origin]) for r in forecasts.ridges(trained, 8, HORIZON)]
  assert any(np.allclose(made["ridge"]["test"]["forecast"][3], w[0], atol=1e-5) for w in wanted)


def test_intervals_come_from_validation_and_answers_have_units(tmp_path):
  task, rows, _ = make("ttm", table(tmp_path / "a.csv"))
  rng = np.random.default_rng(0)
  away = rng.normal(size=(400, HORIZON, 3)) * np.arange(1, HORIZON + 1)[:, None]
  out = {"forecast": np.zeros_like(away), "target": away, "observed": np.ones_like(away)}
  fitted = task.calibrate(out)
  np.testing.assert_allclose(fitted["upper"], 1.2816 * np.arange(1, HORIZON + 1), rtol=0.15)
  shown = task.evidence({"validation": out, "test": out}, fitted)["intervals"]
  assert shown["coverage"] == {"test": pytest.approx(0.8, abs=0.01)} and shown["level"] == 0.8
  scale = rows.splits["test"].series[0].scale
  one = {"forecast": np.ones((HORIZON, 3)), "mean": scale.mean, "std": scale.std}
  again = forecast.Task.from_spec(json.loads(json.dumps(task.spec())), task.preprocess)
  said = again.describe(one, fitted)
  assert said["forecast"]["b"] == pytest.approx([scale.mean[1] + scale.std[1]] * HORIZON)
  assert said["upper"]["b"][2] == pytest.approx(
    scale.mean[1] + scale.std[1] * (1 + fitted["upper"][2]))


def test_intervals_resample_blocks_of_time(tmp_path):
  task, rows, _ = make("ttm", table(tmp_path / "a.csv"), seasonality=8)
  part = rows.splits["test"]
  blocks = task.blocks(batch(task, part, len(part)))
  assert np.array_equal(blocks, part.places[:, 1] // 8)


@pytest.mark.parametrize("task,said", [
  ({"loss": "quantile"}, "need a model of quantiles"), ({"metric": "crps"}, "model of quantiles"),
  ({"neighbours": 0.5}, "data.adjacency does not name any"),
  ({"steps": (5,)}, "whole numbers from 1 to the 4 steps"), ({"steps": (0,)}, "whole numbers"),
])
def test_keys_that_do_not_fit(tmp_path, task, said):
  with pytest.raises(errors.UserError, match=said):
    make("ttm", table(tmp_path / "a.csv"), task)


# ---- A run ---------------------------------------------------------------------------------------


def test_a_run_from_file_to_forecast(tmp_path):
  export(zoo() / "ttm", "ttm")
  path = table(tmp_path / "a.csv", steps=240)
  (tmp_path / "tiny.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(zoo() / 'ttm')!r}),
    data=dict(modality="series", train={str(path)!r}, seasonality=8, stride=2),
    task=dict(name="forecast", steps=(1, 4)), optim=dict(rate=1e-2),
    guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=16, steps=12, eval_every=6, log_every=5, train_sample=16),
  )
""")
  run = tmp_path / "run"
  done = script("train", f"--config={tmp_path / 'tiny.py'}", f"--workdir={run}")
  card = json.loads((run / "card.json").read_text())
  test = card["results"]["test"]
  assert set(test) == {"zero-shot", "ridge", "seasonal-naive", "last-value", "fine-tuned"}
  assert test["fine-tuned"]["metrics"]["mse"] < test["zero-shot"]["metrics"]["mse"]
  assert 0 <= card["intervals"]["coverage"]["test"] <= 1
  assert card["task"]["resampled"].endswith("within 8 steps")
  # The verdict is about the baseline that is hardest to beat.
  assert "over the ridge" in card["guards"]["overfit"]["words"] and "over the ridge" in done.stderr
  assert "Intervals of scores resample blocks" in (run / "card.html").read_text()
  answer = json.loads(script("predict", f"--run={run}", f"--input={path}").stdout)
  assert answer["times"][0] == "2020-01-11 00:00:00" and len(answer["forecast"]["a"]) == HORIZON
  assert answer["lower"]["a"][0] < answer["forecast"]["a"][0] < answer["upper"]["a"][0]
  judged = json.loads(script("evaluate", f"--run={run}", f"--data={path}").stdout)
  assert judged["n"] == len(range(CONTEXT, 240 - HORIZON + 1, 2))
  assert np.isfinite(judged["interval"]["mse"]).all()
