"""Classes by their names: CLIP's texts as a classifier of images that nothing was trained for.

Radford et al. 2021, arXiv:2103.00020, section 3.1: an image is of the class whose prompt lies
nearest to it by cosine; several prompts a class are averaged.

Shapes: B images, C classes, P prompts, D width of the image tower, E of the embeddings.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, models


def classifier(source: str, labels: Sequence[str], prompts: Sequence[str]) -> dict:
  """Returns what `logits` needs: "kernel" (D, E), "texts" (C, E) of length 1, "scale" ().

  The text tower is read for this and let go.

  Args:
    source: of a CLIP dual encoder, with its tokenizer.
    labels: names of the classes; their underscores are read as spaces.
    prompts: sentences with {label} in them.

  Raises:
    UserError: another family, no tokenizer, a prompt without {label}, or one that is too long.
  """
  for prompt in prompts:
    if "{label}" not in prompt:
      raise errors.UserError(f"task.prompts: {prompt!r} has no {{label}} in it")
  info = models.inspect(source)
  if (info.hf_config or {}).get("model_type") != "clip" or info.family != "clip":
    raise errors.UserError(f"task.zero_shot={source}: a {info.family} model; it has to be a CLIP "
                           "with both towers, the one that model.source names")
  loaded = models.load(source, head="none")
  told = [prompt.replace("{label}", str(label).replace("_", " "))
          for label in labels for prompt in prompts]
  embeds = _embeds(loaded, _inputs(told, info.folder, loaded.config.text))
  texts = np.asarray(embeds).reshape(len(labels), len(prompts), -1).mean(1)
  params = loaded.variables["params"]
  return {"kernel": params["visual_projection"]["kernel"],
          "texts": texts / np.linalg.norm(texts, axis=-1, keepdims=True),
          "scale": jnp.exp(params["logit_scale"])}


def logits(made: dict, pooled):
  """Returns (B, C) float32 of an image tower's pooler_output (B, D), as CLIP's logits_per_image."""
  images = pooled.astype(jnp.float32) @ made["kernel"].astype(jnp.float32)
  images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
  return jnp.matmul(images, made["texts"].T, precision="highest") * made["scale"]


def _inputs(texts: list[str], folder, config) -> dict:
  """Returns input_ids and attention_mask (P, T) of texts, padded to the longest."""
  from tokenizers import Tokenizer

  path = pathlib.Path(folder or ".") / "tokenizer.json"
  try:
    encoded = Tokenizer.from_file(str(path)).encode_batch(texts)
  except Exception as e:  # the library raises bare Exception
    raise errors.UserError(f"{path}: its tokenizer cannot be read, and task.zero_shot needs it: "
                           f"{e}") from e
  longest = max(len(one.ids) for one in encoded)
  if longest > config.max_position_embeddings:
    raise errors.UserError(f"task.prompts: {longest} tokens with the longest label, and the text "
                           f"tower reads {config.max_position_embeddings}")
  ids = np.zeros((len(texts), longest), np.int32)
  mask = np.zeros_like(ids)
  for row, one in enumerate(encoded):
    ids[row, :len(one.ids)], mask[row, :len(one.ids)] = one.ids, 1
  return {"input_ids": ids, "attention_mask": mask}


def _embeds(loaded, inputs: dict, size: int = 64):
  """Returns text_embeds (P, E), some rows at a time."""
  apply = jax.jit(lambda variables, part: loaded.module.apply(variables, **part)["text_embeds"])
  count = len(inputs["input_ids"])
  return np.concatenate([
    np.asarray(apply(loaded.variables, {k: v[i:i + size] for k, v in inputs.items()}))
    for i in range(0, count, size)])
