"""Texts that a model writes when it is evaluated: on its devices, in batches, every row once.

They are written at the end of a run, for a fixed choice of rows of each split, by the tuned model
and by the pretrained one. A task takes part by

    generate_rows                 most rows of a split; 0 or no such attribute: no texts
    decoding(pretrained)          generate.Settings
    prompts(batch)                (inputs, prompt) that `generate.program` reads; on the device
    prompt(row), max_prompt       example without what should be written; most tokens it has
    compare(rows, index, texts)   name -> (n, …) statistics, which its metrics read
    sample(row)                   name -> text that a reader compares with
    decode(ids)                   the text of ids (T,); without it, that of the preprocessing
    write(apply, variables, batch)  where it is no None, in place of decoding and prompts: "answer"
                                  and "answer_length" of a model that writes in one pass

and then finds in the outputs of a split "answer" (N, K), "answer_length" and "generated" (N,), 1
where a row has a text, beside its statistics. All texts are in the run's folder, in samples.jsonl.
"""

import json

import numpy as np

from ft import errors, evaluate, guards, mesh, state, texts, workdir
from ft import run as runs
from ft.data import loader as loaders
from ft.models import generate

ANSWERS = "answers.npz"  # of the pretrained model, in the folder of a run that is not finished
SAMPLES = "samples.jsonl"
SHOWN = 5  # samples on the card


def writes(task) -> bool:
  """Whether a task has texts written."""
  return getattr(task, "generate_rows", 0) > 0


def check(task, tuned) -> None:
  """Raises UserError, before anything trains, where texts could not be written."""
  if writes(task) and tuned.around is not None:
    raise errors.UserError("task.generate_rows: no text can be written with this tune.method yet, "
                           "which changes the model's inputs; set task.generate_rows=0 and "
                           "task.metric=nats_per_token, or choose another method")


def make_step(task, pretrained, combine, interceptor=None, out_sharding=None):
  """Returns jitted step(trainable, mutable, frozen, batch) -> {"answer", "answer_length", "index"}.

  It is what `state.make_predict_step` returns, of texts: `evaluate.run` reads a split with it.
  """
  if getattr(task, "write", None):
    apply = state.make_apply(pretrained.module, interceptor)
    return state.make_predict_step(task.write, apply, combine, out_sharding)
  write = generate.program(pretrained.module, task.decoding(pretrained), interceptor)

  def produce(apply, variables, batch):
    del apply  # decoding keeps a cache of its own
    tokens, lengths = write(variables, *task.prompts(batch))
    return {"answer": tokens, "answer_length": lengths}

  return state.make_predict_step(produce, None, combine, out_sharding)


def before(run, examples: dict, features: dict, frozen, mutable, tuned) -> dict:
  """Returns the baselines' features with the texts of the untuned model, of all splits to judge.

  Arguments as in `run.extract_features`.
  """
  if not writes(run.task):
    return features
  untouched = state.State(None, None, tuned.trainable, mutable, None, None)
  step = make_step(run.task, run.pretrained, tuned.combine, tuned.reader, mesh.replicated(run.mesh))
  chosen = _choose(run, examples, [n for n in features if n not in ("train", "validation")])
  made = evaluate.once(run.folder / ANSWERS, step, untouched, frozen, _loaders(run, chosen),
                       run.place, run.poll)
  return {
    name: join(run.task, run.data.splits[name], part, made[name], chosen[name])
    if name in chosen else part for name, part in features.items()
  }


def after(run, examples: dict, outputs: dict, final) -> dict:
  """Returns the outputs of splits with the texts that the final model writes.

  Args:
    run: `run.Run`.
    examples: split -> Examples.
    outputs: split -> what the task predicts.
    final: `averaging.Final`.
  """
  if not writes(run.task):
    return outputs
  step = make_step(run.task, run.pretrained, final.tuned.combine, final.tuned.interceptor,
                   mesh.replicated(run.mesh))
  chosen = _choose(run, examples, outputs)
  made = {
    name: evaluate.run(step, final.state, final.frozen, loader, run.place, run.poll)
    for name, loader in _loaders(run, chosen).items()
  }
  return {name: join(run.task, run.data.splits[name], part, made[name], chosen[name])
          for name, part in outputs.items()}


def prompts(task, rows, index) -> loaders.Examples:
  """Returns the prompts of some rows as examples 0 … n - 1.

  Args:
    task: of the run.
    rows: sources.Rows.
    index: (n,) which of them.
  """
  return loaders.prepare(rows.select(index), task.prompt, preprocess=task.preprocess)


def buckets(task) -> tuple[int, ...]:
  """Returns the lengths that prompts are padded to."""
  return (*(n for n in task.preprocess.buckets if n < task.max_prompt), task.max_prompt)


def join(task, rows, outputs: dict, made: dict, index) -> dict:
  """Returns the outputs of a split (N, …) with texts of some of its rows and their statistics.

  Args:
    task: of the run.
    rows: sources.Rows of the split.
    outputs: what the task predicts, with "index" (N,).
    made: what a step of `make_step` gave of `prompts`, in order: "answer" (n, K), "answer_length".
    index: (n,) which rows they are of.
  """
  found = task.compare(rows, index, decode(task, made))
  kept = {key: made[key] for key in ("answer", "answer_length")}
  return {**outputs, **texts.spread(outputs["index"], index, {**found, **kept})}


def decode(task, made: dict) -> list[str]:
  """Returns the texts (n,) of "answer" (n, K) and "answer_length" (n,)."""
  written = task if hasattr(task, "decode") else task.preprocess
  return [written.decode(row[:length])
          for row, length in zip(made["answer"], made["answer_length"], strict=True)]


def samples(run, outputs: dict, writer: bool) -> list[dict]:
  """Writes every text to samples.jsonl; returns some of test, for the card.

  Args:
    run: `run.Run`.
    outputs: split -> row name -> arrays; those with "answer" have texts.
    writer: whether this process writes.
  """
  if not writes(run.task):
    return []
  found = []
  for split, of in outputs.items():
    rows, tuned = run.data.splits[split], of[guards.TUNED]
    places = np.flatnonzero(tuned["generated"])
    said = {name: decode(run.task, {key: part[key][places] for key in ("answer", "answer_length")})
            for name, part in of.items() if "answer" in part}
    for at, place in enumerate(places):
      number = int(tuned["index"][place])
      found.append({"split": split, "where": rows.where(number), **run.task.sample(rows[number]),
                    "answers": {name: answers[at] for name, answers in said.items()}})
  if writer:
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in found)
    workdir.write_atomic(run.folder / SAMPLES, "".join(lines))
    (run.folder / ANSWERS).unlink(missing_ok=True)
  return [sample for sample in found if sample["split"] == "test"][:SHOWN]


def _choose(run, examples: dict, names) -> dict:
  """Returns split -> (n,) the rows that texts are written for, whatever the run's own seed."""
  return {name: loaders.take(examples[name], run.task.generate_rows,
                             run.config.data.split_seed).indices for name in names}


def _loaders(run, chosen: dict) -> dict:
  c = run.config.train
  return {
    name: runs.loader(run, prompts(run.task, run.data.splits[name], index),
                      c.eval_batch or 2 * c.batch, buckets=buckets(run.task))
    for name, index in chosen.items()
  }
