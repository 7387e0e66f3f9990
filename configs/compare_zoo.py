"""The usual frozen encoders on the usual data sets, beside what open-metric-learning's zoo has.

    python -m siamese_jax compare --config=configs/compare_zoo.py:FOLDER

A cell's "before" is the bare trunk, its "published" what to expect there: recall@1 of PUBLISHED.
Its "after" is the LDA of `fit` on the training classes and one step from it. CLIP's embedding is
the projected one.

FOLDER holds the downloads that there are, unpacked as sop, inshop, cub and cars. What it lacks
comes by TFDS, but for In-Shop; so does all without it: --config=configs/compare_zoo.py. A trunk
whose weights cannot be had is asked for once, listed as not run, and never replaced.

As there, pictures are squashed, cropped to their middle, or padded with white, each trunk's in its
way. Not as there: they are resized bilinearly, ResNet50's middle is the whole height (there 7/8 of
it), CUB's and Cars's are whole pictures (there the object's box), and what is compared is the
cosine (there the Euclidean distance of features as they are).
"""

from pathlib import Path

from configs import common

SETS = ("sop", "inshop", "cub", "cars")


def get_config(folder=None):
    config = common.base()
    config.trunk.image_size = 224
    config.head = common.linear_head(256)
    config.distance = "cosine"
    config.cache.views = 0
    config.sampler = {"name": "classes", "batch_size": 128, "per_class": 2}
    config.train.update(steps=1, rehearse=False, patience=0)
    for name, cell in GRID["data"].items():
        if folder and (Path(folder) / name).is_dir():
            cell["data.root"] = str(Path(folder) / name)
    return config


def _trunk(name, weights, fit, **more):
    fields = {"trunk.name": name, "trunk.weights": weights, "data.fit": fit}
    return fields | {f"trunk.{field}": value for field, value in more.items()}


GRID = {
    "data": {name: {"data.source": name} for name in SETS},
    "trunk": {
        "ResNet50 V1": _trunk("resnet50", "torchvision:IMAGENET1K_V1", "crop"),
        "DINO ViT-S16": _trunk(
            "vit_small_patch16_224", "timm:vit_small_patch16_224.dino", "squash"
        ),
        "DINOv2 ViT-S14 reg": _trunk("vit_small_patch14_reg4_dinov2", "imagenet", "crop"),
        "CLIP ViT-L14": _trunk(
            "vit_large_patch14_clip_quickgelu_224", "imagenet", "pad", stage="proj"
        ),
        "Unicom ViT-L14 336": _trunk(
            "vit_large_patch14_unicom_336", "imagenet", "crop", image_size=336
        ),
    },
}

_SCORES = {
    "ResNet50 V1": (0.515, 0.284, 0.455, 0.247),
    "DINO ViT-S16": (0.648, 0.509, 0.627, 0.265),
    "DINOv2 ViT-S14 reg": (0.566, 0.332, 0.795, 0.740),
    "CLIP ViT-L14": (0.670, 0.675, 0.745, 0.844),
    "Unicom ViT-L14 336": (0.745, 0.810, 0.875, 0.924),
}
PUBLISHED = {
    (data, trunk): score
    for trunk, scores in _SCORES.items()
    for data, score in zip(SETS, scores, strict=True)
}
