"""Replay: rows of what was known are trained on, or held, beside the new ones.

Every step takes share x train.batch further rows of `source`, in an order of their own that is a
function of the step. `loss=task` trains on them with the task's loss (mixing, rehearsal); `loss=kl`
needs no labels and holds the outputs on them close to the base's, T² KL(base || ours), see
ft/anchor/kl.py. Both keep a language model's nats on other text within thousandths where plain
fine-tuning loses a tenth (arXiv:2605.26097). `source=self` is for language models whose first data
is not at hand: the base draws `rows` texts from its start token once, which are kept in the run's
folder. Cost: `share` more forward and backward passes; with kl the base's forward pass on those
rows and a copy of what trains; with self the drawing.
"""

import json
import math

import jax
import numpy as np

from ft import anchor, errors, mesh, state, workdir
from ft import run as runs
from ft.data import loader as loaders
from ft.models import generate

KEYS = {
  "source": ("", "rows to replay, as data.train; self: texts that the base model draws; '': off"),
  "share": (0.25, "replayed rows a new row, in each step", (0.0, 1.0)),
  "weight": (1.0, "weight of the mean loss on the replayed rows", (0.0, None)),
  "loss": ("task", "on the replayed rows: the task's, or the divergence from the base",
           ["task", "kl"]),
  "temperature": (1.0, "kl: T, above 1 unlikely answers count for more", (0.01, None)),
  "rows": (256, "self: texts drawn", (1, None)),
  "max_new_tokens": (64, "self: most tokens of a text", (1, None)),
}
SELF = "self"
TEXTS = "replay.jsonl"  # in the run's folder


def make(config, context) -> anchor.Part | None:
  """Returns the term and its loader; see `ft.anchor.make`."""
  if not config.source:
    return None
  run = context.run
  size = config.share * run.config.train.batch
  if not size or size != math.floor(size):
    raise errors.UserError(f"anchor.replay.share={config.share}: {size:g} rows beside "
                           f"train.batch={run.config.train.batch}; choose a share that makes "
                           "them a whole number above 0")
  mesh.check_batch(run.mesh, int(size), run.config.train.accumulate, "anchor.replay.share x batch")
  if config.source == SELF:
    examples = loaders.prepare(draw(config, run), run.task.example, preprocess=run.preprocess,
                               drop_policy="count", cache_bytes=run.config.data.cache_bytes)
  else:
    examples = context.examples(config.source, "anchor.replay.source", config.loss == "task")
  # One length for all: a bucket more would be compiled beside each of the run's.
  beside = runs.loader(run, examples, int(size), training=True, buckets=())
  if config.loss == "task":
    loss = lambda apply, variables, batch, rng, base: run.task.loss(  # noqa: E731
      apply, variables, batch, rng)
  else:
    loss = held(anchor.divergence(context, config.temperature, "anchor.replay.loss=kl"))
  return anchor.Part(term=state.Term(loss, "replay", config.weight), start=config.loss == "kl",
                     beside={"replay": beside})


def held(measure):
  """Returns the loss of a term: the divergence from the base; see `anchor.divergence`."""
  def loss(apply, variables, batch, rng, base):
    return *measure(anchor.Once(apply), (variables, rng), (base(), None), batch), {}

  return loss


def draw(config, run) -> list[dict]:
  """Returns rows {"text"} that the model draws from its start token, or drew for this run before.

  Raises:
    UserError: it is no language model that continues a text, or has no start token.
  """
  kept = run.folder / TEXTS
  there = kept.is_file()
  mesh.barrier("replay")
  if there:
    return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
  pretrained = run.pretrained
  start = json.loads(getattr(pretrained.config, "source", "{}")).get("bos_token_id")
  start = getattr(pretrained.config, "bos_token_id", start)
  if pretrained.config.head != "lm" or hasattr(pretrained.module, "decode"):
    raise errors.UserError("anchor.replay.source=self: only a language model can draw texts of "
                           "its own; name rows in anchor.replay.source")
  if start is None:
    raise errors.UserError("anchor.replay.source=self: config.json has no bos_token_id to start a "
                           "text with; name rows in anchor.replay.source")
  settings = generate.Settings.of(
    pretrained, max_new_tokens=config.max_new_tokens, do_sample=True, temperature=1.0, top_k=0,
    top_p=1.0, num_beams=1)
  size, texts = run.config.train.batch, []
  prompt = {"input_ids": np.full((size, 1), start, np.int32)}
  for number in range(math.ceil(config.rows / size)):
    run.poll()
    key = jax.random.fold_in(jax.random.key(run.config.seed), number)
    made = generate.generate(pretrained, prompt, settings, rng=key)
    texts += [run.preprocess.decode(row[:length])
              for row, length in zip(made.tokens, made.lengths, strict=True)]
  rows = [{"text": text} for text in texts[:config.rows]]
  if jax.process_index() == 0:
    workdir.write_atomic(kept, "".join(json.dumps(row) + "\n" for row in rows))
  return rows
