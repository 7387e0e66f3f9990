"""Every field of a config does something: changed, it changes the run (or says why it cannot)."""

import functools

import jax
import pytest
import tiny
from PIL import Image

from configs import common
from siamese_jax.report.page import flatten
from siamese_jax.train.experiment import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_trunk")]

# Field -> another value; a dict of fields where one alone means nothing.
CHANGED = {
    "seed": 1,
    "distance": "cosine",
    "data.split_seed": 3,
    "data.test_fraction": 0.4,
    "data.validation_fraction": 0.25,
    "data.fold": "1/2",
    "data.fit": "crop",
    "augment.crop_scale": (0.2, 0.4),
    "augment.crop_ratio": (0.3, 0.4),
    "augment.flip": True,
    "augment.brightness": 0.9,
    "augment.contrast": 0.9,
    "augment.saturation": 0.9,
    "augment.hue": 0.4,
    "augment.greyscale": 0.9,
    "augment.erase": 0.9,
    "trunk.image_size": 40,
    "trunk.stage": "stage3",
    "trunk.pool": {"trunk.pool": "max", "trunk.image_size": 40},  # a map of more than one place
    "trunk.dtype": "bfloat16",
    "trunk.preprocessing": "inception",
    "trunk.freeze": ("stem", "stage[123]"),
    "trunk.batch_norm": {"trunk.batch_norm": "train", "trunk.freeze": ("stem", "stage[123]")},
    "head.layers": (7,),
    "head.init": "pca",
    "head.shrinkage": {"head.shrinkage": 0.9, "head.init": "lda"},
    "head.activation": {"head.activation": "gelu", "head.layers": (8, 8)},
    "head.dropout": 0.5,
    "head.norm": {"head.norm": "layer", "head.layers": (8, 8)},
    "head.signed_sqrt": True,
    "head.unit": True,
    "head.centre": True,
    "head.normalize": False,
    "cache.enabled": False,
    "cache.views": 0,
    "cache.limit": {"cache.limit": 0, "trunk.freeze": ("stem", "stage[123]")},
    "cache.dtype": {"cache.dtype": "bfloat16", "trunk.freeze": ("stem", "stage[123]")},
    "loss.name": "contrastive",
    "miner.name": {"miner.name": "multi_similarity", "loss.name": "multi_similarity"},
    "memory.size": {"memory.size": 24, "loss.name": "contrastive"},
    "sampler.name": "shuffled",
    "sampler.batch_size": 6,
    "sampler.per_class": 4,
    "optim.name": "sgd",
    "optim.learning_rate": 0.05,
    "optim.schedule": "linear",
    "optim.warmup_steps": 2,
    "optim.weight_decay": 3.0,
    "optim.clip_norm": 1e-5,
    "optim.loss_lr_scale": {"optim.loss_lr_scale": 100.0, "loss.name": "proxy_anchor"},
    "optim.decay_on": {"optim.decay_on": "all", "optim.weight_decay": 3.0},
    "optim.trunk_lr_scale": {"optim.trunk_lr_scale": 0.1, "trunk.freeze": ("stem", "stage[123]")},
    "optim.layer_decay": {"optim.layer_decay": 0.1, "trunk.freeze": ("stem", "stage[12]")},
    "optim.ema": {"optim.ema": 0.99, "optim.learning_rate": 0.3},
    "train.steps": 2,
    "train.log_every": 3,  # the first step is always there
    "train.eval_every": 2,
    "train.patience": {
        "train.patience": 1,
        "train.eval_every": 1,
        "train.steps": 8,
        "data.validation_fraction": 0.25,
    },
    "eval.ks": (2, 3),
    "eval.test_during_training": {"eval.test_during_training": True, "train.eval_every": 1},
}
# Where data and weights come from, what is kept, what costs memory: each has tests of its own.
ELSEWHERE = {
    *(f"data.{n}" for n in ("source", "root", "layout", "images", "separator", "split")),
    *(
        f"data.{n}"
        for n in ("strict", "max_pixels", "cache_dir", "label_key", "image_key", "super_key")
    ),
    *(f"trunk.{n}" for n in ("name", "weights", "offline_fallback", "form", "ignore")),
    *(f"trunk.{n}" for n in ("drop_path", "remat")),  # the stand-in has no blocks
    *(f"train.{n}" for n in ("checkpoint_every", "max_to_keep", "rehearse")),
    *(f"train.{n}" for n in ("accumulate", "shard")),  # they change no number
    *(f"eval.{n}" for n in ("batch_size", "choose_by")),
}


def test_every_field_is_here():
    assert {name for name, _ in flatten(common.base().to_dict())} == CHANGED.keys() | ELSEWHERE


@pytest.fixture(scope="module")
def log_of(tmp_path_factory, small_trunk):
    """Trains a small run with some fields changed, once; the content of its metrics.jsonl."""
    root = tmp_path_factory.mktemp("fields")
    tiny.make_folder(root / "shop", classes=8, images=4, noise=60)
    for path in (root / "shop").glob("*/*.png"):  # no squares: `fit` matters
        Image.open(path).crop((0, 4, 32, 24)).save(path)

    @functools.cache
    def train_with(*changes):
        config = common.base()
        config.data.update(source="folder", root=str(root / "shop"), cache_dir=str(root / "cache"))
        config.trunk.update(name="resnet18", weights="random", image_size=32)
        config.head.update(layers=(8,))
        config.cache.views = 1
        config.sampler.batch_size = 8
        config.optim.warmup_steps = 0
        config.train.update(steps=3, log_every=1, eval_every=3, checkpoint_every=3)
        config.train.update(rehearse=False, patience=0)
        for field, value in changes:
            section, _, name = field.rpartition(".")
            if name == "name" and section in ("loss", "sampler", "miner"):
                kept = {"batch_size": 8} if section == "sampler" else {}
                config[section] = {"name": value, **kept}
            else:
                (config[section] if section else config)[name] = value
        workdir = tmp_path_factory.mktemp("run")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            train(config, workdir)
        return (workdir / "metrics.jsonl").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield train_with


@pytest.fixture(scope="module")
def plain(log_of):
    log = log_of()
    assert log == log_of(("eval.batch_size", 5))
    return log


@pytest.mark.parametrize("field", CHANGED)
def test_a_field_changes_the_run(field, log_of, plain):
    value = CHANGED[field]
    changes = value if isinstance(value, dict) else {field: value}
    others = [(name, v) for name, v in changes.items() if name != field]
    assert log_of(*changes.items()) != (log_of(*others) if others else plain)
