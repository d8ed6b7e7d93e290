"""Distillation: the parts of the loss, what a teacher costs, texts of the student's own."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict
from tasks import test_lm as language
from tasks import text_models

from ft import config, errors, models, passes, state, teaching, tune
from ft.data import text
from ft.models import generate, layers, llama
from ft.tasks import distill
from ft.weights import names

WORDS = language.WORDS


def export(folder, seed=1, width=16, depth=1):
  """Writes a random Llama with the tokenizer of `language`, as teacher or student."""
  made = llama.Config(
    vocab_size=len(WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=depth,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, head="lm",
    tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    initializer_range=0.5)
  module = llama.Model(made)
  variables = module.init(jax.random.PRNGKey(seed), **llama.probe_inputs(made))
  models.export(models.Pretrained("llama", module, variables, names.Report(),
                                  language.tokenizer(False), made, "text", ()), folder)
  return models.load(str(folder), head="lm")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
  """(folder, student, teacher): the teacher is of other width and depth."""
  folder = tmp_path_factory.mktemp("pair")
  return folder, export(folder / "student"), export(folder / "teacher", 5, 32, 2)


class Setting:
  """A student and a teacher, and what a step needs of them; `given` are keys of `task`."""

  def __init__(self, pair, method="full", teacher="teacher", **given):
    folder, self.student, self.teacher = pair
    values = {key: value[0] for key, value in text.KEYS.items()} | {"max_length": 16}
    preprocess = text.Preprocess(types.SimpleNamespace(**values),
                                 models.inspect(str(folder / "student")))
    section = {key: value[0] for key, value in distill.KEYS.items()}
    self.task = distill.Task(
      config_dict.ConfigDict(section | {"teacher": teacher and str(folder / teacher)} | given),
      types.SimpleNamespace(columns={"text": "x"}, splits={}), preprocess)
    settings = config.section("tune.method", method, {"rank": 2} if method == "lora" else {})
    self.plain = tune.init(settings, self.student.variables, jax.random.PRNGKey(0))
    self.tuned = tune.accompany(self.plain, *self.task.company(self.student, self.plain, None))
    self.apply = state.make_apply(self.student.module, self.tuned.interceptor)
    self.batch = language.batch()

  def loss(self, trainable=None, rng=None):
    def value(trainable, frozen, batch):
      call = lambda variables, inputs, rng=None: self.apply(variables, inputs, rng)[0]  # noqa: E731
      return self.task.loss(call, self.tuned.combine(frozen, trainable), batch, rng)

    return jax.jit(value)(trainable or self.tuned.trainable, self.tuned.frozen, self.batch)

  def logits(self, pretrained, temperature=1.0):
    inputs = {key: self.batch[key] for key in ("input_ids", "attention_mask")}
    out = jax.jit(lambda v: pretrained.module.apply(v, **inputs))(pretrained.variables)
    return np.asarray(out["logits"][:, :-1], np.float64) / temperature


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---- The loss ----


@pytest.mark.parametrize("alpha,beta,temperature", [(0.3, 0.0, 2.0), (0.5, 0.4, 3.0)])
def test_the_loss_is_the_mix_of_both_parts(pair, alpha, beta, temperature):
  made = Setting(pair, alpha=alpha, beta=beta, temperature=temperature)
  total, weight, aux = made.loss()
  q, p = (log_softmax(made.logits(one, temperature)) for one in (made.student, made.teacher))
  kl = lambda a, b: np.sum(np.exp(a) * (a - b), -1)  # noqa: E731
  m = np.log(beta * np.exp(p) + (1 - beta) * np.exp(q))
  apart = beta * kl(p, m) + (1 - beta) * kl(q, m) if beta else kl(p, q)
  mask = made.batch["attention_mask"][:, 1:]
  nll = -np.take_along_axis(log_softmax(made.logits(made.student)),
                            made.batch["input_ids"][:, 1:, None], -1)[..., 0]
  assert float(weight) == mask.sum()
  assert float(aux["nats_per_token"]) == pytest.approx(np.sum(nll * mask), rel=1e-4)
  assert float(aux["divergence"]) == pytest.approx(temperature**2 * np.sum(apart * mask), rel=1e-3)
  want = (1 - alpha) * np.sum(nll * mask) + alpha * temperature**2 * np.sum(apart * mask)
  assert float(total) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states_are_compared_through_projections(pair, kind):
  made = Setting(pair, hidden=2.0, hidden_loss=kind, alpha=0.0)
  kernels = made.tuned.trainable[tune.COMPANY]["projections"]
  assert {name: part["kernel"].shape for name, part in kernels.items()} == {
    "0to1": (16, 32)}
  total, weight, aux = made.loss()
  inputs = {key: made.batch[key] for key in ("input_ids", "attention_mask")}
  states = [jax.jit(lambda v, one=one: passes.layers_of(
    lambda: one.module.apply(v, **inputs))[1])(one.variables)
    for one in (made.student, made.teacher)]
  mask = made.batch["attention_mask"]
  ours, theirs = np.asarray(states[0][0]) @ np.eye(16, 32), np.asarray(states[1][1])
  each = np.mean((ours - theirs) ** 2, -1)
  if kind == "cosine":
    size = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    each = 1 - np.sum(ours * theirs, -1) / size
  want = np.sum(each * mask) / mask.sum()
  assert float(aux["hidden"] / weight) == pytest.approx(want, rel=1e-4)
  assert float(total) == pytest.approx(float(aux["nats_per_token"] + 2 * aux["hidden"]), rel=1e-5)


def test_layers_are_spread_evenly():
  assert teaching.spread(2, 4) == [(0, 1), (1, 3)]
  assert teaching.spread(3, 6) == [(0, 1), (1, 3), (2, 5)]
  assert teaching.spread(4, 4) == [(i, i) for i in range(4)]
  assert teaching.spread(3, 1) == [(0, 0), (1, 0), (2, 0)]


def test_layers_are_seen_as_they_are(tmp_path):
  """The last layer's state, normalised, is the last hidden state."""
  made = export(tmp_path, depth=3)
  inputs = {"input_ids": jnp.array([[2, 5, 6]])}
  out, seen = passes.layers_of(lambda: made.module.apply(made.variables, **inputs))
  assert sorted(seen) == [0, 1, 2]
  scale = made.variables["params"]["norm"]["scale"]
  last = seen[2] / np.sqrt(np.mean(np.square(seen[2]), -1, keepdims=True) + 1e-6) * scale
  np.testing.assert_allclose(last, out["last_hidden_state"], rtol=1e-3, atol=1e-5)


# ---- What a teacher costs ----


def compiled(made):
  tx = optax.adam(1e-3)
  step = state.make_train_step(made.task.loss, made.apply, made.tuned.combine, tx)
  start = state.create(made.tuned.trainable, {}, tx, 0)
  return step.lower(start, made.tuned.frozen, made.batch).compile(), start


def size(tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.optimised
def test_a_teacher_has_no_gradient_and_no_state(pair):
  """Far larger than its student, it is an argument of the step and computed forwards, no more."""
  folder, student, _ = pair
  large = export(folder / "large", seed=5, width=256, depth=4)
  made = Setting((folder, student, large), teacher="large")
  weights, small = size(large.variables), size(student.variables)
  assert weights > 100 * small
  program, start = compiled(made)
  memory = program.memory_analysis()
  forward = state.make_predict_step(made.task.predict, made.apply, made.tuned.combine).lower(
    made.tuned.trainable, {}, made.tuned.frozen, made.batch).compile().memory_analysis()
  assert memory.argument_size_in_bytes > weights
  assert memory.output_size_in_bytes < 4 * small  # weights and two moments of the student
  assert memory.temp_size_in_bytes < forward.temp_size_in_bytes + weights / 4
  assert size(start) < 4 * small
  # Nothing of it is exported or counted either.
  frozen, trainable = made.tuned.frozen, made.tuned.trainable
  assert size(frozen[tune.COMPANY]) == weights
  assert tune.COMPANY not in made.tuned.merge(frozen, trainable)
  assert jax.tree.leaves(tune.shapes(made.tuned)) == jax.tree.leaves(tune.shapes(made.plain))


def test_a_step_moves_student_and_projections_and_no_teacher(pair):
  made = Setting(pair, hidden=1.0)
  tx = optax.sgd(0.1)
  step = state.make_train_step(made.task.loss, made.apply, made.tuned.combine, tx)
  fresh = state.create(jax.tree.map(jnp.copy, made.tuned.trainable), {}, tx, 0)
  now, metrics = step(fresh, made.tuned.frozen, made.batch)
  before, after = tune.flatten(made.tuned.trainable), tune.flatten(now.trainable)
  assert {path.split("/")[0] for path in before} == {"params", tune.COMPANY}
  for path, leaf in before.items():
    assert np.any(np.asarray(leaf) != np.asarray(after[path])), path
  assert {"nats_per_token", "divergence", "hidden"} <= set(metrics)


# ---- Texts of the student's own ----


def test_own_words_follow_the_beginning_of_each_row():
  ids = np.array([[2, 5, 6, 7, 8, 0], [2, 9, 0, 0, 0, 0]], np.int32)
  batch = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32),
           "weight": np.ones(2, np.float32)}
  said = jnp.array([[11, 12, 3, 0], [13, 14, 15, 16]])
  lengths = jnp.array([3, 4])
  starts = set()
  for seed in range(20):
    read = []

    def write(variables, inputs, rng, read=read):
      read.append(np.asarray(inputs["attention_mask"]).sum(1))
      return said, lengths

    made = jax.tree.map(np.asarray, teaching.own_words(write, {}, batch, jax.random.key(seed)))
    (start,) = read
    starts.add(int(start[0]))
    assert 1 <= start[0] <= 4 and start[1] == 1
    for row in range(2):
      whole = [*ids[row, :start[row]], *np.asarray(said)[row, :lengths[row]]]
      assert made["input_ids"][row, :len(whole)].tolist() == whole
      assert made["attention_mask"][row].tolist() == [1] * len(whole) + [0] * (10 - len(whole))
      assert made["loss_mask"][row].nonzero()[0].tolist() == [*range(start[row], len(whole))]
  assert starts == {1, 2, 3, 4}


def test_a_reply_is_cut_where_the_assistant_begins():
  ids = np.arange(2, 12, dtype=np.int32)[None]
  mask = np.array([[0, 0, 0, 1, 1, 0, 0, 1, 1, 1]], np.int32)
  batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_mask": mask,
           "weight": np.ones(1, np.float32)}
  starts = set()
  for seed in range(12):
    def write(variables, inputs, rng):
      starts.add(int(inputs["attention_mask"].sum()))
      return jnp.ones((1, 2), jnp.int32), jnp.array([2])

    teaching.own_words(write, {}, batch, jax.random.key(seed))
  assert starts == {3, 7}


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_on_policy_compares_on_what_the_student_wrote(pair, method):
  made = Setting(pair, method, on_policy=1.0, alpha=1.0, beta=1.0, max_new_tokens=6)
  if method == "lora":  # an update that is not zero, so that writing has to see it
    made.tuned.trainable["adapters"] = jax.tree.map(
      lambda x: x + 0.5 * jax.random.normal(jax.random.key(9), x.shape),
      made.tuned.trainable["adapters"])
  rng = jax.random.key(4)
  total, weight, aux = made.loss(rng=rng)
  merged = made.tuned.merge(made.tuned.frozen, made.tuned.trainable)
  settings = generate.Settings.of(made.student, do_sample=True, top_k=0, top_p=1.0,
                                  max_new_tokens=6)
  write = generate.program(made.student.module, settings)
  _, key = jax.random.split(jax.random.fold_in(rng, 0x64697374))
  rows = jax.jit(lambda v: teaching.own_words(write, v, made.batch, key))(merged)
  inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
  q, p = (np.asarray(jax.nn.log_softmax(jax.jit(lambda v, one=one: one.module.apply(
    v, **inputs))(v)["logits"]))[:, :-1] for one, v in (
      (made.student, merged), (made.teacher, made.teacher.variables)))
  mask = np.asarray(rows["loss_mask"])[:, 1:]
  want = np.sum(np.sum(np.exp(q) * (q - p), -1) * mask)
  assert float(weight) == mask.sum() == float(aux["on_policy"]) > 4
  assert float(total) == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_on_policy_is_drawn_by_step_and_can_be_repeated(pair):
  made = Setting(pair, on_policy=0.5, alpha=0.7, max_new_tokens=4)
  tx = optax.sgd(0.05)
  step = state.make_train_step(made.task.loss, made.apply, made.tuned.combine, tx)

  def run():
    now = state.create(jax.tree.map(jnp.copy, made.tuned.trainable), {}, tx, 0)
    said = []
    for _ in range(8):
      now, metrics = step(now, made.tuned.frozen, made.batch)
      said.append((float(metrics["on_policy"]), float(metrics["loss"])))
    return said

  first, again = run(), run()
  assert first == again and {share for share, _ in first} == {0.0, 1.0}
  assert all(np.isfinite(loss) for _, loss in first)


# ---- Bad input ----


@pytest.mark.parametrize("given,message", [
  ({"teacher": ""}, "task.teacher is empty"),
  ({"teacher": "nowhere"}, "no such file or folder: .*nowhere"),
  ({"own": {"packin": "best-fit"}}, "did you mean 'task.packing'"),
  ({"on_policy": 0.5, "of": "seq2seq"}, "continues no text"),
  ({"on_policy": 0.5, "own": {"packing": "best-fit"}}, "task.own.packing=none"),
  ({"on_policy": 0.5, "alpha": 0.0}, "set alpha above 0"),
  ({"on_policy": 0.5, "max_new_tokens": 60}, "make 76 tokens"),
  ({"hidden": 1.0, "hidden_layers": ("0:4",)}, "from 0:0 to 0:1"),
  ({"hidden": 1.0, "hidden_layers": ("last",)}, "'last'; expected student:teacher"),
])
def test_keys_that_cannot_be(pair, given, message):
  with pytest.raises(errors.UserError, match=message):
    Setting(pair, **given)


def test_another_tokenizer_is_told(pair):
  text_models.export(pair[0] / "other", "llama")
  with pytest.raises(errors.UserError, match="18 and 25 tokens, and '</s>' is number 3 and 1"):
    Setting(pair, teacher="other")


def test_a_teacher_without_its_head_has_nothing_to_teach(tiny):
  teacher = teaching.Teacher(str(tiny.model), str(tiny.model))
  with pytest.raises(errors.UserError, match="nothing to teach: its checkpoint lacks params/"):
    teacher.load({"head": "mlm"}, layers.Compute(), None)


def test_layers_in_a_loop_cannot_be_compared(pair):
  folder, _, teacher = pair
  scanned = models.load(str(folder / "student"), head="lm", compute=layers.Compute(scan=True))
  with pytest.raises(errors.UserError, match="model.scan=False"):
    teaching.Match.of((), False, scanned.module, teacher.module,
                      {"student": scanned.variables, "teacher": teacher.variables})
