"""PEFT's files both ways, of methods other than LoRA; see test_peft.py."""

import pytest
from tune import peft_models

peft = pytest.importorskip("peft")

model = peft_models.model


def mostly(cases):
  """The cases; those of further architectures and settings, with a hyphen, run as slow ones."""
  return [pytest.param(name, marks=pytest.mark.slow) if "-" in name else name for name in cases]


OUT = {
  "ia3": ("bert", "ia3", {}),
  "ia3-lm": ("llama", "ia3", {}),
  "ia3-gpt2": ("gpt2", "ia3", {}),
  "ia3-conv": ("resnet", "ia3", {}),
  "oft": ("bert", "oft", dict(block_size=4)),
  "oft-exact": ("llama", "oft", dict(block_size=8, neumann=0)),
  "vera": ("bert", "vera", dict(rank=3)),
  "vera-gpt2": ("gpt2", "vera", dict(rank=3)),
  "loha": ("bert", "loha", dict(rank=2)),
  "loha-conv": ("resnet", "loha", dict(rank=2, targets=("conv",))),
  "lokr": ("llama", "lokr", dict(rank=2)),
  "lokr-both": ("bert", "lokr", dict(rank=1, decompose_both=True)),
  "lokr-conv": ("resnet", "lokr", dict(rank=2, targets=("conv",))),
  "hira": ("bert", "hira", dict(rank=2)),
  "hira-gpt2": ("gpt2", "hira", dict(rank=2)),
  "hira-conv": ("resnet", "hira", dict(rank=2)),
  "adalora": ("bert", "adalora", dict(rank=3, target_rank=2)),
  "adalora-gpt2": ("gpt2", "adalora", dict(rank=3, target_rank=2)),
  "adalora-conv": ("resnet", "adalora", dict(rank=3, target_rank=2)),
  "shira": ("vit", "sparse", dict(rank=1)),
  "norms": ("bert", "freeze", dict(select="norms")),
  "norms-lm": ("llama", "freeze", dict(select="norms")),
  "prompt": ("bert", "prompt", dict(length=3)),
  "prompt-lm": ("llama", "prompt", dict(length=3)),
  "prefix": ("llama", "prefix", dict(length=3)),
  "prefix-gpt2": ("gpt2", "prefix", dict(length=3)),
  "tokens": ("bert", "tokens", dict(tokens=(5, 7, 9, 11))),
  "tokens-tied": ("tied", "tokens", dict(tokens=(5, 7, 9, 11))),
}


@pytest.mark.parametrize("name", mostly(OUT))
def test_peft_opens_what_we_write(model, tmp_path, name):
  case, method, values = OUT[name]
  peft_models.check_writing(model(case), method, values, tmp_path / "adapter")


IN = {
  "ia3": ("bert", "ia3", lambda: peft.IA3Config(
    target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"],
    task_type="SEQ_CLS")),
  "ia3-gpt2": ("gpt2", "ia3", lambda: peft.IA3Config(
    target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
  "ia3-conv": ("resnet", "ia3", lambda: peft.IA3Config(
    target_modules=["convolution"], feedforward_modules=["convolution"])),
  "oft": ("bert", "oft", lambda: peft.OFTConfig(
    target_modules=["query", "value"], oft_block_size=4, task_type="SEQ_CLS")),
  "oft-blocks": ("llama", "oft", lambda: peft.OFTConfig(
    target_modules=["q_proj"], r=2, oft_block_size=0, use_cayley_neumann=False)),
  "vera": ("bert", "vera", lambda: peft.VeraConfig(
    r=4, target_modules=["query", "dense"], task_type="SEQ_CLS")),
  "loha": ("bert", "loha", lambda: peft.LoHaConfig(
    r=2, target_modules=["query", "dense"], task_type="SEQ_CLS")),
  "loha-conv": ("resnet", "loha", lambda: peft.LoHaConfig(r=2, target_modules=["convolution"])),
  "lokr": ("llama", "lokr", lambda: peft.LoKrConfig(
    r=2, target_modules=["q_proj", "up_proj"], decompose_factor=2)),
  "lokr-conv": ("resnet", "lokr", lambda: peft.LoKrConfig(r=2, target_modules=["convolution"])),
  "hira": ("bert", "hira", lambda: peft.HiraConfig(
    r=2, target_modules=["query", "dense"], task_type="SEQ_CLS")),
  "adalora": ("bert", "adalora", lambda: peft.AdaLoraConfig(
    init_r=3, target_r=2, total_step=10, target_modules=["query", "value"], task_type="SEQ_CLS")),
  "shira": ("bert", "sparse", lambda: peft.ShiraConfig(
    r=2, target_modules=["query", "value"], task_type="SEQ_CLS")),
  "norms": ("bert", "freeze", lambda: peft.LNTuningConfig(
    target_modules=["LayerNorm"], task_type="SEQ_CLS")),
  "prompt": ("bert", "prompt", lambda: peft.PromptTuningConfig(
    num_virtual_tokens=3, task_type="SEQ_CLS")),
  "prompt-lm": ("llama", "prompt", lambda: peft.PromptTuningConfig(
    num_virtual_tokens=3, task_type="CAUSAL_LM")),
  "prefix": ("llama", "prefix", lambda: peft.PrefixTuningConfig(
    num_virtual_tokens=3, task_type="CAUSAL_LM")),
  "tokens": ("bert", "tokens", lambda: peft.TrainableTokensConfig(
    token_indices=[5, 7, 9, 11], target_modules=["word_embeddings"])),
  "tokens-tied": ("tied", "tokens", lambda: peft.TrainableTokensConfig(
    token_indices=[5, 7, 9, 11], target_modules=["embed_tokens"])),
}


@pytest.mark.parametrize("name", mostly(IN))
def test_we_read_what_peft_writes(model, tmp_path, name):
  case, method, make = IN[name]
  peft_models.check_reading(model(case), method, make(), tmp_path)
