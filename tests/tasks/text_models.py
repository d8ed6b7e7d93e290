"""Tiny random text-to-text models in Hugging Face folders, with a tokenizer of words."""

import json

import jax
import tokenizers

from ft import models
from ft.models import bart, llama, t5
from ft.weights import names

WORDS = ("<pad> </s> <unk> <s> <user> <bot> <end> <en> <de> a bad bright dull film good great grim "
         "is it plot slow the was do sum").split()
TEMPLATE = ("{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }} "
            "{{ m.content }} <end>\n{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}")


def tokenizer(ends: bool = True, template: bool = False) -> dict:
  """Files of a tokenizer, which ends a text with </s> where `ends`."""
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens([w for w in WORDS if w.startswith("<")])
  if ends:
    made.post_processor = tokenizers.processors.TemplateProcessing(
      single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
  settings = {"pad_token": "<pad>", "eos_token": "</s>"}
  settings |= {"chat_template": TEMPLATE} if template else {}
  return {"tokenizer.json": made.to_str().encode(),
          "tokenizer_config.json": json.dumps(settings).encode()}


def config(kind: str):
  """The family and the Config of one of marian, t5, m2m_100 and llama."""
  ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "head": "lm"}
  layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16,
            "max_position_embeddings": 64, "init_std": 0.6, "dropout": 0.0}
  if kind == "t5":
    return "t5", t5.Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2,
                           num_heads=2, initializer_factor=2.0,
                           decoder_start_token_id=0, model_type="t5", **ids)
  if kind == "llama":
    return "llama", llama.Config(
      hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
      tie_word_embeddings=True, **ids)
  more = {"marian": {"decoder_start_token_id": 0, "forced_eos_token_id": 1},
          "m2m_100": {"decoder_start_token_id": 1, "activation_function": "relu",
                      "scale_embedding": True}}[kind]
  return "bart", bart.Config(model_type=kind, **layers, **ids, **more)


def export(folder, kind: str, template: bool = False, scale: float = 1.0):
  """Writes a random model of a kind (see `config`) and returns it as loaded from there."""
  family, made = config(kind)
  family_module = models.family_module(family)
  module = family_module.Model(made)
  variables = module.init(jax.random.PRNGKey(3), **family_module.probe_inputs(made))
  variables = jax.tree.map(lambda x: x * scale, variables)
  files = tokenizer(ends=kind != "llama", template=template)
  models.export(models.Pretrained(family, module, variables, names.Report(), files, made, "text",
                                  ()), folder)
  return models.load(str(folder), head="lm")
