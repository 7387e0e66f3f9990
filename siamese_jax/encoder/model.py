"""trunk -> pool -> head -> embedding, as one set of pure functions."""

import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from siamese_jax import values
from siamese_jax.encoder.head import Head, make_head
from siamese_jax.encoder.pooling import CLASS_TOKEN, pooled, pooled_parts, pooled_width, stripped
from siamese_jax.errors import UserError
from siamese_jax.storage import tree
from siamese_jax.trunks import stochastic_depth
from siamese_jax.trunks.folding import fold_batch_norm, transformed_kernels
from siamese_jax.trunks.stochastic_depth import Rates
from siamese_jax.trunks.table import TRUNKS, VECTORS, Preprocessing, carried, normalise
from siamese_jax.weights.load import TrunkWeights

Array = jax.Array
log = logging.getLogger(__name__)


class Model(NamedTuple):
    """What is computed; static under jit. The parameters travel beside it.

    `name` is the trunk's in TRUNKS, `trunk` its module. `stage` and `pool` say which of its outputs
    are pooled, and how: see `siamese_jax.encoder.pooling.pooled_parts`. `train_stages` use batch
    statistics in training, and blocks are passed by at `drop_rates`. Inputs that are no images are
    what the stage `after` hands to the next, where it is named: the trunk goes on there.
    """

    name: str
    trunk: nn.Module
    head: Head
    preprocessing: Preprocessing
    stage: str
    pool: str
    train_stages: tuple[str, ...] = ()
    after: str = ""
    drop_rates: Rates = ()

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(stage, pooling) of each part of the features."""
        return pooled_parts(self.stage, self.pool)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each part."""
        return _widths(TRUNKS[self.name].channels, self.parts)

    @property
    def columns(self) -> dict[str, int]:
        """The width of each part by what `stage` calls it."""
        return dict(zip(self.stage.split(","), self.widths, strict=True))

    def apart(self) -> "tuple[Model, ...]":
        """The models of each part alone."""
        bare = self._replace(head=make_head(normalize=False, dtype=self.trunk.dtype))
        return tuple(bare._replace(stage=stage, pool=pool) for stage, pool in self.parts)


def _widths(channels: Mapping[str, int], parts: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    return tuple(pooled_width(channels[stage], pool) for stage, pool in parts)


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
      weights: of `siamese_jax.weights.load`, then `with_stages`.
      stage: the trunk's output to pool, or several: "stage4,stage6,top", and with a pooling of its
        own: "stage6,stage6:max,top"; by default its last, or the one that the weights are made for.
        "proj" is CLIP's embedding, "mean" the norm of the patches' mean.
      pool: "average", "max", "rmac", "gem3", "grid2", "grid3" or "gem", or one for each stage:
        "average,max". The power of "gem" is the head's, to be trained, and is for one stage. "cls"
        takes the class token of a Vision Transformer's block, behind the last norm.
      head: options of `siamese_jax.encoder.head.make_head`; none at all gives the pooled features,
        those of several stages with unit length each.
      dtype: compute type of trunk and head, "float32" or "bfloat16".
      train_stages: trunk stages whose BatchNorm uses batch statistics in training.

    Raises:
      UserError: an option does not exist; the message names it.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"trunk.dtype={dtype!r}; choose float32 or bfloat16")
    trunk = TRUNKS[weights.trunk]
    values.check("stage", stage, values.optional(values.text()))
    values.check("pool", pool, values.text())
    stage, pool = stripped(stage or weights.feature), stripped(pool)
    parts = pooled_parts(stage, pool)
    for name in (*(output for output, _ in parts), *train_stages):
        if name not in trunk.channels:
            raise UserError(
                f"{weights.trunk} has no stage {name!r}; choose from {', '.join(trunk.channels)}"
            )
        if name == "proj" and name not in weights.variables["params"]:
            raise UserError(
                f"the weights {weights.source!r} of {weights.trunk} have no projection, which the "
                f"stage proj is: a layer {trunk.width} -> {trunk.projection} without biases; take "
                f"others, or the feature before it, {trunk.stages[-1]}"
            )
    _check_pools(weights.trunk, stage, parts)
    bare = {"layers": (), "normalize": False, "unit": len(parts) > 1}
    options = dict(head) if head is not None else bare
    options["parts"] = _widths(trunk.channels, parts)
    return Model(
        name=weights.trunk,
        trunk=trunk.build(form=weights.form, dtype=jnp.dtype(dtype)),
        head=make_head(**options, gem=parts[0][1] == "gem", dtype=jnp.dtype(dtype)),
        preprocessing=weights.preprocessing,
        stage=stage,
        pool=pool,
        train_stages=tuple(train_stages),
    )


def _check_pools(name: str, asked: str, parts: Sequence[tuple[str, str]]) -> None:
    """UserError for a pooling that makes no sense of a stage: of one vector, or without a token."""
    trunk, named = TRUNKS[name], asked.split(",")
    blocks = [stage for stage in trunk.stages if stage.startswith("block")]
    for stage, way in parts:
        if stage in VECTORS and way != "average" and f"{stage}:{way}" in named:
            raise UserError(
                f"the stage {stage!r} of {name} is one vector, which nothing pools: take "
                f"--stage={stage}, without {way!r}"
            )
        if way == CLASS_TOKEN and not ("cls" in trunk.stages and stage in blocks):
            raise UserError(
                f"{name} has no class token beside {stage!r}: the pooling cls is for the blocks of "
                "a Vision Transformer that has one, as in block11:cls,block12:cls"
            )


def features(
    model: Model,
    params: Any,
    batch_stats: Any,
    inputs: Array,
    *,
    train: bool = False,
    key: Array | None = None,
    kernels: Any = None,
) -> tuple[Array, Any]:
    """The head's input: pooled features, or the feature map where the head pools by itself.

    Args:
      model: static.
      params, batch_stats: the trunk's; a folded trunk has no statistics.
      inputs: uint8 [n, h, w, 3], or float [n, ...], what the stage `model.after` gives.
      train: whether `model.train_stages` use batch statistics, and `model.drop_rates` hold.
      key: for these; needed in training where there are any.
      kernels: of a folded trunk, those transformed in advance (see `inference_trunk`).

    Returns:
      float32 [n, c], the stages side by side (or [n, h', w', c] for the GeM of one), and the
      trunk's new batch_stats.
    """
    dtype, after = model.trunk.dtype, "" if inputs.dtype == jnp.uint8 else model.after
    x = inputs.astype(dtype) if after else normalise(inputs, model.preprocessing, dtype)
    variables = {"params": params, "batch_stats": batch_stats, "tiles": kernels or {}}
    options: dict[str, Any] = {"after": after}
    if train and model.drop_rates:
        assert key is not None, "stochastic depth needs a key"
        options["drops"] = stochastic_depth.draw(key, model.drop_rates, len(x))
    if train and model.train_stages:
        outputs, new = model.trunk.apply(
            variables, x, train_stages=model.train_stages, mutable=["batch_stats"], **options
        )
        batch_stats = new["batch_stats"]
    else:
        outputs = model.trunk.apply(variables, x, **options)
    for stage, _ in model.parts:
        if 0 in outputs[stage].shape[1:3]:
            side, (rows, columns) = inputs.shape[1], outputs[stage].shape[1:3]
            raise UserError(
                f"image_size={side} is too small: {stage} of the trunk gives a map of {rows} x "
                f"{columns} places"
            )
    if model.head.gem:
        return outputs[model.parts[0][0]], batch_stats
    parts = [pooled(outputs, stage, pool) for stage, pool in model.parts]
    return jnp.concatenate(parts, axis=-1), batch_stats


def embed(
    model: Model,
    params: Any,
    batch_stats: Any,
    inputs: Array,
    *,
    train: bool = False,
    mask: Array | None = None,
    key: Array | None = None,
    kernels: Any = None,
) -> tuple[Array, Any]:
    """Images, or features cached of a frozen trunk, to embeddings.

    Args:
      model: static.
      params, batch_stats: {"trunk": ..., "head": ...}.
      inputs: uint8 [n, h, w, 3], or float [n, ...]: as `features` returns them, or where
        `model.after` names a stage as `features` takes them.
      train: dropout, stochastic depth and batch statistics on.
      mask: bool [n], the rows that count in batch statistics.
      key: for dropout and stochastic depth; needed in training.
      kernels: as `features` takes them.

    Returns:
      float32 [n, d] and the new batch_stats.
    """
    batch_stats = dict(batch_stats)
    if inputs.dtype == jnp.uint8 or model.after:
        depth_key = None
        if train and model.drop_rates and key is not None:
            # Without them dropout draws as it always did.
            key, depth_key = jax.random.split(key)
        options: Any = {"train": train, "key": depth_key, "kernels": kernels}
        trunk = (params["trunk"], batch_stats["trunk"])
        inputs, batch_stats["trunk"] = features(model, *trunk, inputs, **options)
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
    variables = jax.jit(model.head.init)(key, jnp.zeros((1, *feature_shape), jnp.float32))
    return {"params": {}, "batch_stats": {}, **variables}


def feature_shape(model: Model, trunk_variables: Any, image_size: int) -> tuple[int, ...]:
    """Shape of one image's features, without computing any."""
    if not model.head.gem:
        return (sum(model.widths),)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    x, _ = jax.eval_shape(
        lambda images: features(
            model, trunk_variables["params"], trunk_variables["batch_stats"], images
        ),
        images,
    )
    return x.shape[1:]


def model_fingerprint(model: Model, variables: Any, *reading: Any) -> str:
    """BLAKE2b of a model's options, of how images are read, and of the bytes of its parameters."""
    text = repr(
        (model.name, model.trunk, model.head, model.preprocessing, model.stage, model.pool, reading)
    ).replace("    unit = ()\n", "")  # Heads of before had no such field: theirs are as they were.
    return hashlib.blake2b(
        (text + tree.digest(tree.flatten(variables))).encode(), digest_size=16
    ).hexdigest()


def block_size(shape: Sequence[int]) -> int:
    """Images embedded at a time, of those in [n, h, w, 3]: a CPU's cache full, or a GPU's worth.

    On a CPU, blocks of 8 are the fastest at 112 pixels, and of 4 at 224 (`benchmarks/encode.py`).
    """
    if jax.default_backend() != "cpu":
        return 256
    return max(1, round(900 / math.sqrt(shape[1] * shape[2])))


# Rows that the device has had room for, by the shape of one: set when it had none for more.
_room: dict[tuple[int, ...], int] = {}


def in_blocks(compute: Callable[[np.ndarray], Array], inputs: np.ndarray, size: int) -> np.ndarray:
    """compute() over blocks of `size` rows, the last one padded: [n, ...] -> [n, ...], n >= 1.

    Blocks run side by side, one on each core of a CPU: XLA's own threads leave a third of a second
    core idle in a trunk. An accelerator copies one block in while it computes another; of several
    devices each has a block at a time. Where the memory does not suffice for a block, that is told,
    and blocks are half as large from then on.
    """
    shape = inputs.shape[1:]
    size = min(size, _room.get(shape, size))
    while True:
        try:
            return _in_blocks(compute, inputs, size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
        size = _room[shape] = size // 2
        log.warning("the device is out of memory: going on with blocks of %d at a time", size)


def on_each_device(tree: Any) -> Any:
    """The same leaves on all devices of the process, where it has several: copied once."""
    return jax.device_put(tree, _over_devices()) if jax.local_device_count() > 1 else tree


def _over_devices(*axes: str) -> NamedSharding:
    """By rows over the process's devices ("data"), or whole on each."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("data",)), PartitionSpec(*axes))


def _in_blocks(compute: Callable[[Any], Array], inputs: np.ndarray, size: int) -> np.ndarray:
    devices, by_rows = jax.local_devices(), _over_devices("data")
    size *= len(devices)

    def run(start: int) -> np.ndarray:
        block = inputs[start : start + size]
        pad = [(0, size - len(block))] + [(0, 0)] * (inputs.ndim - 1)
        block = np.pad(block, pad)
        rows = compute(jax.device_put(block, by_rows) if len(devices) > 1 else block)
        return np.asarray(rows)[: len(inputs) - start]

    # Programs of several devices that wait for one another must begin in one order on all.
    workers = 1 if len(devices) > 1 else _cores() if jax.default_backend() == "cpu" else 2
    with ThreadPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(run, range(0, len(inputs), size))))


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A CPU with AVX-512 runs a trunk's element-wise passes faster in whole vectors than in the halves
# that are XLA's default; other CPUs split them again.
_compiled = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_cpu_prefer_vector_width": 512}
)


@_compiled
def run_features(model: Model, trunk_variables: Any, images: Array) -> Array:
    """`features` for inference, compiled."""
    params, stats, kernels = (
        trunk_variables.get(k, {}) for k in ("params", "batch_stats", "tiles")
    )
    return features(model, params, stats, images, kernels=kernels)[0]


@_compiled
def run_stage(model: Model, trunk_variables: Any, images: Array) -> Array:
    """What the stage `model.after` hands to the next: uint8 [n, h, w, 3] -> [n, ...]. Compiled."""
    x = normalise(images, model.preprocessing, model.trunk.dtype)
    outputs: Any = model.trunk.apply(trunk_variables, x)
    return carried(outputs, model.after)


@_compiled
def run_embed(
    model: Model, params: Any, batch_stats: Any, inputs: Array, kernels: Any = None
) -> Array:
    """`embed` for inference, compiled."""
    return embed(model, params, batch_stats, inputs, kernels=kernels)[0]


def inference_trunk(model: Model, trunk_variables: Any, image_size: int) -> tuple[Model, Any]:
    """The fastest form of a trunk that is not trained.

    BatchNorm goes into the convolutions, where there is any, and the kernels that images of that
    size convolve with are transformed once: {"params", "batch_stats"} -> {"params", "tiles"}.
    """
    folded = fold_batch_norm(model.name, model.trunk.form, trunk_variables)
    trunk = model.trunk.clone(folded=True) if hasattr(model.trunk, "folded") else model.trunk
    tiles = transformed_kernels(trunk, folded, (image_size, image_size, 3))
    return model._replace(trunk=trunk, train_stages=()), {**folded, "tiles": tiles}


def model_of_config(
    config: Mapping[str, Any],
    weights: TrunkWeights,
    train_stages: tuple[str, ...] = (),
    *,
    stage: str | None = None,
    layers: Sequence[int] | None = None,
) -> Model:
    """The model that a config's `trunk` and `head` sections describe, with what was chosen."""
    head = {k: v for k, v in config["head"].items() if k not in ("init", "shrinkage")}
    if layers:
        head["layers"] = tuple(layers)
    trunk = config["trunk"]
    return build_model(
        weights,
        stage=stage or trunk["stage"],
        pool=trunk["pool"],
        head=head,
        dtype=trunk["dtype"],
        train_stages=train_stages,
    )
