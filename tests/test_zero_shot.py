"""CLIP's texts as a classifier: transformers' logits, and what a run needs of it."""

import jax
import numpy as np
import pytest
from ml_collections import config_dict
from parity.test_clip import build
from tasks.test_classify import Data, Rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ft import errors, tune, zero_shot
from ft import models as ft_models
from ft.tasks import classify

torch = pytest.importorskip("torch")
WORDS = ("a", "photo", "of", "drawing", "dog", "fire", "truck", "cat", ".")
LABELS = ("cat", "dog", "fire_truck")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """(folder, transformers' model) of a tiny CLIP with a tokenizer of nine words."""
  folder, model = tmp_path_factory.mktemp("clip"), build("CLIP").eval()
  model.save_pretrained(folder)
  ids = {word: i + 1 for i, word in enumerate(WORDS)} | {"<pad>": 0, "<start>": 48, "<end>": 49}
  tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<start> $A <end>", special_tokens=[("<start>", 48), ("<end>", 49)])
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder, model


class Preprocess:
  def finish(self, batch):
    return batch


def make(clip, **given):
  defaults = {name: entry[0] for name, entry in classify.KEYS.items()}
  data = Data({"train": Rows("train", list(LABELS))}, {"image": "x"})
  return classify.Task(config_dict.ConfigDict(
    {**defaults, "zero_shot": str(clip[0]), **given}), data, Preprocess())


def reference(model, pixels, prompts):
  """Returns transformers' logits_per_image; of several prompts by the definition."""
  said = [p.replace("{label}", label.replace("_", " ")).replace(".", " .").split()
          for label in LABELS for p in prompts]
  rows = [[48, *(WORDS.index(w) + 1 for w in words), 49] for words in said]
  longest = max(map(len, rows))
  ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
  mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
  with torch.no_grad():
    out = model(input_ids=ids, attention_mask=mask,
                pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2))
  if len(prompts) == 1:
    return out.logits_per_image.numpy()
  texts = out.text_embeds.reshape(len(LABELS), len(prompts), -1).mean(1)
  texts = texts / texts.norm(dim=-1, keepdim=True)
  return (out.image_embeds @ texts.T * model.logit_scale.detach().exp()).numpy()


@pytest.mark.parametrize("prompts", [
  ("a photo of a {label}.",), ("a photo of a {label}.", "a drawing of a {label}")])
def test_logits_equal_transformers(clip, prompts):
  task = make(clip, prompts=prompts)
  _, frozen = task.company(None, None, lambda shape: jax.devices()[0])
  loaded = ft_models.load(str(clip[0]), num_labels=3)  # as a run has it: no text tower
  pixels = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype(np.float32)
  batch = {"pixel_values": pixels, "label": np.array([0, 1, 2, 0], np.int32)}

  def apply(variables, inputs, rng):
    return loaded.module.apply({"params": variables["params"]}, **inputs)

  found = jax.jit(lambda variables: task.features(apply, variables, batch))(
    {**loaded.variables, tune.COMPANY: frozen})
  want = reference(clip[1], pixels, prompts)
  assert np.ptp(want) > 0.1
  np.testing.assert_allclose(found["zero_shot"], want, rtol=1e-4, atol=1e-4)
  rows = task.baselines({"train": jax.device_get(found)})
  np.testing.assert_array_equal(rows["zero-shot"]["train"]["logits"], found["zero_shot"])


def test_without_it_there_is_no_row(clip):
  task = make(clip, zero_shot="")
  assert task.company(None, None, None) == ({}, {})
  part = {"features": np.eye(3, dtype=np.float32), "label": np.arange(3)}
  assert set(task.baselines({"train": part})) == {"majority", "probe"}


def test_messages(clip, tiny):
  with pytest.raises(errors.UserError, match="has no {label} in it"):
    zero_shot.classifier(str(clip[0]), LABELS, ("a photo",))
  with pytest.raises(errors.UserError, match="a bert model; it has to be a CLIP"):
    zero_shot.classifier(str(tiny.model), LABELS, ("a {label}",))
  with pytest.raises(errors.UserError, match="19 tokens .* and the text tower reads 16"):
    zero_shot.classifier(str(clip[0]), LABELS, ("a " * 15 + "{label}",))
  with pytest.raises(errors.UserError, match="task.zero_shot is for one label an example"):
    make(clip, labels_kind="multi")
