"""The card's figures as inline SVG: small panels of one width, so that text keeps its size.

Colours come from the page's style sheet (classes), so figures follow dark, light and print.
"""

import math

from ft.card import words
from ft.card.markup import h

WIDTH = 340
_LEFT, _RIGHT = 44, 12  # Margins of the plots with two axes.
_BESIDE, _KEY = 17, 40  # Characters of a name beside a bar, and in the key of a plot.


def intervals(rows, metric, low, high, label):
  """Dots with their intervals, one line a row, over a scale shared between panels.

  Args:
    rows: [(name, value, (lo, hi) or None, emphasised)]. metric: for the format of numbers.
    low, high: ends of the scale. label: what a screen reader says.
  """
  above = max(len(name) for name, *_ in rows) > _BESIDE  # Long names stand above their bars.
  left, right, step = (8, WIDTH - 52, 40) if above else (112, WIDTH - 44, 24)
  height = step * len(rows) + 26

  def x(value):
    return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

  parts = []
  for tick in ticks(low, high, 6):
    parts.append(h("line", x1=_r(x(tick)), x2=_r(x(tick)), y1=4, y2=height - 22, cls="grid"))
    parts.append(h("text", _tick(tick, metric), x=_r(x(tick)), y=height - 8, cls="tick mid"))
  for i, (name, value, pair, strong) in enumerate(rows):
    y, cls = step * i + (30 if above else 16), "strong" if strong else "weak"
    at = {"x": 0, "y": y - 14, "cls": f"row halo {cls}"} if above else {
        "x": left - 10, "y": y + 4, "cls": f"row end {cls}"}
    parts.append(h("text", _clip(name, 52), **at))
    if pair and all(words.finite(v) for v in pair):
      parts.append(h("line", x1=_r(x(pair[0])), x2=_r(x(pair[1])), y1=y, y2=y, cls=f"bar {cls}"))
    if words.finite(value):
      parts.append(h("circle", cx=_r(x(value)), cy=y, r=4.5 if strong else 3.5,
                     cls=f"dot {cls}"))
    parts.append(h("text", words.number(value, metric), x=WIDTH, y=y + 4, cls=f"row end {cls}"))
  return _svg(height, label, parts)


def lines(series, label, mark=None, metric="", axis="step"):
  """Curves over steps, or over what `axis` names.

  Args:
    series: [(name, [(step, value)], class)] in drawing order. label: what a screen reader says.
    mark: (step, text) of a vertical line, or None. metric: for the format of the axis.
  """
  keys, room = _legend(series)
  height, top, bottom = 218 + room, 38 + room, 190 + room
  points = [point for _, curve, _ in series for point in curve]
  first, last = min(s for s, _ in points), max(s for s, _ in points)
  last = last if last > first else first + 1
  whole = axis == "step"
  low, high = span([v for _, v in points])

  def x(step):
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first)

  def y(value):
    return bottom - (bottom - top) * (value - low) / (high - low)

  parts = _axes(ticks(low, high, 5), ticks(first, last, 5), x, y, top, bottom, metric, whole=whole)
  parts.append(h("text", axis, x=WIDTH - _RIGHT, y=height - 1, cls="tick end"))
  marked = mark is not None and first <= mark[0] <= last
  if marked:
    at, end = x(mark[0]), x(mark[0]) > WIDTH * 0.7
    side = "end" if end else "mid" if at > WIDTH * 0.3 else ""
    parts.append(h("line", x1=_r(at), x2=_r(at), y1=top, y2=bottom, cls="mark"))
  for (name, curve, cls), (left, down) in zip(series, keys, strict=True):
    parts.append(h("line", x1=_r(left), x2=_r(left + 18), y1=down + 12, y2=down + 12,
                   cls=f"line {cls}"))
    parts.append(h("text", _clip(name, _KEY), x=_r(left + 23), y=down + 16, cls="tick"))
    if len(curve) <= 30:
      parts += [h("circle", cx=_r(x(s)), cy=_r(y(v)), r=2.4, cls=f"point {cls}")
                for s, v in curve]
    parts.append(h("polyline", cls=f"line {cls}",
                   points=" ".join(f"{_r(x(s))},{_r(y(v))}" for s, v in curve)))
  if marked:
    parts.append(h("text", mark[1], x=_r(at + 5 * (side == "end")), y=top - 3,
                   cls=f"tick {side}".strip()))
  return _svg(height, label, parts)


def reliability(tables, label):
  """Accuracy against confidence by bin; a dot's area is its share of rows, the diagonal is perfect.

  Args:
    tables: [(name, {"confidence", "accuracy", "count"}, class)]. label: for screen readers.
  """
  height, top, bottom = 300, 30, 262

  def x(value):
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * value

  def y(value):
    return bottom - (bottom - top) * value

  quarters = [0, 0.25, 0.5, 0.75, 1.0]
  parts = _axes(quarters, quarters, x, y, top, bottom, "accuracy", both=True)
  parts.append(h("text", "confidence, %", x=WIDTH - _RIGHT, y=height - 4, cls="tick end"))
  parts.append(h("line", x1=_r(x(0)), y1=_r(y(0)), x2=_r(x(1)), y2=_r(y(1)), cls="mark"))
  offset = _LEFT
  for name, table, cls in tables:
    parts.append(h("circle", cx=offset + 5, cy=12, r=4.5, cls=f"point {cls}"))
    parts.append(h("text", name, x=offset + 15, y=16, cls="tick"))
    offset += 28 + 6.2 * len(name)
    rows = [(c, a, n) for c, a, n in zip(table["confidence"], table["accuracy"], table["count"],
                                         strict=True) if words.finite(c) and words.finite(a)]
    total = sum(n for *_, n in rows) or 1
    parts += [h("circle", cx=_r(x(c)), cy=_r(y(a)), r=_r(2.5 + 9 * math.sqrt(n / total)),
                cls=f"point {cls}") for c, a, n in rows]
  return _svg(height, label, parts)


def growth(points, curve, label, metric, axis="training rows"):
  """A fitted curve with its band over a logarithmic axis, and what was measured.

  Args:
    points: [{"n", "error", "lo", "hi"}], measured. curve: the same of the fit, ascending in n; what
      lies beyond the last point is drawn dashed. label: what a screen reader says.
    metric: for the format of the axis. axis: its name.
  """
  height, top, bottom = 240, 12, 204
  rows, last = [*points, *curve], points[-1]["n"]
  first, end = math.log2(rows[0]["n"]), math.log2(max(row["n"] for row in rows))
  low, high = span([v for row in rows for v in (row["error"], row["lo"], row["hi"])])
  low = max(low, 0.0)

  def x(n):
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (math.log2(n) - first) / ((end - first) or 1)

  def y(value):
    return bottom - (bottom - top) * (value - low) / (high - low)

  parts = _axes(ticks(low, high, 5), [], x, y, top, bottom, metric)
  shown = [point["n"] for point in points] + [2 * last, 4 * last]
  every = 2 if len(shown) > 7 else 1  # the last of them always has its number
  parts += [h("text", f"{n:,}", x=_r(x(n)), y=bottom + 15, cls="tick mid")
            for n in shown[::-1][::every] if math.log2(n) <= end + 1e-9]
  parts.append(h("text", axis, x=WIDTH - _RIGHT, y=height - 4, cls="tick end"))
  edge = [(row["n"], row["hi"]) for row in curve] + [(row["n"], row["lo"]) for row in curve[::-1]]
  parts.append(h("polygon", cls="band", points=" ".join(f"{_r(x(n))},{_r(y(v))}" for n, v in edge)))
  inside = [row for row in curve if row["n"] <= last]
  beyond = [*inside[-1:], *[row for row in curve if row["n"] > last]]
  for part, cls in ((inside, "line one"), (beyond, "line two")):
    parts.append(h("polyline", cls=cls, points=" ".join(
        f"{_r(x(row['n']))},{_r(y(row['error']))}" for row in part)))
  for row in points:
    at = _r(x(row["n"]))
    parts.append(h("line", x1=at, x2=at, y1=_r(y(row["lo"])), y2=_r(y(row["hi"])), cls="bar weak"))
    parts.append(h("circle", cx=at, cy=_r(y(row["error"])), r=3.5, cls="dot strong"))
  return _svg(height, label, parts)


def scatter(points, label, metric, axis, log=False):
  """Dots over a number, the strong ones on top.

  Args:
    points: [(x, y, emphasised)]. label: what a screen reader says. metric: for the format of y.
    axis: what x is. log: whether its scale is logarithmic, x above 0.
  """
  height, top, bottom = 210, 12, 176
  scale = math.log10 if log else float
  left, right = span([scale(x) for x, *_ in points])
  low, high = span([value for _, value, _ in points])

  def x(value):
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (scale(value) - left) / (right - left)

  def y(value):
    return bottom - (bottom - top) * (value - low) / (high - low)

  parts = _axes(ticks(low, high, 5), [], x, y, top, bottom, metric)
  marks = ([m * 10.0**k for k in range(math.floor(left), math.ceil(right) + 1) for m in (1, 3)]
           if log else ticks(left, right, 5))
  parts += [h("text", f"{mark:.3g}", x=_r(x(mark)), y=bottom + 15, cls="tick mid")
            for mark in marks if left <= scale(mark) <= right]
  parts.append(h("text", axis, x=WIDTH - _RIGHT, y=height - 2, cls="tick end"))
  parts += [h("circle", cx=_r(x(a)), cy=_r(y(b)), r=4.5 if strong else 3.2,
              cls="dot strong" if strong else "point two")
            for a, b, strong in sorted(points, key=lambda point: point[2])]
  return _svg(height, label, parts)


def span(values, room=0.06):
  """(low, high) that hold all values with some room, never equal."""
  low, high = min(values), max(values)
  room = room * (high - low) or 0.05 * abs(high) or 0.05
  return low - room, high + room


def ticks(low, high, most):
  """At most most + 1 round numbers within [low, high]."""
  raw = (high - low) / most
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
  first = math.ceil(low / step - 1e-9)
  return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(y_ticks, x_ticks, x, y, top, bottom, metric, both=False, whole=True):
  parts = []
  for tick in y_ticks:
    parts.append(h("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_r(y(tick)), y2=_r(y(tick)),
                   cls="grid"))
    parts.append(h("text", _tick(tick, metric), x=_LEFT - 6, y=_r(y(tick) + 4), cls="tick end"))
  shown = [t for t in x_ticks if both or not whole or t == int(t)]
  parts += [h("text", _tick(t, metric) if both else f"{t:,.4g}" if not whole else f"{int(t):,}",
              x=_r(x(t)), y=bottom + 15, cls="tick mid") for t in shown]
  return parts


def _svg(height, label, parts):
  return h("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def _tick(value, metric):
  text = f"{100 * value:.4g}" if words.is_share(metric) else f"{value:.4g}"
  return text.replace("-", "−")


def _r(value):
  return round(value, 1)


def _legend(series):
  """([(x, y) of each curve's key], height of the lines after the first): keys wrap."""
  places, x, y = [], _LEFT, 0
  for name, *_ in series:
    width = 34 + 6.2 * min(len(name), _KEY)
    if places and x + width > WIDTH:
      x, y = _LEFT, y + 16
    places.append((x, y))
    x += width
  return places, y


def _clip(name, most):
  return name if len(name) <= most else name[:most - 1] + "…"
