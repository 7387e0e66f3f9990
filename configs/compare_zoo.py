"""The usual frozen encoders on the usual data sets, beside what open-metric-learning's zoo has.

python -m siamese_jax compare --config=configs/compare_zoo.py

A cell's "before" is the bare trunk, its "after" the LDA of `fit` on the training classes and one
step from it. Recall@1 of the bare trunks, at 224 pixels, to expect:

                        SOP    In-Shop   CUB    Cars
ResNet50 V1            .515     .284     .455   .247
DINO ViT-S/16          .648     .509     .627   .265
DINOv2 ViT-S/14, reg   .566     .332     .795   .740
CLIP ViT-L/14          .670     .675     .745   .844

In-Shop needs the folder of its download: --config.data.root=DIR with GRID cut to it; the others
come by TFDS. A trunk whose weights cannot be had is listed as not run, and never replaced.
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.image_size = 224
    config.head = common.linear_head(256)
    config.distance = "cosine"
    config.cache.views = 0
    config.sampler = {"name": "classes", "batch_size": 128, "per_class": 2}
    config.train.update(steps=1, rehearse=False, patience=0)
    return config


def _trunk(name, tag):
    return {"trunk.name": name, "trunk.weights": tag}


GRID = {
    "data": {name: {"data.source": name} for name in ("sop", "inshop", "cub", "cars")},
    "trunk": {
        "ResNet50 V1": _trunk("resnet50", "torchvision:IMAGENET1K_V1"),
        "DINO ViT-S16": _trunk("vit_small_patch16_224", "timm:vit_small_patch16_224.dino"),
        "DINOv2 ViT-S14 reg": _trunk("vit_small_patch14_reg4_dinov2", "imagenet"),
        "CLIP ViT-L14": _trunk("vit_large_patch14_clip_quickgelu_224", "imagenet"),
    },
}
