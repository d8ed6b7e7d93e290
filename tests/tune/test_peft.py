"""PEFT's files both ways: what we write real `peft` opens, what real `peft` writes we read."""

import numpy as np
import pytest
from tune import peft_models

from ft.tune import peft as ours

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
