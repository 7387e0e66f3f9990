"""Cars196, the field's protocol: train on the first 98 models, search the other 98.

    python main.py --config=configs/cars.py

8,054 images of 98 classes to train on, 8,131 of 98 others to test; from TFDS, or data.root.
ResNet50 trained whole with Proxy-Anchor (Kim et al., 2020, arXiv:2003.13911): AdamW, batch 120,
learning rate 1e-4, a hundredfold for the proxies, margin 0.1, scale 32, BatchNorm frozen,
60 epochs.
Recall@1 to expect: 87.7 %, the paper's with ResNet50, 512 dimensions.
The paper pools by the sum of average and maximum, this is the average. Needs a GPU.
"""

from configs import common


def get_config():
    config = common.proxy_anchor_protocol("cars")
    config.optim.learning_rate = 1e-4
    config.sampler.batch_size = 120
    config.train.steps = 4027  # 60 epochs of 8,054 images
    return config
