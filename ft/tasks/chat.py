"""Supervised tuning on conversations: the assistant's tokens carry loss, and they alone.

A row is a conversation (`turns`), which the checkpoint's own chat template makes a text of, system
and tool messages included. What a reply consists of is learnt: its tokens and the token that ends
the turn, but not the header before it; see `ft.data.turns`. The template sets the
beginning-of-sequence token where there is one, and the tokenizer adds none. A row of text without
turns counts whole, as for task.name=lm: plain text can be replayed, or watched for forgetting.

Texts are written at the end of a run: in each conversation the longest reply, which says more than
a goodbye, from the turns before it. Shapes: B batch, T tokens, N rows of a split.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping

import numpy as np

from ft import errors
from ft.models import generate
from ft.tasks import lm

KEYS = {
  "label_smoothing": (0.0, "share of the target spread over the vocabulary", (0.0, 0.99)),
  "packing": ("none", "put rows of train together in rows of data.max_length tokens",
              ["none", "best-fit"]),
  "generate_rows": (50, "conversations of a split that a reply is written in, at the end; 0: none",
                    (0, None)),
  "max_reply": (64, "most tokens of a reply that is written", (1, None)),
}
# What a reply has to get right: names (capitals within a sentence) and whatever has a digit.
_SLOT = re.compile(r"(?<=[^.?!:\s] )[A-Z][\w'’&-]+|[$€£#]?\w*\d[\w:.,-]*")


class Task(lm.Task):
  """Loss, replies and metrics of a chat model; losses and nats are those of `lm.Task`.

  Attributes:
    generate_rows: most rows of a split that a reply is written in; see `ft.generation`.
    max_prompt: most tokens of a conversation before a reply that is written.
  """

  needs = ("turns",)

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have turns.
      preprocess: text.Preprocess.

    Raises:
      UserError: no turns, or no chat template; a reply behind data.max_length would be beyond the
        model's positions; or the model cannot be packed.
    """
    if "turns" not in data.columns:
      raise errors.UserError("task.name=chat learns from conversations, and the data has no column "
                             "of them: name it in data.columns.turns")
    preprocess.columns = {"turns": data.columns["turns"]}
    self._settle(preprocess, {key: int(config[key]) for key in ("generate_rows", "max_reply")})
    self._train_on(config)

  def _settle(self, preprocess, spec: Mapping) -> None:
    from tokenizers import Tokenizer  # slow to import

    super()._settle(preprocess, spec)
    self.generate_rows, self.max_prompt = spec["generate_rows"], preprocess.max_length
    self._tokenizer = Tokenizer.from_str(preprocess.tokenizer.to_str())
    self._tokenizer.no_truncation()
    preprocess.pad = {**preprocess.pad, "loss_mask": 0}
    self._ends = self._ids(preprocess.ending())[-1:]
    limit = preprocess.positions
    if self.generate_rows and self.max_prompt + spec["max_reply"] > limit:
      raise errors.UserError(
        f"data.max_length={self.max_prompt} and task.max_reply={spec['max_reply']}: the model has "
        f"positions for {limit} tokens; lower one of them, or set task.generate_rows=0")

  def show(self, example: dict) -> str:
    """Returns an example as the model reads it, with what carries loss in ⟦ ⟧."""
    ids, mask = example["input_ids"].tolist(), example["loss_mask"].tolist()
    parts = []
    for learnt, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
      text = self._tokenizer.decode([i for i, _ in group], skip_special_tokens=False)
      parts.append(f"⟦{text}⟧" if learnt else text)
    return f"{''.join(parts)} ({len(ids)} tokens, {sum(mask)} of them learnt)"

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns int32 arrays (tokens,): input_ids, attention_mask, and loss_mask, 1 where learnt.

    Raises:
      RowError: a conversation in which nothing is learnt, or that the template refuses.
      UserError: an unknown role, no chat template, or one that does not come to an end.
    """
    if "turns" not in row and "text" in row:
      text, encoding = self.preprocess.encode(row)
      mask = np.ones(len(encoding.ids), np.int32)
    else:
      text, encoding, mask = self.preprocess.encode_turns(row)
    mask[:1] = 0  # nothing stands before the first token
    if not mask.any():
      self.preprocess.count("nothing_learnt")
      raise errors.RowError(self._nothing(row, text))
    return {**self.preprocess.arrays(encoding), "loss_mask": mask}

  unlabelled = example

  def _nothing(self, row: dict, text: str) -> str:
    roles = [m["role"] for m in self.preprocess.messages(row)] if "turns" in row else []
    if roles and "assistant" not in roles:
      return (f"no turn is the assistant's ({', '.join(dict.fromkeys(roles))}); if a speaker is "
              "called otherwise, say so in data.speakers")
    return (f"no token of the assistant's is left within data.max_length="
            f"{self.preprocess.max_length}: {text[:60]!r}…")

  def _counted(self, batch: dict):
    """Returns the loss mask (B, T)."""
    return batch["loss_mask"]

  # Replies, see `ft.generation`.

  def prompt(self, row: dict) -> dict:
    """Returns what a reply is made of: the turns before it and its head, int32 arrays (tokens,).

    A conversation whose last turn is not the assistant's gets its next turn; a text without turns
    is a user's question. What is longer than max_prompt loses its beginning, and is counted.
    """
    messages, _ = self._asked(row)
    ids = self._ids(self.preprocess.chat(messages, answer_next=True))
    if len(ids) > self.max_prompt:
      self.preprocess.count("prompts_truncated")
    ids = np.array(ids[-self.max_prompt:], np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

  def decoding(self, pretrained) -> generate.Settings:
    """Returns how replies are written: greedily, ended as the template ends a turn."""
    settings = generate.Settings.of(pretrained, do_sample=False, num_beams=1,
                                    max_new_tokens=self._spec["max_reply"])
    ends = tuple(dict.fromkeys((*settings.eos_token_id, *self._ends)))
    return dataclasses.replace(settings, eos_token_id=ends)

  def prompts(self, batch: dict) -> tuple:
    """Returns what generation reads of a batch; see `generate.program`."""
    return {key: batch[key] for key in ("input_ids", "attention_mask")}, None

  def compare(self, rows, index, written: list[str]) -> dict[str, np.ndarray]:
    """Returns {"slots": (n, 2)}: values of the true reply that a written one has, and all of them.

    Args:
      rows: sources.Rows with turns.
      index: (n,) which of them.
      written: (n,) replies.
    """
    found = [slots(self._asked(rows[int(i)])[1], reply)
             for i, reply in zip(index, written, strict=True)]
    return {"slots": np.array(found, np.float64).reshape(-1, 2)}

  def sample(self, row: dict) -> dict[str, str]:
    """Returns what a reader compares a written reply with."""
    messages, reply = self._asked(row)
    context = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return {"conversation": context, "reply": reply}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: a reply, or nats where none is written."""
    if "answer" not in outputs:
      return super().describe(outputs, calibration)
    return {"reply": self._said(outputs)}

  def _asked(self, row: dict) -> tuple[list[dict], str]:
    """Returns the messages before the reply to write, and the true reply; "" if none is known."""
    if "turns" not in row and "text" in row:
      return [{"role": "user", "content": row["text"]}], ""
    messages = self.preprocess.messages(row)
    if messages[-1]["role"] != "assistant":
      return messages, ""
    places = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    place = max(places, key=lambda k: len(messages[k]["content"]))
    return messages[:place], messages[place]["content"]

  def _ids(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def _said(self, outputs: dict) -> str:
    return self.preprocess.decode(outputs["answer"][:int(outputs["answer_length"])]).strip()

  # On the host, over whole splits.

  def beside(self, tuned: dict, pretrained: dict) -> dict:
    """Returns {"known_nll": (N,)}, the pretrained model's nll of each row, where it is known."""
    del tuned
    return {"known_nll": pretrained["nll"]} if "nll" in pretrained else {}

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split: nats_per_token and perplexity of the assistant's tokens.

    Where the pretrained model's outputs are known, win_rate: the share of conversations whose true
    replies are likelier than they were before, a token. Of replies that were written also
    slot_recall, the share of the true replies' names and numbers that they have word for word, and
    distinct_1 and distinct_2, different n-grams of words over all of them (Li et al. 2016,
    arXiv:1510.03055).

    Args:
      outputs: "nll" and "tokens" (N,); "known_nll" (N,); of replies "generated" (N,), 1 where there
        is one, "answer" (N, K), "answer_length" (N,) and "slots" (N, 2). Each may be absent.
    """
    found = super().metrics(outputs) if "nll" in outputs else {}
    if "known_nll" in outputs:
      found["win_rate"] = float(np.mean(outputs["nll"] < outputs["known_nll"]))
    if "generated" not in outputs:
      return found
    rows = np.flatnonzero(outputs["generated"])
    replies = [self._said({key: outputs[key][i] for key in ("answer", "answer_length")})
               for i in rows]
    kept, due = np.sum(np.asarray(outputs["slots"])[rows], axis=0)
    return {**found, "slot_recall": float(kept / due) if due else float("nan"),
            **{f"distinct_{n}": distinct(replies, n) for n in (1, 2)}}


def values_in(text: str) -> set[str]:
  """Returns the names (capitals within a sentence) and whatever has a digit, of a text."""
  return {value.rstrip(".,:-") for value in _SLOT.findall(text)}


def slots(reply: str, written: str) -> tuple[int, int]:
  """Returns (those that a written reply has word for word, all) names and numbers of a reply.

  Each counts once.
  """
  values = values_in(reply)
  kept = [value for value in values
          if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", written)]
  return len(kept), len(values)


def distinct(texts: list[str], n: int) -> float:
  """Returns different n-grams of words over all of them, in lower case; NaN if there are none."""
  words = [text.lower().split() for text in texts]
  grams = [tuple(one[i:i + n]) for one in words for i in range(len(one) - n + 1)]
  return len(set(grams)) / len(grams) if grams else float("nan")
