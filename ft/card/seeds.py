"""Several seeds of one config: mean ± standard deviation beside the intervals over test rows."""

from ft import guards
from ft.card import elements as el
from ft.card import words
from ft.card.markup import h, join, name


def section(record):
  """The part of one valid record; None where there was one seed."""
  found = record.get("seeds")
  if not found:
    return None
  metric, numbers = found["metric"], found["numbers"]
  splits = [split for split in words.splits_in_order(record) if split in found["results"]]
  rows = [[words.row_name(key), *[_cell(found["results"][split].get(key), metric)
                                  for split in splits]]
          for key in words.rows_in_order({key: 0 for split in splits
                                          for key in found["results"][split]})]
  gains = [[name(split), f"over the {words.row_name(key.removeprefix(guards.TUNED + ' - '))}",
            _cell(row, metric), _verdicts(row["verdicts"])]
           for split in splits for key, row in found["differences"].get(split, {}).items()]
  parts = [
      h("h3", f"Over {len(numbers)} seeds"),
      h("p", f"The same config with seeds {', '.join(map(str, numbers))}: mean ± standard "
        "deviation, and every seed's value. The rest of this page is of the first. An interval "
        "is about the rows that were judged, the deviation about the training.", cls="soft"),
      el.table(f"{words.unit(metric)} over seeds", ["", *[(name(s), "n") for s in splits]], rows)]
  if gains:
    parts.append(el.table("Fine-tuned minus baseline over seeds", ["split", "", ("", "n"),
                                                                   "verdicts"], gains))
  return join(parts)


def line(record):
  """"Over 3 seeds: test 86.5 ± 0.3, tweets 71.4 ± 2.9", or None."""
  found = record.get("seeds")
  if not found:
    return None
  said = [f"{split} {spread(found['results'][split][guards.TUNED], found['metric'])}"
          for split in words.splits_in_order(record)
          if guards.TUNED in found["results"].get(split, {})]
  return f"Over {len(found['numbers'])} seeds, mean ± sd: {', '.join(said)}."


def spread(entry, metric):
  """"86.5 ± 0.3"; shares in per cent, with two decimals of the deviation where it is small."""
  if not words.finite(entry["mean"]):
    return "–"
  if not words.finite(entry["sd"]):
    return words.number(entry["mean"], metric)
  share = words.is_share(metric)
  scale, digits = (100, 2) if share else (1, 4)
  return f"{scale * entry['mean']:.{digits}f} ± {scale * entry['sd']:.{digits}f}".replace("-", "−")


def _cell(entry, metric):
  if entry is None:
    return ("–", "n")
  scale, digits = (100, 2) if words.is_share(metric) else (1, 4)
  each = ", ".join(f"{scale * v:.{digits}f}" if words.finite(v) else "–" for v in entry["values"])
  return (join([spread(entry, metric), h("small", each.replace("-", "−"))]), "n")


def _verdicts(verdicts):
  found = [(word, verdicts.count(word)) for word in dict.fromkeys(verdicts)]
  return join([[", " if i else "", el.word(word), f" {count} of {len(verdicts)}"]
               for i, (word, count) in enumerate(found)])
