"""VGG16, frozen, a linear head, batch-hard triplets. Its weights are a download; offline, give
--config.trunk.offline_fallback=efficientnet_lite0.

    python main.py --config=configs/vgg_triplet.py
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.name = "vgg16"
    config.head = common.linear_head(512)
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.2}
    config.sampler = {"name": "classes", "batch_size": 512, "per_class": 2}
    return config
