"""EfficientNet-Lite0, frozen, a linear head, batch-hard triplets; works offline, for the trunk's
ImageNet weights come in a package of the [demo] extra.

    python main.py --config=configs/efficientnet_triplet.py
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.name = "efficientnet_lite0"
    config.head = common.linear_head(512)
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.2}
    config.sampler = {"name": "classes", "batch_size": 512, "per_class": 2}
    return config
