"""LoRA computes what `peft` computes, layer by layer, and both read each other's tensors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import toys

from ft import errors, tune
from ft.models import convolution, layers
from ft.tune import adapters, lora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

NAMES = ("words", "strided", "point", "dense")


class Ours(nn.Module):
  """ids (B, 49) -> (B, 3): an embedding as a picture, two convolutions and a matrix."""

  @nn.compact
  def __call__(self, ids):
    x = layers.Embedding(13, 5, name="words")(ids).reshape(-1, 7, 7, 5)
    x = nn.tanh(convolution.Conv(6, 3, 2, ((1, 1), (1, 1)), use_bias=True, name="strided")(x))
    x = nn.tanh(convolution.Conv(8, 1, 1, use_bias=True, name="point")(x))
    return layers.Linear(3, name="dense")(x.mean((1, 2)))


class Theirs(torch.nn.Module):
  """The same in torch."""

  def __init__(self):
    super().__init__()
    self.words = torch.nn.Embedding(13, 5)
    self.strided = torch.nn.Conv2d(5, 6, 3, 2, 1)
    self.point = torch.nn.Conv2d(6, 8, 1)
    self.dense = torch.nn.Linear(8, 3)

  def forward(self, ids):
    x = self.words(ids).reshape(-1, 7, 7, 5).permute(0, 3, 1, 2)
    return self.dense(torch.tanh(self.point(torch.tanh(self.strided(x)))).mean((2, 3)))


def variables_of(model) -> dict:
  """Our variables with a Theirs's weights."""
  state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
  params = {"words": {"embedding": state["words.weight"]}}
  for name in NAMES[1:]:
    weight = state[f"{name}.weight"]
    kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
    params[name] = {"kernel": kernel, "bias": state[f"{name}.bias"]}
  return jax.tree.map(jnp.array, {"params": params})


def theirs(names=NAMES, **values):
  """(peft model in evaluation with all of its adapter shaken, the bare model's variables)."""
  torch.manual_seed(0)
  bare = Theirs()
  variables = variables_of(bare)
  model = peft.get_peft_model(bare, peft.LoraConfig(target_modules=list(names), **values)).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return model, variables


def tensors(model) -> dict:
  """{module: {suffix: array}} of what `peft` saves of its adapter."""
  out = {}
  for key, value in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items():
    module, _, suffix = key.removeprefix("base_model.model.").partition(".")
    out.setdefault(module, {})[suffix] = value.numpy()
  return out


def read(variables, values, found):
  """(tuned, trainable with the tensors of a file, their layers)."""
  names = [f"^{name}$" for name in found]
  tuned = toys.init("lora", variables, head=(), targets=names, **values)
  method, made, group = lora.METHOD(toys.config("lora", **values)), {}, {}
  for path, leaf in adapters.targets(names, variables, (), method.KINDS).items():
    (group[path],) = adapters.expand(path, leaf, None, jax.random.key(0))
    made[path], fixed = method.from_peft(found[path], group[path])
    assert fixed == {}
  rest = {key: value for key, value in tuned.trainable.items() if key != "adapters"}
  return method, tuned, {**rest, "adapters": made}, group


CASES = {
  "plain": (NAMES, {"r": 2, "lora_alpha": 5}),
  "patterns": (NAMES, {"r": 2, "lora_alpha": 5, "use_rslora": True,
                       "rank_pattern": {"strided|dense": 3, "dense": 1},
                       "alpha_pattern": {"^dense": 7, "ords": 2}}),
  "dora": (NAMES[1:], {"r": 2, "lora_alpha": 5, "use_dora": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_merged_weights(name):
  names, given = CASES[name]
  model, variables = theirs(names, **given)
  found = tensors(model)
  stored = model.peft_config["default"].to_dict()
  values = {**lora.peft_values(stored),
            **lora.patterns_from_peft(stored, {module: module for module in names})}
  method, tuned, trainable, group = read(variables, values, found)
  ids = np.random.default_rng(0).integers(0, 13, (2, 49))

  def loss(trainable):
    with nn.intercept_methods(tuned.interceptor):
      out = Ours().apply(tuned.combine(tuned.frozen, trainable), ids)
    return jnp.sum(out**2), out

  (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
  out = model(torch.tensor(ids))
  np.testing.assert_allclose(ours, out.detach().numpy(), rtol=1e-5, atol=1e-5)
  (out**2).sum().backward()
  with torch.no_grad():
    for parameter in model.parameters():  # so that the gradients can be read as a file's tensors
      if parameter.grad is not None:
        parameter.copy_(parameter.grad)
  for path, leaves in tensors(model).items():
    expected, _ = method.from_peft(leaves, group[path])
    for leaf, value in expected.items():
      np.testing.assert_allclose(gradient["adapters"][path][leaf], value, rtol=1e-4, atol=1e-5,
                                 err_msg=f"{path}/{leaf}")
  model, _ = theirs(names, **given)
  merged = variables_of(model.merge_and_unload())["params"]
  plain = tuned.merge(tuned.frozen, trainable)["params"]
  for path, leaf in tune.flatten(merged).items():
    np.testing.assert_allclose(tune.flatten(plain)[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_tensors_there_and_back(name):
  names, given = CASES[name]
  model, variables = theirs(names, **given)
  found = tensors(model)
  stored = model.peft_config["default"].to_dict()
  values = {**lora.peft_values(stored),
            **lora.patterns_from_peft(stored, {module: module for module in names})}
  method, _, trainable, group = read(variables, values, found)
  for path, layer in group.items():
    written = method.to_peft(trainable["adapters"][path], layer)
    assert written.keys() == found[path].keys()
    for suffix, array in written.items():
      np.testing.assert_array_equal(array.ravel(), found[path][suffix].ravel())
      if layer.kind != "pointwise":  # whose two axes of one ft.tune.peft adds
        assert array.shape == found[path][suffix].shape
  again = {**stored, **lora.peft_config(method.config),
           **method.patterns_to_peft({path: path for path in group})}
  config = peft.LoraConfig(target_modules=list(names), **{
    key: again[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern",
                                "alpha_pattern", "bias", "init_lora_weights")})
  fresh = peft.get_peft_model(Theirs(), config)
  for path in names:
    one, other = (getattr(m.base_model.model, path) for m in (fresh, model))
    assert one.scaling == pytest.approx(other.scaling) and one.r == other.r


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_a_start_takes_out_is_what_peft_takes_out(start, root):
  torch.manual_seed(0)
  bare = Theirs()
  variables = variables_of(bare)
  model = peft.get_peft_model(bare, peft.LoraConfig(
    r=2, lora_alpha=5, use_rslora=root, target_modules=["dense"], init_lora_weights=start))
  fixed = toys.init("lora", variables, head=(), rank=2, alpha=5.0, start=start, targets=("dense",),
                    scale="alpha/sqrt(r)" if root else "alpha/r").frozen["adapters"]["dense"]
  scale = 5 / (np.sqrt(2) if root else 2)
  residual = variables["params"]["dense"]["kernel"] - scale * fixed["lora_a0"] @ fixed["lora_b0"]
  np.testing.assert_allclose(
    residual, model.base_model.model.dense.base_layer.weight.detach().numpy().T, atol=1e-6)


@pytest.mark.parametrize("root", [False, True])
def test_a_start_is_written_as_a_plain_update(root):
  """Of twice the rank, for the pretrained base: `peft` merges it to the same weights."""
  torch.manual_seed(0)
  bare = Theirs()
  variables = variables_of(bare)
  values = {"rank": 2, "alpha": 5.0, "start": "pissa", "targets": ("dense", "point"),
            "scale": "alpha/sqrt(r)" if root else "alpha/r", "alpha_pattern": ("dense=4",),
            "rank_pattern": ("point=3",)}
  tuned = toys.init("lora", variables, head=(), **values)
  trainable = toys.shaken(tuned.trainable)
  method, found = lora.METHOD(toys.config("lora", **values)), {}
  for path in ("dense", "point"):
    (layer,) = adapters.expand(path, adapters.layers_of(variables)[path], None, jax.random.key(0))
    own = {**trainable["adapters"][path], **tuned.frozen["adapters"][path]}
    for suffix, array in method.to_peft(own, layer).items():
      axes = array.shape if path == "dense" else (*array.shape, 1, 1)
      found[f"base_model.model.{path}.{suffix}"] = torch.tensor(array.reshape(axes))
  assert found["base_model.model.point.lora_A.weight"].shape == (6, 6, 1, 1)
  conf = {**lora.peft_config(method.config),
          **method.patterns_to_peft({"dense": "dense", "point": "point"})}
  plain = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["dense", "point"], **conf))
  assert not peft.set_peft_model_state_dict(plain, found).unexpected_keys
  expected = tune.flatten(variables_of(plain.merge_and_unload()))
  for path, leaf in tune.flatten(tuned.merge(tuned.frozen, trainable)).items():
    np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6)


def test_tied_embedding_is_what_peft_ties():
  """With ensure_weight_tying: the same logits, and the output layer's tensors are `peft`'s."""
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True)
  bare = transformers.LlamaForCausalLM(config).eval()
  table = bare.model.embed_tokens.weight.detach().numpy().copy()
  conf = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["embed_tokens"],
                         ensure_weight_tying=True)
  model = peft.get_peft_model(bare, conf).eval()
  with torch.no_grad():
    model.base_model.model.model.embed_tokens.lora_embedding_A["default"].normal_()
  state = {key.rpartition("embed_tokens.")[2].rpartition("lm_head.")[2]: value.numpy()
           for key, value in peft.get_peft_model_state_dict(
             model, save_embedding_layers=False).items()}
  embedding = {key: value for key, value in state.items() if "embedding" in key}
  variables = {"params": {"words": {"embedding": jnp.asarray(table)}}}
  values = lora.peft_values(conf.to_dict())
  method, tuned, trainable, group = read(variables, values, {"words": embedding})
  written = method.tied_to_peft(trainable["adapters"]["words"], group["words"])
  for suffix, array in written.items():
    np.testing.assert_array_equal(array, state[suffix])
  hidden = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  merged = tuned.merge(tuned.frozen, trainable)["params"]["words"]["embedding"]
  with torch.no_grad():
    logits = model.base_model.model.lm_head(torch.tensor(hidden)).numpy()
    rows = model.base_model.model.model.embed_tokens(torch.arange(11)).numpy()
  np.testing.assert_allclose(hidden @ merged.T, logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(merged, rows, rtol=1e-5, atol=1e-6)
  lora.check_tying({"ensure_weight_tying": True}, True)
  lora.check_tying({}, False)
  with pytest.raises(errors.UserError, match="lookup, but not the output layer"):
    lora.check_tying({}, True)


@pytest.mark.parametrize("given,reason", [
  ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
  ({"init_lora_weights": "olora"}, "changes the base weights"),
  ({"init_lora_weights": "corda"}, "changes the base weights"),
  ({"init_lora_weights": "loftq"}, "changes the base weights"),
  ({"init_lora_weights": "lora_ga"}, "changes the base weights"),
  ({"init_lora_weights": "mica"}, "is not known here"),
  ({"use_qalora": True}, "pools the inputs"),
  ({"alora_invocation_tokens": [1]}, "aLoRA"),
  ({"arrow_config": {"top_k": 2}}, "Arrow"),
  ({"megatron_config": {"x": 1}}, "Megatron"),
  ({"target_parameters": ["experts.up"]}, "bare parameters"),
  ({"layer_replication": [[0, 2]]}, "repeats layers"),
  ({"lora_bias": True}, "B has a bias"),
  ({"kasa_config": {"beta": 1}}, "KaSA"),
])
def test_refusals(given, reason):
  with pytest.raises(errors.UserError, match=reason):
    lora.peft_values({"peft_type": "LORA", **given})


def test_values_of_a_short_file():
  values = lora.peft_values({"peft_type": "LORA", "init_lora_weights": "eva"})
  assert values == {"rank": 8, "alpha": 8.0, "scale": "alpha/r", "dropout": 0.0, "dora": False,
                    "bias": "none", "start": "zero"}


def test_tensors_that_do_not_fit():
  variables = {"params": {"dense": {"kernel": jnp.ones((8, 3))}}}
  good = {"lora_A.weight": np.ones((2, 8)), "lora_B.weight": np.ones((3, 2))}
  with pytest.raises(errors.UserError, match="has lora_A.weight for dense.*expected"):
    read(variables, {"rank": 2}, {"dense": {"lora_A.weight": np.ones((2, 8))}})
  with pytest.raises(errors.UserError, match="shape \\(2, 3\\).*expected \\(2, 3\\)"):
    read(variables, {"rank": 2}, {"dense": {**good, "lora_B.weight": np.ones((2, 3))}})
