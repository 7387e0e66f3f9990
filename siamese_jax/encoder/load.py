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
from siamese_jax.encoder.model import Model, build_model, feature_shape, init_head, model_of_config
from siamese_jax.encoder.pooling import split_stages
from siamese_jax.errors import UserError
from siamese_jax.storage import checkpoint, run_folder, tree
from siamese_jax.trunks.names import advice
from siamese_jax.trunks.table import TRUNKS, Preprocessing, as_preprocessing, find
from siamese_jax.weights.load import load as load_weights
from siamese_jax.weights.load import stored_weights, with_stages

# A head without layers, of the signed roots of each stage's features.
ROOTS = {"layers": (), "normalize": False, "signed_sqrt": True, "unit": True}


def load_encoder(
    name: str | os.PathLike[str],
    weights: str | os.PathLike[str] = "imagenet",
    image_size: int | None = None,
    *,
    stage: str | None = None,
    pool: str = "average",
    signed_sqrt: bool = False,
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
      weights: of a trunk: "imagenet", "random", a named source, "timm:NAME" of the Hub, or a file
        of PyTorch, Keras, safetensors or NumPy.
      image_size: pixels; by default what the run, or the weights, were trained at.
      stage, pool: the trunk's output to use and its pooling, for a bare trunk. Several outputs,
        "stage4,stage6,top", are taken out of one pass and joined with unit length each.
      signed_sqrt: of a bare trunk, x -> sign(x) sqrt(|x|) on its features, then unit length.
      offline_fallback: a trunk to take instead where the weights cannot be had.
      dtype: compute type of a bare trunk, "float32" or "bfloat16".
      form: of a bare trunk's weights, where a file does not tell: "keras" (TensorFlow's padding and
        epsilon) or "torch"; "dino" resizes a Vision Transformer's positions as DINO's code does.
      preprocessing: of a bare trunk's pixels, where it is not as the weights say: "imagenet",
        "inception", "lite", "caffe", "clip", "satellite", "unit", or "MEAN/STD" for pixels from
        0 to 1.
      ignore: a pattern (`re.search`) of the leaves of a file that are no part of the trunk.
      whitening: whether a whitening that lies in the folder is applied.

    Raises:
      UserError: no such run or trunk, or weights that cannot be had.
    """
    values.check("image_size", image_size, values.optional(values.PIXELS))
    if Path(name).is_dir():
        given: dict[str, Any] = {"stage": stage, "form": form, "preprocessing": preprocessing}
        given |= {"ignore": ignore, "pool": pool != "average", "signed_sqrt": signed_sqrt}
        if idle := [option for option, value in given.items() if value]:
            said = f"{' and '.join(idle)}: for a trunk by its name"
            raise UserError(f"{said}; {name} is a folder, which has its own")
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
    reading: dict[str, Any] = {"form": form, "preprocessing": scaling, "ignore": ignore}
    found = load_weights(os.fspath(name), weights, offline_fallback=offline_fallback, **reading)
    if isinstance(stage, str):  # others are refused with the rest
        found = with_stages(found, [name for name, _, _ in split_stages(stage)])
    written = None if scaling is None else dataclasses.asdict(scaling)
    kept = reading | {"preprocessing": written, "signed_sqrt": signed_sqrt or None}
    arguments |= {key: value for key, value in kept.items() if value is not None}
    head = ROOTS if signed_sqrt else None
    model = build_model(found, stage=stage, pool=pool, head=head, dtype=dtype)
    params, batch_stats = (
        {"trunk": found.variables[part], "head": {}} for part in ("params", "batch_stats")
    )
    if model.head.gem:
        shape = feature_shape(model, found.variables, found.image_size)
        params["head"] = init_head(model, shape, jax.random.key(0))["params"]
    return make_encoder(
        model,
        params,
        batch_stats,
        image_size=image_size or found.image_size,
        provenance=found.describe() | features_of(model),
        arguments=arguments,
    )


def features_of(model: Model) -> dict[str, Any]:
    """What a model's head takes of its trunk, as JSON can hold it."""
    return {"stage": model.stage, "pool": model.pool, "signed_sqrt": model.head.signed_sqrt}


def check_name(name: str | os.PathLike[str]) -> None:
    """UserError for what is neither a folder nor a trunk's name."""
    if Path(name).is_dir():
        return
    lost = os.sep in str(name) and advice(os.fspath(name), TRUNKS) is None
    for what, so in (("is a file", Path(name).is_file()), ("does not exist", lost)):
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
    bare = run.results is not None and run.results.get("saved") == run_folder.BARE
    choices = run.facts.get("choices", {})
    if bare:
        options = run.config["trunk"]
        stage = options["stage"] if options["stage"] != "auto" else None
        model = build_model(weights, stage=stage, pool=options["pool"], dtype=options["dtype"])
        distance = "cosine"
    else:
        stage, layers = choices.get("stage"), choices.get("layers")
        model = model_of_config(run.config, weights, stage=stage, layers=layers)
        distance = run.config["distance"]
    head = {
        part: {} if bare else tree.nest(leaves, f"{part}/head/")
        for part in ("params", "batch_stats")
    }
    return make_encoder(
        model,
        {"trunk": weights.variables["params"], "head": head["params"]},
        {"trunk": weights.variables["batch_stats"], "head": head["batch_stats"]},
        image_size=image_size or run.config["trunk"]["image_size"],
        fit=run.config["data"]["fit"],
        distance=distance,
        fitted_to=frozenset() if bare else run_folder.trained_on(folder),
        provenance={"run": str(folder), "step": step, **run.facts["trunk"], **features_of(model)},
        arguments={"name": str(folder), "image_size": image_size},
    )
