"""What every parity test does: outputs, gradients, round trip; and the table they print.

`check` takes a reference model that transformers (or another upstream package) computes, saves it,
loads it with ft, and compares, all in float32:

    outputs      within 1e-4 of the largest value of each
    gradients    of sum(output * fixed random weights) with respect to every parameter, the same
    round trip   models.export(models.load(x)) holds bitwise the tensors of x, and upstream opens it
                 without a missing, unexpected or mismatched key
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ft import models
from ft.models import layers
from ft.weights import names, tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
core_model_loading = pytest.importorskip("transformers.core_model_loading")

TOLERANCE = 1e-4
ROWS = []  # (family, configuration, largest relative difference of outputs, of gradients)


def difference(got, want, floor=1e-6) -> float:
  """Returns the largest difference, relative to the largest value; infinite for other shapes."""
  got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
  if got.shape != want.shape or not np.isfinite(got).all():
    return np.inf
  return float(np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), floor))


def randomise(model, seed=1, scale=0.3):
  """Moves norms and biases of a fresh torch model off their zeros and ones; returns it, in eval."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim <= 1 or not bool(parameter.abs().max() > 0):
        parameter.add_(scale * torch.randn_like(parameter))
  return model.eval()


def tokens(vocab, rows=3, length=13, seed=0, left=False, first=3):
  """Returns input_ids and attention_mask, padded rows among them; no id below `first` is drawn."""
  rng = np.random.default_rng(seed)
  mask = np.ones((rows, length), np.int32)
  for row in range(1, rows):
    mask[row, :3 * row] = 0 if left else 1
    mask[row, length - 3 * row:] = 1 if left else 0
  return {"input_ids": np.where(mask, rng.integers(first, vocab, mask.shape), 0).astype(np.int32),
          "attention_mask": mask}


def as_torch(inputs):
  """Returns inputs as torch's: ints long, images (B, H, W, C) as (B, C, H, W)."""
  out = {}
  for key, value in inputs.items():
    value = np.asarray(value)
    if key == "pixel_values":
      value = np.moveaxis(value, -1, 1)
    out[key] = torch.tensor(value, dtype=torch.long if value.dtype.kind == "i" else None)
  return out


def check(family, case, model, inputs, outputs, folder, *, load=None, real=None, reopen=None,
          call=None, torch_inputs=None, gradients=True, table=True):
  """Compares a reference model with ft's reading of it; see the module's docstring.

  Args:
    family, case: the line of the table.
    model: torch module in evaluation mode, with save_pretrained.
    inputs: name -> array, of both models; images are (B, H, W, C).
    outputs: our output's name -> the reference's name, or a function of its output and inputs.
    folder: a fresh path to work in.
    load: keyword arguments of models.load.
    real: our output's name -> mask over its leading axes of what is compared (padding is not).
    reopen: the class that opens the export; the model's own if None.
    call: (pretrained, variables, inputs) -> dict; module.apply if None.
    torch_inputs: the reference's inputs where they are not `inputs`; a dict of tensors.
    gradients: False where the reference has none to compare.

  Returns:
    The Pretrained, for further checks.
  """
  source = folder / "upstream"
  model.save_pretrained(source)
  pretrained = models.load(str(source), **(load or {}))
  assert not pretrained.report.initialised, pretrained.report
  call = call or (lambda p, variables, kw: p.module.apply(variables, **kw))
  kw = {key: np.asarray(value) for key, value in inputs.items()}
  theirs = torch_inputs or as_torch(inputs)
  model.zero_grad()
  reference = model(**theirs)
  want = {name: get(reference, theirs) if callable(get) else reference[get]
          for name, get in outputs.items()}
  weights = {name: _weights(value, (real or {}).get(name)) for name, value in want.items()}


  def loss(params):
    out = call(pretrained, {**pretrained.variables, "params": params}, kw)
    out = {name: out[name] for name in want}
    return sum((out[name].astype(np.float32) * weights[name]).sum() for name in want), out

  run = jax.value_and_grad(loss, has_aux=True) if gradients else lambda p: (loss(p), None)
  (_, got), grads = jax.jit(run)(pretrained.variables["params"])
  worst = 0.0
  for name, value in want.items():
    seen = weights[name] != 0
    delta = difference(np.where(seen, got[name], 0), np.where(seen, value.detach().numpy(), 0))
    assert delta <= TOLERANCE, (family, case, name, delta)
    worst = max(worst, delta)
  worst_gradient = 0.0
  if gradients:
    sum((value * torch.tensor(weights[name])).sum() for name, value in want.items()).backward()
    worst_gradient = same_gradients(model, pretrained, grads, (family, case))
  round_trip(pretrained, source, folder / "exported", reopen or type(model), model, theirs)
  if table:
    ROWS.append((family, case, worst, worst_gradient))
  return pretrained


def _weights(value, real):
  """Returns fixed random weights of an output; zero where it is not real (padding)."""
  value = value.detach().numpy()
  weights = np.random.default_rng(7).normal(size=value.shape).astype(np.float32)
  if real is not None:
    real = np.asarray(real)
    weights = weights * real.reshape(real.shape + (1,) * (value.ndim - real.ndim))
  return weights


def compare_gradients(model, pretrained, loss, what) -> float:
  """`same_gradients` of loss(variables)."""
  grads = jax.jit(jax.grad(lambda p: loss({**pretrained.variables, "params": p})))(
      pretrained.variables["params"])
  return same_gradients(model, pretrained, grads, what)


def same_gradients(model, pretrained, grads, what) -> float:
  """Returns the largest relative difference of any parameter's gradient; asserts the tolerance."""
  rules = models.family_module(pretrained.family).NAMES
  layout = dataclasses.replace(pretrained.layout, dtypes={}, buffers={})
  got = {name: tensor.read() for name, tensor in names.dump_tree(
      names.flatten({"params": grads}), rules, layout, config=pretrained.config).items()}
  want = {_in_file(model, name, got): grad for name, grad in _gradients(model).items()}
  missing = want.keys() - got.keys()
  assert not missing, (what, "parameters without a gradient of ours", sorted(missing)[:5])
  largest = max(float(g.abs().max()) for g in want.values() if g is not None)
  worst = 0.0
  for name, gradient in want.items():
    gradient = np.zeros(got[name].shape, np.float32) if gradient is None else gradient.numpy()
    # A key's bias and the like have none but the rounding errors of sums of larger numbers.
    none = np.abs(gradient).max(initial=0) <= 1e-5 * largest
    delta = difference(got[name], gradient, floor=(1e-2 if none else 1e-3) * largest)
    assert delta <= TOLERANCE, (*what, f"gradient of {name}", delta)
    worst = max(worst, delta)
  return worst


def _gradients(model) -> dict:
  """Returns {name: gradient}, names and layout as save_pretrained writes the parameters."""
  want = {name: p.grad for name, p in model.named_parameters()}
  if not isinstance(model, transformers.PreTrainedModel):
    return want
  want = {name: torch.zeros_like(p) if p.grad is None else p.grad
          for name, p in model.named_parameters()}
  return core_model_loading.revert_weight_conversion(model, want)


def _in_file(model, name, file_names):
  """Returns the name under which save_pretrained writes a parameter: its prefix may differ."""
  if name in file_names:
    return name
  prefix = getattr(model, "base_model_prefix", "")
  tied = getattr(model, "all_tied_weights_keys", {}).get(name, name)
  for other in (f"{prefix}.{name}", name.removeprefix(f"{prefix}."), tied):
    if other in file_names:
      return other
  return name


def round_trip(pretrained, source, out, opener, model, inputs) -> None:
  """Asserts that the export holds bitwise the source's tensors, and that upstream opens it."""
  models.export(pretrained, out)
  same_tensors(source, out)
  # Implementations differ at padding that sees nothing, so it is opened with the model's own.
  same = getattr(getattr(model, "config", None), "_attn_implementation", None)
  again, info = opener.from_pretrained(out, output_loading_info=True, dtype=torch.float32,
                                       **({"attn_implementation": same} if same else {}))
  for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[key], (key, info[key])
  with torch.no_grad():
    first, second = model(**inputs), again.eval()(**inputs)
  for key, value in first.items():
    if isinstance(value, torch.Tensor):
      assert torch.allclose(value, second[key], rtol=1e-4, atol=1e-5, equal_nan=True), key
  stated = json.loads((source / "config.json").read_text())
  written = json.loads((out / "config.json").read_text())
  changed = {key for key in stated if written.get(key) != stated[key]}
  assert changed <= {"transformers_version"}, changed


def same_tensors(a, b) -> None:
  """Asserts equal names, shapes, dtypes and bits of two folders' tensors."""
  a, b = (tensors.open_tensors(folder) for folder in (a, b))
  assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:8]
  for name in a:
    assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
    assert a[name].read().tobytes() == b[name].read().tobytes(), name


def check_scan(pretrained, inputs, folder, call=None, tolerance=2e-6) -> None:
  """Asserts that model.scan=True gives the same outputs, gradients and exported file.

  Args:
    pretrained: unrolled, from `check`, whose folder holds "upstream".
  """
  call = call or (lambda p, variables, kw: p.module.apply(variables, **kw))
  kw = {key: np.asarray(value) for key, value in inputs.items()}
  scanned = models.load(str(folder / "upstream"), head=pretrained.config.head,
                        compute=layers.Compute(scan=True, remat="full"))
  assert any("/layers/" in path for path in names.flatten(scanned.variables))
  want = jax.jit(lambda v: call(pretrained, v, kw))(pretrained.variables)
  got = jax.jit(lambda v: call(scanned, v, kw))(scanned.variables)
  for name, value in want.items():
    if isinstance(value, jax.Array):
      assert difference(got[name], value) <= tolerance, name
  models.export(scanned, folder / "scanned")
  same_tensors(folder / "upstream", folder / "scanned")
