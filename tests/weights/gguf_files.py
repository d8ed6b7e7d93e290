"""Writes small GGUF files: any tensors, and whole models the way llama.cpp's converter does."""

import json

import numpy as np

TEXTS = ["the plot of this movie is slow, the acting isn't", "warm and bright: 1984 was good",
         "def f(x):\n    return x  # tab\there\n\n", "Ünïcödé — 日本語 😀",
         "HELLO World, it's 3.14"]


def vocabulary():
  """Returns (tokens, merges) of a byte-level BPE that was trained on TEXTS."""
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
      vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  model = json.loads(tokenizer.to_str())["model"]
  words = ["<|endoftext|>", "<|end|>", *sorted(model["vocab"], key=model["vocab"].get)]
  return words, [" ".join(pair) for pair in model["merges"]]


def write(path, arch="llama", keys=None, tensors=None, kinds=None, tokenizer=None):
  """Writes a GGUF file.

  Args:
    path: the file.
    arch: general.architecture.
    keys: key -> int, float, bool, str or list of strings, with the full name.
    tensors: GGUF name -> array; of bytes where `kinds` says so.
    kinds: GGUF name -> ggml type of an array of bytes.
    tokenizer: keys under tokenizer.ggml.
  """
  import gguf
  writer = gguf.GGUFWriter(path, arch)
  everything = {**(keys or {}),
                **{f"tokenizer.ggml.{k}": v for k, v in (tokenizer or {}).items()}}
  add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
         str: writer.add_string, list: writer.add_array}
  for key, value in everything.items():
    add[type(value)](key, value)
  for name, array in (tensors or {}).items():
    writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def bpe(pre="gpt-2", **more):
  words, merges = vocabulary()
  kinds = [3, 3] + [1] * (len(words) - 2)
  return {"model": "gpt2", "pre": pre, "tokens": words, "merges": merges, "token_type": kinds,
          "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1, **more}


def sizes(arch, config) -> dict:
  """Returns the keys that llama.cpp's converter writes for a transformers config."""
  theta = (config.rope_parameters.get("full_attention") or config.rope_parameters)["rope_theta"]
  found = {
      "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
      "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
      "attention.head_count": config.num_attention_heads,
      "attention.head_count_kv": config.num_key_value_heads,
      "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": float(theta),
  }
  if getattr(config, "head_dim", None):
    found["attention.key_length"] = config.head_dim
  if arch == "phi3":
    found["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
  if arch.startswith("gemma"):
    found["attention.sliding_window"] = config.sliding_window
  return {f"{arch}.{k}": v for k, v in found.items()}


def convert(path, arch, model, keys, tokenizer, extra=None):
  """Writes a transformers model as llama.cpp's converter does, in float32."""
  import gguf
  config = model.config
  number = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
  table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
  tensors = dict(extra or {})
  for name, tensor in model.state_dict().items():
    if name == "lm_head.weight" and config.tie_word_embeddings:
      continue
    array = tensor.numpy()
    theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if arch == "llama" and ("attn_q." in theirs or "attn_k." in theirs):
      heads = config.num_attention_heads if "_q." in theirs else config.num_key_value_heads
      array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if arch.startswith("gemma") and theirs.endswith("norm.weight"):
      array = array + 1
    if arch == "gpt2" and array.ndim == 2 and name.endswith((
        "c_attn.weight", "c_proj.weight", "c_fc.weight")):
      array = array.T
    tensors[theirs] = np.ascontiguousarray(array)
  return write(path, arch, keys, tensors, tokenizer=padded(tokenizer, config.vocab_size))


def padded(tokenizer, count) -> dict:
  """Returns a tokenizer with as many tokens as the model has; the converter calls them unused."""
  spare = range(count - len(tokenizer["tokens"]))
  more = {"tokens": [f"[PAD{i}]" for i in spare], "token_type": [5 for _ in spare],
          "scores": [-1e4 for _ in spare]}
  return {k: v + more[k] if k in more else v for k, v in tokenizer.items()}
