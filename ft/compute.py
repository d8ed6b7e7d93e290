"""What a computation takes: floating-point operations by formula, a device's peak, and energy."""

import contextlib
import dataclasses
import pathlib
import resource
import threading
import time
from collections.abc import Mapping

import numpy as np

# Part of jax's device_kind -> (peak of dense bfloat16 matrix products, V100 and T4 float16, in
# FLOP/s of what jax calls one device; watts of its datasheet, None where the vendor states none).
# The first that is found counts.
PEAKS = {
  "B200": (2250e12, 1000), "H200": (989e12, 700), "H100 PCIe": (756e12, 350),
  "H100 NVL": (835e12, 400), "H100": (989e12, 700), "A100": (312e12, 400), "A10G": (70e12, 150),
  "A10": (125e12, 150), "L40S": (362e12, 350), "L40": (181e12, 300), "L4": (121e12, 72),
  "V100": (125e12, 300), "T4": (65e12, 70), "RTX 4090": (165e12, 450), "RTX 3090": (71e12, 350),
  "TPU v2": (22.5e12, None), "TPU v3": (61.5e12, None), "TPU v4": (275e12, None),
  "TPU v5 lite": (197e12, None), "TPU v5e": (197e12, None), "TPU v5": (459e12, None),
  "TPU v6": (918e12, None),
}
RAPL = pathlib.Path("/sys/class/powercap")
EVERY = 60.0  # seconds between readings of counters that start again from 0 when they are full


def peak(kind: str) -> tuple[float | None, float | None]:
  """Returns (FLOP/s, watts) of a device of this kind; None for what is not known of it."""
  return next((found for name, found in PEAKS.items() if name.lower() in kind.lower()),
              (None, None))


def matmul_parameters(shapes: Mapping, head: str = "") -> int:
  """Returns how many parameters every token is multiplied with.

  Tables that are looked up in cost no operation, unless the head of a language model is the same
  table again.

  Args:
    shapes: path -> array or shape of it, see `tune.flatten`.
    head: what stands on the body, e.g. "lm".
  """
  sizes = {path: int(np.prod(leaf.shape)) for path, leaf in shapes.items()}
  total = sum(size for path, size in sizes.items() if not path.endswith("/embedding")
              and len(shapes[path].shape) > 1)
  tables = [size for path, size in sizes.items() if path.endswith("/embedding")]
  tied = head == "lm" and tables and not any("lm_head" in path for path in sizes)
  return total + (max(tables) if tied else 0)


def training_flops(parameters: int, trained: int, tokens: float,
                   through_body: bool = True) -> float:
  """Returns the operations of training by formula: 6 N a token where all of N trains.

  2 N a token forward, 2 N back through the activations, 2 a trained parameter for its gradient
  (Kaplan et al. 2020, arXiv:2001.08361): 4 N and a little of a frozen base with adapters. Attention
  scores, 12 times layers, width and length a token, are left out.

  Args:
    parameters, trained: that tokens are multiplied with; see `matmul_parameters`.
    tokens: of all rows of all steps, padding not counted.
    through_body: whether gradients pass through the body; False where only a head trains.
  """
  return tokens * (2 * parameters + 2 * trained + (2 * parameters if through_body else 0))


@dataclasses.dataclass
class Meter:
  """Energy from its making on, as far as a counter can be read: of the CPU (RAPL) and GPUs (NVML).

  RAPL counts the whole machine's packages and NVML all of its GPUs, whoever uses them.

  Attributes:
    before: what `read` gave to the processes before this one, of a run that goes on.
  """

  begun: float = dataclasses.field(default_factory=time.monotonic)
  before: Mapping = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._cpu, self._packages, self._lock = _cpu_seconds(), packages(), threading.Lock()
    self._last = {path: _read(path / "energy_uj") for path in self._packages}
    self._joules = 0.0
    self._gpus = gpu_joules()
    self._stop = threading.Event()
    if self._packages:
      threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self):
    while not self._stop.wait(EVERY):
      self._sample()

  def _sample(self):
    with self._lock:
      for path, full in self._packages.items():
        now, before = _read(path / "energy_uj"), self._last[path]
        if now is not None and before is not None:
          self._joules += ((now - before) % full) / 1e6
        self._last[path] = now

  def read(self) -> dict:
    """Returns what was used so far, by the processes before this one too.

    {"seconds", "cpu_seconds"}, and where counters could be read by all of them "rapl_joules" and
    "nvml_joules".
    """
    found = {"seconds": time.monotonic() - self.begun, "cpu_seconds": _cpu_seconds() - self._cpu}
    if self._packages:
      self._sample()
      found["rapl_joules"] = self._joules
    if self._gpus is not None:
      found["nvml_joules"] = gpu_joules() - self._gpus
    if not self.before:
      return found
    return {key: value + self.before[key] for key, value in found.items() if key in self.before}


def energy(used: Mapping, platform: str, kind: str, devices: int, core_watts: float,
           device_watts: float) -> dict:
  """Returns {"joules", "source", "measured"} of what a `Meter` read; estimates are called so.

  Args:
    used: of `Meter.read`.
    platform, kind, devices: of jax.
    core_watts: assumed of a busy CPU core where RAPL cannot be read.
    device_watts: assumed of an accelerator where NVML cannot be read; 0: those of its datasheet.
  """
  parts, measured = [], True
  if "rapl_joules" in used:
    parts.append((used["rapl_joules"], "CPU packages by RAPL, the whole machine"))
  else:
    measured = False
    seconds = used["cpu_seconds"]
    parts.append((seconds * core_watts,
                  f"estimate: {core_watts:g} W a busy CPU core, {seconds:.0f} s of them"))
  if platform != "cpu":
    watts = device_watts or peak(kind)[1]
    if "nvml_joules" in used:
      parts.append((used["nvml_joules"], "GPUs by NVML, all of the machine"))
    elif watts:
      measured = False
      parts.append((used["seconds"] * watts * devices,
                    f"estimate: {watts:g} W for each {kind} all the time"))
    else:
      measured = False
      parts.append((0.0, f"{kind} not counted: its watts are not known"))
  return {"joules": float(sum(joules for joules, _ in parts)), "measured": measured,
          "source": "; ".join(said for _, said in parts)}


def packages() -> dict[pathlib.Path, int]:
  """Returns the readable RAPL domains of whole packages -> micro-joules at which they restart."""
  found = {}
  with contextlib.suppress(OSError):
    for path in sorted(RAPL.glob("intel-rapl:*")):
      full = _read(path / "max_energy_range_uj")
      if path.name.count(":") == 1 and full and _read(path / "energy_uj") is not None:
        found[path] = full
  return found


def gpu_joules() -> float | None:
  """Returns what all GPUs took since their driver started; None where NVML does not tell."""
  import jax  # slow, and the card reads this module without

  if jax.default_backend() != "gpu":
    return None
  try:
    import pynvml  # comes with nvidia-ml-py, which nothing here depends on

    pynvml.nvmlInit()
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
  except Exception:  # noqa: BLE001  whatever is missing there, the estimate takes its place
    return None


def _read(path: pathlib.Path) -> int | None:
  try:
    return int(path.read_text())
  except (OSError, ValueError):
    return None


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime
