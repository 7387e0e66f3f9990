"""In-Shop Clothes Retrieval with a Vision Transformer, as open-metric-learning trains it.

    python main.py --config=configs/inshop_vit.py --config.data.root=DIR

DINO's ViT-S/16 at 224 pixels, trained whole: the hard triplets of a batch, a soft margin,
batches of 6 images of each of 22 classes, 11 in each of 2 super-classes,
Adam at 1e-5, no schedule. The embedding is the class token, of any length.
Recall@1 to expect: .921, open-metric-learning's own; .509 before training.
The batches are those of an earlier version of theirs; its augmentation is another.
It trains until nothing improves, this 20,000 steps. Needs a GPU.
"""

from configs import common


def get_config():
    config = common.dino_protocol("inshop")
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.0, "soft": True}
    # On unit vectors a soft margin has next to no gradient.
    config.loss.normalize = config.head.normalize = False
    config.sampler = {"name": "hierarchical", "batch_size": 132, "per_class": 6, "per_super": 11}
    config.train.steps = 20000
    return config
