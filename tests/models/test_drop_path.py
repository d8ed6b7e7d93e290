"""model.drop_path: stochastic depth where a family has it, in training only."""

import jax
import numpy as np
import pytest

from ft import errors, models
from ft.models import bert, convnext, resnet, vit
from ft.weights import names


def exported(folder, module, config):
  model = module.Model(config)
  variables = jax.jit(model.init)(jax.random.key(0), **module.probe_inputs(config))
  family = module.__name__.rpartition(".")[2]
  made = models.Pretrained(family, model, variables, names.Report(), {}, config, "image", ())
  models.export(made, folder)
  return str(folder)


@pytest.mark.parametrize("module, config", [
  (vit, vit.Config(model_type="vit", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32, image_size=16, patch_size=8)),
  (convnext, convnext.Config(model_type="convnext", hidden_sizes=(8, 16), depths=(1, 2),
                             num_stages=2, layer_scale_init_value=1.0)),
], ids=["vit", "convnext"])
def test_branches_are_dropped_in_training_only(tmp_path, module, config):
  folder = exported(tmp_path / "model", module, config)
  plain, dropped = models.load(folder), models.load(folder, drop_path=0.7)
  assert dropped.config.drop_path_rate == 0.7 and not plain.config.drop_path_rate
  image = np.random.default_rng(0).standard_normal((6, 32, 32, 3)).astype(np.float32)
  if module is vit:
    image = image[:, :16, :16]

  def features(loaded, seed=None):
    rngs = {} if seed is None else {"dropout": jax.random.key(seed)}
    return np.array(jax.jit(lambda v: loaded.module.apply(v, pixel_values=image, rngs=rngs))(
      loaded.variables)["features"])

  np.testing.assert_array_equal(features(plain), features(dropped))
  np.testing.assert_array_equal(features(plain), features(plain, 1))
  first, second = features(dropped, 1), features(dropped, 2)
  assert not np.allclose(first, features(plain)) and not np.allclose(first, second)


def test_families_without_it_say_so(tmp_path):
  config = bert.Config(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, max_position_embeddings=16)
  folder = exported(tmp_path / "bert", bert, config)
  with pytest.raises(errors.UserError, match="bert has no stochastic depth"):
    models.load(folder, drop_path=0.1)
  assert not resnet.Config(model_type="resnet").has_drop_path
