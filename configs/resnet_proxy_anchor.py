"""ResNet50, frozen, a linear head and Proxy-Anchor (Kim et al., 2020, arXiv:2003.13911), with the
paper's margin 0.1, scale 32 and a hundredfold learning rate for the proxies.

    python main.py --config=configs/resnet_proxy_anchor.py
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.offline_fallback = "efficientnet_lite0"  # see resnet_triplet.py
    config.head = common.linear_head(512)
    config.loss = {"name": "proxy_anchor", "margin": 0.1, "alpha": 32.0}
    config.sampler = {"name": "classes", "batch_size": 512, "per_class": 2}
    config.optim.loss_lr_scale = 100.0
    return config
