"""CUB-200-2011, the field's protocol: train on the first 100 birds, search the other 100.

    python main.py --config=configs/cub.py

5,864 images of 100 classes to train on, 5,924 of 100 others to test; from TFDS, or data.root.
ResNet50 trained whole with Proxy-Anchor (Kim et al., 2020, arXiv:2003.13911): AdamW, batch 120,
learning rate 1e-4, a hundredfold for the proxies, margin 0.1, scale 32, BatchNorm frozen,
60 epochs.
Recall@1 to expect: 69.7 %, the paper's with ResNet50, 512 dimensions.
The paper pools by the sum of average and maximum, this is the average. Needs a GPU.
"""

from configs import common


def get_config():
    config = common.proxy_anchor_protocol("cub")
    config.optim.learning_rate = 1e-4
    config.sampler.batch_size = 120
    config.train.steps = 2932  # 60 epochs of 5,864 images
    return config
