"""SASRec and BERT4Rec against their published formulas in torch, float32.

The references are written from the papers and from the form of RecBole's and pmixer's models; their
modules have those names, so that a saved state has the published layout.
"""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import sasrec

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402 (it needs torch)

_SMALL = {"vocab_size": 23, "hidden_size": 12, "n_layers": 2, "n_heads": 3, "inner_size": 17,
          "hidden_dropout_prob": 0.4, "attn_dropout_prob": 0.3, "MAX_ITEM_LIST_LENGTH": 14}
_PMIXER = {"vocab_size": 23, "hidden_units": 12, "num_blocks": 2, "num_heads": 2, "maxlen": 13,
           "dropout_rate": 0.2, "model_type": "sasrec", "layout": "pmixer"}
_ONE = {**_PMIXER, "num_blocks": 1}
CONFIGS = {
    "SASRec, RecBole": {**_SMALL, "model_type": "sasrec", "hidden_act": "relu"},
    "BERT4Rec, RecBole": {**_SMALL, "model_type": "bert4rec", "n_heads": 2, "layer_norm_eps": 1e-5},
    "SASRec, pmixer: norm of queries, zeros": _PMIXER,
    "SASRec, pmixer: norm of queries, position 0": {**_ONE, "padding": "position"},
    "SASRec, pmixer: norm first": {**_ONE, "norm_first": True, "num_heads": 1},
    "SASRec, pmixer: norm last": {**_ONE, "norm_first": False, "num_heads": 4},
}
RECBOLE, BERT4REC, QUERIES, _, FIRST, LAST = CONFIGS
ACTS = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}


class Saved(torch.nn.Module):
  """A module with save_pretrained and from_pretrained: safetensors and a config.json."""

  def __init__(self, config):
    super().__init__()
    self.config = config

  def save_pretrained(self, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in self.state_dict().items()},
              folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(self.config))

  @classmethod
  def from_pretrained(cls, folder, output_loading_info=True, dtype=None):
    del output_loading_info, dtype
    folder = pathlib.Path(folder)
    model = cls(json.loads((folder / "config.json").read_text()))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), False)
    return model, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": []}


def modules(**parts):
  return torch.nn.ModuleDict(parts)


def last(x, real):
  index = (real * torch.arange(x.shape[1])).argmax(1)
  return x[torch.arange(len(x)), index]


class RecBole(Saved):
  """Norm after each sum; BERT4Rec looks both ways, transforms its output and adds a bias."""

  def __init__(self, config):
    super().__init__(config)
    d, nn = config["hidden_size"], torch.nn
    self.both_ways = config["model_type"] == "bert4rec"
    self.eps = config.get("layer_norm_eps", 1e-12)
    self.item_embedding = nn.Embedding(config["vocab_size"], d, padding_idx=0)
    self.position_embedding = nn.Embedding(config["MAX_ITEM_LIST_LENGTH"], d)
    self.LayerNorm = nn.LayerNorm(d, self.eps)
    self.trm_encoder = modules(layer=nn.ModuleList([modules(
        multi_head_attention=modules(
            query=nn.Linear(d, d), key=nn.Linear(d, d), value=nn.Linear(d, d),
            dense=nn.Linear(d, d), LayerNorm=nn.LayerNorm(d, self.eps)),
        feed_forward=modules(
            dense_1=nn.Linear(d, config["inner_size"]), dense_2=nn.Linear(config["inner_size"], d),
            LayerNorm=nn.LayerNorm(d, self.eps))) for _ in range(config["n_layers"])]))
    if self.both_ways:
      self.output_ffn = nn.Linear(d, d)
      self.output_ln = nn.LayerNorm(d, self.eps)
      self.output_bias = nn.Parameter(torch.zeros(config["vocab_size"] - 1))

  def forward(self, item_ids, attention_mask):
    steps = item_ids.shape[1]
    x = self.LayerNorm(self.item_embedding(item_ids) + self.position_embedding.weight[:steps])
    seen = attention_mask[:, None, None, :].bool()
    if not self.both_ways:
      seen = seen & torch.ones(steps, steps).tril().bool()
    for layer in self.trm_encoder["layer"]:
      x = self.layer(layer["multi_head_attention"], layer["feed_forward"], x, seen)
    if self.both_ways:
      x = self.output_ln(torch.nn.functional.gelu(self.output_ffn(x)))
    y = last(x, attention_mask)
    if self.both_ways:
      scores = y @ self.item_embedding.weight[:-1].T + self.output_bias
    else:
      scores = y @ self.item_embedding.weight.T
    return {"last_hidden_state": x, "features": y, "logits": scores}

  def layer(self, own, network, x, seen):
    heads = self.config["n_heads"]
    q, k, v = (own[name](x).unflatten(2, (heads, -1)).transpose(1, 2)
               for name in ("query", "key", "value"))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    y = (scores + torch.where(seen, 0.0, -10000.0)).softmax(-1) @ v
    x = own["LayerNorm"](x + own["dense"](y.transpose(1, 2).flatten(2)))
    act = ACTS[self.config.get("hidden_act", "gelu")]
    return network["LayerNorm"](x + network["dense_2"](act(network["dense_1"](x))))


class Pmixer(Saved):
  """torch's own attention, convolutions of width 1, a last norm, vectors scaled by sqrt(D)."""

  def __init__(self, config):
    super().__init__(config)
    d, nn = config["hidden_units"], torch.nn
    self.norm_first = config.get("norm_first")
    self.zeros = config.get("padding") != "position" and self.norm_first is None
    self.item_emb = nn.Embedding(config["vocab_size"], d, padding_idx=0)
    positions = config["maxlen"] + (not self.zeros)
    self.pos_emb = nn.Embedding(positions, d, padding_idx=None if self.zeros else 0)

    def norms():
      return nn.ModuleList([nn.LayerNorm(d, 1e-8) for _ in range(config["num_blocks"])])

    self.attention_layernorms, self.forward_layernorms = norms(), norms()
    self.attention_layers = nn.ModuleList([
        nn.MultiheadAttention(d, config["num_heads"]) for _ in range(config["num_blocks"])])
    self.forward_layers = nn.ModuleList([
        modules(conv1=nn.Conv1d(d, d, 1), conv2=nn.Conv1d(d, d, 1))
        for _ in range(config["num_blocks"])])
    self.last_layernorm = nn.LayerNorm(d, 1e-8)

  def forward(self, item_ids, attention_mask):
    real = attention_mask[..., None]
    positions = torch.arange(item_ids.shape[1]).expand_as(item_ids)
    if not self.zeros:
      positions = (positions + 1) * attention_mask
    x = self.item_emb(item_ids) * self.item_emb.embedding_dim**0.5 + self.pos_emb(positions)
    x = x * real if self.zeros else x
    for own in zip(self.attention_layernorms, self.attention_layers, self.forward_layernorms,
                   self.forward_layers, strict=True):
      x = self.layer(*own, x)
      x = x * real if self.zeros else x
    x = self.last_layernorm(x)
    y = last(x, attention_mask)
    return {"last_hidden_state": x, "features": y, "logits": y @ self.item_emb.weight.T}

  def layer(self, attention_norm, attention, norm, convolutions, x):
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()

    def attend(q, source):
      q, source = q.transpose(0, 1), source.transpose(0, 1)
      return attention(q, source, source, attn_mask=hidden)[0].transpose(0, 1)

    def network(x):
      y = torch.relu(convolutions["conv1"](x.transpose(1, 2)))
      return convolutions["conv2"](y).transpose(1, 2)

    if self.norm_first is None:
      query = attention_norm(x)
      x = norm(query + attend(query, x))
      return x + network(x)
    if self.norm_first:
      query = attention_norm(x)
      x = x + attend(query, query)
      return x + network(norm(x))
    x = attention_norm(x + attend(x, x))
    return norm(x + network(x))


def build(case):
  """Returns a random model; padding's vector is not zero, so that reading it would show."""
  torch.manual_seed(0)
  config = CONFIGS[case]
  model = (Pmixer if config.get("layout") == "pmixer" else RecBole)(config)
  model = harness.randomise(model)
  with torch.no_grad():
    for name in ("item_emb", "item_embedding", "pos_emb", "position_embedding"):
      if hasattr(model, name):
        getattr(model, name).weight.normal_(0, 0.7)
  return model


def histories(left=False, length=13):
  inputs = harness.tokens(22, rows=4, length=length, left=left, first=1)
  return {"item_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def run(pretrained, inputs, **kw):
  return jax.jit(lambda v: pretrained.module.apply(v, **inputs, **kw))(pretrained.variables)


def scored(pretrained, variables, inputs):
  """The outputs, logits without the row of BERT4Rec's mask, which upstream does not have."""
  out = pretrained.module.apply(variables, **inputs)
  return {**out, "logits": out["logits"][:, :pretrained.config.scored]}


@pytest.mark.parametrize("case", CONFIGS)
def test_scores(case, tmp_path):
  model, inputs = build(case), histories(left="pmixer" in case)
  names = ("last_hidden_state", "features", "logits")
  pretrained = harness.check("sasrec", case, model, inputs, {n: n for n in names}, tmp_path,
                             real={"last_hidden_state": inputs["attention_mask"]}, call=scored)
  assert pretrained.config.head == "rank"
  if case in (BERT4REC, QUERIES):
    harness.check_scan(pretrained, inputs, tmp_path)
  if case != LAST:
    return
  hidden = run(pretrained, inputs)["last_hidden_state"]
  every = pretrained.module.apply(pretrained.variables, hidden, method="item_logits")
  assert every.shape == (4, 13, 23) and every.dtype == np.float32
  only_ids = run(pretrained, {"item_ids": inputs["item_ids"]})  # id 0 is padding
  assert np.array_equal(only_ids["last_hidden_state"], hidden)


def test_later_items_are_unseen_by_sasrec_and_seen_by_bert4rec(tmp_path):
  for case, same in ((RECBOLE, True), (FIRST, True), (BERT4REC, False)):
    build(case).save_pretrained(tmp_path / case)
    pretrained = models.load(str(tmp_path / case))
    inputs = {"item_ids": histories()["item_ids"][:1]}
    changed = {"item_ids": np.where(np.arange(13) == 12, 5, inputs["item_ids"])}
    a, b = (run(pretrained, kw)["last_hidden_state"][:, :12] for kw in (inputs, changed))
    assert np.array_equal(a, b) == same


def test_the_mask_is_no_item_to_recommend(tmp_path):
  build(BERT4REC).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  assert pretrained.config.mask_token_id == 22
  logits = run(pretrained, histories())["logits"]
  assert logits.shape == (4, 23) and (logits[:, 22] == np.finfo(np.float32).min).all()


@pytest.mark.parametrize("case", [RECBOLE, BERT4REC, QUERIES])
def test_more_items(case, tmp_path):
  build(case).save_pretrained(tmp_path / "old")
  old = models.load(str(tmp_path / "old"))
  new = models.load(str(tmp_path / "old"), changes={"vocab_size": 26})
  assert "vocab_size 23 -> 26" in new.report.changed[0]
  table, before = (p.variables["params"]["item_embedding"]["embedding"] for p in (new, old))
  assert np.array_equal(table[:23], before)
  np.testing.assert_allclose(table[23:], np.tile(before.mean(0), (3, 1)), rtol=1e-5, atol=1e-6)
  want, got = (run(p, histories())["logits"] for p in (old, new))
  assert got.shape == (4, 26)
  np.testing.assert_allclose(got[:, :23], want, rtol=1e-5, atol=1e-5)
  models.export(new, tmp_path / "new")
  again = models.load(str(tmp_path / "new"))
  assert again.config == new.config and not again.report.initialised
  if case == BERT4REC:
    assert again.config.mask_token_id == 22  # stays where it was, in the midst of the items now
    with pytest.raises(errors.UserError, match="the mask is item 22"):
      models.load(str(tmp_path / "old"), changes={"vocab_size": 20})


def test_depth(tmp_path):
  model = build(QUERIES)
  model.save_pretrained(tmp_path)
  cut = models.load(str(tmp_path), changes={"depth": 1})
  model.attention_layers = model.attention_layers[:1]
  for name in ("attention_layernorms", "forward_layernorms", "forward_layers"):
    setattr(model, name, getattr(model, name)[:1])
  inputs = histories(left=True)
  want = model(**harness.as_torch(inputs))["logits"].detach()
  assert harness.difference(run(cut, inputs)["logits"], want) <= harness.TOLERANCE


def test_other_heads(tmp_path):
  build(BERT4REC).save_pretrained(tmp_path / "rank")
  body = models.load(str(tmp_path / "rank"), head="none")
  assert body.report.ignored == ["output_bias"]
  labelled = models.load(str(tmp_path / "rank"), labels=("stays", "leaves"))
  assert sorted(labelled.report.initialised) == ["params/classifier/bias",
                                                 "params/classifier/kernel"]
  models.export(labelled, tmp_path / "labelled")
  again = models.load(str(tmp_path / "labelled"))
  assert again.config.labels == ("stays", "leaves") and not again.report.initialised
  assert run(again, histories())["logits"].shape == (4, 2)


def test_dropout_acts_only_with_a_key(tmp_path):
  build(FIRST).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  a, b, c, d = (np.asarray(run(pretrained, histories(), rngs=rngs)["logits"]) for rngs in (
      {}, {}, {"dropout": jax.random.key(1)}, {"dropout": jax.random.key(2)}))
  assert np.array_equal(a, b)
  assert not np.allclose(a, c) and not np.allclose(c, d)
  assert pretrained.config.attention_probs_dropout_prob == 0.2
  assert pretrained.config.with_dropout(0.0).to_hf()["dropout_rate"] == 0.0


def test_settings_of_published_codebases():
  read = sasrec.Config.from_hf(CONFIGS[RECBOLE])
  assert (read.num_hidden_layers, read.num_attention_heads, read.intermediate_size) == (2, 3, 17)
  assert (read.norm, read.padding, read.max_position_embeddings) == ("post", "masked", 14)
  assert (read.attention_probs_dropout_prob, read.layer_norm_eps) == (0.3, 1e-12)
  pmixer = sasrec.Config.from_hf(_PMIXER)
  assert (pmixer.norm, pmixer.padding, pmixer.hidden_act) == ("query", "zero", "relu")
  assert (pmixer.intermediate_size, pmixer.layer_norm_eps) == (12, 1e-8)
  first = sasrec.Config.from_hf(CONFIGS[FIRST])
  assert (first.norm, first.padding) == ("pre", "position")


@pytest.mark.parametrize(("case", "wrong"), [
    (RECBOLE, {"hidden_act": "step"}), (RECBOLE, {"norm": "pre"}), (RECBOLE, {"vocab_size": 0}),
    (RECBOLE, {"padding": "zero"}), (RECBOLE, {"layout": "x"}), (BERT4REC, {"layout": "pmixer"}),
    (QUERIES, {"norm": "sandwich"}), (QUERIES, {"padding": "none"}), (RECBOLE, {"hidden_size": 13}),
    (BERT4REC, {"mask_token_id": 40})])
def test_wrong_config_values(case, wrong):
  key = next(iter(wrong)).replace("mask_token_id", "the mask is item 40")
  with pytest.raises(errors.UserError, match=key):
    sasrec.Config.from_hf({**CONFIGS[case], **wrong})


def test_too_many_items(tmp_path):
  build(RECBOLE).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="15 items; the model reads 14"):
    pretrained.module.apply(pretrained.variables, np.ones((1, 15), np.int32))
