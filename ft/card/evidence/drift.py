"""Evidence of the drift guard: class shares, distance and classifier between train and splits."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join, name

TITLE = "Drift"

_SHARE = "recall"  # the format of shares
_FEW = 12  # Up to here every class has its line.


def section(numbers, record):
  """The guard's numbers, see `ft/guards/drift.py`, as a part of the page."""
  del record
  return join([_priors(numbers.get("priors") or []), _features(numbers.get("features") or []),
               _levels(numbers.get("levels") or []), _missing(numbers.get("missing") or [])])


def _priors(rows):
  if not rows:
    return None
  body = []
  for row in rows:
    pair = words.interval(row["change_interval"], _SHARE)
    body.append([name(row["split"]), (f"{row['n']:,}", "n"), name(row["label"]),
                 (words.number(row["train"], _SHARE), "n"),
                 (words.number(row["share"], _SHARE), "n"),
                 (join([words.number(row["change"], _SHARE), h("small", pair)]), "n"),
                 (words.number(row["total_variation"], _SHARE), "n"),
                 (join([f"{row['kl']:.4f}", h("small", f"chance: {row['kl_null']:.4f}")]), "n")])
  table = el.table(
      "Class shares against train, in per cent: the class that changed most, the total variation, "
      "and the KL divergence in nats with what it stays below by chance (95 %)",
      ["split", ("rows", "n"), "class", ("in train", "n"), ("in it", "n"), ("change", "n"),
       ("variation", "n"), ("KL", "n")], body)
  return join([h("h3", "Class shares"), _panels(rows), table, _classes(rows)])


def _panels(rows):
  rows = [row for row in rows if len(row["classes"]) <= _FEW][:4]
  panels = []
  for row in rows:
    high = max(max(c["train"], c["share"]) for c in row["classes"]) * 1.05
    shown = [line for c in row["classes"]
             for line in ((f"{c['label'][:12]}", c["share"], None, True),
                          ("train", c["train"], None, False))]
    said = "; ".join(f"{c['label']}: {words.number(c['share'], _SHARE)} against "
                     f"{words.number(c['train'], _SHARE)} in train" for c in row["classes"])
    panels.append(el.figure([h("b", name(row["split"])), " share of each class, %"],
                            charts.intervals(shown, _SHARE, 0.0, high, f"{row['split']}, {said}")))
  return h("div", panels, cls="figures") if panels else None


def _classes(rows):
  parts = []
  for row in rows:
    if len(row["classes"]) > _FEW:
      ordered = sorted(row["classes"], key=lambda c: -abs(c["share"] - c["train"]))[:_FEW]
      body = [[name(c["label"]), (words.number(c["train"], _SHARE), "n"),
               (words.number(c["share"], _SHARE), "n")] for c in ordered]
      parts.append(el.details(f"{row['split']}: the classes that changed most", el.table(
          f"Shares in train and {row['split']}, in per cent",
          ["class", ("train", "n"), (name(row["split"]), "n")], body)))
  return join(parts)


def _features(rows):
  if not rows:
    return None
  shown = [(row["split"], row["auroc"], row["auroc_interval"], row["split"] == "test")
           for row in rows]
  said = "; ".join(f"{split} {value:.2f}" for split, value, *_ in shown)
  low = min([0.45, *[pair[0] for _, _, pair, _ in shown if words.finite(pair[0])]])
  chart = el.figure([h("b", "AUROC, %"), " of telling train from the split; 50: alike"],
                    charts.intervals(shown, "auroc", low, 1.0, f"AUROC: {said}"))
  body = []
  for row in rows:
    matched = row.get("auroc_matched")
    body.append([name(row["split"]), row["of"], (f"{row['n']:,}", "n"),
                 (join([words.number(row["auroc"], "auroc"),
                        h("small", words.interval(row["auroc_interval"], "auroc"))]), "n"),
                 (join([words.number(matched, "auroc"),
                        h("small", f"n = {row['n_matched']:,}") if row["n_matched"] else None]),
                  "n"),
                 (join([f"{row['mmd']:.5f}".replace("-", "−"),
                        h("small", f"chance: {row['mmd_null']:.5f}")]), "n"),
                 (f"{row['p']:.3f}", "n")])
  table = el.table(
      "How far rows are from those of train: AUROC of a classifier that tells them apart, in per "
      "cent; the same with equal class shares; the squared maximum mean discrepancy with what it "
      "stays below by chance (95 %), and the share of permutations that reach it",
      ["split", "by", ("rows of each", "n"), ("AUROC", "n"), ("at equal shares", "n"),
       ("MMD²", "n"), ("p", "n")], body)
  return join([h("h3", "Rows"), h("div", chart, cls="figures"), table])


def _levels(rows):
  if not rows:
    return None
  body = [[name(row["split"]), name(row["series"]), (f"{row['n']:,}", "n"),
           (join([f"{row['level']:.2f}".replace("-", "−"),
                  h("small", "[{:.2f}, {:.2f}]".format(*row["level_interval"]).replace("-", "−"))]),
            "n"), (f"{row['spread']:.2f}", "n")] for row in rows]
  return join([h("h3", "Series"), el.table(
      "The series that moved most, where train has mean 0 and standard deviation 1 (intervals "
      "resample seasons)", ["split", "series", ("steps", "n"), ("mean", "n"), ("spread", "n")],
      body)])


def _missing(rows):
  if not rows:
    return None
  return el.details("Not measured", h("ul", [h("li", f"{row['part']}: {row['reason']}")
                                             for row in rows]))
