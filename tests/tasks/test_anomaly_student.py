"""A student of nominal images: distances by hand, what trains, and a run from end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tasks.test_anomaly import folder  # noqa: F401 (a fixture)

from ft import config, errors, judge, predict, students, train


def test_distances_are_one_minus_the_cosine():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
  found, = students.apart([a], [b])
  want = 1 - (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
  np.testing.assert_allclose(found, want, atol=1e-6)
  np.testing.assert_allclose(students.apart([a], [7 * a])[0], 0, atol=1e-6)  # length counts nowhere
  large = np.ones((3, 8, 10), np.float32)
  np.testing.assert_allclose(students.joined([large, np.full((3, 4, 5), 2.0, np.float32)]), 3)


def test_the_student_looks_at_the_last_map_alone():
  rng = np.random.default_rng(0)
  maps = [rng.normal(size=(2, side, side, c)).astype(np.float32) for side, c in ((8, 3), (4, 5))]
  student = students.Decoder(width=7, dropout=0.5)
  variables = student.init(jax.random.PRNGKey(0), maps)
  made = student.apply(variables, maps)
  assert [y.shape for y in made] == [y.shape for y in maps]
  other = student.apply(variables, [0 * maps[0], maps[1]])
  np.testing.assert_array_equal(made[0], other[0])
  assert np.abs(made[0] - student.apply(variables, [maps[0], maps[1] * -1])[0]).max() > 0.01
  noisy = student.apply(variables, maps, True, rngs={"dropout": jax.random.PRNGKey(1)})
  assert np.abs(noisy[0] - made[0]).max() > 0.01
  # One cell of the coarse map reaches its surroundings and no further: what is seen is local.
  at = jax.grad(lambda y: student.apply(variables, [maps[0], y])[1][0, 0, 0].sum())(
    jnp.asarray(maps[1]))
  assert np.abs(at[0, :2, :2]).min() > 0 and not np.asarray(at[0, 2:]).any()


@pytest.fixture(scope="module")
def record(folder):  # noqa: F811
  return train.train(config.complete({
    "model.source": str(folder / "model"), "data.modality": "image", "data.resize": "none",
    "data.train": str(folder / "train"), "data.test": str(folder / "test"),
    "data.validation_fraction": 0.25, "task.name": "anomaly_student", "task.maps": (0, 1, 2),
    "task.width": 32, "task.pictures": 2, "tune.method": "none", "optim.rate": 1e-2,
    "train.batch": 8, "train.train_sample": 0, "train.steps": 60, "train.eval_every": 30.0,
  }), folder / "student")


def test_holes_are_found(folder, record):  # noqa: F811
  tuned = record["results"]["test"]["fine-tuned"]["metrics"]
  assert tuned["auroc"] > 0.9 and tuned["pixel_auroc"] > 0.8 and tuned["recall/hole"] > 0.5
  history = record["history"]
  assert history[-1]["validation/mean_score"] < history[0]["validation/mean_score"]
  # The teacher stays as it was: the student alone trains.
  assert 0 < record["model"]["trainable"] < 40_000
  assert set(record["results"]["test"]) == {"mean-image", "nearest-image", "fine-tuned"}
  validation = record["results"]["validation"]["fine-tuned"]["metrics"]
  assert validation["false_alarms"] == pytest.approx(1 / 6)
  assert (folder / "student" / "card.html").read_text().count('src="data:image/png;base64,') == 4


def test_prediction_and_evaluation_have_the_student(folder, record):  # noqa: F811
  want = record["results"]["test"]["fine-tuned"]["metrics"]
  again = judge.judge(folder / "student", str(folder / "test"))
  for key in ("auroc", "f1", "pixel_auroc"):
    assert again["metrics"][key] == pytest.approx(want[key], abs=1e-6)
  predictor = predict.Predictor(folder / "student")
  answers = list(predictor(predictor.rows(str(folder / "test"))))
  said = [answer["anomalous"] for answer in answers]
  assert np.mean(said[10:]) == pytest.approx(want["recall/hole"])
  (folder / "student" / "model" / "student.npz").write_bytes(b"no archive")
  with pytest.raises(errors.UserError, match=r"student\.npz: no readable student"):
    predict.Predictor(folder / "student")
