"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values in every layer.

Before the keys and values of each self-attention stand P trained ones, which every query sees,
padding, causality and windows notwithstanding; grouped heads have as many as their key heads. The
leaves prefix_key and prefix_value (P, K * D) stand at the attention module and reach
`ft.models.attention` through its `prefix`. Positions of a decoder-only model are shifted by P, as
if the prefix were text that was read before (what transformers does with past_key_values); those
of encoders, and of encoder-decoders, are not. The keys and values are trained themselves; the
paper's reparametrisation by a network, which PEFT drops when it saves, is not offered. Generation
reads the prefix like any adapter, given Tuned.interceptor. Plain weights cannot compute it.
"""

import re

import numpy as np

from ft import errors, tune
from ft.models import attention, decoder
from ft.tune import adapters, prompt
from ft.weights import stacking

KEYS = {
  "length": (20, "trained keys and values before those of each layer", (1, None)),
}
PEFT = "PREFIX_TUNING"

_LEAVES = ("prefix_key", "prefix_value")
_START = 0.02  # standard deviation: of small weight beside what the model attends to
_VALUE_OF = {"key": "value", "k": "v", "k_proj": "v_proj"}
_OUTPUTS = ("output", "o", "out_proj")
_CROSS = re.compile(r"(^|/)(cross_attention|encoder_attn)(/|$)")


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the prefixes and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: the model has no self-attention, or no room for the prefix.
  """
  leaves = {}
  for path, (width, count) in attentions(variables, head).items():
    alone = [path] if count is None else [stacking.numbered(path, i) for i in range(count)]
    for name in _LEAVES:
      draws = [adapters.generator(rng, f"{one}/{name}").normal(0, _START, (config.length, width))
               for one in alone]
      leaves[f"{adapters.COLLECTION}/{path}/{name}"] = np.asarray(
        draws[0] if count is None else draws, np.float32)
  paths = {path.split("/", 1)[1].rpartition("/")[0] for path in leaves}
  return adapters.beside(
    leaves, config, variables, head,
    interceptor=_interceptor(paths, config.length, prompt.positions(context)))


def attentions(variables, head=()) -> dict:
  """Returns {path of a self-attention: (width K * D of its keys, layers if stacked or None)}."""
  known, found = adapters.layers_of(variables, head), {}
  for path, layer in known.items():
    module, _, name = path.rpartition("/")
    out = [known[f"{module}/{end}"] for end in _OUTPUTS if f"{module}/{end}" in known]
    if _CROSS.search(module) or layer.kind != "linear" or not out:
      continue
    count = layer.leaf.shape[0] if stacking.is_stacked(module) else None
    if f"{module}/{_VALUE_OF.get(name)}" in known:
      found[module] = layer.leaf.shape[-1], count
    elif name == "qkv":  # queries are as wide as what the output layer reads
      found[module] = (layer.leaf.shape[-1] - out[0].leaf.shape[-2]) // 2, count
  if not found:
    raise errors.UserError(
      "tune.method='prefix' stands before the keys and values of self-attention, and this model "
      "has none (layers such as attention/key and attention/value); its layers are:\n  "
      + "\n  ".join(known))
  return found


def _interceptor(paths: set, length: int, limit):
  def run(call, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__":
      return call(*args, **kwargs)
    if not module.path and isinstance(module, decoder.Decoder):
      return call(**_shifted(module, length, limit, *args, **kwargs))
    path = "/".join(module.path)
    if path not in paths or not module.has_variable(adapters.COLLECTION, _LEAVES[0]):
      return call(*args, **kwargs)
    with attention.prefix(*(module.get_variable(adapters.COLLECTION, name) for name in _LEAVES)):
      return call(*args, **kwargs)

  return run


def _shifted(module, length, limit, input_ids, attention_mask=None, position_ids=None,
             segment_ids=None, cache_index=None) -> dict:
  """Returns a decoder's inputs with positions behind the prefix, where there is one."""
  if adapters.COLLECTION in module.variables:
    if position_ids is None:
      position_ids = module.positions(input_ids.shape[1], cache_index)
    prompt.check_length(length, input_ids.shape[1], limit)
    position_ids = position_ids + length
  return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
          "segment_ids": segment_ids, "cache_index": cache_index}


def peft_config(config, context) -> dict:
  """Returns this method's keys of adapter_config.json."""
  heads, size, count = _sizes(context)
  return {"num_virtual_tokens": config.length, "token_dim": heads * size, "num_layers": count,
          "num_attention_heads": heads, "num_transformer_submodules": 1,
          "encoder_hidden_size": heads * size, "prefix_projection": False}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of tune.* that adapter_config.json states; a projection is dropped in files."""
  return {"length": adapter_config["num_virtual_tokens"]}


def peft_tensors(flat: dict, config, context) -> dict:
  """Returns {name in PEFT's file: array (P, 2 * layers * K * D)} of {path: leaf}: k0, v0, k1, …."""
  del config
  _sizes(context)
  alone = stacking.unstack({path: np.asarray(leaf, np.float32) for path, leaf in flat.items()
                            if path.endswith(_LEAVES)})
  ordered = sorted(alone, key=lambda path: (stacking.split(path)[1], path.endswith(_LEAVES[1])))
  return {"prompt_embeddings": np.concatenate([alone[path] for path in ordered], axis=1)}


def peft_leaves(tensors: dict, config, context) -> dict:
  """Returns {path: leaf} of {name in PEFT's file: array}.

  Raises:
    UserError: the file is for another model, or the model is no decoder.
  """
  heads, size, count = _sizes(context)
  array = np.asarray(tensors["prompt_embeddings"], np.float32)
  if array.shape != (config.length, 2 * count * heads * size):
    raise errors.UserError(
      f"prompt_embeddings is of shape {array.shape}; this model and tune.length={config.length} "
      f"need {(config.length, 2 * count * heads * size)}: keys and values of {count} layers with "
      f"{heads} key heads of {size}")
  parts = array.reshape(config.length, count, 2, heads * size).transpose(2, 1, 0, 3)
  leaves = {}
  for path in attentions(context.pretrained.variables, context.pretrained.head):
    layer = stacking.split(path)[1]
    for name, part in zip(_LEAVES, parts, strict=True):
      leaves[f"{adapters.COLLECTION}/{path}/{name}"] = part if layer is None else part[layer]
  return leaves


def _sizes(context) -> tuple:
  """Returns (key heads, their size, layers) of a decoder, whose prefixes alone PEFT computes."""
  if not isinstance(context.pretrained.module, decoder.Decoder):
    raise errors.UserError(
      "PEFT's prefix files are for decoder-only language models: of an encoder-decoder `peft` "
      "prefixes the decoder only, and with transformers 5 it drops the prefix of an encoder")
  config = context.pretrained.config

  def first(*names):
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

  heads = first("num_attention_heads", "n_head")
  size = first("head_dim") or first("hidden_size", "n_embd") // heads
  return first("num_key_value_heads") or heads, size, first("num_hidden_layers", "n_layer")
