"""Series: times, gaps and borders; what a window holds, and that the future is not in it."""

import datetime
import json
import types

import numpy as np
import pytest

from ft import config as config_lib
from ft import errors, models
from ft.data import panel, series, timeline, windows

CONTEXT, HORIZON = 12, 4
HF = {"model_type": "tinytimemixer", "architectures": ["TinyTimeMixerForPrediction"],
      "context_length": CONTEXT, "patch_length": 4, "patch_stride": 4,
      "prediction_length": HORIZON, "d_model": 8}


def info(**changes):
  return types.SimpleNamespace(source="tiny", family="ttm", hf_config={**HF, **changes})


def data_section(path, **keys):
  return config_lib.complete({
    "data.modality": "series", "task.name": "forecast", "data.train": str(path),
    **{f"data.{key}": value for key, value in keys.items()}}).data


def write(path, values, start="2020-01-01", minutes=60, names="abcdefg", skip=()):
  first = datetime.datetime.fromisoformat(start)
  values = np.asarray(values)
  values = values[:, None] if values.ndim == 1 else values
  lines = ["time," + ",".join(names[:values.shape[1]])]
  for i, row in enumerate(values):
    if i not in skip:
      time = first + i * datetime.timedelta(minutes=minutes)
      lines.append(f"{time}," + ",".join("" if v is None or v != v else f"{v:.6f}" for v in row))
  path.write_text("\n".join(lines) + "\n")
  return path


def walk(steps, channels=1, seed=0):
  return np.cumsum(np.random.default_rng(seed).normal(size=(steps, channels)), 0) + 50


def load(path, hf=None, **keys):
  section = data_section(path, **keys)
  preprocess = series.Preprocess(section, info(**(hf or {})))
  return preprocess, preprocess.load(section)


def message(path, hf=None, **keys):
  with pytest.raises(errors.UserError) as raised:
    load(path, hf, **keys)
  return str(raised.value)


# ---- Splits --------------------------------------------------------------------------------------


def test_etth1_has_the_published_windows(shared):
  """Zhou et al. 2021 give 8,545 / 2,881 / 2,881 rows: windows and the steps that are forecast.

  That is with a context of 96, where a window lies in its part: 8,449 + 96, and 2,785 + 96, since
  validation and test reach back. With 1,024 the training part alone has fewer.
  """
  for context, count in ((96, 8449), (512, 8033), (1024, 7521)):
    section = data_section(shared / "data/forecast-ett/ETTh1.csv", borders=(8640, 11520, 14400))
    found = models.inspect(str(shared / "weights/ttm-1024-96"))
    found = types.SimpleNamespace(source="", family="ttm",
                                  hf_config={**found.hf_config, "context_length": context,
                                             "num_patches": None, "patch_length": 32,
                                             "patch_stride": 32})
    preprocess = series.Preprocess(section, found)
    rows = preprocess.load(section).splits
    assert {name: len(part) for name, part in rows.items()} == {
      "train": count, "validation": 2785, "test": 2785}
    if context == 96:
      assert [len(part) + 96 for part in rows.values()] == [8545, 2881, 2881]
  table = np.genfromtxt(shared / "data/forecast-ett/ETTh1.csv", delimiter=",", skip_header=1,
                        usecols=range(1, 8))
  first = preprocess.future(rows["test"][0])["future_values"]
  mean, std = table[:8640].mean(0), table[:8640].std(0)
  np.testing.assert_allclose(first, (table[11520:11616] - mean) / std, atol=1e-5)
  assert preprocess.clock.name == "1h" and preprocess.season == 24
  assert rows["test"].where(0).endswith("forecast from 2017-10-24 00:00:00")


def test_parts_follow_each_other_and_reach_back_for_context_only(tmp_path):
  path = write(tmp_path / "a.csv", walk(200, 2))
  preprocess, data = load(path, validation_fraction=0.2, test_fraction=0.3)
  ends = {"train": (0, 100), "validation": (100, 140), "test": (140, 200)}
  for name, (start, stop) in ends.items():
    origins = data.splits[name].places[:, 1]
    assert origins[0] == max(start, CONTEXT) and origins[-1] == stop - HORIZON
    assert np.array_equal(np.diff(origins), np.ones(len(origins) - 1))
  scale = preprocess.scales[""]
  values = walk(200, 2)[:100]
  np.testing.assert_allclose(scale.mean, values.mean(0), atol=1e-5)
  np.testing.assert_allclose(scale.std, values.std(0), atol=1e-5)


def test_borders_by_time_by_step_and_by_file(tmp_path):
  values = walk(200)
  whole = write(tmp_path / "a.csv", values)
  _, by_step = load(whole, borders=(120, 160, 190))
  _, by_time = load(whole, borders=("2020-01-06", "2020-01-07 16:00", "2020-01-08 22:00"))
  parts = [write(tmp_path / f"{name}.csv", values[a:b], str(datetime.datetime(2020, 1, 1)
                                                          + datetime.timedelta(hours=a)))
           for name, a, b in (("train", 0, 120), ("validation", 120, 160), ("test", 160, 190))]
  _, by_file = load(parts[0], validation=str(parts[1]), test=str(parts[2]))
  for other in (by_time, by_file):
    for name, rows in by_step.splits.items():
      assert np.array_equal(rows.places, other.splits[name].places), name
  said = message(parts[1], validation=str(parts[0]), test=str(parts[2]))
  assert "2020-01-01 00:00:00 comes after 2020-01-07 15:00:00" in said
  _, carved = load(parts[0], test=str(parts[1]), validation_fraction=0.25)
  assert carved.splits["validation"].places[0, 1] == 90
  assert carved.splits["test"].places[0, 1] == 120
  assert "validation has a source of its own" in message(whole, validation=str(whole))
  assert "have to follow each other" in message(whole, borders=(160, 120))
  assert "have to follow each other" in message(whole, borders=(120, 160, 201))


def test_share_stride_and_limit(tmp_path):
  path = write(tmp_path / "a.csv", walk(300))
  _, every = load(path)
  _, some = load(path, train_share=0.1, stride=3)
  train, part = every.splits["train"].places, some.splits["train"].places
  assert np.array_equal(part, train[-round(0.1 * len(train)):])
  assert np.array_equal(some.splits["test"].places, every.splits["test"].places[::3])
  _, few = load(path, limit=5)
  assert {len(rows) for rows in few.splits.values()} == {5}


def test_a_long_table_and_a_wide_one_are_the_same(tmp_path):
  values = walk(120, 2)
  wide, wide_rows = load(write(tmp_path / "w.csv", values))
  lines = ["id,time,value"]
  for i in range(120):  # rows of both series, one after the other
    time = datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=i)
    lines += [f"{name},{time},{values[i, c]:.6f}" for c, name in enumerate("ab")]
  (tmp_path / "l.csv").write_text("\n".join(lines))
  long, long_rows = load(tmp_path / "l.csv", series_id="id")
  assert long.channels == ("value",) and set(long.scales) == {"a", "b"}
  one = wide(wide_rows.splits["test"][0])["past_values"]
  both = [long(long_rows.splits["test"][i])["past_values"][:, 0]
          for i in (0, len(long_rows.splits["test"]) // 2)]
  assert np.array_equal(one, np.stack(both, 1))
  assert "stands there twice" in message(tmp_path / "l.csv", targets=("value",))
  blocks = {int(long(row)["block"]) for row in long_rows.splits["test"]}
  assert len(blocks) == 2 * len({int(wide(row)["block"]) for row in wide_rows.splits["test"]})


def test_parquet_is_read_as_csv(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet
  values = walk(120)
  times = [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=i) for i in range(120)]
  parquet.write_table(pyarrow.table({"time": times, "a": values[:, 0].round(6)}),
                      tmp_path / "a.parquet")
  one, rows = load(tmp_path / "a.parquet")
  other, again = load(write(tmp_path / "a.csv", values))
  assert np.array_equal(one(rows.splits["test"][3])["past_values"],
                        other(again.splits["test"][3])["past_values"])


# ---- The future ----------------------------------------------------------------------------------


def test_what_follows_cannot_reach_a_window(tmp_path):
  """All values from a step on are replaced: windows that end before it are bitwise the same."""
  values = walk(300, 2)
  covariate = np.sin(np.arange(300) / 5)[:, None]
  values[40:43, 0] = np.nan
  cut = 250
  changed = values.copy()
  changed[cut:] = 1e6 * np.random.default_rng(1).normal(size=(50, 2))
  made = {}
  for name, table in (("real", values), ("changed", changed)):
    path = write(tmp_path / f"{name}.csv", np.hstack([table, covariate]), names=["a", "b", "x"])
    made[name] = load(path, covariates=("x",), gaps="mask")
  (one, rows), (other, again) = made["real"], made["changed"]
  assert one.spec() == other.spec()  # the scaler and the effect of covariates are of train alone
  compared = 0
  for name in ("train", "validation", "test"):
    for i in range(len(rows.splits[name])):
      if rows.splits[name].places[i, 1] <= cut:
        a, b = one(rows.splits[name][i]), other(again.splits[name][i])
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        compared += 1
  assert compared > 150
  last = rows.splits["test"][len(rows.splits["test"]) - 1]
  assert not np.array_equal(one(last)["past_values"],
                            other(again.splits["test"][len(again.splits["test"]) - 1])
                            ["past_values"])


def test_gaps_are_filled_from_the_past_and_masked(tmp_path):
  values = walk(120)
  values[50:53] = np.nan
  path = write(tmp_path / "a.csv", values, skip=(70, 71))
  preprocess, rows = load(path, gaps="mask")
  one = rows.splits["train"].series[0]
  assert np.array_equal(one.values[50:53, 0], np.repeat(one.values[49], 3))
  assert np.array_equal(np.flatnonzero(one.observed[:, 0] == 0), [50, 51, 52, 70, 71])
  assert np.array_equal(one.values[70:72, 0], np.repeat(one.values[69], 2))
  assert rows.report["series"]["missing values"] == 5


def test_what_covariates_explain_is_taken_out(tmp_path):
  x = np.random.default_rng(0).normal(size=200)
  y = 3 * x + 0.01 * np.sin(np.arange(200)) + 7
  path = write(tmp_path / "a.csv", np.stack([y, x], 1), names=["y", "x"])
  preprocess, rows = load(path, covariates=("x",))
  window = rows.splits["test"][0]
  example, future = preprocess(window), preprocess.future(window)
  assert preprocess.channels == ("y",)
  origin = int(rows.splits["test"].places[0, 1])
  real = (future["future_values"] + example["explained"]) * example["std"] + example["mean"]
  np.testing.assert_allclose(real[:, 0], y[origin:origin + HORIZON], atol=1e-4)
  assert np.abs(future["future_values"]).max() < 0.05  # next to nothing is left to forecast


def test_seasonal_error_is_that_of_the_history(tmp_path):
  values = walk(120)
  preprocess, rows = load(write(tmp_path / "a.csv", values), seasonality=6)
  row = rows.splits["test"][2]
  example, past = preprocess(row), values[:row["window"].origin, 0]
  want = np.mean(np.abs(past[6:] - past[:-6])) / preprocess.scales[""].std[0]
  assert example["seasonal_error"][0] == pytest.approx(want, rel=1e-4)
  short = windows.build(panel.Raw("", 0, values[:5], np.zeros((5, 0)), ""),
                        preprocess.scales[""], season=6)
  want = np.mean(np.abs(np.diff(values[:5, 0]))) / preprocess.scales[""].std[0]
  assert short.seasonal_error(5)[0] == pytest.approx(want, rel=1e-4)


# ---- Times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values,step,name,season", [
  (["2020-01-01 00:00", "2020-01-01 00:15"], 15, "15min", 96),
  (["2020-01-01T00:00:00Z", "2020-01-01T02:00:00+01:00"], 60, "1h", 24),
  (["20200101", "20200102", "20200103"], 1440, "1d", 7),
  (["2020-01-31", "2020-02-29", "2020-03-31"], 1, "1mo", 12),
  (["2020-01-01", "2020-04-01", "2020-07-01"], 3, "1q", 4),
  (["2019-01-01", "2020-01-01", "2021-01-01"], 12, "1y", 1),
  (["2020-01-06", "2020-01-13"], 10080, "1w", 52),
  ([3, 4, 5], 1, "", 1),
])
def test_frequency(values, step, name, season):
  where = lambda i: f"row {i}"  # noqa: E731
  kind, ticks = timeline.read(values, "", where)
  clock = timeline.frequency("", kind, [ticks])
  assert clock.name == name and clock.season == season
  assert clock.step == step * (60 * 10**6 if clock.kind == "time" else 1)
  ticks = timeline.months(ticks) if clock.kind == "month" else ticks
  assert timeline.positions(ticks, clock, "", where).tolist() == list(range(len(values)))
  if name:
    assert timeline.frequency(name, kind, [ticks]) == clock


def test_several_columns_are_the_time(tmp_path):
  lines = ["year,month,day,hour,pm"] + [
    f"2010,1,{1 + i // 24},{i % 24},{v}" for i, v in enumerate(walk(120)[:, 0])]
  (tmp_path / "a.csv").write_text("\n".join(lines))
  preprocess, rows = load(tmp_path / "a.csv", time=("year", "month", "day", "hour"),
                          time_format="%Y %m %d %H")
  assert preprocess.channels == ("pm",) and preprocess.clock.name == "1h"
  assert rows.splits["test"].where(0).endswith("2010-01-05 00:00:00")


# ---- Bad input -----------------------------------------------------------------------------------


def test_a_gap_a_missing_value_and_a_time_that_stands_twice(tmp_path):
  values = walk(100, 2)
  said = message(write(tmp_path / "gap.csv", values, skip=(30, 31, 60)))
  assert "gap.csv: line 32: a gap: 2 steps of 1h are missing before 2020-01-02 08:00:00" in said
  assert "(3 in 2 gaps)" in said and "data.gaps=mask" in said
  holes = values.copy()
  holes[20, 1] = np.nan
  said = message(write(tmp_path / "hole.csv", holes))
  assert "hole.csv: line 22: no value of b at 2020-01-01 20:00:00" in said
  lines = write(tmp_path / "twice.csv", values).read_text().splitlines()
  (tmp_path / "twice.csv").write_text("\n".join([*lines[:11], lines[10], *lines[11:]]))
  said = message(tmp_path / "twice.csv")
  assert "twice.csv: line 12: the time 2020-01-01 09:00:00 stands there twice" in said
  assert "(first: " in said and "line 11" in said
  (tmp_path / "back.csv").write_text("\n".join([lines[0], *lines[5:9], *lines[1:5]]))
  assert "line 6: the time 2020-01-01 00:00:00 comes after" in message(tmp_path / "back.csv")
  shifted = [*lines[:40], lines[40].replace(":00:00,", ":07:00,"), *lines[41:]]
  (tmp_path / "off.csv").write_text("\n".join(shifted))
  assert "line 41" in message(tmp_path / "off.csv")
  far = [*lines, "2950-01-01 00:00:00,1,2"]
  (tmp_path / "far.csv").write_text("\n".join(far))
  assert "is that time right" in message(tmp_path / "far.csv", gaps="mask")


def test_short_and_constant_series(tmp_path):
  said = message(write(tmp_path / "short.csv", walk(20)))
  assert "no window of train fits: its longest series has 14 steps there" in said
  assert "data.context=12" in said and "data.horizon=4" in said
  flat = np.hstack([walk(100), np.full((100, 1), 3.0)])
  path = write(tmp_path / "flat.csv", flat)
  preprocess, rows = load(path)
  assert preprocess.channels == ("a",)
  assert rows.report["left out"] == ["b is 3 at every step of the training part"]
  assert "b is 3 at every step" in message(path, drop="error")
  said = message(write(tmp_path / "all.csv", np.full(100, 3.0)))
  assert "a is 3 at every step of the training part" in said
  dead = walk(100, 2)
  dead[:80, 1] = np.nan
  preprocess, rows = load(write(tmp_path / "dead.csv", dead), gaps="mask")
  assert rows.report["left out"] == ["b has no values in the training part"]


@pytest.mark.parametrize("keys,said", [
  ({"group": "a"}, "data.group is of no use with series"),
  ({"columns": {"text": "a"}}, "data.columns is of no use"),
  ({"context": 13}, "data.context=13: the model has 12 steps"),
  ({"horizon": 5}, "data.horizon=5: the model has 4"),
  ({"targets": ("b",)}, "no column 'b' (data.targets)"),
  ({"time": ("when",)}, "no column 'when' (data.time)"),
  ({"targets": ("a", "time")}, "also the time"),
  ({"frequency": "1 fortnight"}, "expected a number and one of s, min, h"),
  ({"time_format": "%d.%m.%Y"}, "is no time of the form"),
  ({"borders": (50,)}, "expected where validation and test begin"),
])
def test_keys_that_do_not_fit(tmp_path, keys, said):
  path = write(tmp_path / "a.csv", walk(100, 3), names="acd")
  assert said in message(path, **keys)


def test_values_and_times_that_are_none(tmp_path):
  path = write(tmp_path / "a.csv", walk(60))
  lines = path.read_text().splitlines()
  (tmp_path / "word.csv").write_text("\n".join([*lines[:9], lines[9].split(",")[0] + ",off",
                                               *lines[10:]]))
  said = message(tmp_path / "word.csv", targets=("a",))
  assert "line 10: a is 'off', no finite number" in said and "data.missing" in said
  preprocess, rows = load(tmp_path / "word.csv", targets=("a",), missing=("off",), gaps="mask")
  assert rows.splits["train"].series[0].observed[8, 0] == 0
  (tmp_path / "time.csv").write_text("\n".join([*lines[:9], "soon,1", *lines[10:]]))
  assert "line 10: 'soon' is no time such as" in message(tmp_path / "time.csv")
  (tmp_path / "words.csv").write_text("time,a\n2020-01-01,x\n2020-01-02,y\n")
  assert "no column of numbers to forecast" in message(tmp_path / "words.csv")


def test_a_model_that_forecasts_some_channels_is_refused():
  with pytest.raises(errors.UserError, match="some of its channels"):
    series.Preprocess(data_section("a.csv"), info(num_input_channels=2,
                                                  prediction_channel_indices=[0]))


# ---- Neighbours ----------------------------------------------------------------------------------


def test_neighbours_are_read_as_edges_and_as_a_square(tmp_path):
  path = write(tmp_path / "a.csv", walk(100, 3))
  (tmp_path / "edges.csv").write_text("from,to,weight\na,b,1\na,c,3\nb,a,2\nc,z,1\n")
  want = [[0, 0.25, 0.75], [1, 0, 0], [0, 0, 0]]
  squares = {"plain.csv": "a,b,c\n9,1,3\n2,0,0\n0,0,0\n",
             "named.csv": "sensor,c,b,a\nc,0,0,0\nb,0,5,2\na,3,1,1\n",
             "edges.csv": None}
  for name, text in squares.items():
    if text:
      (tmp_path / name).write_text(text)
    preprocess, _ = load(path, adjacency=str(tmp_path / name))
    np.testing.assert_allclose(preprocess.adjacency, want, err_msg=name)
  (tmp_path / "less.csv").write_text("a,b\n0,1\n1,0\n")
  assert "nothing about c" in message(path, adjacency=str(tmp_path / "less.csv"))
  (tmp_path / "minus.csv").write_text("from,to,weight\na,b,-1\nb,c,1\n")
  assert "'-1' should be a weight" in message(path, adjacency=str(tmp_path / "minus.csv"))


# ---- Prediction ----------------------------------------------------------------------------------


def test_prediction_has_the_scaler_of_the_run(tmp_path):
  values = walk(120)
  preprocess, _ = load(write(tmp_path / "a.csv", values))
  again = series.Preprocess.from_spec(json.loads(json.dumps(preprocess.spec())))
  assert json.dumps(again.spec()) == json.dumps(preprocess.spec())
  new = write(tmp_path / "new.csv", walk(40, seed=5), start="2023-05-01 06:00:00")
  (row,) = again.read_rows(str(new))
  assert row["times"] == [f"2023-05-02 {22 + i}:00:00" if i < 2 else f"2023-05-03 0{i - 2}:00:00"
                          for i in range(4)]
  want = (walk(40, seed=5)[-CONTEXT:] - preprocess.scales[""].mean) / preprocess.scales[""].std
  np.testing.assert_allclose(again(row)["past_values"], want, atol=1e-4)
  (row,) = again.read_rows(str(write(tmp_path / "few.csv", walk(9))))
  with pytest.raises(errors.RowError, match="9 steps of history, and data.context reads 12"):
    again(row)


def test_prediction_of_new_series_and_of_covariates_ahead(tmp_path):
  lines = ["id,time,y,x"]
  for name in "ab":
    lines += [f"{name},{i},{v:.4f},{i % 7}" for i, v in enumerate(walk(120)[:, 0])]
  (tmp_path / "l.csv").write_text("\n".join(lines))
  keys = dict(series_id="id", covariates=("x",))
  preprocess, _ = load(tmp_path / "l.csv", **keys)
  ahead = [f"b,{120 + i},,{i % 7}" for i in range(HORIZON)]
  new = [f"z,{i},{5 + i % 3 if i < 20 else ''},{i % 7}" for i in range(20 + HORIZON)]
  flat = [f"flat,{i},5,{i % 7}" for i in range(30)]
  less = [f"a,{i},{i % 5},1" for i in range(20)]
  (tmp_path / "n.csv").write_text("\n".join(["id,time,y,x", *lines[121:], *ahead, *new, *flat,
                                             *less]))
  found = list(preprocess.read_rows(str(tmp_path / "n.csv")))
  assert [row["id"] for row in found[:2]] == ["b", "z"]
  assert found[0]["times"] == ["120", "121", "122", "123"]
  example = preprocess(found[1])
  assert np.isfinite(example["past_values"]).all() and example["explained"].shape == (HORIZON, 1)
  assert example["mean"][0] == pytest.approx(5.95)  # its own history's
  assert isinstance(found[2], errors.RowError) and isinstance(found[3], errors.RowError)
  assert "covariates for 0 steps" in str(found[3])
  section = data_section(tmp_path / "n.csv", **keys)
  with pytest.raises(errors.UserError, match="the series 'z' is not in train"):
    preprocess.read(section, str(tmp_path / "n.csv"))
