"""ResNet50, frozen, a linear head, contrastive loss on explicit anchor-positive and anchor-negative
pairs: the first design of the course project (Hadsell, Chopra, LeCun, 2006).

    python main.py --config=configs/resnet_pairs.py
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.offline_fallback = "efficientnet_lite0"  # see resnet_triplet.py
    config.head = common.linear_head(512)
    config.loss = {"name": "contrastive", "pairs": "explicit", "negative_margin": 1.0}
    config.sampler = {"name": "pairs", "batch_size": 512}
    return config
