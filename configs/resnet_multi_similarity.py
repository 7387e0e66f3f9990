"""ResNet50, frozen, a linear head and the multi-similarity loss with its miner (Wang et al., 2019,
arXiv:1904.06627), alpha 2, beta 50, base 0.5.

    python main.py --config=configs/resnet_multi_similarity.py
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.offline_fallback = "efficientnet_lite0"  # see resnet_triplet.py
    config.head = common.linear_head(512)
    config.loss = {"name": "multi_similarity", "alpha": 2.0, "beta": 50.0, "base": 0.5}
    config.miner = {"name": "multi_similarity", "epsilon": 0.1}
    config.sampler = {"name": "classes", "batch_size": 512, "per_class": 2}
    return config
