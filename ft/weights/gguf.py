"""Reads a GGUF file as the Hugging Face checkpoint that it was made from.

A GGUF file holds a decoder under llama.cpp's names, usually quantised, with its sizes and its
tokenizer as key-value pairs. `read` gives it back as tensors under transformers' names, in
transformers' layout, beside a config.json and the tokenizer's files. Tensors are dequantised when
they are read, one at a time.

Names of tensors and the arithmetic of the quantised types are the `gguf` package's (extra `gguf`).
What llama.cpp's converter does to values is undone here: it turns the rows of q and k for its own
order of rotary pairs (architecture llama), adds one to Gemma's norms, transposes GPT-2's matrices.

A Mistral model is of architecture llama in GGUF and is read as Llama, which computes the same; the
sliding window of Mistral 7B v0.1 is not in the file.

Sources: llama.cpp's `convert_hf_to_gguf.py`; transformers' `modeling_gguf_pytorch_utils.py`, with
which the tests compare.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ft import errors
from ft.weights import gguf_tokenizer
from ft.weights.gguf_header import Header, read_header
from ft.weights.lazy import FileTensor, LazyTensor, corrupt

# ggml types that are numbers as they stand; all others are quantised.
_PLAIN = {0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32, 27: np.int64,
          28: np.float64, 30: ml_dtypes.bfloat16}
# Tensors that say what a config.json says, and are read into it.
_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 to 3.3 state these; the file holds only what follows from them and the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


class Gguf(NamedTuple):
  """A GGUF file, read as a Hugging Face checkpoint.

  Attributes:
    tensors: transformers' name -> LazyTensor; quantised ones are float32 once read, others have the
      dtype that the file has. A tensor that transformers' model has not keeps its GGUF name.
    hf_config: what config.json would say.
    files: tokenizer.json, tokenizer_config.json (with the chat template), generation_config.json.
  """

  tensors: dict[str, LazyTensor]
  hf_config: dict[str, Any]
  files: dict[str, bytes]


def read(path) -> Gguf:
  """Opens a GGUF file; no tensor is read, save two small ones that belong into the config.

  Raises:
    UserError: not a GGUF file, damaged, of an architecture or a type of tensor that is not served,
      one part of several, or the `gguf` package is not installed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.UserError(f"no such file of weights: {path}")
  return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a model is inspected, and then loaded
def _read(path, changed) -> Gguf:
  del changed
  package = errors.require("gguf", "gguf")
  try:
    header = read_header(path)
  except PermissionError as e:
    raise errors.UserError(f"no permission to read {path}: {e}") from None
  keys = _Keys(path, header)
  arch = _served(path, header, keys.architecture)
  raw = {name: _open(package, path, name, entry) for name, entry in header.tensors.items()}
  if "token_embd.weight" not in raw:
    raise corrupt(path, "it has no tensor token_embd.weight")
  config = arch.config(keys, raw)
  names = _names(package, keys, arch)
  tensors = {}
  for name, tensor in raw.items():
    if name not in _ROPE:
      base, dot, suffix = name.rpartition(".")
      undo = arch.undo(name, keys)
      theirs = names.get(base, base) + dot + suffix
      tensors[theirs] = _Undone(tensor, *undo) if undo else tensor
  return Gguf(tensors, config, _files(path, header, config))


class _Keys:
  """The key-value pairs of an architecture, checked as they are asked for."""

  def __init__(self, path, header: Header):
    self.path, self.fields, self.tensors = path, header.fields, header.tensors
    self.architecture = header.fields.get("general.architecture")
    if not isinstance(self.architecture, str):
      raise corrupt(path, "it does not state its general.architecture")

  def get(self, key: str, default=None):
    """Returns the value of `ARCHITECTURE.key`; an error if it is absent and has no default."""
    value = self.fields.get(f"{self.architecture}.{key}", default)
    if value is None:
      raise corrupt(self.path, f"it has no key {self.architecture}.{key}")
    return value

  def count(self, key: str, default: int | None = None) -> int:
    """Returns a size: positive, and the same for all layers."""
    value = self.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
      value = value[0]
    if type(value) is not int or not 0 < value < 2**31:
      raise errors.UserError(f"{self.path}: {self.architecture}.{key} is {str(value)[:60]}; only "
                             "one positive number for all layers is served")
    return value

  def real(self, key: str, default: float | None = None) -> float:
    """Returns a number as it was before it was rounded to float32: 1e-05, not 9.99999975e-06."""
    value = self.get(key, default)
    if not isinstance(value, int | float):
      raise corrupt(self.path, f"{self.architecture}.{key} is no number")
    return float(str(np.float32(value)))

  def has(self, key: str) -> bool:
    return f"{self.architecture}.{key}" in self.fields

  @property
  def heads(self) -> int:
    return self.count("attention.head_count")

  @property
  def kv_heads(self) -> int:
    return self.count("attention.head_count_kv", self.heads)

  @property
  def layers(self) -> int:
    layers = self.count("block_count")
    if layers > len(self.tensors):
      raise corrupt(self.path, f"it states {layers} layers and has {len(self.tensors)} tensors")
    return layers


class _Architecture(NamedTuple):
  """How one architecture of GGUF maps to transformers.

  Attributes:
    modules: transformers' names of what has weights; `{i}` is the layer.
    config: (keys, tensors) -> config.json.
    undo: (GGUF name, keys) -> None, or (values -> values, shape -> shape).
  """

  modules: tuple[str, ...]
  config: Callable
  undo: Callable


class _Quantised(LazyTensor):
  """A tensor in blocks of a ggml type: dequantised to float32 when it is read."""

  dtype = np.dtype(np.float32)

  def __init__(self, dequantise, raw: FileTensor, shape):
    self._dequantise, self._raw, self.shape = dequantise, raw, shape

  def read(self):
    return self._dequantise(self._raw.read()).reshape(self.shape)


class _Undone(LazyTensor):
  """A tensor in which something that the converter did is undone."""

  def __init__(self, tensor: LazyTensor, change, reshape, dtype=None):
    self._tensor, self._change = tensor, change
    self.shape, self.dtype = reshape(tensor.shape), np.dtype(dtype or tensor.dtype)

  def read(self):
    return np.ascontiguousarray(self._change(self._tensor.read().astype(self.dtype, copy=False)))


def _open(package, path, name, entry) -> LazyTensor:
  """Returns a tensor as the file has it, once it is known to lie inside the file."""
  if entry.kind in _PLAIN:
    tensor = FileTensor(path, entry.offset, _PLAIN[entry.kind], entry.shape)
    size = math.prod(entry.shape) * tensor.dtype.itemsize
  else:
    kind, block, width = _quantised(package, path, name, entry.kind)
    if not entry.shape or entry.shape[-1] % block:
      raise corrupt(path, f"{name} of shape {entry.shape} is not made of blocks of {block}")
    bytes_shape = (*entry.shape[:-1], entry.shape[-1] // block * width)
    size = math.prod(bytes_shape)
    raw = FileTensor(path, entry.offset, np.uint8, bytes_shape)
    tensor = _Quantised(lambda data: package.dequantize(data, kind), raw, entry.shape)
  if entry.offset + size > path.stat().st_size:
    raise corrupt(path, f"it is cut short: {name} should end at byte {entry.offset + size}, the "
                        f"file at byte {path.stat().st_size}")
  return tensor


def _quantised(package, path, name, number) -> tuple:
  """Returns (ggml type, elements in a block, bytes in a block) of a type that gguf dequantises."""
  try:
    kind = package.GGMLQuantizationType(number)
    block, width = package.GGML_QUANT_SIZES[kind]
    package.dequantize(np.zeros((1, width), np.uint8), kind)
  except (ValueError, KeyError, NotImplementedError):
    raise errors.UserError(f"{path}: {name} is of ggml type {number}, which the gguf package does "
                           "not dequantise; take a file of another quantisation, such as Q8_0 or "
                           "Q4_K_M, or update the package") from None
  return kind, block, width


def _served(path, header, architecture: str) -> _Architecture:
  if header.fields.get("split.count", 0) not in (0, 1):
    raise errors.UserError(f"{path} is one of {header.fields['split.count']} parts of a model; "
                           "join them first: llama-gguf-split --merge FIRST-PART OUTPUT")
  if architecture not in _ARCHITECTURES:
    raise errors.UserError(f"{path} is of architecture {architecture!r}"
                           f"{errors.suggest(architecture, _ARCHITECTURES)}; served from GGUF "
                           f"are: {', '.join(_ARCHITECTURES)}")
  if header.fields.get(f"{architecture}.expert_count"):
    raise errors.UserError(f"{path} is a mixture of experts, which is not served from GGUF")
  return _ARCHITECTURES[architecture]


def _names(package, keys, arch) -> dict[str, str]:
  """Returns {GGUF name: transformers' name}, both without .weight and .bias."""
  number = {v: k for k, v in package.MODEL_ARCH_NAMES.items()}[keys.architecture]
  table = package.get_tensor_name_map(number, keys.layers)
  modules = [m.format(i=i) for m in arch.modules for i in range(keys.layers if "{" in m else 1)]
  return {table.get_name(module): module for module in modules}


def _files(path, header, config) -> dict[str, bytes]:
  files = gguf_tokenizer.files(path, header.fields, config.get("max_position_embeddings"))
  ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
  turn = header.fields.get("tokenizer.ggml.eot_token_id")  # where a turn of a chat ends
  if turn is not None and turn != ids["eos_token_id"]:
    ids["eos_token_id"] = [i for i in (ids["eos_token_id"], turn) if i is not None]
  text = json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2, sort_keys=True)
  return {**files, "generation_config.json": (text + "\n").encode()}


# What each architecture's config.json says.


def _common(keys, tensors, kind: str, model: str) -> dict:
  ids = {name: keys.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in (
      ("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))}
  return {
      "architectures": [model], "model_type": kind, "torch_dtype": "float32",
      "vocab_size": tensors["token_embd.weight"].shape[0],
      "tie_word_embeddings": "output.weight" not in tensors, **ids,
  }


def _rotary(keys, tensors, kind, model) -> dict:
  """The config of a decoder with RMS norms, rotary positions and a gated feed-forward part."""
  hidden = keys.count("embedding_length")
  return {
      **_common(keys, tensors, kind, model),
      "hidden_size": hidden,
      "intermediate_size": keys.count("feed_forward_length"),
      "num_hidden_layers": keys.layers,
      "num_attention_heads": keys.heads,
      "num_key_value_heads": keys.kv_heads,
      "head_dim": keys.count("attention.key_length", hidden // keys.heads),
      "max_position_embeddings": keys.count("context_length"),
      "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
      "rope_theta": keys.real("rope.freq_base", 10000.0),
      "rope_scaling": _rope_scaling(keys),
      "hidden_act": "silu", "attention_dropout": 0.0,
  }


def _rope_scaling(keys) -> dict | None:
  kind = keys.get("rope.scaling.type", "none")
  if kind == "none" or not keys.has("rope.scaling.factor"):
    return None
  scaling = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
  if keys.has("rope.scaling.original_context_length"):
    scaling["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
  return scaling


def _llama(keys, tensors) -> dict:
  config = _rotary(keys, tensors, "llama", "LlamaForCausalLM")
  if not keys.has("attention.key_length") and keys.has("rope.dimension_count"):
    config["head_dim"] = keys.count("rope.dimension_count")
  if "rope_freqs.weight" in tensors:
    config["rope_scaling"] = _llama3(keys, tensors["rope_freqs.weight"], config)
  return {**config, "attention_bias": "blk.0.attn_q.bias" in tensors,
          "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _llama3(keys, tensor, config) -> dict:
  """Returns the scaling of Llama 3.1 whose divisors of frequencies the file holds."""
  divisors = tensor.read().astype(np.float64).reshape(-1)
  scaling = {"rope_type": "llama3", "factor": float(divisors.max(initial=1.0)), **_LLAMA3}
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
  turns = scaling["original_max_position_embeddings"] / (
      2 * np.pi * config["rope_theta"] ** exponents)
  share = np.clip((turns - low) / (high - low), 0, 1)
  want = 1 / ((1 - share) / scaling["factor"] + share)
  if divisors.shape != want.shape or not np.allclose(divisors, want, rtol=1e-4):
    raise errors.UserError(f"{keys.path}: rope_freqs.weight is not the scaling of Llama 3.1, which "
                           "is the only one that is served from GGUF")
  return scaling


def _qwen2(keys, tensors) -> dict:
  return {**_rotary(keys, tensors, "qwen2", "Qwen2ForCausalLM"), "use_sliding_window": False}


def _qwen3(keys, tensors) -> dict:
  return {**_rotary(keys, tensors, "qwen3", "Qwen3ForCausalLM"), "use_sliding_window": False,
          "attention_bias": "blk.0.attn_q.bias" in tensors}


def _gemma(keys, tensors, kind, model, large: int) -> dict:
  """Gemma 2 and 3; `large`: layers of the 27 B model, which alone scales queries otherwise."""
  config = _rotary(keys, tensors, kind, model)
  del config["hidden_act"]
  scale = config["hidden_size"] // keys.heads if keys.layers == large else config["head_dim"]
  return {**config, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scale,
          "sliding_window": keys.count("attention.sliding_window", 4096), "attention_bias": False}


def _gemma2(keys, tensors) -> dict:
  return {**_gemma(keys, tensors, "gemma2", "Gemma2ForCausalLM", 46),
          "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
          "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0)}


def _gemma3(keys, tensors) -> dict:
  every = 6  # five layers with a window, then one without
  kinds = ["full_attention" if i % every == every - 1 else "sliding_attention"
           for i in range(keys.layers)]
  return {**_gemma(keys, tensors, "gemma3_text", "Gemma3ForCausalLM", 62), "layer_types": kinds,
          "rope_local_base_freq": 10000.0}


def _phi3(keys, tensors) -> dict:
  config = _rotary(keys, tensors, "phi3", "Phi3ForCausalLM")
  original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
  config.update(original_max_position_embeddings=original,
                partial_rotary_factor=keys.count("rope.dimension_count", config["head_dim"])
                / config["head_dim"])
  if keys.has("attention.sliding_window"):
    config["sliding_window"] = keys.count("attention.sliding_window")
  factors = {f"{name}_factor": tensors[f"rope_factors_{name}.weight"].read().tolist()
             for name in ("long", "short") if f"rope_factors_{name}.weight" in tensors}
  if factors:
    config["rope_scaling"] = {"rope_type": "longrope", **factors,
                              "original_max_position_embeddings": original}
  return config


def _gpt2(keys, tensors) -> dict:
  return {
      **_common(keys, tensors, "gpt2", "GPT2LMHeadModel"),
      "n_embd": keys.count("embedding_length"), "n_inner": keys.count("feed_forward_length"),
      "n_layer": keys.layers, "n_head": keys.heads, "n_positions": keys.count("context_length"),
      "layer_norm_epsilon": keys.real("attention.layer_norm_epsilon"),
      "activation_function": "gelu_new",
  }


# What the converter did to values.


def _as_is(name, keys):
  del name, keys


def _turned(name, keys):
  """Rows of q and k: each head's pairs (2i, 2i + 1) go back to (i, i + half)."""
  heads = {"attn_q": keys.heads, "attn_k": keys.kv_heads}.get(name.split(".")[-2])
  if heads is None:
    return None

  def change(a):
    if a.shape[0] % (2 * heads):
      raise corrupt(keys.path, f"{name} has {a.shape[0]} rows for {heads} heads")
    return a.reshape(heads, -1, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

  return change, tuple


def _plus_one(name, keys):
  del keys
  if name.endswith("norm.weight"):
    return (lambda a: a - np.float32(1)), tuple, np.float32
  return None


def _transposed(name, keys):
  del keys
  if name.startswith("blk.") and name.endswith((
      "attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")):
    return np.transpose, lambda shape: shape[::-1]
  return None


def _layers(*names) -> tuple[str, ...]:
  return ("model.embed_tokens", "model.norm", "lm_head",
          *(f"model.layers.{{i}}.{name}" for name in names))


_DENSE = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
          "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMED = ("self_attn.q_norm", "self_attn.k_norm")
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_GPT2 = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head",
         *(f"transformer.h.{{i}}.{name}" for name in (
             "ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")))
_ARCHITECTURES = {
    "llama": _Architecture(_layers(*_DENSE), _llama, _turned),
    "qwen2": _Architecture(_layers(*_DENSE), _qwen2, _as_is),
    "qwen3": _Architecture(_layers(*_DENSE, *_NORMED), _qwen3, _as_is),
    "gemma2": _Architecture(_layers(*_DENSE, *_SANDWICH), _gemma2, _plus_one),
    "gemma3": _Architecture(_layers(*_DENSE, *_SANDWICH, *_NORMED), _gemma3, _plus_one),
    "phi3": _Architecture(
        _layers("input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj",
                "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"), _phi3, _as_is),
    "gpt2": _Architecture(_GPT2, _gpt2, _transposed),
}
