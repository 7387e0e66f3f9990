"""Every loss on the default experiment's features, three seeds each, in one table.

python -m siamese_jax compare --config=configs/compare_losses.py

The trunk, the head, the batches, the steps and the learning rate are the same for all; a loss has
its own paper's settings where the defaults are those, and what its scale asks for beside it. The
split follows the seed, so the deviation holds both: other test classes and other random numbers.
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


# Proxies start at random and have a long way to go: their papers give them 100 times the rate.
PROXIES = {"optim.loss_lr_scale": 100.0}

GRID = {
    "loss": {
        "triplet, hard": {},
        "triplet, semi-hard": {"loss": {"name": "triplet", "mining": "semi_hard", "margin": 0.2}},
        "triplet, all": {"loss": {"name": "triplet", "mining": "all", "margin": 0.2}},
        "contrastive": {"loss": {"name": "contrastive"}},
        "n_pairs": {"loss": {"name": "n_pairs", "l2": 0.002}, "head.normalize": False},
        "nt_xent": {"loss": {"name": "nt_xent", "distance": "cosine"}},
        "sup_con": {"loss": {"name": "sup_con", "distance": "cosine"}},
        "multi_similarity": {"loss": {"name": "multi_similarity", "distance": "cosine"}},
        "circle": {"loss": {"name": "circle"}},
        "lifted_structure": {"loss": {"name": "lifted_structure"}},
        "margin": {"loss": {"name": "margin"}},
        "fast_ap": {"loss": {"name": "fast_ap"}},
        "smooth_ap": {"loss": {"name": "smooth_ap"}},
        "proxy_nca": {"loss": {"name": "proxy_nca", "scale": 8.0}, **PROXIES},
        "proxy_anchor": {"loss": {"name": "proxy_anchor"}, **PROXIES},
        "normalized_softmax": {"loss": {"name": "normalized_softmax"}, **PROXIES},
        "arcface": {"loss": {"name": "arcface"}, **PROXIES},
        "sub_center_arcface": {"loss": {"name": "sub_center_arcface"}, **PROXIES},
        "cosface": {"loss": {"name": "cosface"}, **PROXIES},
        "soft_triple": {"loss": {"name": "soft_triple"}, **PROXIES},
        "softmax": {"loss": {"name": "softmax"}, "head.normalize": False, **PROXIES},
    },
    "seed": {str(seed): {"seed": seed} for seed in (0, 1, 2)},
}
