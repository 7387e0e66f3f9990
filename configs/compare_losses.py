"""Every loss on the default experiment's features, tuned by the same number of tries, in one table.

    python -m siamese_jax compare --config=configs/compare_losses.py --folds=4 --best-of=rate

Each try is trained once for each fold of the training classes, and measured on the same test
classes. The trunk, the head and its start (a PCA), the batches and the steps are the same for all;
a loss has its own paper's settings where the defaults are those, and what its scale asks for beside
it; its learning rate is tried. Proxies start at random and have a long way to go: their papers give
them 100 times the rate.
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.name = "efficientnet_lite0"
    config.trunk.image_size = 224
    config.head = common.linear_head(512, init="pca")
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.2}
    config.sampler = {"name": "classes", "batch_size": 256, "per_class": 2}
    config.train.update(steps=100, eval_every=25, checkpoint_every=100, max_to_keep=1, patience=0)
    return config


PROXIES = {"optim.loss_lr_scale": 100.0}

GRID = {
    "loss": {
        "triplet": {},
        "contrastive": {"loss": {"name": "contrastive"}},
        "n_pairs": {"loss": {"name": "n_pairs", "l2": 0.002}, "head.normalize": False},
        "nt_xent": {"loss": {"name": "nt_xent", "distance": "cosine"}},
        "sup_con": {"loss": {"name": "sup_con", "distance": "cosine"}},
        "hyperbolic": {
            "loss": {"name": "hyperbolic"},
            "head.normalize": False,
            "distance": "cosine",
        },
        "pairwise_sigmoid": {"loss": {"name": "pairwise_sigmoid"}},
        "multi_similarity": {"loss": {"name": "multi_similarity", "distance": "cosine"}},
        "circle": {"loss": {"name": "circle"}},
        "lifted_structure": {"loss": {"name": "lifted_structure"}},
        "margin": {"loss": {"name": "margin"}},
        "fast_ap": {"loss": {"name": "fast_ap"}},
        "smooth_ap": {"loss": {"name": "smooth_ap"}},
        "roadmap": {"loss": {"name": "roadmap"}},
        "recall_at_k": {"loss": {"name": "recall_at_k", "mixup": 1}},
        "proxy_nca": {"loss": {"name": "proxy_nca", "scale": 8.0}, **PROXIES},
        "proxy_anchor": {"loss": {"name": "proxy_anchor"}, **PROXIES},
        "normalized_softmax": {"loss": {"name": "normalized_softmax"}, **PROXIES},
        "arcface": {"loss": {"name": "arcface"}, **PROXIES},
        "sub_center_arcface": {"loss": {"name": "sub_center_arcface"}, **PROXIES},
        "cosface": {"loss": {"name": "cosface"}, **PROXIES},
        "soft_triple": {"loss": {"name": "soft_triple", "centers": 2}, **PROXIES},
        "softmax": {"loss": {"name": "softmax"}, "head.normalize": False, **PROXIES},
    },
    "rate": {f"{rate:g}": {"optim.learning_rate": rate} for rate in (1e-3, 3e-3)},
}
