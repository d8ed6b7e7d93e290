"""Tables as numbers and categories: statistics of train alone, gaps, the unknown; a whole run."""

import json

import numpy as np
import pytest
from commands import script
from sklearn import datasets, linear_model, model_selection, pipeline, preprocessing

from ft import bundled, config, errors, models, predict, train
from ft.data import table
from ft.models import tabular

ROWS = "age,job,code,label\n10,a,1,no\n20,b,2,yes\n,a,1,no\n30,?,2,yes\n"


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "train.csv").write_text(ROWS)
  (tmp_path / "test.csv").write_text("age,job,code,label\n1000,z,3, no.\n20,b,1,yes.\n")
  return tmp_path


def loaded(folder, **changes):
  given = {"data.modality": "table", "data.train": str(folder / "train.csv"),
           "data.validation": str(folder / "test.csv"), "data.test": "",
           "data.test_fraction": 0.0, "data.label_strip": ".",
           **{f"data.{key}": value for key, value in changes.items()}}
  section = config.complete(given).data
  preprocess = table.Preprocess(section, None)
  return preprocess, preprocess.load(section)


def test_statistics_are_those_of_train_and_nothing_else(folder):
  preprocess, data = loaded(folder, categorical=("code",))
  age, = preprocess.numbers
  assert (age.mean, age.gaps) == (20.0, True)
  assert age.sd == pytest.approx(np.std([10, 20, 30]))
  assert {c.name: c.values for c in preprocess.categories} == {
    "job": ("a", "b", ""), "code": ("1", "2")}
  train = [preprocess(row) for row in data.splits["train"]]
  np.testing.assert_allclose([e["numbers"] for e in train],
                             np.array([[-10, 0], [0, 0], [0, 1], [10, 0]]) / [age.sd, 1])
  assert [e["categories"].tolist() for e in train] == [[1, 1], [2, 2], [1, 1], [3, 2]]


def test_the_unknown_has_its_own_code_and_is_counted(folder):
  preprocess, data = loaded(folder, categorical=("code",))
  rows = data.splits["validation"]
  assert preprocess(rows[0])["categories"].tolist() == [0, 0]
  preprocess(rows[1])
  assert preprocess.counts == {"with_unknown_categories": 1, "with_missing_values": 0}
  assert [row["label"] for row in rows] == ["no", "yes"]  # label_strip
  again = table.from_spec(json.loads(json.dumps(preprocess.spec())))
  for row in rows:
    for key, value in preprocess(row).items():
      np.testing.assert_array_equal(value, again(row)[key])


def test_an_unknown_category_counts_for_nothing():
  shape = tabular.Config(numbers=1, cardinalities=(2,), hidden_size=4, num_labels=2)
  module = tabular.Model(shape)
  import jax
  variables = module.init(jax.random.key(0), **tabular.probe_inputs(shape))
  out = module.apply(variables, np.zeros((3, 1)), np.array([[0], [1], [2]]))
  np.testing.assert_array_equal(out["features"][:, 1:3], [[0, 0], [1, 0], [0, 1]])
  assert np.all(np.asarray(out["features"][:, 3:]) == 0)  # what is learnt starts at nothing


@pytest.mark.parametrize("changes, match", [
  ({"numeric": ("job",)}, "column 'job' of train holds 'a', no number"),
  ({"ignore": ("jop",)}, "no column 'jop' .data.ignore.*did you mean 'job'"),
  ({"ignore": ("age",), "numeric": ("age",)}, "'age' is in two of"),
  ({"ignore": ("age", "job", "code")}, "no column is left"),
])
def test_messages(folder, changes, match):
  with pytest.raises(errors.UserError, match=match):
    loaded(folder, **changes)


def test_rows_that_cannot_be_read_say_why(folder):
  preprocess, data = loaded(folder)
  record = data.splits["train"][0]["record"]
  with pytest.raises(errors.RowError, match="age is 'old', no number"):
    preprocess({"record": {**record, "age": "old"}})
  with pytest.raises(errors.RowError, match="no column 'job'"):
    preprocess({"record": {"age": 1, "code": 1}})


@pytest.mark.parametrize("source, match", [
  ("scratch:bert", "bert starts from a checkpoint"), ("scratch:tabluar", "did you mean 'tabular'")])
def test_only_tables_start_from_nothing(source, match):
  with pytest.raises(errors.UserError, match=match):
    models.inspect(source)
  with pytest.raises(errors.UserError, match="no such field.*did you mean 'hidden_size'"):
    models.load("scratch:tabular", shape={"numbers": 2, "hiden_size": 3})


def test_a_run_learns_the_diagnosis_and_predicts(tmp_path):
  """Beside scikit-learn's logistic regression, cross-validated over the same table: about .97."""
  bundled.write(tmp_path / "breast_cancer.csv", "breast_cancer")
  script("train", f"--workdir={tmp_path / 'run'}",
         f"--config=configs/table.py:data=breast_cancer,folder={tmp_path}")
  card = json.loads((tmp_path / "run" / "card.json").read_text())
  bunch = datasets.load_breast_cancer()
  reference = pipeline.make_pipeline(preprocessing.StandardScaler(),
                                     linear_model.LogisticRegression())
  known = model_selection.cross_val_score(reference, bunch.data, bunch.target, cv=5).mean()
  for name in ("probe", "fine-tuned"):
    assert abs(card["results"]["test"][name]["metrics"]["accuracy"] - known) < 0.04
  assert card["results"]["test"]["fine-tuned"]["metrics"]["auroc"] > 0.98
  assert card["screening"]["positive"] == "malignant"
  predictor = predict.Predictor(tmp_path / "run")
  rows = list(predictor.rows(str(tmp_path / "breast_cancer.csv")))
  said = np.array([answer["label"] for answer in predictor(rows)])
  assert np.mean(said == bunch.target_names[bunch.target]) > 0.95


def test_a_head_on_what_was_drawn_finds_it_again(tmp_path):
  bundled.write(tmp_path / "breast_cancer.csv", "breast_cancer")
  given = [("tune.method", "head"), ("train.steps", "20"), ("guard.overfit.resamples", "100")]
  made = config.load(f"configs/table.py:data=breast_cancer,folder={tmp_path}", given)
  card = train.train(made, tmp_path / "run")
  predictor = predict.Predictor(tmp_path / "run")
  rows = list(predictor.rows(str(tmp_path / "breast_cancer.csv")))
  assert len(list(predictor(rows))) == 569
  assert card["model"]["trainable"] < card["model"]["parameters"]
  assert (tmp_path / "run" / "adapter" / "ft_adapter.safetensors").is_file()
