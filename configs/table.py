"""Classification of rows of a table: incomes (UCI Adult, CC BY 4.0), or diagnoses of breast masses.

    python scripts/train.py --config=configs/table.py --workdir=runs/table
    python scripts/prepare.py --sklearn=breast_cancer --output=breast_cancer.csv
    python scripts/train.py --config=configs/table.py:data=breast_cancer,folder=. --workdir=runs/bc

A wide and deep network from random weights: there are no pretrained ones for tables. The probe is
logistic regression on the standardised table. adult: its own train and test rows; sex and race are
columns that the guard of bias tells results apart by. breast_cancer: scikit-learn's table (BSD), a
fifth of it test; the flagging threshold leaves 95 % of the benign validation rows below it. data:
which of both; folder: where it lies.
"""


def get_config(data="adult", folder="../shared/data"):
  return {"adult": adult, "breast_cancer": breast_cancer}[data](folder)


NAMES = ("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation",
         "relationship", "race", "sex", "capital_gain", "capital_loss", "hours_per_week",
         "native_country", "income")


def adult(folder):
  return dict(
    title="Incomes above $50,000",
    model=dict(source="scratch:tabular"),
    data=dict(
      modality="table", train=f"{folder}/bias-adult/adult-train.csv",
      test=f"{folder}/bias-adult/adult-test.csv", header=False, names=NAMES, label_strip=".",
      columns=dict(label="income"), ignore=("fnlwgt",), attributes=("sex", "race"),
    ),
    optim=dict(rate=3e-3, weight_decay=0.1),
    train=dict(batch=256, epochs=10.0, eval_every=0.1, eval_batch=2048),
  )


def breast_cancer(folder):
  return dict(
    title="Breast masses, malignant or benign",
    model=dict(source="scratch:tabular"),
    data=dict(modality="table", train=f"{folder}/breast_cancer.csv"),
    task=dict(specificity=0.95, positive="malignant", metric="auroc"),
    optim=dict(rate=3e-3, weight_decay=0.1),
    train=dict(batch=32, epochs=20.0),
  )
