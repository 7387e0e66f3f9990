"""In-Shop Clothes Retrieval (DeepFashion), the field's protocol.

    python main.py --config=configs/inshop.py --config.data.root=DIR

25,882 images to train on; 14,218 queries search 12,612 gallery images. data.root is the folder of
the download.
ResNet50 trained whole with Proxy-Anchor (Kim et al., 2020, arXiv:2003.13911): AdamW, batch 180,
learning rate 6e-4, a hundredfold for the proxies, margin 0.1, scale 32, BatchNorm frozen,
60 epochs.
Recall@1 to expect: 91.5 %, the paper's with BN-Inception as trunk.
The paper pools by the sum of average and maximum, this is the average. Needs a GPU.
"""

from configs import common


def get_config():
    config = common.proxy_anchor_protocol("inshop")
    config.optim.learning_rate = 6e-4
    config.sampler.batch_size = 180
    config.train.steps = 8627  # 60 epochs of 25,882 images
    return config
