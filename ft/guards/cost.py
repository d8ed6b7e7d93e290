"""Cost: what the run took, in time, memory and storage.

`evidence.cost` is a dict of what the run recorded, each entry optional:
  phases              phase name -> wall seconds, in the order they ran
  examples            of training that were seen: rows, or what the task makes of them
  steps               training steps taken
  examples_per_second of the training loop without compilation
  compile_seconds     of the compiled functions         data_wait_share   share of loop time
  parameters          of the model                      trainable         of them
  checkpoint_bytes    of the newest checkpoint          devices           how many
  peak_bytes          of device memory, where the platform tells
  platform, device_kind   of jax
  used                what `compute.Meter` read: seconds, cpu_seconds, joules

Operations are by formula where rows are tokens (see `compute.training_flops`), else three times
those that the compiler counts in a forward pass. Beside the run stand the baselines: what the
frozen probe and the pretrained model cost and reached.
"""

import resource
import sys

from absl import logging

from ft import compute, guards

KEYS = {
    "on": (True, "report time, memory and storage"),
    "wait": (0.2, "share of the loop spent waiting for data that counts as a warning", (0.0, 1.0)),
    "scratch": (False, "train the same model from random weights too, for as many steps, and say "
                "what pretraining saved: as much time again"),
    "core_watts": (10.0, "watts assumed for a busy CPU core where no counter can be read",
                   (0.0, None)),
    "device_watts": (0.0, "watts assumed for an accelerator where no counter can be read; 0: those "
                     "of its datasheet", (0.0, None)),
}


def gather(config, context):
  """Returns what operations are counted from; {} where that is not known, which costs no run."""
  del config
  try:
    return _work(context)
  except Exception:  # noqa: BLE001  the other numbers of this guard do not depend on it
    logging.exception("guard cost: operations could not be counted")
    return {}


def _work(context) -> dict:
  """The parameters that rows meet, and tokens or forward operations of an example of training."""
  from ft import run as runs  # the card, which has this guard's words, should not wait for jax
  from ft import tune

  run, tuned = context.run, context.tuned
  if context.tokens_each is not None and hasattr(run.preprocess, "tokenizer"):
    trained = tune.flatten(tuned.trainable)
    shapes = {**tune.flatten(tune.shapes(tuned)), **trained}
    head = getattr(run.pretrained.config, "head", "")
    return {"tokens_per_example": context.tokens_each,
            "matmul_parameters": compute.matmul_parameters(shapes, head),
            "matmul_trained": compute.matmul_parameters(trained, head),
            "through_body": not tuned.only_head}
  if run.config.model.scan:
    return {}  # the compiler counts the body of a loop once
  final = context.final
  load = runs.loader(run, context.examples["validation"],
                     run.config.train.eval_batch or 2 * run.config.train.batch)
  batch = run.place(load.batch(0))
  lowered = final.predict.lower(final.state.trainable, final.state.mutable, final.frozen, batch)
  flops = lowered.cost_analysis()["flops"] / len(batch["index"]) * context.rows_each
  # Of a frozen base with adapters, no gradient of its weights is made.
  frozen = all(not row.path.startswith("params/") or tune.under(row.path, run.pretrained.head)
               for row in tuned.table) and not tuned.only_head
  return {"forward_flops": flops, "factor": 2 if frozen else 3}


def measure(config, evidence):
  """The guard; numbers are what the card's cost section shows.

  Those of `evidence.cost` but used, wall_seconds, peak_host_bytes, trainable_share;
  where they are known tokens and tokens_per_second (padding not counted), flops of training,
  flops_by (how they were counted), utilisation (share of the device's peak); energy: joules,
  measured, source; beside: name, metric, value, n, seconds, what for each row of the results.
  """
  cost = dict(evidence.cost)
  if not cost:
    return guards.not_measured("no times were recorded")
  phases = {name: float(seconds) for name, seconds in (cost.get("phases") or {}).items()}
  cost["phases"] = phases
  cost["wall_seconds"] = sum(phases.values())
  cost["peak_host_bytes"] = peak_host_bytes()
  if cost.get("parameters"):
    cost["trainable_share"] = cost.get("trainable", 0) / cost["parameters"]
  cost |= _operations(cost, evidence.gathered.get("cost"))
  if used := cost.pop("used", None):
    cost["energy"] = compute.energy(used, cost["platform"], cost["device_kind"],
                                    cost.get("devices", 1), config.core_watts, config.device_watts)
  cost["beside"] = _beside(evidence, phases)
  wait = cost.get("data_wait_share") or 0.0
  words = _words(cost)
  if wait > config.wait:
    words += f" The loop waited for data {100 * wait:.0f} % of its time."
  return guards.result("warning" if wait > config.wait else "ok", words, cost)


def _operations(cost, work) -> dict:
  """Tokens, operations and utilisation, as far as `gather` found what they follow from."""
  if not isinstance(work, dict) or not work or not cost.get("examples"):
    return {}
  examples, rate, found = cost["examples"], cost.get("examples_per_second"), {}
  if "tokens_per_example" in work:
    tokens = examples * work["tokens_per_example"]
    flops = compute.training_flops(work["matmul_parameters"], work["matmul_trained"], tokens,
                                   work["through_body"])
    found |= {"tokens": round(tokens),
              "flops_by": "formula: 2 N forward, 2 N back and 2 a trained weight, a token"}
    if rate:
      found["tokens_per_second"] = rate * work["tokens_per_example"]
  else:
    flops = work["factor"] * examples * work["forward_flops"]
    found["flops_by"] = f"{work['factor']} times what the compiler counts in a forward pass"
  found["flops"] = float(flops)
  peak = compute.peak(cost.get("device_kind", ""))[0]
  if peak and rate:
    found["utilisation"] = flops / examples * rate / (peak * cost.get("devices", 1))
  return found


def _beside(evidence, phases) -> list[dict]:
  """What each row of the results on test reached, and the seconds that it took."""
  rows, found = evidence.outputs.get("test") or {}, []
  once = ("one forward pass of the untuned model over every row, and what is fitted to it, "
          "all baselines together")
  for name, outputs in rows.items():
    seconds, what = phases.get("baselines"), once
    if name == guards.TUNED:
      seconds, what = phases.get("training"), "training, evaluations within it included"
    elif name == guards.MAJORITY:
      seconds, what = 0.0, "the labels of the training rows"
    found.append({"name": name, "metric": evidence.metric,
                  "value": float(evidence.metrics(outputs)[evidence.metric]),
                  "n": len(next(iter(outputs.values()))), "seconds": seconds,
                  "what": what})
  return found


def peak_host_bytes():
  """Largest resident memory of this process so far, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes.


def duration(seconds):
  """"8.4 s", "3 min 12 s" or "2 h 05 min"."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  whole = round(seconds)
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02d} s"
  return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share):
  """"100 %", "0.38 %", "0.012 %": two digits that say something."""
  return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.4g} %"


def size(count):
  """Bytes in words: "512 B", "43.1 MiB"."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024 or unit == "GiB":
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024


def operations(flops):
  """"21.3 TFLOP": floating-point operations in words."""
  for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"):
    if flops < 1000 or unit == "EFLOP":
      return f"{flops:.3g} {unit}"
    flops /= 1000


def watt_hours(joules):
  """"1.2 Wh" or "3.4 kWh" of joules."""
  hours = joules / 3600
  return f"{hours:.3g} Wh" if hours < 1000 else f"{hours / 1000:.3g} kWh"


def _words(cost):
  parts = [f"{duration(cost['wall_seconds'])} in all"] if cost["phases"] else []
  if cost.get("compile_seconds") is not None:
    parts.append(f"{duration(cost['compile_seconds'])} of it compiling")
  if cost.get("examples_per_second") is not None:
    parts.append(f"{cost['examples_per_second']:.1f} examples/s in training")
  if cost.get("flops"):
    share = f" ({100 * cost['utilisation']:.1f} % of the peak)" if "utilisation" in cost else ""
    parts.append(f"{operations(cost['flops'])} of training{share}")
  if cost.get("energy"):
    kind = "" if cost["energy"]["measured"] else " (an estimate)"
    parts.append(f"{watt_hours(cost['energy']['joules'])}{kind}")
  parts.append(f"{size(cost['peak_host_bytes'])} of host memory at most")
  if "trainable_share" in cost:
    parts.append(f"{percent(cost['trainable_share'])} of {cost['parameters']:,} parameters trained")
  if cost.get("checkpoint_bytes") is not None:
    parts.append(f"a checkpoint of {size(cost['checkpoint_bytes'])}")
  text = ", ".join(parts) + "."
  return text[0].upper() + text[1:]
