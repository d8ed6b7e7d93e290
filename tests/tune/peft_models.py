"""Tiny random models of transformers, what they give, and adapters of real `peft` on them."""

import copy
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from tune import toys

from ft import models, state, tune
from ft.tune import peft as ours

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

_SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def _bert():
  config = transformers.BertConfig(**_SIZES, vocab_size=30, max_position_embeddings=16,
                                   num_labels=3)
  return transformers.BertForSequenceClassification(config)


def _llama(tied=False):
  config = transformers.LlamaConfig(**_SIZES, vocab_size=30, num_key_value_heads=1,
                                    max_position_embeddings=32, tie_word_embeddings=tied,
                                    bos_token_id=1, eos_token_id=2)
  return transformers.LlamaForCausalLM(config)


def _gpt2():
  config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=32,
                                   bos_token_id=1, eos_token_id=2)
  return transformers.GPT2LMHeadModel(config)


def _vit():
  config = transformers.ViTConfig(**_SIZES, image_size=8, patch_size=4, num_labels=3)
  return transformers.ViTForImageClassification(config)


def _resnet():
  config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1],
                                     layer_type="bottleneck", num_labels=3)
  return transformers.ResNetForImageClassification(config)


CASES = {"bert": _bert, "llama": _llama, "tied": functools.partial(_llama, tied=True),
         "gpt2": _gpt2, "vit": _vit, "resnet": _resnet}


@dataclasses.dataclass
class Reference:
  """A model of transformers and ours of the same weights."""

  torch: object
  ours: models.Pretrained
  inputs: dict
  folder: str

  def outputs(self, model) -> np.ndarray:
    """What a torch model gives: logits."""
    given = {}
    for key, value in self.inputs.items():
      value = np.moveaxis(value, -1, 1) if key == "pixel_values" else value
      given[key] = torch.tensor(value, dtype=torch.long if value.dtype.kind == "i" else None)
    with torch.no_grad():
      logits = model.eval()(**given)["logits"].numpy()
    # `peft` gives the logits of a prompt, too.
    return logits[:, -given["input_ids"].shape[1]:] if logits.ndim == 3 else logits

  def fresh(self):
    """The torch model, to be wrapped."""
    return copy.deepcopy(self.torch)

  def init(self, method, **values):
    """`tune.init` on our model."""
    context = tune.Context(self.ours)
    return toys.init(method, self.ours.variables, self.ours.head, context, **values)

  def tuned(self, tuned, trainable) -> np.ndarray:
    """What our model gives, tuned: logits."""
    apply = state.make_apply(self.ours.module, tuned.interceptor, tuned.around)
    variables = tuned.combine(tuned.frozen, trainable)
    return np.asarray(jax.jit(lambda v: apply(v, self.inputs)[0]["logits"])(variables))


@functools.cache
def reference(case: str, folder: str) -> Reference:
  """The model of a case, written to a folder and loaded from there."""
  torch.manual_seed(1)
  model = CASES[case]().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1) * 0.5)
    for name, buffer in model.named_buffers():
      if name.endswith("running_var"):
        buffer.add_(0.5 * torch.rand_like(buffer))
  place = f"{folder}/{case}"
  model.save_pretrained(place)
  rng = np.random.default_rng(0)
  if case in ("vit", "resnet"):
    inputs = {"pixel_values": rng.normal(size=(2, 8, 8, 3)).astype(np.float32)}
    if case == "resnet":
      inputs = {"pixel_values": rng.normal(size=(2, 32, 32, 3)).astype(np.float32)}
  else:
    ids = rng.integers(3, 30, (2, 7)).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
  return Reference(model, models.load(place), inputs, place)


def shake(model, seed=0, scale=0.2) -> None:
  """Moves what a PeftModel trains off its start."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def difference(got, want) -> float:
  """The largest difference, relative to the largest value."""
  return float(np.abs(got - want).max() / np.abs(want).max())


TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Case -> Reference."""
  folder = str(tmp_path_factory.mktemp("peft"))
  return lambda case: reference(case, folder)


def check_writing(reference, method, values, folder, moved=1e-3) -> None:
  """Real `peft` opens what we write, nothing missing or left, and gives our outputs."""
  tuned = reference.init(method, **values)
  trainable = toys.shaken(tuned.trainable, size=0.2)
  ours.write(folder, reference.ours, tuned, trainable, reference.folder)
  conf = json.loads((folder / "adapter_config.json").read_text())
  assert list(conf) == sorted(conf)
  theirs = peft.PeftModel.from_pretrained(reference.fresh(), str(folder))
  result = peft.set_peft_model_state_dict(theirs, peft.load_peft_weights(str(folder)))
  # What `peft` keeps once and shows in every layer, derives, or keeps outside of its modules.
  own = ("vera_A", "vera_B", "ranknum", "prompt_e", "lm_head.trainable_tokens_delta")
  odd = [*result.unexpected_keys, *(key for key in result.missing_keys if "default" in key)]
  odd = [key for key in odd if not any(name in key for name in own)]
  assert not odd, odd
  want = reference.tuned(tuned, trainable)
  assert difference(reference.outputs(theirs), want) <= TOLERANCE
  assert difference(want, reference.outputs(reference.torch)) > moved


def saved(reference, config, folder, name="default"):
  """A PeftModel with shaken parameters, written to a folder."""
  torch.manual_seed(3)
  theirs = peft.get_peft_model(reference.fresh(), config, adapter_name=name)
  shake(theirs)
  theirs.save_pretrained(str(folder))
  return theirs


def check_reading(reference, method, config, folder, moved=1e-3) -> tune.Tuned:
  """What real `peft` writes gives its outputs when we read it; returns the split."""
  theirs = saved(reference, config, folder)
  tuned = reference.init(method, init=str(folder))
  want = reference.outputs(theirs)
  assert difference(reference.tuned(tuned, tuned.trainable), want) <= TOLERANCE
  assert difference(want, reference.outputs(reference.torch)) > moved
  return tuned
