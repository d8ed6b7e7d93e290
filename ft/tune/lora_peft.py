"""LoRA's own part of PEFT's adapter_config.json, in both directions.

Facts from peft 0.21.2. The scale is lora_alpha/r or, with use_rslora, lora_alpha/sqrt(r), with the
layer's own r and lora_alpha where a pattern says so: the first key k of rank_pattern for which
`(.*\\.)?(k)$` matches the module's name from its start.

An embedding that is the output layer too. `peft` adapts the lookup alone, unless the file says
ensure_weight_tying: then the output layer has an adapter whose A and B are the embedding's,
transposed (the file holds both copies). Its merging adds the update of both to the one table, and
so changes what the model computes. Here the update belongs to the table, acts on both sides, and
merges exactly; files with ensure_weight_tying say the same, others are refused (`check_tying`).
"""

import math
import re

from ft import errors

PEFT = "LORA"

_UNKNOWN = {  # keys of adapter_config.json that change what is computed, and how
  "use_qalora": "it pools the inputs of quantised layers (QA-LoRA)",
  "alora_invocation_tokens": "it acts on the tokens after a certain text only (aLoRA)",
  "arrow_config": "it is chosen among others token by token (Arrow)",
  "megatron_config": "it belongs to Megatron's sharded layers",
  "target_parameters": "it adapts bare parameters, such as stacked experts, not layers",
  "layer_replication": "it repeats layers of the base",
  "lora_bias": "its B has a bias",
  "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
  "kasa_config": "loading it cuts singular values off the base (KaSA)",
  "velora_config": "it compresses what the backward pass reads (VeLoRA)",
  "monteclora_config": "it samples its weights (MonteCLoRA)",
  "trainable_token_indices": "it replaces rows of the embedding",
}
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS = (True, False, None, "gaussian", "orthogonal", "eva")  # the file's A and B are all


def peft_config(config) -> dict:
  """Returns the method's keys of adapter_config.json; for the patterns see `patterns_to_peft`."""
  root = config.scale == "alpha/sqrt(r)"
  grown = config.start != "zero"  # written as a plain update of twice the rank: the scale stays
  return {
    "r": config.rank * (2 if grown else 1),
    "lora_alpha": config.alpha * ((math.sqrt(2) if root else 2) if grown else 1),
    "use_rslora": root,
    "lora_dropout": config.dropout,
    "use_dora": config.dora,
    "bias": config.bias,
    "init_lora_weights": True,
  }


def peft_values(adapter_config: dict) -> dict:
  """Returns the values of `tune.*` that a file's adapter_config.json stands for, patterns apart.

  Raises:
    UserError: the file is of a kind that is not computed here, or `peft` changes the base weights
      when it loads it.
  """
  for key, reason in _UNKNOWN.items():
    if adapter_config.get(key):
      raise errors.UserError(f"adapter_config.json: {key} is set, and {reason}; such LoRA files "
                             "cannot be read")
  start = adapter_config.get("init_lora_weights", True)
  if isinstance(start, str) and start.lower().startswith(_MUTATING):
    raise errors.UserError(
      f"adapter_config.json: with init_lora_weights={start!r} peft changes the base weights when "
      "it loads the adapter, so that the file means nothing without them; save it with "
      "path_initial_model_for_weight_conversion, which turns it into a plain LoRA")
  if start not in _HARMLESS:
    raise errors.UserError(f"adapter_config.json: init_lora_weights={start!r} is not known here; "
                           "true, false, 'gaussian', 'orthogonal' and 'eva' are")
  return {
    "rank": int(adapter_config.get("r", 8)),
    "alpha": float(adapter_config.get("lora_alpha", 8)),
    "scale": "alpha/sqrt(r)" if adapter_config.get("use_rslora") else "alpha/r",
    "dropout": float(adapter_config.get("lora_dropout") or 0.0),
    "dora": bool(adapter_config.get("use_dora")),
    "bias": adapter_config.get("bias") or "none",
    "start": "zero",
  }


def patterns_from_peft(adapter_config: dict, names: dict[str, str]) -> dict[str, tuple]:
  """Returns the values of tune.rank_pattern and tune.alpha_pattern.

  Args:
    adapter_config: of the file.
    names: the name of each adapted module in torch -> our path of the layer, with its number.
  """
  out = {}
  for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
    given = adapter_config.get(key) or {}
    found = {path: _matched(given, name) for name, path in names.items()}
    out[key] = tuple(f"^{re.escape(path)}$={kind(value)}" for path, value in found.items()
                     if value is not None)
  return out


def _matched(given: dict, name: str):
  """The value of `peft`'s first key that matches a module's name, or None."""
  return next((value for key, value in given.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def check_tying(adapter_config: dict, tied: bool) -> None:
  """Raises UserError where a file adapts the lookup alone of a table that is the output layer too.

  Args:
    adapter_config: of a file that adapts the embedding.
    tied: whether the model's output layer is its embedding.
  """
  if tied and not adapter_config.get("ensure_weight_tying"):
    raise errors.UserError(
      "adapter_config.json: the adapter changes the embedding's lookup, but not the output layer "
      "that has the same weights (ensure_weight_tying is false); no weights of this model compute "
      "that. Train it with ensure_weight_tying=True")
