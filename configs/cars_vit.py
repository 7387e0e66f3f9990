"""Cars196 with a Vision Transformer, as open-metric-learning trains it.

    python main.py --config=configs/cars_vit.py

DINO's ViT-S/16 at 224 pixels, trained whole: all triplets of a batch, a soft margin,
batches of 10 images of each of 20 classes,
Adam at 1e-5, no schedule. The embedding is the class token, of any length.
Recall@1 to expect: .907, open-metric-learning's own; .265 before training.
Theirs is of pictures cropped to their bounding boxes, and of other augmentation; this takes the
whole picture.
It trains until nothing improves, this 5,000 steps. Needs a GPU.
"""

from configs import common


def get_config():
    config = common.dino_protocol("cars")
    config.loss = {"name": "triplet", "mining": "all", "margin": 0.0, "soft": True}
    # On unit vectors a soft margin has next to no gradient.
    config.loss.normalize = config.head.normalize = False
    config.sampler = {"name": "classes", "batch_size": 200, "per_class": 10}
    config.train.steps = 5000
    return config
