"""What of a trunk never changes in a run, whole or its first stages. Computed once, and kept."""

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from siamese_jax.data.records import Records
from siamese_jax.encoder.head import Head
from siamese_jax.encoder.model import (
    Model,
    block_size,
    feature_shape,
    in_blocks,
    inference_trunk,
    model_fingerprint,
    run_features,
    run_stage,
)
from siamese_jax.train import optim
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.values import in_bytes, said_bytes
from siamese_jax.weights.load import TrunkWeights

log = logging.getLogger(__name__)


EARLY = "early"  # of trunk.freeze: all but the last stages
MOVING = 1 / 3  # of a trunk's blocks, at most, where it is


def freeze_patterns(config: ConfigDict, trunk: TrunkWeights) -> tuple[str, ...]:
    """The patterns of `trunk.freeze`, with one in place of "early"."""
    return tuple(
        f"(?!({'|'.join(late_stages(trunk.trunk))})/)" if pattern == EARLY else pattern
        for pattern in config.trunk.freeze
    )


def late_stages(name: str) -> list[str]:
    """The last stages of a trunk that have at most a third of its blocks, or one; and what follows.

    >>> late_stages("resnet50"), late_stages("efficientnet_lite0")
    (['stage4'], ['stage6', 'stage7', 'top'])
    """
    row = TRUNKS[name]
    blocks = row.blocks or {s: 1 for s in row.stages if s.startswith("stage")}
    late, most = list[str](), MOVING * sum(blocks.values())
    for stage in reversed(row.channels):
        if late and sum(blocks.get(one, 0) for one in (stage, *late)) > max(most, 1):
            break
        late.insert(0, stage)
    return late


def moving_leaves(config: ConfigDict, trunk: TrunkWeights) -> Any:
    """A tree of bools: which parameters of the trunk move."""
    return optim.trainable(trunk.variables["params"], freeze_patterns(config, trunk))


def is_frozen(config: ConfigDict, trunk: TrunkWeights) -> bool:
    """Whether no parameter of the trunk moves."""
    return not any(jax.tree.leaves(moving_leaves(config, trunk)))


def is_cached(config: ConfigDict, trunk: TrunkWeights) -> bool:
    """Whether the whole trunk is frozen and its features are kept."""
    return bool(config.cache.enabled) and is_frozen(config, trunk)


class Once(NamedTuple):
    """What is computed once of every image, and kept.

    Attributes:
      shapes: of each part that is kept, by the fingerprint of what makes it.
      compute: uint8 [b, h, w, 3] -> float [b, ...], all parts side by side.
      title: what makes it, in words.
      dtype: that it is kept in.
    """

    shapes: dict[str, tuple[int, ...]]
    compute: Callable[[np.ndarray], np.ndarray]
    title: str
    dtype: str = "float32"


def kept_once(config: ConfigDict, model: Model, trunk: TrunkWeights) -> Once:
    """What the frozen part gives; maps in the trunk's type, unless the config says another."""
    of = (model, trunk.variables, config.trunk.image_size, config.data.fit)
    dtype = config.cache.dtype or config.trunk.dtype
    return first_stages(*of, dtype) if model.after else whole_trunk(*of)


def at_boundary(config: ConfigDict, model: Model, trunk: TrunkWeights, records: Records) -> Model:
    """The model, to go on after its frozen stages where what they give is kept; that is told."""
    limit = config.cache.limit
    if not config.cache.enabled or is_frozen(config, trunk) or limit is None:
        return model  # runs of earlier versions have no limit: they go on as they began
    moving = moving_leaves(config, trunk)
    after = last_frozen(moving, {stage for stage, _ in model.parts}, TRUNKS[model.name].stages)
    if not after:
        return model
    held = model._replace(after=after)
    once = kept_once(config, held, trunk)
    views = config.cache.views
    rows, size = kept_size(once, records, views)
    (shape,) = once.shapes.values()
    what = f"{' x '.join(map(str, (rows, *shape)))}, {said_bytes(size)}"
    are = "are" if " to " in once.title else "is"
    if size > in_bytes(limit):
        log.warning(
            "%s %s frozen, but the output (%s) is more than cache.limit=%s: nothing is kept, every "
            "step runs all stages, and augments anew; cache.limit=%s allows it%s",
            once.title, are, what, limit, said_bytes(size),
            "" if once.dtype == "bfloat16" else ", and cache.dtype=bfloat16 halves it",
        )  # fmt: skip
        return model
    log.info(
        "%s %s frozen: the output (%s) is computed once and kept%s", once.title, are, what,
        "" if after not in {s for s, _ in model.parts} else ", as it is the first that is pooled",
    )  # fmt: skip
    log.info(
        "training sees each image as it is%s; cache.enabled=False augments every step anew",
        f" and in {views} augmented views (cache.views)" if views else " alone (cache.views=0)",
    )
    return held


def last_frozen(moving: Mapping[str, Any], pooled: Collection[str], stages: Sequence[str]) -> str:
    """The last of the first stages that are frozen whole, or the first of them that is pooled.

    "" where the first stage moves.

    >>> last_frozen({"a": [False], "b": [False], "c": [True, False]}, ["c"], ["a", "b", "c"])
    'b'
    >>> last_frozen({"a": [False], "b": [False], "c": [True]}, ["a", "c"], ["a", "b", "c"])
    'a'
    """
    found = ""
    for stage in stages:
        if stage not in moving:  # a token, that is part of another stage's output
            continue
        if any(jax.tree.leaves(moving[stage])):
            break
        found = stage
        if stage in pooled:
            break
    return found


def whole_trunk(model: Model, trunk_variables: Any, size: int, fit: str) -> Once:
    """The features of a trunk that never changes, each stage's apart.

    The head has no part in it. Images are squares of `size`, made so as `fit` says.
    """
    headless, shapes = model._replace(head=Head()), {}
    for (stage, pool), width in zip(model.parts, model.widths, strict=True):
        one = headless._replace(stage=stage, pool=pool)
        name = model_fingerprint(one, trunk_variables, size, fit)
        whole = model.head.gem
        shapes[name] = feature_shape(model, trunk_variables, size) if whole else (width,)
    return Once(shapes, _folded(run_features, model, trunk_variables, size), "trunk")


def first_stages(model: Model, trunk_variables: Any, size: int, fit: str, dtype: str) -> Once:
    """What the stage `model.after` of a trunk gives, whose stages up to there never change.

    Kept in `dtype`; of images as for `whole_trunk`.
    """
    stages = TRUNKS[model.name].stages
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    run_features.eval_shape(model, trunk_variables, images)  # UserError where they are too small
    found = run_stage.eval_shape(model, trunk_variables, images)
    frozen = stages[: stages.index(model.after) + 1]
    held = {
        kind: {stage: leaves[stage] for stage in frozen if stage in leaves}
        for kind, leaves in trunk_variables.items()
    }
    bare = model._replace(head=Head(), stage=model.after, pool="")
    name = model_fingerprint(bare, held, size, fit, "map", dtype)
    title = f"stages {frozen[0]} to {frozen[-1]}" if len(frozen) > 1 else f"stage {frozen[0]}"
    compute = _folded(run_stage, model, trunk_variables, size)
    return Once({name: found.shape[1:]}, compute, title, dtype)


def kept_size(once: Once, records: Records, views: int) -> tuple[int, int]:
    """How many rows are kept, of the images and their views, and their bytes."""
    rows = len(records) + views * len(records.where("train"))
    values = sum(math.prod(shape) for shape in once.shapes.values())
    return rows, rows * values * jnp.dtype(once.dtype).itemsize


def _folded(
    run: Callable[..., jax.Array], model: Model, trunk_variables: Any, size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [b, h, w, 3] -> float [b, ...]: what `run` gives, in the trunk's fastest form."""

    @functools.cache
    def folded() -> tuple[Model, Any]:  # where all is kept, there is nothing to compute
        return inference_trunk(model, trunk_variables, size)

    def compute(images: np.ndarray) -> np.ndarray:
        size = min(block_size(images.shape), len(images))
        return in_blocks(functools.partial(run, *folded()), images, size)

    return compute
