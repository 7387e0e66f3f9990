"""Stanford Online Products, the field's protocol.

    python main.py --config=configs/sop.py

59,551 images of 11,318 classes to train on, 60,502 of 11,316 others to test; from TFDS, or
data.root.
ResNet50 trained whole with Proxy-Anchor (Kim et al., 2020, arXiv:2003.13911): AdamW, batch 180,
learning rate 6e-4, a hundredfold for the proxies, margin 0.1, scale 32, BatchNorm frozen,
60 epochs.
Recall@1 to expect: 79.1 %, the paper's with BN-Inception as trunk.
The paper pools by the sum of average and maximum, this is the average. Needs a GPU.
"""

from configs import common


def get_config():
    config = common.proxy_anchor_protocol("sop")
    config.optim.learning_rate = 6e-4
    config.sampler.batch_size = 180
    config.train.steps = 19850  # 60 epochs of 59,551 images
    return config
