r"""ResNet50, frozen, a linear head from LDA, cross-vendor triplets: the default.

    python main.py --config=configs/resnet_triplet.py
    python main.py --config=configs/resnet_triplet.py --config.data.source=folder \
        --config.data.root=DIR

Stages, shrinkage and steps are chosen on training classes. On the emoji, with the offline fallback:
recall@1 .678, recall@10 .908 on 965 unseen classes, the mean of seeds 0 to 2 (the trunk's own
features: .279 and .569). There LDA is the result: no step of training is told to be better.
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.name = "resnet50"
    # ResNet50's weights are a download. Where it cannot be had, the trunk whose weights come with
    # the [demo] extra takes its place, with a warning; None makes that an error instead.
    config.trunk.offline_fallback = "efficientnet_lite0"
    config.trunk.image_size = 224
    config.trunk.stage = "auto"
    config.head = common.linear_head(512)
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.2}
    config.sampler = {"name": "classes", "batch_size": 256, "per_class": 2}
    config.train.update(steps=300, eval_every=25, checkpoint_every=25)
    return config
