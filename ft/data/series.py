"""Time series to windows: a stretch of the past that a model reads, and the steps that follow.

Tables are wide (a column a series, all of them channels of one window) or long (a row a series and
time; a window is of one series). Time splits them: train precedes validation precedes test; windows
reach back across a border for context, never forward. The standardiser is fitted to train alone.
Shapes: T steps of context, H of the forecast, C channels.
"""

import dataclasses
import importlib
import shlex
import types
from collections.abc import Iterator

import numpy as np
from absl import logging

from ft import errors
from ft.data import panel, sources, splits, timeline, windows
from ft.data.fixed import Fixed

KEYS = {
  "time": ((), "columns whose values, with spaces between, are the time; (): one called time, date,"
           " datetime, timestamp or ds", "list"),
  "time_format": ("", "how times are written, as strptime has it; empty: ISO 8601"),
  "series_id": ("", "column that tells the series of a long table apart; empty: a wide table"),
  "targets": ((), "columns that are forecast; (): all others that hold numbers", "list"),
  "covariates": ((), "columns that are known ahead, such as prices and holidays", "list"),
  "adjacency": ("", "wide tables: which columns are neighbours; a square CSV, or from,to,weight"),
  "frequency": ("", "step of the series, such as 15min, 1h, 1d, 1mo; empty: the most common one"),
  "missing": (("", "NA", "NaN", "nan", "null"), "what stands for a missing value; add 0 where "
              "sensors that fail report it", "list"),
  "gaps": ("error", "missing steps and values: stop, or mask them", ["error", "mask"]),
  "context": (0, "steps that are read for a forecast; 0: as many as the model reads", (0, None)),
  "horizon": (0, "steps that are forecast; 0: as many as the model gives", (0, None)),
  "borders": ((), "first step, or time, of validation, of test and, if it ends before the table, "
              "behind test; (): by the fractions", "list"),
  "train_share": (1.0, "share of the training windows that are trained on, the newest; scaler and "
                  "ridge baseline see the whole training part", (0.0, 1.0)),
  "stride": (1, "steps between the windows of validation and test", (1, None)),
  "seasonality": (0, "steps of a season, for MASE and the seasonal naive forecast; 0: by the "
                  "frequency", (0, None)),
}
# Keys of ft/data/sources.py that divide or drop rows in ways that time does not allow.
_NOT_FOR_SERIES = ("columns", "binarize", "group", "per_label", "unknown")
_FILES = ("header", "names", "encoding", "quoting")
_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Reads:
  """What a model reads and gives.

  Attributes:
    context, horizon: most steps of either.
    levels: (Q,) quantiles that it forecasts; () for one that forecasts points.
    tokens: frequency's name -> its number, for a model that is told the frequency, else None.
  """

  context: int
  horizon: int
  levels: tuple[float, ...] = ()
  tokens: dict[str, int] | None = None


class Preprocess(Fixed):
  """Turns {"window": windows.Window} into the past that a model reads, and splits tables by time.

  Args:
    config: the `data` section.
    info: what models.inspect says.

  Attributes:
    reads: what the model reads, see `Reads`.
    context, horizon: T and H.
    channels: (C,) names of what is forecast; () before `load`.
    clock: timeline.Clock, and season: steps; both None before `load`.
    adjacency: (C, C), see `panel.neighbours`, or None.
    scales: series name -> windows.Scale.
    block: steps whose windows the bootstrap resamples together.

  Raises:
    UserError: a key does not fit series or the model.
  """

  def __init__(self, config, info):
    for key in _NOT_FOR_SERIES:
      if config[key]:
        raise errors.UserError(f"data.{key} is of no use with series, which time divides; leave it "
                               "empty")
    reads = _reads(info)
    for key, most in (("context", reads.context), ("horizon", reads.horizon)):
      if config[key] > most:
        raise errors.UserError(f"data.{key}={config[key]}: the model has {most} steps; set it to "
                               f"{most} or less")
    self._settle({key: config[key] for key in KEYS}, {key: config[key] for key in _FILES}, reads)

  def _settle(self, keys: dict, files: dict, reads: Reads) -> None:
    self._keys, self._files, self.reads = types.SimpleNamespace(**keys), files, reads
    self.context, self.horizon = keys["context"] or reads.context, keys["horizon"] or reads.horizon
    self.channels, self.clock, self.season, self.adjacency = (), None, None, None
    self.scales, self.block = {}, self.horizon

  # Tables to rows.

  def load(self, config) -> sources.Data:
    """Returns the splits of a `data` section, in place of `sources.load`.

    A run that is finished has its scaler: then all of the training source is one split, train.

    Raises:
      UserError: besides what `panel.read` says, a split in which no window fits, borders that are
        not in order, or no series that can be used.
    """
    if self.scales:
      rows = self.read(config, config.train, name="train")
      return sources.Data({"train": rows}, {"labels": {}}, {})
    tables = self._tables(config)
    found = panel.read(self._keys, tables)
    borders = _borders(config, self._keys.borders, found, tables)
    found, dropped = _usable(found, borders[0], config.drop)
    self._fit(found, borders[0], config)
    built = self._build(found)
    source, result = next(iter(tables.values()))[0].source, {}
    for i, name in enumerate(_SPLITS):
      start, stop = (None, *borders)[i], borders[i]
      result[name] = self._windows(name, built, start, stop, source)
    result |= {name: self.read(config, spec, name=name)
               for name, spec in dict(config.extra or {}).items()}
    report = self._report(found, borders, result, dropped)
    if config.limit:
      result = {name: rows.select(splits.sample(None, config.limit, config.split_seed, len(rows)))
                for name, rows in result.items()}
    return sources.Data(result, report, {})

  def read(self, config, spec, *, name: str = "input", labelled: bool = True) -> windows.Windows:
    """Returns all windows of a further source, in place of `sources.read`; its series are known.

    Raises:
      UserError: besides what `panel.read` says, a series that train has not, or no window fits.
    """
    del labelled  # the steps that follow are there either way
    _, table, indices = sources.table(config, spec)
    found = panel.read(self._keys, {name: (table, indices)})
    for raw in found.series:
      if raw.name not in self.scales:
        raise errors.UserError(f"{raw.where}: the series {raw.name!r} is not in train"
                               f"{errors.suggest(raw.name, self.scales)}; scripts/predict.py "
                               "forecasts series that are new")
    return self._windows(name, self._build(found), None, None, table.source)

  def _build(self, found: panel.Panel) -> list[windows.Series]:
    built, block = [], 0
    for raw in found.series:
      built.append(windows.build(raw, self.scales[raw.name], self.season, block=block))
      block += len(raw.values) // self.block + 1
    return built

  def _tables(self, config) -> dict:
    """Returns split -> (table, its rows) of the sources that are given."""
    if config.validation and not config.test:
      raise errors.UserError("data.validation has a source of its own and data.test has none, but "
                             "test has to come last; name both, or data.train alone")
    if not config.train:
      raise errors.UserError("data.train is empty; give a table of series such as sensors.csv.")
    seen = {}
    return {name: sources.table(config, config[name], tables=seen)[1:]
            for name in _SPLITS if config[name]}

  def _fit(self, found: panel.Panel, border: int, config) -> None:
    """Fits what a run learns of its training part apart from the model."""
    self.channels, self.clock = found.channels, found.clock
    self.season = self._keys.seasonality or self.clock.season
    self.block = max(self.horizon, self.season)
    self._keys.targets = self.channels
    self._keys.frequency = self._keys.frequency or self.clock.name
    for raw in found.series:
      self.scales[raw.name] = windows.fit(raw, _step(raw, self.clock, border))
    if self._keys.adjacency:
      if self._keys.series_id:
        raise errors.UserError("data.adjacency is of the columns of a wide table; leave it empty "
                               "with data.series_id")
      self.adjacency = panel.neighbours(config, self.channels)

  def _windows(self, name, series, start, stop, source) -> windows.Windows:
    """Returns the windows that are forecast within the ticks start … stop - 1 (None: no limit)."""
    places, parts = [], []
    train = name == "train" and (start, stop) != (None, None)
    stride = 1 if train else self._keys.stride
    for number, one in enumerate(series):
      low = 0 if start is None else _step(one, self.clock, start)
      high = len(one.values) if stop is None else min(_step(one, self.clock, stop),
                                                      len(one.values))
      at = windows.origins(one, low, high, self.context, self.horizon, stride)
      if train and len(at):
        at = at[-max(1, round(self._keys.train_share * len(at))):]
      places.append(np.stack([np.full(len(at), number), at], 1))
      parts.append((min(low, high), high))
    places = np.concatenate(places)
    if not len(places):
      longest = max(high - low for low, high in parts)
      raise errors.UserError(
        f"{source}: no window of {name} fits: its longest series has {longest:,} steps there, a "
        f"window takes data.horizon={self.horizon} of them after data.context={self.context} "
        "observed before; lower these, move data.borders, or give longer series")
    return windows.Windows(name, tuple(series), places, source, self._show, np.array(parts))

  def _show(self, series, step: int) -> str:
    return self.clock.show(series.first + step * self.clock.step)

  def _report(self, found, borders, result, dropped) -> dict:
    show = self.clock.show
    spans = dict(zip(_SPLITS, ("the first step", *map(show, borders[:2])), strict=True))
    missing = sum(int(np.isnan(raw.values).sum()) for raw in found.series)
    return {
      "labels": {}, "splits": {name: len(rows) for name, rows in result.items()},
      "series": {"series": len(found.series), "channels": len(self.channels),
                 "steps": max(len(raw.values) for raw in found.series),
                 "step": self.clock.name or str(self.clock.step), "season": self.season,
                 "missing values": missing, "context": self.context, "horizon": self.horizon},
      "forecasts from": spans, "left out": dropped,
    }

  # Rows to examples.

  def __call__(self, row: dict) -> dict[str, np.ndarray]:
    """Returns what may be known before the forecast; RowError for a history that is too short.

    past_values and past_observed_mask (T, C) float32; mean, std (C,) that undo the standardising;
    seasonal_error (C,) of the history; block () int32; where there are covariates explained (H, C);
    where the model is told the frequency freq_token () int32.
    """
    window = row["window"]
    series, past = window.series, window.past(self.context)
    example = {
      "past_values": series.values[past], "past_observed_mask": series.observed[past],
      "mean": series.scale.mean.astype(np.float32), "std": series.scale.std.astype(np.float32),
      "seasonal_error": series.seasonal_error(window.origin),
      "block": np.int32(series.block + window.origin // self.block),
    }
    if series.explained is not None:
      example["explained"] = series.explained[window.future(self.horizon)]
    if self.reads.tokens is not None:
      example["freq_token"] = np.int32(self.reads.tokens.get(self.clock.name, 0))
    return example

  def future(self, row: dict) -> dict[str, np.ndarray]:
    """Returns what a forecast is compared with: future_values and future_observed (H, C)."""
    window = row["window"]
    at = window.future(self.horizon)
    return {"future_values": window.series.values[at],
            "future_observed": window.series.observed[at]}

  def show(self, example: dict) -> str:
    """Returns one line about an example for log and card."""
    past, seen = example["past_values"], example["past_observed_mask"]
    last = ", ".join(f"{name} {value:.2f}" for name, value in
                     zip(self.channels[:8], past[-1], strict=False))
    return (f"{past.shape[0]} steps of {past.shape[1]} channels, {100 * seen.mean():.1f} % "
            f"observed; the last, standardised: {last}")

  # Prediction.

  def read_rows(self, source: str) -> Iterator[dict]:
    """Yields a row a series: its end, from which it is forecast, and the "times" of the forecast.

    Args:
      source: a file with the columns of the run, as CSV, Parquet, …; "-": CSV, or JSON lines, on
        standard input.
        Rows behind the last value of a series may hold the covariates of the steps ahead. A series
        that train had not is standardised by what is given of it.

    Raises:
      UserError: the file, or a series in it, cannot be read.
    """
    if source == "-":
      with sources.standard_input() as path:
        yield from list(self.read_rows(path))
      return
    config = sources.written(**self._files)
    _, table, indices = sources.table(config, source)
    for raw in panel.read(self._keys, {"input": (table, indices)}).series:
      yield self._row(raw)

  def _row(self, raw: panel.Raw) -> dict | errors.RowError:
    end, ahead = len(raw.values), self.horizon
    if raw.known.shape[1] and len(raw.known) < end + ahead:
      return errors.RowError(f"{raw.where}: {raw.name or 'the series'} has its covariates for "
                             f"{len(raw.known) - end} steps after its last value; {ahead} are "
                             "forecast")
    scale = self.scales.get(raw.name)
    if scale is None:
      for c, channel in enumerate(self.channels):
        if why := windows.unusable(raw.values[:, c]):
          return errors.RowError(f"{raw.where}: {raw.name}: {channel} {why}".replace(
            "the training part", "it"))
      scale = windows.fit(raw, end)
    series = windows.build(raw, scale, self.season, ahead)
    times = [self._show(series, end + i) for i in range(ahead)]
    name = {"id": raw.name} if raw.name else {}
    return {"window": windows.Window(series, end), "times": times, **name}

  def try_it(self, folder) -> str:
    """Returns the command that forecasts series of the user's own with the run in a folder."""
    return f"python scripts/predict.py --run={shlex.quote(str(folder))} --input=SERIES.csv"

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"modality": "series", "keys": vars(self._keys), "files": self._files,
            "reads": dataclasses.asdict(self.reads), "channels": list(self.channels),
            "clock": dataclasses.asdict(self.clock), "season": self.season, "block": self.block,
            "adjacency": None if self.adjacency is None else self.adjacency.tolist(),
            "scales": {name: scale.spec() for name, scale in self.scales.items()}}

  @classmethod
  def from_spec(cls, spec: dict, folder=None) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction."""
    self = cls.__new__(cls)
    reads = {**spec["reads"], "levels": tuple(spec["reads"]["levels"])}
    self._settle(dict(spec["keys"]), spec["files"], Reads(**reads))
    self.channels, self.clock = tuple(spec["channels"]), timeline.Clock(**spec["clock"])
    self.season, self.block = spec["season"], spec["block"]
    self.adjacency = None if spec["adjacency"] is None else np.array(spec["adjacency"])
    self.scales = {name: windows.Scale.from_spec(one) for name, one in spec["scales"].items()}
    return self


from_spec = Preprocess.from_spec


def _reads(info) -> Reads:
  """Returns what a checkpoint's config says of its inputs and outputs."""
  family = importlib.import_module(f"ft.models.{info.family}")
  config = family.Config.from_hf(info.hf_config)
  if getattr(config, "channels", None) is not None:
    raise errors.UserError(f"{info.source}: a model that forecasts some of its channels from the "
                           "others is not served; all channels are forecast here")
  tokens = family.FREQUENCIES if getattr(config, "resolution_prefix_tuning", False) else None
  return Reads(config.context_length, getattr(config, "horizon", config.prediction_length),
               tuple(getattr(config, "quantiles", ())), tokens)


def _step(series, clock: timeline.Clock, tick: int) -> int:
  """Returns the first step of a series (with `first`) at or after a tick, from 0."""
  return max(0, -(-(tick - series.first) // clock.step))


def _borders(config, stated, found: panel.Panel, tables: dict) -> tuple[int, int, int]:
  """Returns the ticks at which validation and test begin, and the one behind test."""
  clock, first = found.clock, min(raw.first for raw in found.series)
  end = max(raw.first + len(raw.values) * clock.step for raw in found.series)
  if stated:
    if len(tables) > 1 or not 2 <= len(stated) <= 3:
      raise errors.UserError(f"data.borders={list(stated)}: expected where validation and test "
                             "begin and, if need be, where test ends, of one source")
    given = [first + b * clock.step if isinstance(b, int) else clock.tick(b, "", "data.borders")
             for b in stated]
    borders = (*given, end)[:3]
  else:
    test = found.starts.get("test", end)
    size, v = (test - first) // clock.step, config.validation_fraction
    t = 0.0 if "test" in tables else config.test_fraction
    if v + t >= 1:
      raise errors.UserError("data.validation_fraction and data.test_fraction leave nothing to "
                             "train on.")
    middle = first + round((1 - v - t) * size) * clock.step
    last = test if "test" in tables else first + round((1 - t) * size) * clock.step
    borders = (found.starts.get("validation", middle), last, end)
  if not first < borders[0] < borders[1] < borders[2] <= end:
    raise errors.UserError(
      f"train, validation and test have to follow each other: validation begins at "
      f"{clock.show(borders[0])}, test at {clock.show(borders[1])} and ends before "
      f"{clock.show(borders[2])}; the series go from {clock.show(first)} to "
      f"{clock.show(end - clock.step)}")
  return borders


def _usable(found: panel.Panel, border: int, policy: str) -> tuple[panel.Panel, list[str]]:
  """Leaves out what cannot be standardised; returns the rest and why the others are not in it.

  Of a wide table channels are left out, of a long one series.
  """
  reasons, series, channels = [], [], list(range(len(found.channels)))
  wide = len(found.series) == 1 and not found.series[0].name
  for raw in found.series:
    stop = _step(raw, found.clock, border)
    why = {c: said for c in channels if (said := windows.unusable(raw.values[:stop, c]))}
    reasons += [f"{raw.name + ', ' if raw.name else ''}{found.channels[c]} {said}"
                for c, said in why.items()]
    if wide:
      channels = [c for c in channels if c not in why]
    if channels if wide else not why:
      series.append(raw)
  some = "; ".join(reasons[:5]) + ("; …" if len(reasons) > 5 else "")
  if reasons and (policy == "error" or not series):
    raise errors.UserError(f"{found.series[0].where}: series that cannot be standardised, "
                           f"{len(reasons)} in all: {some}" + (
                             "; leave them out of data.targets, or set data.drop=count" if series
                             else "; data.borders says where training ends"))
  if reasons:
    logging.warning("left out, %d in all: %s", len(reasons), some)
    series = [dataclasses.replace(raw, values=raw.values[:, channels]) for raw in series]
  kept = tuple(found.channels[c] for c in channels)
  return dataclasses.replace(found, series=series, channels=kept), reasons
