"""trunk -> pool -> head -> embedding, as one set of pure functions, and the encoder users call."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.head import Head, make_head
from siamese_jax.pooling import FIXED_POOLS, check_pool
from siamese_jax.trunks import TRUNKS, Preprocessing, normalise
from siamese_jax.weights import TrunkWeights
from siamese_jax.weights import load as load_weights

Array = jax.Array

__all__ = ["TRUNKS", "Encoder", "Model", "build_model", "embed", "features", "load_encoder"]


class Model(NamedTuple):
    """What is computed; static under jit. The parameters travel beside it."""

    trunk: nn.Module
    head: Head
    preprocessing: Preprocessing
    stage: str
    pool: str
    train_stages: tuple[str, ...] = ()


def build_model(
    weights: TrunkWeights,
    *,
    stage: str | None = None,
    pool: str = "average",
    head: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    train_stages: tuple[str, ...] = (),
) -> Model:
    """The model on a trunk's weights.

    Args:
      weights: of `siamese_jax.weights.load`.
      stage: the trunk's output to pool; its last by default.
      pool: "average", "max", "rmac" or "gem".
      head: options of `siamese_jax.head.make_head`; none at all gives the pooled features.
      dtype: compute type of trunk and head, "float32" or "bfloat16".
      train_stages: trunk stages whose BatchNorm uses batch statistics in training.

    Raises:
      UserError: an option does not exist; the message names it.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"trunk.dtype={dtype!r}; choose float32 or bfloat16")
    trunk = TRUNKS[weights.trunk]
    stage = stage or trunk.stages[-1]
    for name in (stage, *train_stages):
        if name not in trunk.stages:
            raise UserError(
                f"{weights.trunk} has no stage {name!r}; choose from {', '.join(trunk.stages)}"
            )
    options = dict(head) if head is not None else {"layers": (), "normalize": False}
    return Model(
        trunk=trunk.build(form=weights.form, dtype=jnp.dtype(dtype)),
        head=make_head(**options, gem=check_pool(pool) == "gem", dtype=jnp.dtype(dtype)),
        preprocessing=weights.preprocessing,
        stage=stage,
        pool=pool,
        train_stages=tuple(train_stages),
    )


def features(
    model: Model, params: Any, batch_stats: Any, images: Array, *, train: bool = False
) -> tuple[Array, Any]:
    """The head's input: pooled features, or the feature map where the head pools by itself.

    Args:
      model: static.
      params, batch_stats: the trunk's.
      images: uint8 [n, h, w, 3].
      train: whether `model.train_stages` use batch statistics.

    Returns:
      float32 [n, c] (or [n, h', w', c] for GeM), and the trunk's new batch_stats.
    """
    x = normalise(images, model.preprocessing, model.trunk.dtype)
    variables = {"params": params, "batch_stats": batch_stats}
    if train and model.train_stages:
        outputs, new = model.trunk.apply(
            variables, x, train_stages=model.train_stages, mutable=["batch_stats"]
        )
        batch_stats = new["batch_stats"]
    else:
        outputs = model.trunk.apply(variables, x)
    x = outputs[model.stage]
    return (FIXED_POOLS[model.pool](x) if model.pool in FIXED_POOLS else x), batch_stats


def embed(
    model: Model,
    params: Any,
    batch_stats: Any,
    inputs: Array,
    *,
    train: bool = False,
    mask: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, Any]:
    """Images, or features cached of a frozen trunk, to embeddings.

    Args:
      model: static.
      params, batch_stats: {"trunk": ..., "head": ...}.
      inputs: uint8 [n, h, w, 3], or float [n, ...] as `features` returns them.
      train: dropout and batch statistics on.
      mask: bool [n], the rows that count in batch statistics.
      key: for dropout; needed in training.

    Returns:
      float32 [n, d] and the new batch_stats.
    """
    batch_stats = dict(batch_stats)
    if inputs.dtype == jnp.uint8:
        inputs, batch_stats["trunk"] = features(
            model, params["trunk"], batch_stats["trunk"], inputs, train=train
        )
    embeddings, new = model.head.apply(
        {"params": params["head"], "batch_stats": batch_stats["head"]},
        inputs,
        train=train,
        mask=mask,
        rngs=None if key is None else {"dropout": key},
        mutable=["batch_stats"],
    )
    return embeddings, {**batch_stats, "head": new.get("batch_stats", {})}


def init_head(model: Model, feature_shape: tuple[int, ...], key: Array) -> dict[str, Any]:
    """Fresh {"params", "batch_stats"} of the head for one feature's shape [c] or [h', w', c]."""
    variables = model.head.init(key, jnp.zeros((1, *feature_shape), jnp.float32))
    return {"params": {}, "batch_stats": {}, **variables}


def feature_shape(model: Model, trunk_variables: Any, image_size: int) -> tuple[int, ...]:
    """Shape of one image's features, without computing any."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    x, _ = jax.eval_shape(
        lambda images: features(
            model, trunk_variables["params"], trunk_variables["batch_stats"], images
        ),
        images,
    )
    return x.shape[1:]
