"""trunk -> pool -> head -> embedding, as one set of pure functions, and the encoder users call."""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax import checkpoint, encoder_folder
from siamese_jax.combined import Combined
from siamese_jax.errors import UserError
from siamese_jax.head import Head, make_head
from siamese_jax.pooling import FIXED_POOLS, check_pool
from siamese_jax.trunks import TRUNKS, Preprocessing, as_preprocessing, normalise
from siamese_jax.weights import TrunkWeights
from siamese_jax.weights import load as load_weights
from siamese_jax.weights.inference import fold_batch_norm, transformed_kernels

log = logging.getLogger(__name__)
Array = jax.Array

__all__ = ["TRUNKS", "Encoder", "Model", "build_model", "embed", "features", "load_encoder"]


class Model(NamedTuple):
    """What is computed; static under jit. The parameters travel beside it.

    `name` is the trunk's in TRUNKS, `trunk` its module.
    """

    name: str
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
        name=weights.trunk,
        trunk=trunk.build(form=weights.form, dtype=jnp.dtype(dtype)),
        head=make_head(**options, gem=check_pool(pool) == "gem", dtype=jnp.dtype(dtype)),
        preprocessing=weights.preprocessing,
        stage=stage,
        pool=pool,
        train_stages=tuple(train_stages),
    )


def features(
    model: Model,
    params: Any,
    batch_stats: Any,
    images: Array,
    *,
    train: bool = False,
    kernels: Any = None,
) -> tuple[Array, Any]:
    """The head's input: pooled features, or the feature map where the head pools by itself.

    Args:
      model: static.
      params, batch_stats: the trunk's; a folded trunk has no statistics.
      images: uint8 [n, h, w, 3].
      train: whether `model.train_stages` use batch statistics.
      kernels: of a folded trunk, those transformed in advance (see `inference_trunk`).

    Returns:
      float32 [n, c] (or [n, h', w', c] for GeM), and the trunk's new batch_stats.
    """
    x = normalise(images, model.preprocessing, model.trunk.dtype)
    variables = {"params": params, "batch_stats": batch_stats, "tiles": kernels or {}}
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
    kernels: Any = None,
) -> tuple[Array, Any]:
    """Images, or features cached of a frozen trunk, to embeddings.

    Args:
      model: static.
      params, batch_stats: {"trunk": ..., "head": ...}.
      inputs: uint8 [n, h, w, 3], or float [n, ...] as `features` returns them.
      train: dropout and batch statistics on.
      mask: bool [n], the rows that count in batch statistics.
      key: for dropout; needed in training.
      kernels: as `features` takes them.

    Returns:
      float32 [n, d] and the new batch_stats.
    """
    batch_stats = dict(batch_stats)
    if inputs.dtype == jnp.uint8:
        inputs, batch_stats["trunk"] = features(
            model, params["trunk"], batch_stats["trunk"], inputs, train=train, kernels=kernels
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


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Images in, embeddings out.

    Attributes:
      model: what is computed.
      params, batch_stats: {"trunk": ..., "head": ...}; the trunk's norms are in its kernels.
      image_size: the side, in pixels, that images are brought to by `embed_folder`.
      fit: how they are brought there: "squash", "crop" or "pad".
      distance: what the embeddings are compared by.
      provenance: where trunk and weights came from, as `run.json` holds it.
      mirror: whether every image is seen mirrored.
      arguments: what `load_encoder` was called with, where it made this encoder.
      kernels: the trunk's, transformed for this image size and processor. They follow from the
        parameters, and are no part of what the encoder is.
    """

    model: Model
    params: Any
    batch_stats: Any
    image_size: int
    fit: str = "squash"
    distance: str = "cosine"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mirror: bool = False
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kernels: Any = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        facts = [f"{self.image_size} px", f"{self.embedding_dim} dimensions", self.distance]
        facts += ["mirrored"] if self.mirror else []
        return f"<Encoder {self.provenance.get('run') or self.model.name}: {', '.join(facts)}>"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embeds images, in blocks of a fixed size so that one compilation serves any number.

        Args:
          images: uint8 [n, h, w, 3], RGB.

        Returns:
          float32 [n, d]

        Raises:
          UserError: another shape or dtype.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(
                f"an encoder takes uint8 images [n, h, w, 3], not {images.dtype} "
                f"{list(images.shape)}"
            )
        if not len(images):
            return np.zeros((0, self.embedding_dim), np.float32)
        images = images[:, :, ::-1] if self.mirror else images
        return in_blocks(self._embed_block, images, block_size(images.shape))

    def _embed_block(self, images: np.ndarray) -> Array:
        return run_embed(self.model, self.params, self.batch_stats, images, self.kernels)

    @functools.cached_property
    def embedding_dim(self) -> int:
        """Width of the embedding."""
        if self.model.head.layers:
            return self.model.head.layers[-1]
        shape = feature_shape(
            self.model,
            {"params": self.params["trunk"], "batch_stats": self.batch_stats["trunk"]},
            self.image_size,
        )
        return shape[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of all that an embedding depends on beside the image.

        It is of the weights as they were loaded, so it is equal on every processor.
        """
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        seen = ("mirror",) if self.mirror else ()
        return model_fingerprint(self.model, variables, self.image_size, self.fit, *seen)

    def at_size(self, image_size: int) -> "Encoder":
        """The same for images of another size."""
        if image_size == self.image_size:
            return self
        shape = (image_size, image_size, 3)
        kernels = transformed_kernels(self.model.trunk, {"params": self.params["trunk"]}, shape)
        return dataclasses.replace(self, kernels=kernels, image_size=image_size)

    def mirrored(self) -> "Encoder":
        """The same, seeing every image mirrored."""
        return dataclasses.replace(self, mirror=not self.mirror)


def model_fingerprint(model: Model, variables: Any, *reading: Any) -> str:
    """BLAKE2b of a model's options, of how images are read, and of the bytes of its parameters."""
    text = repr(
        (model.name, model.trunk, model.head, model.preprocessing, model.stage, model.pool, reading)
    )
    return hashlib.blake2b(
        (text + checkpoint.digest(checkpoint.flatten(variables))).encode(), digest_size=16
    ).hexdigest()


def block_size(shape: Sequence[int]) -> int:
    """Images embedded at a time, of those in [n, h, w, 3]: a CPU's cache full, or a GPU's worth.

    On a CPU, blocks of 8 are the fastest at 112 pixels, and of 4 at 224 (`benchmarks/encode.py`).
    """
    if jax.default_backend() != "cpu":
        return 256
    return max(1, round(900 / math.sqrt(shape[1] * shape[2])))


def in_blocks(compute: Callable[[np.ndarray], Array], inputs: np.ndarray, size: int) -> np.ndarray:
    """compute() over blocks of `size` rows, the last one padded: [n, ...] -> [n, ...], n >= 1.

    Blocks run side by side, one on each core of a CPU: XLA's own threads leave a third of a second
    core idle in a trunk. An accelerator copies one block in while it computes another.
    """

    def run(start: int) -> np.ndarray:
        block = inputs[start : start + size]
        pad = [(0, size - len(block))] + [(0, 0)] * (inputs.ndim - 1)
        return np.asarray(compute(np.pad(block, pad)))[: len(block)]

    workers = _cores() if jax.default_backend() == "cpu" else 2
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
def run_embed(
    model: Model, params: Any, batch_stats: Any, inputs: Array, kernels: Any = None
) -> Array:
    """`embed` for inference, compiled."""
    return embed(model, params, batch_stats, inputs, kernels=kernels)[0]


def make_encoder(
    model: Model, params: Any, batch_stats: Any, *, image_size: int, **options: Any
) -> Encoder:
    """An encoder for inference."""
    trunk = {"params": params["trunk"], "batch_stats": batch_stats["trunk"]}
    model, trunk = inference_trunk(model, trunk, image_size)
    return Encoder(
        model,
        {"trunk": trunk["params"], "head": params["head"]},
        {"trunk": {}, "head": batch_stats["head"]},
        image_size=image_size,
        kernels=trunk["tiles"],
        **options,
    )


def inference_trunk(model: Model, trunk_variables: Any, image_size: int) -> tuple[Model, Any]:
    """The fastest form of a trunk that is not trained.

    BatchNorm goes into the convolutions, and the kernels that images of that size convolve with
    are transformed once: {"params", "batch_stats"} -> {"params", "tiles"}.
    """
    folded = fold_batch_norm(model.name, model.trunk.form, trunk_variables)
    trunk = model.trunk.clone(folded=True)
    tiles = transformed_kernels(trunk, folded, (image_size, image_size, 3))
    return model._replace(trunk=trunk, train_stages=()), {**folded, "tiles": tiles}


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
    if Path(name).is_dir():
        if form or preprocessing or ignore:
            raise UserError(
                f"form, preprocessing and ignore are for a trunk's weights; {name} is a folder, "
                "which has its own"
            )
        return _from_folder(Path(name), image_size, whitening)
    if os.sep in os.fspath(name):
        raise UserError(f"{name} does not exist; give the folder of a run, or a trunk's name")
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


def stored_weights(run: Mapping[str, Any], leaves: Mapping[str, Any]) -> TrunkWeights:
    """The trunk that a run uses, from its run.json and the leaves of a checkpoint."""
    facts = {
        name: run["trunk"][name]
        for name in ("trunk", "form", "image_size", "source", "sha256", "licence", "fallback_for")
    }
    scaling = run["trunk"]["preprocessing"]
    return TrunkWeights(
        **facts,
        preprocessing=as_preprocessing(scaling),
        notes=tuple(run["trunk"].get("notes", ())),
        variables={
            kind: checkpoint.nest(leaves, f"{kind}/trunk/") for kind in ("params", "batch_stats")
        },
    )


def model_of_config(
    config: Mapping[str, Any], weights: TrunkWeights, train_stages: tuple[str, ...] = ()
) -> Model:
    """The model that a config's `trunk` and `head` sections describe."""
    head = {k: v for k, v in config["head"].items() if k != "init"}
    trunk = config["trunk"]
    return build_model(
        weights,
        stage=trunk["stage"],
        pool=trunk["pool"],
        head=head,
        dtype=trunk["dtype"],
        train_stages=train_stages,
    )


def _from_folder(folder: Path, image_size: int | None, whitening: bool) -> Encoder | Combined:
    arguments = encoder_folder.load_arguments(folder)
    if arguments is None:
        made: Encoder | Combined = _from_run(folder, image_size)
    else:
        size = {} if image_size is None else {"image_size": image_size}
        made = load_encoder(**arguments | size | {"whitening": False})
    return encoder_folder.with_whitening(folder, made) if whitening else made


def _from_run(folder: Path, image_size: int | None) -> Encoder:
    files = {name: folder / f"{name}.json" for name in ("config", "run", "results")}
    if not files["config"].exists() or not files["run"].exists():
        raise UserError(f"{folder} is not a run: it has no config.json and run.json")
    config, run = (json.loads(files[name].read_text()) for name in ("config", "run"))
    step = None
    if files["results"].exists():
        step = json.loads(files["results"].read_text())["checkpoint_step"]
    found = checkpoint.load_newest(folder / "checkpoints", step)
    if found is None:
        raise UserError(f"{folder} has no checkpoint yet: train it first")
    if step is None:
        log.warning("%s is not finished: its checkpoint of step %d is used", folder, found[0])
    leaves = {name: jnp.asarray(leaf) for name, leaf in found[1].items()}
    weights = stored_weights(run, leaves)
    model = model_of_config(config, weights)
    return make_encoder(
        model,
        {"trunk": weights.variables["params"], "head": checkpoint.nest(leaves, "params/head/")},
        {
            "trunk": weights.variables["batch_stats"],
            "head": checkpoint.nest(leaves, "batch_stats/head/"),
        },
        image_size=image_size or config["trunk"]["image_size"],
        fit=config["data"]["fit"],
        distance=config["distance"],
        provenance={"run": str(folder), "step": found[0], **run["trunk"]},
        arguments={"name": str(folder), "image_size": image_size},
    )
