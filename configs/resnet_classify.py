"""ResNet50, frozen, a linear head and softmax classification: the baseline that metric learning is
compared with. The embedding is the classifier's input (Zhai, Wu, 2019, arXiv:1811.12649).

    python main.py --config=configs/resnet_classify.py
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.offline_fallback = "efficientnet_lite0"  # see resnet_triplet.py
    config.head = common.linear_head(512)
    config.loss = {"name": "softmax"}
    config.sampler = {"name": "shuffled", "batch_size": 256}
    config.optim.loss_lr_scale = 10.0
    return config
