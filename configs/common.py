"""The fragments that every experiment is made of; each config overrides what it is about.

Every field can be set on the command line: `--config.loss.margin=0.3`. What each may be stands in
`siamese_jax/train/fields.py`, and `siamese-jax config` prints it. A head is set whole by its name
in `HEADS`, and changed from there: `--config.head=linear --config.head.layers=256`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder


def base() -> ConfigDict:
    """All fields with their defaults. A config adds `loss`, `miner` and `sampler` options."""
    return ConfigDict(
        {
            "seed": 0,
            "distance": "euclidean",  # euclidean, sqeuclidean, cosine or dot
            "data": data(),
            "augment": augment(),
            "trunk": trunk(),
            "head": head(),
            "cache": {
                # run what is frozen once, a whole trunk or its first stages, and train on that
                "enabled": True,
                "views": 0,  # augmented views of each training image, beside the plain one
                # disk for the output of frozen first stages; where it is more, none is kept
                "limit": FieldReference("20GB", field_type=object),
                "dtype": placeholder(str),  # float32, bfloat16; default: trunk.dtype
            },
            "loss": {"name": "triplet"},
            "miner": {"name": "none"},
            "memory": {"size": 0},  # embeddings of past batches used as candidates; 0 for none
            # classes, shuffled, pairs, triplets or hierarchical; see data/samplers.py for options
            "sampler": {"name": "classes", "batch_size": 128, "per_class": 2},
            "optim": optim(),
            "train": train(),
            "eval": {
                "ks": (1, 5, 10),
                "batch_size": 64,
                "choose_by": "map@r",  # of validation: map@r, r_precision, mrr
                "test_during_training": False,  # curves of the test data, which choose nothing
            },
        }
    )


def data() -> ConfigDict:
    return ConfigDict(
        {
            # emoji, folder, query_gallery, anchor_positive, csv, tfds:NAME, cub, cars, sop, inshop
            "source": "emoji",
            "root": placeholder(str),  # the folder or CSV file
            "layout": placeholder(str),  # of a folder that can be read in several ways
            "images": placeholder(str),  # of a CSV: the folder that its relative paths start from
            "separator": placeholder(str),  # of a CSV: between the labels of an image, such as ";"
            "label_key": placeholder(str),  # of tfds:NAME: the feature of the class,
            "image_key": placeholder(str),  # of the image,
            "super_key": placeholder(str),  # and of the super-class (for sampler.name=hierarchical)
            "split": placeholder(str),  # own or classes; by default own where there is one, but
            # classes for tfds:NAME
            "split_seed": -1,  # seed of the split by class; -1 takes `seed`
            "test_fraction": 0.5,  # of the classes, where the source brings no split
            "validation_fraction": 0.0,  # of the classes; picks the best checkpoint. See also
            # train.rehearse
            "fold": placeholder(str),  # which fold of the training classes is validation, of how
            # many: 1/4; `compare --folds=4` takes each in turn
            "fit": "squash",  # how a picture becomes a square: squash, crop or pad
            "max_pixels": placeholder(int),  # a picture of more is broken; default: 178,956,970
            "strict": False,  # a broken image stops the run instead of being skipped and listed
            "cache_dir": placeholder(str),  # default: $SIAMESE_JAX_CACHE or ~/.cache/siamese_jax
        }
    )


def augment() -> ConfigDict:
    """Of training images. All are drawn from (seed, step, position), so a resumed run agrees."""
    return ConfigDict(
        {
            "crop_scale": (0.7, 1.0),  # share of the area that a random resized crop keeps
            "crop_ratio": (0.8, 1.25),
            "flip": False,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "hue": 0.05,
            "greyscale": 0.1,
            "erase": 0.0,
        }
    )


def trunk() -> ConfigDict:
    return ConfigDict(
        {
            "name": "resnet50",
            "weights": "imagenet",  # random, imagenet, a named source, or a path
            "offline_fallback": placeholder(str),  # trunk to use where the weights cannot be had
            "form": placeholder(str),  # of a file that does not tell its own: keras, torch, ...
            "preprocessing": placeholder(str),  # of a file: imagenet, inception, ..., MEAN/STD
            "ignore": placeholder(str),  # pattern of a file's leaves that are not the trunk's
            "image_size": 192,
            "stage": placeholder(str),  # output to pool, or several: stage4,top; default: the last;
            # auto chooses by folds over the training classes
            "pool": "average",  # or max, rmac, gem3, grid2, gem, cls; or one for each: average,max
            "dtype": "float32",  # or bfloat16
            "freeze": (".*",),  # patterns of parameter paths inside the trunk, e.g. ("stage[123]",)
            "drop_path": 0.0,  # stochastic depth: how often the last block is passed by in training
            "remat": False,  # compute blocks again in the backward pass: less memory on a GPU
            "batch_norm": "frozen",  # or "train": batch statistics in stages that are not frozen
        }
    )


def proxy_anchor_protocol(source: str) -> ConfigDict:
    """A whole ResNet50 trained with Proxy-Anchor on a standard data set, as its paper does."""
    config = base()
    config.data.source = source
    config.augment.update(
        crop_scale=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=True,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        greyscale=0.0,
    )
    config.trunk.weights = "torchvision:IMAGENET1K_V1"
    config.trunk.image_size = 224
    config.trunk.freeze = ()
    config.head.layers = (512,)
    config.distance = "cosine"
    config.loss = {"name": "proxy_anchor", "margin": 0.1, "alpha": 32.0}
    config.sampler = {"name": "shuffled", "batch_size": 120}
    config.optim.loss_lr_scale = 100.0
    config.train.update(log_every=50, eval_every=500, checkpoint_every=500)
    return config


def dino_protocol(source: str) -> ConfigDict:
    """A whole DINO ViT-S/16 trained with the triplet loss, as open-metric-learning does."""
    config = proxy_anchor_protocol(source)
    config.trunk.update(name="vit_small_patch16_224", weights="timm:vit_small_patch16_224.dino")
    config.head.update(layers=(), normalize=True)
    config.distance = "euclidean"
    config.loss = {"name": "triplet", "mining": "hard", "margin": 0.15}
    config.optim.update(learning_rate=1e-5, schedule="constant", warmup_steps=0, weight_decay=0.0)
    config.optim.loss_lr_scale = 1.0
    return config


def head() -> ConfigDict:
    """Three dense layers. `linear_head` is the other one in use."""
    return ConfigDict(
        {
            "layers": (512, 256, 256),
            "init": "random",  # of the first layer: random, pca, or lda, by classes
            "shrinkage": FieldReference(
                "auto", field_type=object
            ),  # of lda: auto chooses by folds over classes; or from 0 to 1: 0.5
            "activation": "relu",
            "dropout": 0.0,  # on the input of every dense layer
            "norm": "none",  # none, batch, layer
            "signed_sqrt": False,
            "unit": False,  # each stage's features to unit length
            "centre": False,
            "normalize": True,
        }
    )


def linear_head(width: int = 512, init: str = "lda") -> ConfigDict:
    """One dense layer on the roots of the features, that starts as LDA, or as a PCA."""
    config = head()
    config.update(layers=(width,), init=init, dropout=0.3)
    config.update(signed_sqrt=True, unit=init == "lda", centre=True)
    return config


# --config.head=linear: a head whole, and nothing of the one before.
HEADS = {"dense3": head, "linear": linear_head}


def optim() -> ConfigDict:
    return ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 3e-4,
            "schedule": "cosine",  # constant, cosine, linear
            "warmup_steps": 20,
            "weight_decay": 1e-4,
            "decay_on": "kernels",  # or matrices: positions and tokens too; or all: biases too
            "clip_norm": 0.0,  # of the trainable leaves' gradient; 0 for no limit
            "loss_lr_scale": 1.0,  # factor on the learning rate of the loss's own parameters
            "trunk_lr_scale": 1.0,  # likewise of the trunk's
            "ema": 0.0,  # decay of an average of the weights, measured in their place; 0: none
            "layer_decay": 1.0,  # and that of each stage or block before the next one's
        }
    )


def train() -> ConfigDict:
    return ConfigDict(
        {
            "steps": 600,
            "log_every": 10,
            "eval_every": 100,
            "checkpoint_every": 100,
            "max_to_keep": 2,
            "accumulate": 1,  # chunks that a batch is embedded in; its loss is of all the same
            "shard": "none",  # or classes, state: what is split over several devices
            "patience": 3,  # evaluations without a better one on validation, then stop; 0: never
            "rehearse": True,  # without validation: hold training classes out first, for the steps
        }
    )
