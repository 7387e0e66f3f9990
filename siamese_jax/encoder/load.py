"""`load_encoder`: the only file that knows runs, folders and trunks."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from siamese_jax import values
from siamese_jax.encoder import folder as encoder_folder
from siamese_jax.encoder.combined import Combined
from siamese_jax.encoder.encoder import Encoder, make_encoder
from siamese_jax.encoder.model import build_model, feature_shape, init_head, model_of_config
from siamese_jax.errors import UserError
from siamese_jax.storage import checkpoint, run_folder, tree
from siamese_jax.trunks.table import Preprocessing, as_preprocessing, find
from siamese_jax.weights.load import load as load_weights
from siamese_jax.weights.load import stored_weights


def load_encoder(
    name: str | os.PathLike[str],
    weights: str | os.PathLike[str] = "imagenet",
    image_size: int | None = None,
    *,
    stage: str | None = None,
    pool: str = "average",
    offline_fallback: str | None = None,
    dtype: str = "float32",
    form: str | None = None,
    preprocessing: str | Preprocessing | Mapping[str, Any] | None = None,
    ignore: str | None = None,
    whitening: bool = True,
) -> Encoder | Combined:
    """An encoder from a folder, or a trunk with its pretrained features.

    Args:
      name: a folder that `main.py` has trained in or `whiten` has saved to, or a name in TRUNKS.
      weights: of a trunk: "imagenet", "random", a named source, or a file of PyTorch, Keras,
        safetensors or NumPy.
      image_size: pixels; by default what the run, or the weights, were trained at.
      stage, pool: the trunk's output to use and its pooling, for a bare trunk.
      offline_fallback: a trunk to take instead where the weights cannot be had.
      dtype: compute type of a bare trunk, "float32" or "bfloat16".
      form: of a bare trunk's weights, where a file does not tell: "keras" (TensorFlow's padding and
        epsilon) or "torch".
      preprocessing: of a bare trunk's pixels, where it is not as the weights say: "imagenet",
        "inception", "lite", "caffe", "unit", or "MEAN/STD" for pixels from 0 to 1.
      ignore: a pattern (`re.search`) of the leaves of a file that are no part of the trunk.
      whitening: whether a whitening that lies in the folder is applied.

    Raises:
      UserError: no such run or trunk, or weights that cannot be had.
    """
    values.check("image_size", image_size, values.optional(values.PIXELS))
    if Path(name).is_dir():
        if form or preprocessing or ignore:
            raise UserError(
                f"form, preprocessing and ignore are for a trunk's weights; {name} is a folder, "
                "which has its own"
            )
        return _from_folder(Path(name), image_size, whitening)
    check_name(name)
    arguments: dict[str, Any] = {
        "name": os.fspath(name),
        "weights": os.fspath(weights),
        "image_size": image_size,
        "stage": stage,
        "pool": pool,
        "offline_fallback": offline_fallback,
        "dtype": dtype,
    }
    scaling = None if preprocessing is None else as_preprocessing(preprocessing)
    found = load_weights(
        os.fspath(name),
        weights,
        offline_fallback=offline_fallback,
        form=form,
        preprocessing=scaling,
        ignore=ignore,
    )
    written = None if scaling is None else dataclasses.asdict(scaling)
    kept = {"form": form, "preprocessing": written, "ignore": ignore}
    arguments |= {key: value for key, value in kept.items() if value is not None}
    model = build_model(found, stage=stage, pool=pool, dtype=dtype)
    params = {"trunk": found.variables["params"], "head": {}}
    batch_stats = {"trunk": found.variables["batch_stats"], "head": {}}
    if pool == "gem":
        fresh = init_head(
            model, feature_shape(model, found.variables, found.image_size), jax.random.key(0)
        )
        params["head"] = fresh["params"]
    return make_encoder(
        model,
        params,
        batch_stats,
        image_size=image_size or found.image_size,
        provenance=found.describe(),
        arguments=arguments,
    )


def check_name(name: str | os.PathLike[str]) -> None:
    """UserError for what is neither a folder nor a trunk's name."""
    if Path(name).is_dir():
        return
    for what, so in (("is a file", Path(name).is_file()), ("does not exist", os.sep in str(name))):
        if so:
            raise UserError(f"{name} {what}; give the folder of a run, or a trunk's name")
    find(os.fspath(name))


def _from_folder(folder: Path, image_size: int | None, whitening: bool) -> Encoder | Combined:
    arguments = encoder_folder.load_arguments(folder)
    if arguments is None:
        made: Encoder | Combined = _from_run(folder, image_size)
    else:
        size = {} if image_size is None else {"image_size": image_size}
        made = load_encoder(**arguments | size | {"whitening": False})
    return encoder_folder.with_whitening(folder, made) if whitening else made


def _from_run(folder: Path, image_size: int | None) -> Encoder:
    run = run_folder.read(folder)
    step, found = checkpoint.load_chosen(run)
    leaves = {name: jnp.asarray(leaf) for name, leaf in found.items()}
    weights = stored_weights(run.facts, leaves)
    model = model_of_config(run.config, weights)
    return make_encoder(
        model,
        {"trunk": weights.variables["params"], "head": tree.nest(leaves, "params/head/")},
        {
            "trunk": weights.variables["batch_stats"],
            "head": tree.nest(leaves, "batch_stats/head/"),
        },
        image_size=image_size or run.config["trunk"]["image_size"],
        fit=run.config["data"]["fit"],
        distance=run.config["distance"],
        provenance={"run": str(folder), "step": step, **run.facts["trunk"]},
        arguments={"name": str(folder), "image_size": image_size},
    )
