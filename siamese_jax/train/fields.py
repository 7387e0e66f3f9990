"""Every field of a config: what it may be, and what it means. The defaults are `configs/common.py`.

`train` checks a config by this table before any work, `siamese-jax config` prints it, and
`docs/config.md` is that print. A section with a `name` (loss, miner, sampler) has the options of
what is named, from tables of their own.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from siamese_jax.data.preprocess import FITS
from siamese_jax.data.samplers import SAMPLERS
from siamese_jax.distances import DISTANCES
from siamese_jax.encoder.head import ACTIVATIONS, NORMS
from siamese_jax.encoder.pooling import POOLS
from siamese_jax.errors import UserError
from siamese_jax.losses import LOSSES
from siamese_jax.losses.miners import MINERS
from siamese_jax.losses.options import LOSS_OPTIONS, MINER_OPTIONS
from siamese_jax.storage.run_folder import flat
from siamese_jax.train.mesh import SHARDS
from siamese_jax.train.optim import DECAY_ON, OPTIMIZERS, SCHEDULES
from siamese_jax.trunks.names import advice
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.values import (
    BATCH,
    COUNT,
    PIXELS,
    Kind,
    Option,
    check,
    choice,
    either,
    flag,
    fold,
    listed,
    nearest,
    number,
    optional,
    rising,
    several,
    size,
    text,
    whole,
)

STEPS = whole(1, 10**9)
SEED = 2**32 - 1

_SHARE = number(0, 1)
_PART = number(0, below=1)
_TEXT = optional(text())


def _trunk() -> Kind:
    """A trunk's name; UserError with ours for one that other libraries give."""
    named = choice(*TRUNKS)

    def holds(value: Any) -> bool:
        if isinstance(value, str) and value not in TRUNKS and (line := advice(value, TRUNKS)):
            raise UserError(f"no trunk is called so: {line}")
        return named.holds(value)

    return named._replace(holds=holds)


FIELDS: dict[str, Option] = {
    "seed": Option(whole(0, SEED), "of the start, the batches, the augmentation and the split"),
    "distance": Option(choice(*DISTANCES), "what embeddings are compared by"),
    "data.source": Option(
        text(),
        "folder, query_gallery, anchor_positive, images, csv, emoji, tfds:NAME, cub, cars, sop or "
        "inshop",
    ),
    "data.root": Option(_TEXT, "the folder or CSV file"),
    "data.layout": Option(_TEXT, "of a folder that can be read in several ways"),
    "data.images": Option(_TEXT, "of a CSV: the folder that its relative paths start from"),
    "data.separator": Option(_TEXT, 'of a CSV: between the labels of an image, such as ";"'),
    "data.label_key": Option(_TEXT, "of tfds:NAME: the feature of the class"),
    "data.image_key": Option(_TEXT, "of tfds:NAME: the feature of the image"),
    "data.super_key": Option(_TEXT, "of tfds:NAME: the feature of the super-class"),
    "data.split": Option(
        optional(choice("own", "classes")),
        "the split that the data bring, or one by class; by default own where there is one, but "
        "classes for tfds:NAME",
    ),
    "data.split_seed": Option(whole(-1, SEED), "of the split by class; -1 takes `seed`"),
    "data.test_fraction": Option(_PART, "of the classes, where the source brings no split"),
    "data.validation_fraction": Option(_PART, "of the classes; picks the best checkpoint"),
    "data.fold": Option(
        optional(fold()),
        "which fold of the training classes is validation, of how many; `compare --folds=4` takes "
        "each in turn",
    ),
    "data.fit": Option(choice(*FITS), "how a picture becomes a square"),
    "data.max_pixels": Option(
        optional(COUNT), "a picture of more counts as broken; default: 178,956,970"
    ),
    "data.strict": Option(flag(), "a broken image stops the run instead of being left out"),
    "data.cache_dir": Option(_TEXT, "default: $SIAMESE_JAX_CACHE or ~/.cache/siamese_jax"),
    "augment.crop_scale": Option(
        rising(several(number(above=0, high=1), 2, 2)),
        "least and largest share of the area that a random crop keeps",
    ),
    "augment.crop_ratio": Option(
        rising(several(number(above=0), 2, 2)), "least and largest width / height of that crop"
    ),
    "augment.flip": Option(flag(), "mirror every second image"),
    "augment.brightness": Option(_SHARE, "by how much it may change, either way"),
    "augment.contrast": Option(_SHARE, "likewise, about the mean grey"),
    "augment.saturation": Option(_SHARE, "likewise"),
    "augment.hue": Option(number(0, 0.5), "turns of the hue circle, either way"),
    "augment.greyscale": Option(_SHARE, "how many images lose their colours"),
    "augment.erase": Option(_SHARE, "how many images have a rectangle covered"),
    "trunk.name": Option(_trunk(), "the architecture; `siamese-jax weights trunks` has them all"),
    "trunk.weights": Option(text(), "random, imagenet, a named source, timm:NAME, or a path"),
    "trunk.offline_fallback": Option(
        optional(choice(*TRUNKS)), "the trunk to take where the weights cannot be had"
    ),
    "trunk.form": Option(
        optional(choice("keras", "torch", "torchvision", "dino")),
        "how the network of a weights file that does not tell computes: TensorFlow's padding and "
        "epsilons, PyTorch's, torchvision's epsilon of MobileNetV3, DINO's resizing of positions",
    ),
    "trunk.preprocessing": Option(
        _TEXT, "of the pixels, where the weights do not say: imagenet, inception, ..., MEAN/STD"
    ),
    "trunk.ignore": Option(_TEXT, "pattern of a file's leaves that are not the trunk's"),
    "trunk.image_size": Option(PIXELS, "pixels a side"),
    "trunk.stage": Option(
        _TEXT,
        "the output to pool, or several of one pass: stage4,stage6,top, and stage6:max for another "
        "pooling; the last by default; auto chooses by folds over the training classes",
    ),
    "trunk.pool": Option(
        listed(*POOLS), "from a feature map to one vector, for all stages or for each"
    ),
    "trunk.dtype": Option(choice("float32", "bfloat16"), "what the trunk computes in"),
    "trunk.freeze": Option(
        several(text()),
        'patterns of the trunk\'s parameters that stay, such as "stage[123]"; "early": all but the '
        "last stages, which have at most a third of the blocks",
    ),
    "trunk.batch_norm": Option(
        choice("frozen", "train"), "train: batch statistics in stages that are not frozen"
    ),
    "trunk.drop_path": Option(
        _PART,
        "stochastic depth: how often an image passes the last block by in training; of the blocks "
        "before it, in a line down to 0 at the first; in stages where anything moves",
    ),
    "trunk.remat": Option(
        flag(),
        "compute blocks again in the backward pass in place of keeping their insides: less memory "
        "and more time on an accelerator; XLA's compiler for CPUs undoes it",
    ),
    "head.layers": Option(several(whole(1, 65_536)), "widths; the last is the embedding's"),
    "head.init": Option(
        choice("random", "pca", "lda"),
        "of the first layer: the PCA of the features, or LDA, which makes classes alike",
    ),
    "head.shrinkage": Option(
        optional(either(choice("auto"), number(0, 1))),
        "of lda; auto chooses by folds over the training classes",
    ),
    "head.activation": Option(choice(*ACTIVATIONS), "after every layer but the last"),
    "head.dropout": Option(_PART, "on the input of every layer"),
    "head.norm": Option(choice(*NORMS), "after every layer but the last"),
    "head.signed_sqrt": Option(flag(), "take the signed root of the features"),
    "head.unit": Option(optional(flag()), "give each stage's features length 1"),
    "head.centre": Option(flag(), "take off the training features' mean"),
    "head.normalize": Option(flag(), "give the embedding length 1"),
    "cache.enabled": Option(
        flag(),
        "run what is frozen once, the whole trunk or its first stages, and train on its output",
    ),
    "cache.views": Option(
        whole(0, 1000), "augmented views of each training image, beside the plain one"
    ),
    "cache.limit": Option(
        optional(size()),
        "disk for the output of frozen first stages; where it is more, none is kept",
    ),
    "cache.dtype": Option(
        optional(choice("float32", "bfloat16")), "that output is kept in; default: trunk.dtype"
    ),
    "loss.name": Option(choice(*LOSSES), "the loss; its options stand beside it"),
    "miner.name": Option(choice("none", *MINERS), "which pairs or triplets the loss sees"),
    "memory.size": Option(whole(0, 2**24), "embeddings of past batches used too; 0 for none"),
    "sampler.name": Option(choice(*SAMPLERS), "which images make a batch"),
    "optim.name": Option(choice(*OPTIMIZERS), "the optimiser"),
    "optim.learning_rate": Option(number(0), "after the warm-up"),
    "optim.schedule": Option(choice(*SCHEDULES), "of the learning rate, to 0 at the last step"),
    "optim.warmup_steps": Option(whole(0, 10**9), "in which the learning rate rises"),
    "optim.weight_decay": Option(
        number(0), "share of a matrix taken off each step, times the learning rate"
    ),
    "optim.decay_on": Option(
        choice(*DECAY_ON),
        "what it is on: kernels, or matrices: positions, class tokens and registers too, or all: "
        "norms, biases and gains too",
    ),
    "optim.clip_norm": Option(number(0), "of the trainable leaves' gradient; 0 for no limit"),
    "optim.loss_lr_scale": Option(
        number(0), "factor on the learning rate of the loss's own parameters"
    ),
    "optim.trunk_lr_scale": Option(
        number(0), "factor on the learning rate of the trunk's moving parameters"
    ),
    "optim.layer_decay": Option(
        number(above=0, high=1),
        "layer-wise decay: the learning rate of each stage, or block of a transformer, is this "
        "times that of the next one; the last that the head sees has it whole",
    ),
    "optim.ema": Option(
        _PART,
        "decay of an average of the moving weights, such as .999, which is measured, chosen and "
        "saved in their place; debiased: the start has no weight in it; 0 for none",
    ),
    "train.steps": Option(STEPS, "how many batches are trained on"),
    "train.log_every": Option(STEPS, "steps between two lines of metrics.jsonl"),
    "train.eval_every": Option(STEPS, "steps between two evaluations"),
    "train.checkpoint_every": Option(STEPS, "steps between two checkpoints"),
    "train.patience": Option(
        optional(whole(0, 10**6)),
        "evaluations without a better one on validation, then it stops; 0: never",
    ),
    "train.rehearse": Option(
        optional(flag()),
        "without a validation split: hold training classes out first, to choose the steps",
    ),
    "train.accumulate": Option(
        whole(1, 2**20),
        "chunks that a batch is embedded in, one after the other, in the memory of one; the loss "
        "is of the whole batch all the same, and so is its gradient (GradCache); dropout is drawn "
        "by chunk",
    ),
    "train.shard": Option(
        choice(*SHARDS),
        "what is split over several devices, and not on each of them: classes: class weights, "
        "proxies and the cross-batch memory; state: all parameters and what the optimiser keeps of "
        "them (FSDP)",
    ),
    "train.max_to_keep": Option(whole(1, 10**6), "newest checkpoints to keep, beside the best"),
    "eval.ks": Option(several(COUNT, 1), "depths of recall"),
    "eval.choose_by": Option(
        optional(choice("map@r", "r_precision", "mrr")), "what chooses, on validation"
    ),
    "eval.test_during_training": Option(
        optional(flag()), "curves of the test data, which choose nothing"
    ),
    "eval.batch_size": Option(BATCH, "images in memory at a time"),
}

_BATCH_SIZE = Option(BATCH, "images in a batch")
_PER_CLASS = Option(BATCH, "images of each class")
_WEIGHT = Option(either(choice("equal", "images"), several(number(0), 1)), "how likely a class is")
_LEAST = Option(BATCH, "classes with fewer images are left out")
SAMPLER_OPTIONS: dict[str, dict[str, Option]] = {
    "classes": {
        "batch_size": _BATCH_SIZE,
        "per_class": _PER_CLASS,
        "class_weight": _WEIGHT,
        "min_images": _LEAST,
    },
    "hierarchical": {
        "batch_size": _BATCH_SIZE,
        "per_class": _PER_CLASS,
        "per_super": Option(BATCH, "classes of each super-class"),
        "min_images": _LEAST,
    },
    "pairs": {"batch_size": _BATCH_SIZE, "class_weight": _WEIGHT},
    "shuffled": {"batch_size": _BATCH_SIZE},
    "triplets": {"batch_size": _BATCH_SIZE, "class_weight": _WEIGHT},
}

# The sections that are made of what their `name` says: the functions, and their options.
Functions = Mapping[str, Callable[..., Any]]
SECTIONS: dict[str, tuple[Functions, Mapping[str, Mapping[str, Option]]]] = {
    "loss": (LOSSES, LOSS_OPTIONS),
    "miner": (MINERS, MINER_OPTIONS),
    "sampler": (SAMPLERS, SAMPLER_OPTIONS),
}


def check_config(config: ConfigDict) -> None:
    """UserError for the first field that is unknown, missing, or not what it may be."""
    given = dict(flat(config.to_dict()))
    for name, option in FIELDS.items():
        if name not in given:
            raise UserError(f"the config lacks the field {name}; begin with common.base()")
        check(name, given.pop(name), option.kind)
    for name, value in given.items():
        check(name, value, find(name, config).kind)
    for section in SECTIONS:
        called = config[section].name
        for missing in needed(section, called):
            if missing not in config[section]:
                raise UserError(f"{section}.name={called} needs {section}.{missing}")


def needed(section: str, called: str) -> list[str]:
    """The options of a loss, a miner or a sampler that have no default."""
    function = SECTIONS[section][0].get(called)
    known = inspect.signature(function).parameters if function else {}
    return [
        name for name in options_of(section, called) if known[name].default is known[name].empty
    ]


# Fields that came later, with what was done before there was a choice.
EARLIER: dict[str, Any] = {
    "train.accumulate": 1,
    "train.shard": "none",
    "trunk.remat": False,
    "trunk.drop_path": 0.0,
    "optim.ema": 0.0,
    "optim.decay_on": "matrices",
    "optim.trunk_lr_scale": 1.0,
    "optim.layer_decay": 1.0,
}


def completed(config: ConfigDict) -> ConfigDict:
    """A copy of a config, as an earlier version may have written it: fields that came later are as
    `EARLIER` has them, or None, and so are those where version 0.1.0 wrote the text "None"."""
    made = ConfigDict(config.to_dict())
    for name, option in FIELDS.items():
        section, _, last = name.rpartition(".")
        holder = made.get(section) if section else made
        if not isinstance(holder, ConfigDict):
            continue
        if name in EARLIER and last not in holder:
            holder[last] = EARLIER[name]
        elif option.kind.holds(None):
            with holder.ignore_type():
                holder[last] = None if holder.get(last) == "None" else holder.get(last)
    return made


def find(name: str, config: ConfigDict) -> Option:
    """The row of a field, by its dotted name. UserError where the config has no such field."""
    if name in FIELDS:
        return FIELDS[name]
    section, _, option = name.partition(".")
    if section not in SECTIONS or not option:
        raise UserError(f"{name}: the config has no such field{nearest(name, list(FIELDS))}")
    called = config.get(section, {}).get("name")
    check(f"{section}.name", called, FIELDS[f"{section}.name"].kind)
    known = options_of(section, called)
    if option not in known:
        raise UserError(
            f"{name}: {called} has no such option{nearest(option, known)}; it has "
            f"{', '.join(known) or 'none'}{_elsewhere(section, option)}"
        )
    return known[option]


def _elsewhere(section: str, option: str) -> str:
    """Which of the section's other choices have an option of that name."""
    names = [name for name in SECTIONS[section][0] if option in options_of(section, name)]
    return f"; {option} is one of {', '.join(names)}" if names else ""


def options_of(section: str, called: str) -> Mapping[str, Option]:
    """The options of a loss, a miner or a sampler."""
    functions, options = SECTIONS[section]
    return options[functions[called].__name__] if called in functions else {}
