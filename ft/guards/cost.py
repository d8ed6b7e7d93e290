"""Cost: what the run took, in time, memory and storage.

`evidence.cost` is a dict of what the run recorded, each entry optional:
  phases              phase name -> wall seconds, in the order they ran
  examples            training examples seen            steps             training steps taken
  examples_per_second of the training loop without compilation
  compile_seconds     of the compiled functions         data_wait_share   share of loop time
  parameters          of the model                      trainable         of them
  checkpoint_bytes    of the newest checkpoint          devices           how many
  peak_bytes          of device memory, where the platform tells
"""

import resource
import sys

from ft import guards

KEYS = {
    "on": (True, "report time, memory and storage"),
    "wait": (0.2, "share of the loop spent waiting for data that counts as a warning", (0.0, 1.0)),
}


def measure(config, evidence):
  """The guard; numbers are what the card's cost section shows."""
  cost = dict(evidence.cost)
  if not cost:
    return guards.not_measured("no times were recorded")
  phases = {name: float(seconds) for name, seconds in (cost.get("phases") or {}).items()}
  cost["phases"] = phases
  cost["wall_seconds"] = sum(phases.values())
  cost["peak_host_bytes"] = peak_host_bytes()
  if cost.get("parameters"):
    cost["trainable_share"] = cost.get("trainable", 0) / cost["parameters"]
  wait = cost.get("data_wait_share") or 0.0
  words = _words(cost)
  if wait > config.wait:
    words += f" The loop waited for data {100 * wait:.0f} % of its time."
  return guards.result("warning" if wait > config.wait else "ok", words, cost)


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


def _words(cost):
  parts = [f"{duration(cost['wall_seconds'])} in all"] if cost["phases"] else []
  if cost.get("compile_seconds") is not None:
    parts.append(f"{duration(cost['compile_seconds'])} of it compiling")
  if cost.get("examples_per_second") is not None:
    parts.append(f"{cost['examples_per_second']:.1f} examples/s in training")
  parts.append(f"{size(cost['peak_host_bytes'])} of host memory at most")
  if "trainable_share" in cost:
    parts.append(f"{percent(cost['trainable_share'])} of {cost['parameters']:,} parameters trained")
  if cost.get("checkpoint_bytes") is not None:
    parts.append(f"a checkpoint of {size(cost['checkpoint_bytes'])}")
  text = ", ".join(parts) + "."
  return text[0].upper() + text[1:]
