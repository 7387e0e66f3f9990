"""Trunks x heads x losses with their distances, each cell a run of its own, in one table.

python -m siamese_jax compare --config=configs/compare_trunks.py

The weights of EfficientNet-Lite0, 1 and 2 come with the extra [demo]; the other ones are downloaded
once. A trunk whose weights cannot be had is listed as not run, and never replaced.
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.name = "efficientnet_lite0"
    config.trunk.image_size = 128  # so that a cell takes seconds
    config.head = common.linear_head(512, init="pca")
    config.train.rehearse = False
    config.cache.views = 2
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.2}
    config.sampler = {"name": "classes", "batch_size": 512, "per_class": 2}
    return config


TRUNKS = (
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_b0",
    "resnet50",
    "vgg16",
)

GRID = {
    "trunk": {name: {"trunk.name": name} for name in TRUNKS},
    "head": {
        "linear": {},
        "three dense": {"head": "dense3"},
    },
    "loss": {
        "triplet, Euclidean": {},
        "triplet, cosine": {"distance": "cosine"},
        "InfoNCE, cosine": {
            "distance": "cosine",
            "loss": {"name": "nt_xent", "temperature": 0.07},
        },
    },
}
