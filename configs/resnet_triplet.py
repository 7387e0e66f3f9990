r"""ResNet50, frozen, a linear head from a PCA, cross-vendor triplets: the default experiment.

    python main.py --config=configs/resnet_triplet.py
    python main.py --config=configs/resnet_triplet.py --config.data.source=folder \
        --config.data.root=DIR

On the emoji, with the offline fallback: recall@1 .547, recall@10 .851 on 965 unseen classes, the
mean of three seeds (the trunk's own features: .310 and .596).
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.name = "resnet50"
    # ResNet50's weights are a download. Where it cannot be had, the trunk whose weights come with
    # the [demo] extra takes its place, with a warning; None makes that an error instead.
    config.trunk.offline_fallback = "efficientnet_lite0"
    config.head = common.linear_head(512)
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.2}
    config.sampler = {"name": "classes", "batch_size": 512, "per_class": 2}
    return config
