"""Tables: columns told apart, standardised by train alone, a network of them, and a whole run."""

import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import script
from sklearn import neural_network, preprocessing
from sklearn.datasets import load_breast_cancer

from ft import config as config_lib
from ft import errors, models, scratch
from ft.data import sources, table
from ft.models import tabular

ROWS = ("age,job,code,sick", "30,cook,7,no", "?,pilot,7,yes", "50,cook,7,no", "41,,7,yes",
        "28,pilot,7,no", "61,cook,7,yes")

WHOLE = {"data.validation_fraction": 0.0, "data.test_fraction": 0.0}


def write(path, lines=ROWS):
  path.write_text("\n".join(lines) + "\n")
  return str(path)


@pytest.fixture
def made(tmp_path):
  """(path of a table, preprocessing of a network for it)."""
  path = write(tmp_path / "a.csv")
  scratch.write_tabular(tmp_path / "start", path, ["sick"], width=8, layers=1)
  return path, table.Preprocess(None, models.inspect(str(tmp_path / "start")))


def section(train, **given):
  config = config_lib.complete({"model.source": "x", "data.modality": "table", "data.train": train,
                                "data.columns": {"label": "sick"}, **given})
  return config.data


def test_columns_are_told_apart_and_constant_ones_left_out(made):
  _, preprocess = made
  assert preprocess.numbers == ["age"]
  assert preprocess.categories == {"job": {"cook": 1, "pilot": 2}}


def test_numbers_are_standardised_as_they_are_in_train(made, tmp_path):
  path, preprocess = made
  other = write(tmp_path / "test.csv", [ROWS[0], "1000,cook,7,no", "900,cook,7,yes"])
  data = preprocess.load(section(path, **{"data.test": other, "data.validation_fraction": 0.0}))
  assert {"fields", "label"} <= set(data.splits["test"][0])
  ages = np.array([[30], [np.nan], [50], [41], [28], [61]])
  wanted = preprocessing.StandardScaler().fit(ages).transform(ages)
  made = [preprocess(row) for row in data.splits["train"]]
  np.testing.assert_allclose([one["numbers"][0] for one in made], np.nan_to_num(wanted[:, 0]),
                             rtol=1e-6)
  assert [one["numbers"][1] for one in made] == [0, 1, 0, 0, 0, 0]  # where the age is missing
  assert [one["categories"][0] for one in made] == [1, 2, 1, 0, 2, 1]
  assert preprocess.counts == {"missing_numbers": 1, "unknown_categories": 1}
  assert "job pilot" in preprocess.show(made[4]) and "age 28" in preprocess.show(made[4])


def test_a_run_predicts_with_the_numbers_of_its_own_train(made, tmp_path, monkeypatch):
  path, preprocess = made
  preprocess.load(section(path, **WHOLE))
  again = table.from_spec(json.loads(json.dumps(preprocess.spec())))
  monkeypatch.setattr("sys.stdin", io.StringIO("job,age\nnurse,30\n"))
  row, = again.read_rows("-")
  assert row == {"fields": {"age": "30", "job": "nurse"}}
  assert again(row)["categories"].tolist() == [0] and again.counts["unknown_categories"] == 1
  before = again.mean.copy()
  again.load(section(write(tmp_path / "b.csv", [ROWS[0], "1,cook,7,no", "2,cook,7,yes"]),
                     **WHOLE))
  assert (again.mean == before).all()  # judged on other rows, it stays what it was


def test_labels_may_be_written_in_several_ways(tmp_path):
  path = write(tmp_path / "a.csv", ["text,label", "one,yes.", "two,yes", "three,no"])
  config = config_lib.complete({"model.source": "x", "data.train": path,
                                "data.relabel": (("yes.", "yes"),)}).data
  assert [row["label"] for row in sources.read(config, path)] == ["yes", "yes", "no"]


def test_what_is_wrong_is_named(made, tmp_path):
  path, preprocess = made
  with pytest.raises(errors.UserError, match=r"no column 'age' .*its columns are job, sick"):
    preprocess.load(section(write(tmp_path / "b.csv", ["job,sick", "cook,no"])))
  preprocess.load(section(path, **WHOLE))
  with pytest.raises(errors.RowError, match="age is 'old'; the model reads a number"):
    preprocess({"fields": {"age": "old", "job": "cook"}})
  with pytest.raises(errors.RowError, match="no value for job"):
    preprocess({"fields": {"age": "3"}})
  (tmp_path / "start" / "table.json").write_text('["age"]')
  with pytest.raises(errors.UserError, match="table.json should be"):
    table.Preprocess(None, models.inspect(str(tmp_path / "start")))
  with pytest.raises(errors.UserError, match="'sickness' .*did you mean 'sick'"):
    scratch.write_tabular(tmp_path / "other", path, ["sickness"])
  with pytest.raises(errors.UserError, match="no column to learn from"):
    scratch.write_tabular(tmp_path / "other", path, ["age", "job", "sick"])


def test_the_network_is_scikit_learns():
  rng = np.random.default_rng(0)
  config = tabular.Config(numbers=3, hidden_size=5, num_hidden_layers=2, num_labels=3)
  x = rng.normal(size=(7, 6)).astype(np.float32)
  inputs = {"numbers": x, "categories": np.zeros((7, 0), np.int32)}
  model = tabular.Model(config)
  variables = model.init(jax.random.PRNGKey(0), **inputs)
  theirs = neural_network.MLPClassifier((5, 5), activation="relu", max_iter=1)
  with np.testing.suppress_warnings() as quiet:
    quiet.filter(Warning)
    theirs.fit(x, [0, 1, 2, 0, 1, 2, 0])
  params = [variables["params"][name] for name in ("layer_0", "layer_1", "classifier")]
  theirs.coefs_ = [np.asarray(p["kernel"], np.float32) for p in params]
  theirs.intercepts_ = [np.asarray(p["bias"], np.float32) for p in params]
  ours = jax.nn.softmax(model.apply(variables, **inputs)["logits"])
  np.testing.assert_allclose(ours, theirs.predict_proba(x), atol=1e-6)


def test_a_category_has_a_vector_of_its_own_and_zero_is_unknown():
  config = tabular.Config(numbers=0, cardinalities=(3, 40), num_hidden_layers=0, embedding_size=4)
  model = tabular.Model(config)
  inputs = {"numbers": jnp.zeros((2, 0)), "categories": jnp.array([[0, 39], [2, 1]])}
  variables = model.init(jax.random.PRNGKey(0), **inputs)
  tables = [variables["params"][f"embedding_{i}"]["embedding"] for i in range(2)]
  assert [one.shape for one in tables] == [(3, 3), (40, 4)]
  wanted = jnp.stack([jnp.concatenate([tables[0][a], tables[1][b]])
                      for a, b in inputs["categories"].tolist()])
  np.testing.assert_array_equal(model.apply(variables, **inputs)["features"], wanted)


def test_a_run_from_file_to_diagnosis(tmp_path):
  data = load_breast_cancer()
  with open(tmp_path / "tumours.csv", "w", newline="") as file:
    out = csv.writer(file)
    out.writerow([*data.feature_names, "target"])
    out.writerows([*x, data.target_names[y]] for x, y in zip(data.data, data.target, strict=True))
  start, run = tmp_path / "start", tmp_path / "run"
  script("prepare", f"--table={tmp_path / 'tumours.csv'}", "--leave_out=target",
         f"--output={start}")
  script("train", f"--config=configs/table.py:data={tmp_path / 'tumours.csv'},start={start}",
         f"--workdir={run}", "--config.train.epochs=20", "--config.train.eval_every=0.5")
  card = json.loads((run / "card.json").read_text())
  test = card["results"]["test"]
  assert test["fine-tuned"]["metrics"]["accuracy"] > 0.93  # logistic regression has 0.95 to 0.99
  assert card["screening"]["positive"] == "malignant"
  said = script("predict", f"--run={run}", f"--input={tmp_path / 'tumours.csv'}").stdout
  labels = [json.loads(line)["label"] for line in said.splitlines()]
  assert np.mean([a == data.target_names[b]
                  for a, b in zip(labels, data.target, strict=True)]) > 0.95
