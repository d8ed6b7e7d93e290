"""A tiny random Llama with a chat template, in a Hugging Face folder, with a tokenizer of words."""

import json
import types

import jax
import tokenizers
from ml_collections import config_dict

from ft import models
from ft.data import text
from ft.models import llama
from ft.tasks import chat
from ft.weights import names

WORDS = ("<b> <|im|> <e> <unk> system user assistant tool be kind hi how are you fine thanks a "
         "table in Paris for 2 is booked at 7:30 bye which city ok").split()
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|im|> ' + m.role + '\n' + m.content "
            "+ ' <e>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im|> assistant\n' }}"
            "{% endif %}")
MARKED = ("{{ bos_token }}{% for m in messages %}{{ '<|im|> ' + m.role + '\n' }}"
          "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' <e>' }}"
          "{% endgeneration %}{% else %}{{ m.content + ' <e>' }}{% endif %}{{ '\n' }}{% endfor %}")
TALK = [["system", "be kind"], ["user", "a table for 2"], ["assistant", "in which city"],
        ["user", "Paris at 7:30"], ["tool", "ok"],
        ["assistant", "a table in Paris is booked at 7:30"], ["user", "thanks"],
        ["assistant", "bye"]]


def export(folder, template=TEMPLATE, positions=128):
  """Writes the model, whose pad token is the token that ends a turn, and returns it as loaded."""
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(["<b>", "<|im|>", "<e>", "<unk>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<b> $A", pair="<b> $A $B", special_tokens=[("<b>", 0)])  # a second one, if it acts
  settings = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<e>",
              "tokenizer_class": "PreTrainedTokenizerFast"}
  if template:
    settings["chat_template"] = template
  files = {"tokenizer.json": made.to_str().encode(),
           "tokenizer_config.json": json.dumps(settings).encode()}
  config = llama.Config(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, head="lm",
    tie_word_embeddings=True, pad_token_id=2, bos_token_id=0, eos_token_id=2, initializer_range=0.4)
  module = llama.Model(config)
  variables = module.init(jax.random.PRNGKey(0), **llama.probe_inputs(config))
  models.export(models.Pretrained("llama", module, variables, names.Report(), files, config, "text",
                                  ()), folder)
  return models.load(str(folder), head="lm")


def task(folder, columns=("turns",), data=None, **given):
  """The task of a run: `given` are keys of the section `task`, `data` those of `data`."""
  values = {key: value[0] for key, value in text.KEYS.items()} | {"max_length": 64} | (data or {})
  preprocess = text.Preprocess(types.SimpleNamespace(**values), models.inspect(str(folder)))
  section = {key: value[0] for key, value in chat.KEYS.items()} | {"max_reply": 8} | given
  return chat.Task(config_dict.ConfigDict(section),
                   types.SimpleNamespace(columns=dict.fromkeys(columns, "turns")), preprocess)
