"""Chat templates: spans and texts against transformers, bounds, and what goes wrong."""

import json
import pickle

import numpy as np
import pytest

from ft import errors
from ft.data import turns

CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}"
          "{{ '<s>system\nBe kind.</s>\n' }}{% endif %}"
          "{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")
MARKED = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '[A] ' }}"
          "{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}{% else %}"
          "{{ '[' ~ m.role ~ '] ' ~ (m | tojson) }}{% endif %}{{ '\n' }}{% endfor %}")
TALK = [{"role": "system", "content": "Sei <nett> & \"gut\""}, {"role": "user", "content": "hé?"},
        {"role": "assistant", "content": " yes </s> 🙂 "}, {"role": "tool", "content": "42"},
        {"role": "assistant", "content": ""}, {"role": "user", "content": "yes"}]


def make(source, **tokens):
  return turns.Renderer("the checkpoint", source, tokens)


def said(renderer, messages=TALK):
  content, spans = renderer.spans(messages)
  return [content[start:end] for start, end in spans]


def test_texts_and_generation_blocks_are_those_of_transformers():
  chat = pytest.importorskip("transformers.utils.chat_template_utils")
  tokens = {"bos_token": "<b>", "eos_token": "</s>"}
  for source in (CHATML, MARKED):
    for start in (False, True):
      want, _ = chat.render_jinja_template([TALK], chat_template=source,
                                           add_generation_prompt=start, **tokens)
      assert make(source, **tokens)(TALK, start) == want[0]
  want, blocks = chat.render_jinja_template(
    [TALK], chat_template=MARKED, return_assistant_tokens_mask=True, **tokens)
  content, spans = make(MARKED, **tokens).spans(TALK)
  assert content == want[0] and spans == [tuple(block) for block in blocks[0]]
  assert said(make(MARKED, **tokens)) == ["yes </s> 🙂</s>", "</s>"]


def test_spans_without_blocks_are_what_a_turn_adds_after_its_head():
  renderer = make(CHATML)
  content, spans = renderer.spans(TALK)
  assert said(renderer) == [" yes </s> 🙂 </s>\n", "</s>\n"]
  assert content[:spans[0][0]].endswith("<s>assistant\n")
  closed = turns.spoken(content, spans, ("</s>",))
  assert [content[a:b] for a, b in closed] == [" yes </s> 🙂 </s>", "</s>"]
  assert turns.spoken(content, spans, ("<end>",)) == spans  # the line break is what ends a turn


@pytest.mark.parametrize("source", [
  # thoughts of earlier turns are dropped once there are later ones
  "{% for m in messages %}{{ m.role ~ ':' ~ (m.content if loop.last else '-') }};{% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}",
  # the head of a reply is not what its turn begins with
  "{% for m in messages %}{{ m.role ~ ':' ~ m.content }};{% endfor %}"
  "{% if add_generation_prompt %}assistant:<think>{% endif %}"])
def test_templates_whose_prefixes_are_none(source):
  with pytest.raises(errors.RowError, match="up to turn 3 .*generation %}"):
    make(source).spans(TALK)


@pytest.mark.parametrize("source,kind,message", [
  ("{% for %}", errors.UserError, "not valid"),
  ("{{ ''.__class__.__mro__ }}", errors.RowError, "unsafe"),
  ("{{ messages.append(1) }}", errors.RowError, "unsafe"),
  ("{{ raise_exception('no system turns') }}", errors.RowError, "no system turns"),
  ("{{ 1 // 0 }}", errors.RowError, "division"),
  ("{{ 'a' * 10**12 }}", errors.UserError, "more than 10,000,000 characters"),
  ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", errors.UserError, "10,000,000"),
])
def test_bad_templates_end_in_one_message(source, kind, message):
  with pytest.raises(kind, match=message):
    make(source)(TALK)


def test_a_template_without_end_is_stopped(monkeypatch):
  monkeypatch.setattr(turns, "SECONDS", 1)
  loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
  renderer = make(f"{{% if messages[0].content == 'loop' %}}{loop}{{% endif %}}ok")
  with pytest.raises(errors.UserError, match="the checkpoint.*more than 1 s"):
    renderer([{"role": "user", "content": "loop"}])
  assert renderer(TALK) == "ok"  # in a new process


def test_renderers_come_from_the_checkpoints_files_and_can_be_sent(tmp_path):
  settings = {"chat_template": [{"name": "rag", "template": "no"},
                                {"name": "default", "template": "{{ eos_token }}"}],
              "eos_token": {"content": "</s>"}}
  assert turns.renderer(tmp_path, {}) is None
  assert turns.renderer(tmp_path, settings)(TALK) == "</s>"
  (tmp_path / "chat_template.jinja").write_text("file")
  renderer = turns.renderer(tmp_path, json.loads(json.dumps(settings)))
  assert renderer(TALK) == "file" == pickle.loads(pickle.dumps(renderer))(TALK)


def test_tokens_between_those_of_a_span_count_with_it():
  offsets = [(0, 3), (3, 5), (5, 5), (5, 9), (9, 9), (9, 10)]  # empty: trimmed spaces
  assert turns.token_mask(offsets, [(4, 9)]).tolist() == [0, 1, 1, 1, 0, 0]
  assert turns.token_mask(offsets, [(0, 1), (9, 10)]).tolist() == [1, 0, 0, 0, 0, 1]
  assert turns.token_mask(offsets, [(3, 3)]).dtype == np.int32
