"""PEFT's files both ways: what we write real `peft` opens, what real `peft` writes we read."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from tune import peft_models, toys

from ft import errors, models, tune
from ft.models import layers
from ft.tune import peft as ours
from ft.weights import tensors

model = peft_models.model

peft = pytest.importorskip("peft")

LINEAR = ("attention/(query|output)$", "intermediate$")
OUT = {
  "lora": ("bert", "lora", dict(rank=2)),
  "lora-pattern": ("bert", "lora", dict(rank=2, rank_pattern=("layer_1/attention=3",),
                                        alpha_pattern=("query=7",), scale="alpha/sqrt(r)")),
  "lora-bias": ("bert", "lora", dict(rank=2, targets=LINEAR, bias="lora_only")),
  "lora-biases": ("bert", "lora", dict(rank=2, targets=LINEAR, bias="all")),
  "dora": ("bert", "lora", dict(rank=2, dora=True)),
  "lora-also": ("bert", "lora", dict(rank=2, also_train=("pooler", "attention/norm"))),
  "lora-embedding": ("bert", "lora", dict(rank=2, targets=("query$", "embeddings/word$"))),
  "lora-lm": ("llama", "lora", dict(rank=2)),
  "lora-tied": ("tied", "lora", dict(rank=2, targets=("query$", "embed_tokens"))),
  "lora-pissa": ("llama", "lora", dict(rank=2, start="pissa")),
  "lora-gpt2": ("gpt2", "lora", dict(rank=2)),
  "dora-gpt2": ("gpt2", "lora", dict(rank=2, dora=True)),
  "lora-vit": ("vit", "lora", dict(rank=2)),
  "lora-conv": ("resnet", "lora", dict(rank=2, targets=(r"conv",))),
  "dora-conv": ("resnet", "lora", dict(rank=2, targets=(r"conv",), dora=True)),
}


@pytest.mark.parametrize("name", OUT)
def test_peft_opens_what_we_write(model, tmp_path, name):
  case, method, values = OUT[name]
  peft_models.check_writing(model(case), method, values, tmp_path / "adapter")


def _lora(targets, **values):
  return "lora", peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **values)


IN = {
  "lora": ("bert", lambda: _lora(["query", "dense"], task_type="SEQ_CLS")),
  "lora-pattern": ("bert", lambda: _lora(
    ["query", "output.dense"], task_type="SEQ_CLS", use_rslora=True,
    rank_pattern={"layer.1.attention.self.query": 2}, alpha_pattern={"query": 9})),
  "lora-bias": ("bert", lambda: _lora(["query"], task_type="SEQ_CLS", bias="lora_only")),
  "lora-biases": ("bert", lambda: _lora(["query"], task_type="SEQ_CLS", bias="all")),
  "dora": ("bert", lambda: _lora(["query", "value"], task_type="SEQ_CLS", use_dora=True)),
  "lora-also": ("bert", lambda: _lora(["query"], modules_to_save=["classifier", "pooler"])),
  "lora-embedding": ("bert", lambda: _lora(["word_embeddings"], task_type="SEQ_CLS")),
  "lora-lm": ("llama", lambda: _lora("all-linear", task_type="CAUSAL_LM")),
  "lora-embed": ("llama", lambda: _lora(["embed_tokens", "q_proj"], task_type="CAUSAL_LM")),
  "lora-tied": ("tied", lambda: _lora(["embed_tokens"], ensure_weight_tying=True)),
  "lora-gpt2": ("gpt2", lambda: _lora(["c_attn", "c_proj"], fan_in_fan_out=True)),
  "lora-vit": ("vit", lambda: _lora(["q_proj", "fc1"], modules_to_save=["classifier"])),
  "lora-conv": ("resnet", lambda: _lora(["convolution"], modules_to_save=["classifier"])),
  "dora-conv": ("resnet", lambda: _lora(["convolution"], use_dora=True)),
}


@pytest.mark.parametrize("name", IN)
def test_we_read_what_peft_writes(model, tmp_path, name):
  case, make = IN[name]
  reference, (method, config) = model(case), make()
  tuned = peft_models.check_reading(reference, method, config, tmp_path)
  if name == "lora":  # and written again, it is the same file
    ours.write(tmp_path / "again", reference.ours, tuned, tuned.trainable)
    first, second = (peft.load_peft_weights(str(f)) for f in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_scanned_layers_are_written_and_read_one_by_one(model, tmp_path):
  reference = model("bert")
  scanned = dataclasses.replace(reference, ours=models.load(
    reference.folder, compute=layers.Compute(scan=True)))
  peft_models.check_writing(scanned, "lora", dict(rank=2), tmp_path / "out")
  config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="lora_only")
  peft_models.check_reading(scanned, "lora", config, tmp_path / "in")
  torn = peft.LoraConfig(r=2, target_modules=["0.attention.self.query"], task_type="SEQ_CLS")
  peft_models.saved(reference, torn, tmp_path / "torn")
  with pytest.raises(errors.UserError, match="nothing for encoder/layer_1.*model.scan=False"):
    scanned.init("lora", init=str(tmp_path / "torn"))


def test_names_of_transformers_4_are_read(model, tmp_path):
  reference = model("vit")
  config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "fc1"])
  theirs = peft_models.saved(reference, config, tmp_path / "new")
  old = {"layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query",
         "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense"}
  found = tensors.open_tensors(tmp_path / "new" / "adapter_model.safetensors")
  renamed = {}
  for name, tensor in found.items():
    for new, before in old.items():
      name = name.replace(new, before)
    renamed[name] = tensor.read()
  (tmp_path / "old").mkdir()
  shutil.copy(tmp_path / "new" / "adapter_config.json", tmp_path / "old")
  tensors.write_safetensors(tmp_path / "old" / "adapter_model.safetensors", renamed)
  tuned = reference.init("lora", init=str(tmp_path / "old"))
  want = reference.outputs(theirs)
  assert peft_models.difference(reference.tuned(tuned, tuned.trainable), want) <= 1e-5


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
  """A LoRA of bert's queries, as `peft` writes it."""
  folder = tmp_path_factory.mktemp("adapter")
  config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
  peft_models.saved(model("bert"), config, folder)
  return folder


def altered(adapter, folder, conf=None, change=None):
  """A copy of the adapter with other entries of its configuration, or other tensors."""
  folder.mkdir()
  entries = {**json.loads((adapter / "adapter_config.json").read_text()), **(conf or {})}
  (folder / "adapter_config.json").write_text(json.dumps(entries))
  found = tensors.open_tensors(adapter / "adapter_model.safetensors")
  found = {name: tensor.read() for name, tensor in found.items()}
  tensors.write_safetensors(folder / "adapter_model.safetensors", (change or dict)(found))
  return folder


def test_folders_that_hold_adapters(model, adapter, tmp_path):
  reference = model("bert")
  shutil.copytree(adapter, tmp_path / "one" / "mine")
  assert reference.init("lora", init=str(tmp_path / "one")).settings.rank == 2
  shutil.copytree(adapter, tmp_path / "one" / "yours")
  with pytest.raises(errors.UserError, match="several adapters, name one: .*mine, .*yours"):
    reference.init("lora", init=str(tmp_path / "one"))
  with pytest.raises(errors.UserError, match="no adapter there; it should hold"):
    reference.init("lora", init=str(tmp_path / "none"))
  pickled = altered(adapter, tmp_path / "pickled")
  (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
  with pytest.raises(errors.UserError, match="adapter_model.bin is a pickle, which can run code"):
    reference.init("lora", init=str(pickled))
  (pickled / "adapter_model.bin").unlink()
  with pytest.raises(errors.UserError, match="adapter_model.safetensors is missing"):
    reference.init("lora", init=str(pickled))


def test_configurations_that_are_refused(model, adapter, tmp_path):
  reference = model("bert")

  def refuse(name, match, method="lora", **conf):
    with pytest.raises(errors.UserError, match=match):
      reference.init(method, init=str(altered(adapter, tmp_path / name, conf)))

  refuse("typo", r"peft_type 'LORRA' is none that can be read \(did you mean 'LORA'\?\)",
         peft_type="LORRA")
  refuse("none", "has no peft_type", peft_type=None)
  refuse("method", "is a LORA adapter: set tune.method=lora", method="ia3")
  refuse("pissa", "peft changes the base weights when it loads", init_lora_weights="pissa")
  refuse("alora", "aLoRA", alora_invocation_tokens=[1])
  broken = altered(adapter, tmp_path / "broken")
  (broken / "adapter_config.json").write_text('{"peft_type": ')
  with pytest.raises(errors.UserError, match="adapter_config.json: cannot be read as JSON"):
    reference.init("lora", init=str(broken))


def test_tensors_that_do_not_fit(model, adapter, tmp_path):
  reference = model("bert")
  one = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight"

  def refuse(name, match, change):
    with pytest.raises(errors.UserError, match=match):
      reference.init("lora", init=str(altered(adapter, tmp_path / name, change=change)))

  def renamed(old, new):
    return lambda found: {name.replace(old, new): a for name, a in found.items()}

  refuse("other", r"matches nothing in this model \(BertForSequenceClassification\); unmatched: "
         ".*wpe.*are named as bert.encoder.layer.0", renamed("self.query", "self.wpe"))
  refuse("part", r"only in part; tensors without a layer:\n.*layer.7.attention",
         renamed("layer.1.", "layer.7."))
  refuse("missing", r"missing: bert.encoder.layer.1.attention.self.query.lora_B.weight \(16, 2\)",
         lambda found: {name: a for name, a in found.items() if name != one})
  refuse("shape", r"query.lora_B.weight: has \(15, 2\), needs \(16, 2\)",
         lambda found: {**found, one: found[one][1:]})
  refuse("odd", "without a layer: bert.encoder.layer.1.attention.self.query.lora_C.weight",
         lambda found: {**found, one.replace("_B", "_C"): found[one]})
  refuse("plain", r"pooler.dense.weight has shape \(16, 15\)",
         lambda found: {**found, "base_model.model.bert.pooler.dense.weight": np.ones((16, 15))})


def test_a_head_for_other_labels_starts_anew(model, adapter, tmp_path, caplog):
  reference = model("bert")
  other = altered(adapter, tmp_path / "other", change=lambda found: {
    name: a[:2] if "classifier" in name else a for name, a in found.items()})
  with caplog.at_level("WARNING", logger="absl"):
    tuned = reference.init("lora", init=str(other))
  assert "is a head for other labels, (2,)" in caplog.text
  kernel = reference.ours.variables["params"]["classifier"]["kernel"]
  np.testing.assert_array_equal(tuned.trainable["params"]["classifier"]["kernel"], kernel)


def test_leaks_of_bias_all_are_tolerated(model, adapter, tmp_path):
  reference = model("bert")
  leaked = altered(adapter, tmp_path / "leaked", {"bias": "all"}, lambda found: {
    **found, "base_model.model.classifier.modules_to_save.bias": np.ones(3, np.float32),
    "base_model.model.classifier.original_module.bias": np.ones(3, np.float32)})
  tuned = reference.init("lora", init=str(leaked))
  assert not np.array_equal(tuned.trainable["params"]["classifier"]["bias"], np.ones(3))


def test_what_has_no_form_in_peft(model, tmp_path):
  def refuse(case, method, match, **values):
    reference = model(case)
    tuned = reference.init(method, **values)
    with pytest.raises(errors.UserError, match=match):
      ours.write(tmp_path / "out", reference.ours, tuned, tuned.trainable)
    assert not (tmp_path / "out").exists()

  refuse("bert", "freeze", "no form for what this run trained; --format=merged", train=("pooler",))
  refuse("bert", "ssf", "no form for what this run trained; --format=merged")
  refuse("gpt2", "loha", "LOHA has no form for layers such as transformer.h.0", rank=2)
  refuse("gpt2", "lora", "cannot adapt transformer.wte and lm_head", rank=2, targets=("tokens$",))
  refuse("vit", "lora", "no weight or bias of a module", rank=2, also_train=("cls_token",))


def test_an_adapter_of_a_quantised_base(model, tmp_path):
  """The file holds the adapter alone; what reads it puts it on the base in full precision."""
  reference = model("bert")
  tuned = reference.init("lora", rank=2, quantize="int8", quantize_targets=("encoder",))
  assert "quantized" in tuned.frozen
  trainable = toys.shaken(tuned.trainable)
  ours.write(tmp_path, reference.ours, tuned, trainable, reference.folder)
  again = reference.init("lora", init=str(tmp_path), quantize="int8", quantize_targets=("encoder",))
  assert "quantized" in again.frozen and again.settings.quantize == "int8"
  was, now = tune.flatten(trainable), tune.flatten(again.trainable)
  assert was.keys() == now.keys()
  assert all(np.array_equal(was[path], now[path]) for path in was)
