"""Rows of a table: who earns much (Adult), or which tumour is malign (breast cancer).

    python scripts/prepare.py --table=../shared/data/bias-adult/adult-train.csv --names=age,work,\
weight,education,years,married,job,family,race,sex,gain,loss,hours,country,income \
--leave_out=income,weight,race,sex --output=runs/adult-start
    python scripts/train.py --config=configs/table.py --workdir=runs/adult

    python -c "import csv; from sklearn.datasets import load_breast_cancer as load; d = load();
    w = csv.writer(open('tumours.csv', 'w')); w.writerow([*d.feature_names, 'target']);
    w.writerows([*x, d.target_names[y]] for x, y in zip(d.data, d.target))"
    python scripts/prepare.py --table=tumours.csv --leave_out=target --output=runs/tumours-start
    python scripts/train.py --config=configs/table.py:data=tumours.csv --workdir=runs/tumours

A small network from random weights: nothing was pretrained, and the frozen probe is a logistic
regression on what it makes of the columns untrained. Adult (Becker and Kohavi 1996, CC BY 4.0):
sex and race are not read, and the card says how the errors fall on them. Breast cancer (Wolberg et
al. 1993, in scikit-learn, BSD): the card judges it as a screening test as well.
data: adult, or a table with a column target; start: the folder that prepare.py made; folder: of
the data.
"""

NAMES = ("age", "work", "weight", "education", "years", "married", "job", "family", "race", "sex",
         "gain", "loss", "hours", "country", "income")


def get_config(data="adult", start="", folder="../shared/data"):
  adult = data == "adult"
  own = dict(
    train=f"{folder}/bias-adult/adult-train.csv", test=f"{folder}/bias-adult/adult-test.csv",
    header=False, names=NAMES, columns=dict(label="income"), attributes=("sex", "race"),
    relabel=(("<=50K.", "<=50K"), (">50K.", ">50K")),
  ) if adult else dict(train=data, columns=dict(label="target"))
  screen = {} if adult else dict(positive="malignant", specificity=0.95)
  return dict(
    title="Income over 50,000, Adult" if adult else f"Diagnosis, {data}",
    notes=("A benchmark of audits: no decision about people should rest on it.",) if adult else (),
    model=dict(source=start or ("runs/adult-start" if adult else "runs/tumours-start")),
    data=dict(modality="table", **own),
    task=dict(**screen),
    optim=dict(rate=1e-3, weight_decay=1e-2),
    train=dict(batch=256 if adult else 32, epochs=10.0 if adult else 60.0, eval_every=0.1),
  )
