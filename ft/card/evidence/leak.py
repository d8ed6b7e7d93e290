"""Evidence of the leak guard: how many rows leaked, what that did to the metric, which they are."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join, name
from ft.guards import leak

TITLE = "Leakage"

_HALVES = (("leaked", "in train too"), ("clean", "the rest"), ("all", "all rows"))
_SHARE = "recall"  # the format of shares


def section(numbers, record):
  """The guard's numbers, see `ft/guards/leak.py`, as a part of the page."""
  del record
  parts = [h("p", _explained(numbers), cls="soft"), _shares(numbers), _halves(numbers),
           _examples(numbers.get("examples") or []), _inside(numbers), _groups(numbers),
           _times(numbers), _columns(numbers), _missing(numbers.get("missing") or [])]
  return join(parts)


def _explained(numbers):
  s, made = numbers.get("settings") or {}, []
  rows = {row["split"]: row for row in numbers.get("splits") or []}
  cut = [f"{row['n']:,} of {row['of']:,} rows of {split}" for split, row in rows.items()
         if row["n"] < row["of"]]
  if "features" in s:
    made.append(f"to the model before tuning (cosine of its {s['features']} features above "
                f"{s['cosine']:g})")
  if "minhash_cut" in s:
    made.append(f"by their characters (Jaccard similarity of {s['jaccard']:g} or more)")
  if "pictures" in s:
    made.append(f"as pictures (hashes within {s['bits']} of 64 bits, pixels correlated by "
                f"{s['correlation']:g} or more; {s['pictures']:,} images)")
  text = "Rows are exact duplicates where text is the same up to case, punctuation and spaces, or "
  text += ("where image or sound is the same byte for byte; of tables, where all columns are that "
           "the model reads.")
  if made:
    text += f" They are near-duplicates where they are alike {', or '.join(made)}."
  return text + (f" Compared: {', '.join(cut)}." if cut else "")


def _shares(numbers):
  rows = numbers.get("between") or []
  splits = list(dict.fromkeys(row["split"] for row in rows))
  splits.sort(key=lambda split: split != "test")
  if not splits:
    return None
  high = max([row["share"] or 0 for row in rows]
             + [(row["interval"] or [0, 0])[1] or 0 for row in rows]) * 1.05 or 0.01
  panels = []
  for split in splits[:4]:
    of = [row for row in rows if row["split"] == split]
    shown = [(leak.LONG[row["method"]], row["share"], row["interval"],
              row["method"] == leak.ANY) for row in of]
    said = "; ".join(f"{label} {words.number(value, _SHARE)} %" for label, value, *_ in shown)
    caption = [h("b", name(split)), f" rows that are in train, %, n = {of[0]['n']:,}"]
    panels.append(el.figure(caption,
                            charts.intervals(shown, _SHARE, 0.0, high, f"{split}: {said}")))
  table = el.table(
      "Rows with a duplicate in train, by the way they were found (95 % Wilson interval)",
      ["split", "found by", ("rows", "n"), ("of", "n"), ("share, %", "n"), ("same label, %", "n")],
      [[name(row["split"]), leak.LONG[row["method"]], (f"{row['rows']:,}", "n"),
        (f"{row['n']:,}", "n"), _percent(row),
        (words.number(row.get("same_label"), _SHARE), "n")] for row in rows])
  return join([h("div", panels, cls="figures"), table])


def _halves(numbers):
  rows = numbers.get("halves") or []
  if not rows:
    return None
  body = []
  for row in rows:
    cells = [_metric(row[key], row["metric"]) for key, _ in _HALVES]
    body.append([name(row["split"]), leak.LONG[row["method"]], words.row_name(row["model"]), *cells,
                 (words.number(row["inflation"], row["metric"]), "n")])
  unit = words.unit(rows[0]["metric"])
  return el.table(
      f"{unit[0].upper()}{unit[1:]} on rows that are in train too and on the rest; inflation is "
      f"how much better all rows look than the rest (no metric below {leak.FEWEST} rows)",
      ["split", "found by", "", *[(label, "n") for _, label in _HALVES], ("inflation", "n")], body)


def _metric(half, metric):
  pair = words.interval([half["lo"], half["hi"]], metric)
  shown = words.number(half["value"], metric)
  return (join([shown, h("small", f"{pair} n = {half['n']:,}".strip())]), "n")


def _examples(rows):
  if not rows:
    return None
  body = [[_place(row, ""), (_text(row, ""), "long"), (_text(row, "train_"), "long"),
           _place(row, "train_"), (f"{row['similarity']:.2f}", "n"), leak.LONG[row["method"]]]
          for row in rows]
  table = el.table("A few of the pairs, from close to barely alike",
                   ["row", "", "in train", "row", ("alike", "n"), "found by"], body,
                   "stack")
  return el.details(f"Pairs to look at ({len(rows)})", table)


def _place(row, prefix):
  where = (row.get(f"{prefix}place") or "").rsplit("/", 1)[-1]
  return name(where)


def _text(row, prefix):
  label, picture = row.get(f"{prefix}label"), row.get(f"{prefix}picture")
  shown = name(row.get(f"{prefix}text") or "–")
  if picture:
    shown = h("img", src=picture, alt=row.get(f"{prefix}place") or "", width=72)
  return join([shown, h("small", [" (", name(label), ")"]) if label is not None else None])


def _inside(numbers):
  rows = [row for row in numbers.get("inside") or [] if row["rows"]]
  if not rows:
    return None
  body = [[name(row["split"]), leak.LONG[row["method"]], (f"{row['rows']:,}", "n"),
           (f"{row['n'] - row['rows']:,}", "n"), _percent(row)] for row in rows]
  return el.details("Repeats within a split", el.table(
      "Rows that repeat an earlier row of their own split",
      ["split", "found by", ("rows", "n"), ("left without", "n"), ("share, %", "n")], body))


def _groups(numbers):
  rows = numbers.get("groups") or []
  body = [[name(row["split"]), (f"{row['groups']:,}", "n"), (f"{row['rows']:,}", "n"),
           (f"{row['n']:,}", "n"), _percent(row)] for row in rows]
  return body and el.table("Rows whose group is in train too",
                           ["split", ("groups", "n"), ("rows", "n"), ("of", "n"),
                            ("share, %", "n")], body) or None


def _times(numbers):
  rows = numbers.get("times") or []
  body = [[name(row["split"]), name(" … ".join(row["train"])), name(" … ".join(row["of_split"])),
           (words.number(row["later"], _SHARE), "n")] for row in rows]
  return body and el.table("Times of train and of the other splits; 0 % where train comes first, "
                           "50 % where times are mixed",
                           ["split", "train", "the split", ("train rows later than half of it, %",
                                                            "n")], body) or None


def _columns(numbers):
  rows = numbers.get("columns") or []
  body = [[name(row["column"]), _percent({"share": row["accuracy"], **row}),
           (words.number(row["majority"], _SHARE), "n"), (f"{row['n']:,}", "n")] for row in rows]
  return body and el.table("How well a single column predicts the label of test, learnt from train",
                           ["column", ("accuracy, %", "n"), ("majority class, %", "n"),
                            ("rows", "n")], body) or None


def _missing(rows):
  if not rows:
    return None
  return el.details("Not measured", h("ul", [h("li", f"{row['part']}: {row['reason']}")
                                             for row in rows]))


def _percent(row):
  pair = words.interval(row.get("interval"), _SHARE)
  return (join([words.number(row["share"], _SHARE), h("small", pair) if pair else None]), "n")
