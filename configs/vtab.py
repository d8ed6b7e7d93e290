"""VTAB-1k (Zhai et al. 2019, arXiv:1910.04867): 19 tasks, 800 images to train on, 200 to choose by.

    python scripts/train.py --config=configs/vtab.py:task=cifar100,method=lora --workdir=runs/vtab/1
    python scripts/vtab.py --run=runs/vtab/1 --run=runs/vtab/2        means over tasks, by method

Data come from TFDS by name (TFDS_DATA_DIR says where they lie; some have to be fetched by hand), or
from a prepared folder, data=FOLDER. Training rows are the first 800 of a task's training part,
validation the first 200 of its validation part, as in VTAB; test is its whole test part. Published
tables train the chosen setting once more on all 1,000; here the best step of the 800 is judged.
No augmentation, whole images scaled to 224 pixels, 100 epochs.

task: see TASKS. model: ViT-B/16 of ImageNet-21k, or any source of a ViT. method: head | full |
bitfit | ssf | lora | adapter | adaptformer | vpt-shallow | vpt-deep; rate: in place of its own.
Published means over the tasks: head 52.94, bitfit 62.05, vpt-shallow 64.85, full 65.57, vpt-deep
69.43, adapter 71.44, lora 72.25, adaptformer 72.32, ssf 73.10. Not run here: no data at hand.
"""

# Task -> group, name, validation, test (train: the first 800 of train), how its label is had.
TASKS = {
  "caltech101": ("natural", "caltech101", "train[2753:2953]", "test", {}),
  "cifar100": ("natural", "cifar100", "train[45000:45200]", "test", {}),
  "dtd": ("natural", "dtd", "validation[:200]", "test", {}),
  "flowers102": ("natural", "oxford_flowers102", "validation[:200]", "test", {}),
  "pets": ("natural", "oxford_iiit_pet", "train[2944:3144]", "test", {}),
  "sun397": ("natural", "sun397/tfds", "validation[:200]", "test", {}),
  "svhn": ("natural", "svhn_cropped", "train[65931:66131]", "test", {}),
  "camelyon": ("specialised", "patch_camelyon", "validation[:200]", "test", {}),
  "eurosat": ("specialised", "eurosat/rgb", "train[16200:16400]", "train[21600:]", {}),
  "resisc45": ("specialised", "resisc45", "train[18900:19100]", "train[25200:]", {}),
  "retinopathy": ("specialised", "diabetic_retinopathy_detection/btgraham-300",
                  "validation[:200]", "test", {}),
  "clevr-count": ("structured", "clevr", "train[63000:63200]", "validation",
                  dict(derive="clevr-count")),
  "clevr-distance": ("structured", "clevr", "train[63000:63200]", "validation",
                     dict(derive="clevr-distance")),
  "dmlab": ("structured", "dmlab", "validation[:200]", "test", {}),
  "dsprites-location": ("structured", "dsprites", "train[589824:590024]", "train[663552:]",
                        dict(derive="dsprites-location")),
  "dsprites-orientation": ("structured", "dsprites", "train[589824:590024]", "train[663552:]",
                           dict(derive="dsprites-orientation")),
  "kitti-distance": ("structured", "kitti", "validation[:200]", "test",
                     dict(derive="kitti-distance")),
  "smallnorb-azimuth": ("structured", "smallnorb", "test[:200]", "test[12150:]",
                        dict(columns=dict(image="image", label="label_azimuth"))),
  "smallnorb-elevation": ("structured", "smallnorb", "test[:200]", "test[12150:]",
                          dict(columns=dict(image="image", label="label_elevation"))),
}
METHODS = {  # with the usual rate of each
  "head": (1e-2, {}), "full": (1e-4, {}), "bitfit": (3e-3, dict(method="freeze", select="bias")),
  "ssf": (3e-3, {}), "lora": (1e-3, dict(method="lora", rank=8, alpha=8.0)),
  "adapter": (1e-3, dict(method="bottleneck", size=8)),
  "adaptformer": (1e-3, dict(method="bottleneck", size=8, placement="parallel", scale=0.1)),
  "vpt-shallow": (3e-2, dict(method="visual_prompt", length=50, deep=False)),
  "vpt-deep": (1e-2, dict(method="visual_prompt", length=20)),
}


def get_config(task="cifar100", method="lora", model="hf:google/vit-base-patch16-224-in21k",
               data="", rate=0.0, batch=64, size=224):
  group, name, validation, test, label = TASKS[task]
  own, tune = METHODS[method]
  source = f"tfds:{data or name}"
  return dict(
    title=f"VTAB-1k {group}/{task}: {method}",
    model=dict(source=model),
    data=dict(modality="image", train=f"{source}:train[:800]", validation=f"{source}:{validation}",
              test=f"{source}:{test}", size=int(size), resize="squash", **label),
    task=dict(neighbours=20, unseen="class"),
    tune=tune or dict(method=method),
    optim=dict(rate=float(rate) or own, weight_decay=1e-4),
    train=dict(batch=int(batch), epochs=100.0, eval_every=0.1, train_sample=200),
  )
