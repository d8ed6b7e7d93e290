"""Recommendation: ranks by brute force, losses by torch, padding and seen items never, a run."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import script
from ml_collections import config_dict

from ft import config as config_lib
from ft import errors, judge, models, predict, recommendations, scratch
from ft.data import interactions
from ft.tasks import recommend

ROOT = pathlib.Path(__file__).parents[2]
ITEMS = 14


def table(path, users=30, seed=0):
  """Writes a CSV in which a user walks up the items, one after the other, from anywhere."""
  rng, lines = np.random.default_rng(seed), ["user,item,time"]
  for user in range(users):
    first = rng.integers(ITEMS)
    lines += [f"u{user},f{(first + t) % ITEMS},{t}" for t in range(rng.integers(6, 12))]
  path.write_text("\n".join(lines) + "\n")
  return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
  folder = tmp_path_factory.mktemp("zoo")
  table(folder / "a.csv")
  for kind in ("sasrec", "bert4rec"):
    scratch.write_recommender(folder / kind, str(folder / "a.csv"), kind=kind, width=8, layers=1,
                              heads=2, positions=8, dropout=0.0)
  return folder


def make(zoo, kind="sasrec", task=(), **data):
  """Returns (task, data, model) of the table."""
  section = config_lib.complete({
    "data.modality": "interactions", "task.name": "recommend", "data.train": str(zoo / "a.csv"),
    **{f"data.{key}": value for key, value in data.items()}}).data
  preprocess = interactions.Preprocess(section, models.inspect(str(zoo / kind)))
  rows = preprocess.load(section)
  keys = {key: entry[0] for key, entry in recommend.KEYS.items()}
  made = recommend.Task(config_dict.ConfigDict({**keys, **dict(task)}), rows, preprocess)
  return made, rows, models.load(str(zoo / kind), head="rank")


def stack(examples):
  return {**{key: np.stack([e[key] for e in examples]) for key in examples[0]},
          "weight": np.ones(len(examples), np.float32)}


def call(pretrained):
  """The model's apply, as a step has it."""
  def apply(variables, inputs, rng=None):
    if "hidden" in inputs:
      return {"logits": pretrained.module.apply(variables, inputs["hidden"], method="lm_logits")}
    return pretrained.module.apply(variables, **inputs)

  return apply


# ---- Ranks and scores ----------------------------------------------------------------------------


def brute_force(scores, target, blocked):
  """The place of the target when all that is not blocked is put in order, ties before it."""
  if blocked[target]:
    return 0
  order = sorted((i for i in range(len(scores)) if not blocked[i]),
                 key=lambda i: (-scores[i], i == target))
  return order.index(target) + 1


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_place_is_that_of_a_brute_force_ranking(xp):
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, (200, 15)).astype(np.float32)  # many are equal
  target, blocked = rng.integers(0, 15, 200), rng.random((200, 15)) < 0.3
  found = recommendations.place(xp, xp.asarray(scores), xp.asarray(target), xp.asarray(blocked))
  assert np.asarray(found).tolist() == [
    brute_force(*row) for row in zip(scores, target, blocked, strict=True)]
  # What cannot tell items apart, or gives no numbers, is last and not first.
  for value in (0.0, np.nan):
    same = xp.full((2, 15), value)
    assert recommendations.place(xp, same, xp.asarray([3, 4]), xp.zeros(15, bool)).tolist() == [
      15, 15]


def test_measures_are_those_of_scikit_learn():
  metrics = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(1)
  scores, target = rng.normal(size=(60, 30)), rng.integers(0, 30, 60)
  rank = recommendations.place(np, scores, target, np.zeros(30, bool))
  relevant = (np.arange(30) == target[:, None]).astype(int)
  for k in (5, 10):
    assert recommendations.per_row(f"ndcg@{k}", rank).mean() == pytest.approx(
      metrics.ndcg_score(relevant, scores, k=k))
    assert recommendations.per_row(f"hr@{k}", rank).mean() == pytest.approx(
      metrics.top_k_accuracy_score(target, scores, k=k, labels=np.arange(30)))
  assert recommendations.per_row("mrr", rank).mean() == pytest.approx(
    metrics.label_ranking_average_precision_score(relevant, scores))
  assert recommendations.per_row("mrr", [0, 2]).tolist() == [0, 0.5]
  assert recommendations.per_row("ndcg@10", [0, 1, 3, 11]).tolist() == [0, 1, 0.5, 0]


def test_coverage_and_popularity_by_hand():
  counts, ranked = np.array([0, 5, 1, 1, 0, 9]), np.array([0, 1, 1, 1, 1, 0], bool)
  # Of the four ranked: 0 choices .125, twice 1 choice .5, 5 choices .875.
  np.testing.assert_allclose(recommendations.percentiles(counts, ranked),
                             [0, 0.875, 0.5, 0.5, 0.125, 0])
  out = {"rank": np.array([1, 0]), "top": np.array([[1, 2], [1, 0]]), "target": np.array([1, 4])}
  found = recommendations.summary(out, (5, 10), counts, ranked)
  assert found["coverage"] == 0.5 and found["popularity"] == pytest.approx((0.875 * 2 + 0.5) / 3)
  assert found["popularity_of_targets"] == pytest.approx((0.875 + 0.125) / 2)
  assert found["hr@5"] == found["mrr"] == found["ndcg@10"] == 0.5


def test_neighbours_are_by_the_cosines_of_scikit_learn():
  pairwise = pytest.importorskip("sklearn.metrics.pairwise")
  rng = np.random.default_rng(2)
  histories = [rng.choice(np.arange(1, 9), rng.integers(1, 7), replace=False) for _ in range(30)]
  near = recommendations.Neighbours(histories, 9)
  chosen = recommendations.matrix(histories, 9).toarray()
  alike = pairwise.cosine_similarity(chosen.T)
  np.fill_diagonal(alike, 0)
  np.testing.assert_allclose(near.last_item([[3, 5]])[0], alike[5], atol=1e-6)
  np.testing.assert_allclose(near.items([[3, 5]], 500)[0], alike[3] + alike[5], atol=1e-6)
  nearest = np.where(alike >= np.sort(alike, 1)[:, [-2]], alike, 0)
  np.testing.assert_allclose(near.items([[3, 5]], 2)[0], nearest[3] + nearest[5], atol=1e-6)
  assert near.popularity([[1]])[0].tolist() == chosen.sum(0).tolist()


# ---- The task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
@pytest.mark.parametrize("seen", ["exclude", "rank"])
def test_predictions_leave_out_padding_and_what_was_seen(zoo, kind, seen):
  task, data, model = make(zoo, kind, {"seen": seen, "top": 20}, k_core=1)
  task.preprocess.ranked[3] = False  # as of an item that the run's table does not have
  task._settle("ndcg@10", (5,), 20, seen, task.preprocess)
  rows = [data.splits["test"][i] for i in range(6)]
  batch = stack([task.example(row) for row in rows])
  out = jax.device_get(jax.jit(lambda b: task.predict(call(model), model.variables, b))(batch))
  logits = model.module.apply(model.variables, jnp.asarray(batch["item_ids"]))["logits"]
  for i, row in enumerate(rows):
    listed = [item for item in out["top"][i] if item]
    blocked = np.ones(task.preprocess.size, bool)
    blocked[1:ITEMS + 1] = False  # neither padding nor mask
    blocked[3] = True
    everything = brute_force(np.array(logits[i]), row["target"], blocked)
    if seen == "exclude":
      assert out["rank_incl_seen"][i] == everything
      blocked[row["history"]] = True
    assert out["rank"][i] == brute_force(np.array(logits[i]), row["target"], blocked)
    assert sorted(listed) == np.flatnonzero(~blocked).tolist()
    assert listed == sorted(listed, key=lambda item: -logits[i][item])
    said = task.describe({key: value[i] for key, value in out.items()}, {})
    assert len(said["items"]) == len(said["scores"]) == len(listed)
    assert said["items"][0] == task.preprocess.items[listed[0] - 1]


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_the_loss_is_torchs_over_all_ranked_items(zoo, kind):
  torch = pytest.importorskip("torch")
  task, data, model = make(zoo, kind)
  rng = np.random.default_rng(0)
  examples = [task.augment(task.example(data.splits["train"][i]), rng) for i in range(5)]
  batch = stack(examples)
  batch["weight"][4] = 0
  total, weight, _ = jax.jit(lambda b: task.loss(call(model), model.variables, b, None))(batch)
  hidden = model.module.apply(model.variables, jnp.asarray(batch["item_ids"]))["last_hidden_state"]
  logits = model.module.apply(model.variables, hidden, method="lm_logits")
  logits = torch.tensor(np.array(logits[:4, :, 1:ITEMS + 1])).reshape(-1, ITEMS)
  targets = torch.tensor(batch["targets"][:4].reshape(-1)).long() - 1  # -1: nothing is predicted
  want = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
  assert float(total) == pytest.approx(float(want), rel=1e-5)
  assert float(weight) == int((targets >= 0).sum()) > 4


def test_what_follows_does_not_reach_a_state(zoo):
  task, data, model = make(zoo)
  row = data.splits["train"][0]
  one, other = task.example(row)["item_ids"][None], task.example(row)["item_ids"][None].copy()
  other[0, -1] = 1 + other[0, -1] % ITEMS
  states = [np.array(model.module.apply(model.variables, ids)["last_hidden_state"])
            for ids in (one, other)]
  real = np.flatnonzero(one[0])  # states of padding are read by nobody, and predict nothing
  assert 0 < len(real) < 8 and not task.example(row)["targets"][one[0] == 0].any()
  np.testing.assert_allclose(states[0][0, real[:-1]], states[1][0, real[:-1]], atol=1e-6)
  assert not np.allclose(states[0][0, -1], states[1][0, -1])


def test_bert4rec_hides_items_and_never_padding(zoo):
  task, data, _ = make(zoo, "bert4rec", {"mask_rate": 0.5, "last_only": 0.2})
  mask, alone = task.preprocess.mask, 0
  for number in range(200):
    row = data.splits["train"][number % len(data.splits["train"])]
    before = task.example(row)
    whole = np.array([*row["history"], row["target"]])[-8:]
    example = task.augment(before, np.random.default_rng(number))
    hidden = example["item_ids"] == mask
    assert hidden.any() and (example["targets"] > 0).tolist() == hidden.tolist()
    ids = np.where(hidden, example["targets"], example["item_ids"])
    assert ids[ids > 0].tolist() == whole.tolist()
    alone += hidden.sum() == 1 and hidden[-1]
  assert before["item_ids"][-1] == mask and 20 < alone < 80
  task, data, _ = make(zoo)
  same = task.example(data.splits["train"][0])
  assert task.augment(same, np.random.default_rng(0)) is same


def test_baselines_see_train_alone(zoo):
  task, data, _ = make(zoo)
  index = {split: np.arange(len(data.splits[split])) for split in ("validation", "test")}
  features = {split: {"index": at, "rank": at} for split, at in index.items()}
  found = task.baselines(features)
  assert set(found) == {"starting model", "popularity", "last-item kNN", "item-kNN"}
  counts, rows = task.preprocess.chosen, data.splits["test"]
  for i, row in enumerate(rows):
    blocked = np.zeros(len(counts), bool)
    blocked[[0, *row["history"]]] = True
    assert found["popularity"]["test"]["rank"][i] == brute_force(counts, row["target"], blocked)
    assert not set(found["item-kNN"]["test"]["top"][i]) & set(row["history"])
  assert set(task.metrics(found["item-kNN"]["test"])) >= {"hr@5", "ndcg@10_incl_seen", "coverage"}


def test_the_rule_is_said(zoo):
  said = make(zoo)[0].describe_task()["protocol"]
  assert said == ("leave-one-out: each user's last interaction is test, the one before validation; "
                  "one target a row, ranked among all 14 items, those of the user's own history "
                  "left out, none sampled; ties count against the target")
  assert "history ranked too" in make(zoo, task={"seen": "rank"})[0].protocol
  with pytest.raises(errors.UserError, match="task.cutoffs=.*whole numbers from 1"):
    make(zoo, task={"cutoffs": (0,)})


# ---- From another domain -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_a_start_keeps_layers_and_shared_items(zoo, tmp_path, kind):
  other = tmp_path / "b.csv"
  other.write_text("user,item\nu,new\nu,f5\nu,f2\nu,newer\n")
  scratch.write_recommender(tmp_path / "b", str(other), start=str(zoo / kind))
  a, b = models.load(str(zoo / kind)), models.load(str(tmp_path / "b"))
  assert json.loads(b.files["items.json"]) == ["new", "f5", "f2", "newer"]
  for part in ("encoder", "position_embedding", "norm"):
    jax.tree.map(np.testing.assert_array_equal, a.variables["params"][part],
                 b.variables["params"][part])
  old, rows = (np.array(m.variables["params"]["item_embedding"]["embedding"]) for m in (a, b))
  place = {item: i for i, item in enumerate(json.loads(a.files["items.json"]), 1)}
  np.testing.assert_array_equal(rows[2:4], old[[place["f5"], place["f2"]]])
  assert not np.allclose(rows[1], rows[4])
  if kind == "bert4rec":
    assert len(rows) == 6
    np.testing.assert_array_equal(rows[-1], old[-1])
  with pytest.raises(errors.UserError, match="is there already"):
    scratch.write_recommender(tmp_path / "b", str(other))


# ---- A run ---------------------------------------------------------------------------------------


def test_a_run_from_table_to_recommendation(zoo, tmp_path):
  (tmp_path / "tiny.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(zoo / 'sasrec')!r}),
    data=dict(modality="interactions", train={str(zoo / 'a.csv')!r}, stride=4),
    task=dict(name="recommend", top=3), optim=dict(rate=2e-2, weight_decay=0.0),
    guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=16, steps=60, eval_every=30, log_every=20, train_sample=16),
  )
""")
  run = tmp_path / "run"
  done = script("train", f"--config={tmp_path / 'tiny.py'}", f"--workdir={run}")
  card = json.loads((run / "card.json").read_text())
  test = card["results"]["test"]
  assert set(test) == {"starting model", "popularity", "last-item kNN", "item-kNN", "fine-tuned"}
  tuned = test["fine-tuned"]["metrics"]
  assert tuned["ndcg@10"] > 0.8 > test["popularity"]["metrics"]["ndcg@10"]
  for text in (done.stderr, (run / "card.html").read_text()):
    assert "ranked among all 14 items" in text
  predictor = predict.Predictor(run)
  known, unknown = predictor([
    *predictor.preprocess.read_rows(str(write(tmp_path / "new.jsonl", ["f3", "f99", "f4"]))),
    *predictor.preprocess.read_rows(str(write(tmp_path / "none.jsonl", ["f98"])))])
  assert known["items"][0] == "f5" and len(known["items"]) == 3
  assert known["unseen_items"] == ["f99"] and not {"f3", "f4"} & set(known["items"])
  assert "without an item that the model knows" in unknown["error"]
  judged = judge.judge(run, str(zoo / "a.csv"))
  assert judged["n"] == 30 and judged["metrics"]["ndcg@10"] == pytest.approx(tuned["ndcg@10"])
  assert judged["protocol"].startswith("each user's last interaction is the target; one target")


def write(path, history):
  path.write_text(json.dumps({"history": history}) + "\n")
  return path
