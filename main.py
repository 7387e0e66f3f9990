"""One experiment from a config: train (or resume), evaluate, report.

The file is short because there is nothing to decide here: the config says what to do, and
`siamese_jax/train/experiment.py` reads top to bottom. Tools on finished runs: `siamese-jax`, or
`python -m siamese_jax`.

    python main.py --config=configs/resnet_triplet.py --workdir=runs/emoji --config.seed=1
"""

import sys

from siamese_jax.__main__ import process

if __name__ == "__main__":
    process(["train", *sys.argv[1:]])
