"""Pretrained weights: named sources and local files, ported into a trunk's variables.

weights.load("resnet50")                                   # its ImageNet weights
weights.load("resnet50", "torchvision:IMAGENET1K_V2")
weights.load("resnet50", "timm:resnet50.tv_in1k")          # any of timm's, listed or not
weights.load("resnet50", "my.weights.h5")                  # .h5 .keras .pth .ckpt .safetensors .npz
weights.load("resnet50", "random", key=jax.random.key(0))
"""

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.storage import checkpoint, run_folder, tree
from siamese_jax.trunks.table import (
    CAFFE,
    HALF,
    IMAGENET,
    LITE,
    PREPROCESSING,
    TRUNKS,
    Preprocessing,
    as_preprocessing,
    find,
)
from siamese_jax.weights import formats, origin
from siamese_jax.weights.download import Unavailable, obtain, obtain_described
from siamese_jax.weights.fit import first
from siamese_jax.weights.formats import META, Leaves
from siamese_jax.weights.namings import shapes, vit_plan
from siamese_jax.weights.port import DISTILLED, Ported, flatten, port, unflatten
from siamese_jax.weights.sources import SOURCES, Source, find_source, unlisted

__all__ = ["SOURCES", "FallbackWarning", "TrunkWeights", "load", "save", "with_stages"]
log = logging.getLogger(__name__)
UNKNOWN_LICENCE = "unknown: see where the file came from"


class FallbackWarning(UserWarning):
    """Another trunk than the one asked for was loaded."""


@dataclass(frozen=True)
class TrunkWeights:
    """A trunk with weights, and all that is needed to use them.

    `trunk` is the one really loaded; `source` says from where ("keras", a path, "random"), `sha256`
    is that of the file. `variables` = {"params": ..., "batch_stats": ...}, float32. `classifier`,
    where the file has one that is linear on the pooled features: {"kernel" [c, classes], "bias"};
    CLIP's projection is one with biases of 0.
    `fallback_for` names the trunk and the reason if this one was loaded in its place. `notes` say
    what was taken where a file left it open. `stage` is the one that the weights are made for,
    where it is not the trunk's last.
    """

    trunk: str
    form: str
    variables: dict[str, Any]
    preprocessing: Preprocessing
    image_size: int
    source: str
    sha256: str | None = None
    licence: str | None = None
    classifier: dict[str, Any] | None = None
    fallback_for: str | None = None
    notes: tuple[str, ...] = ()
    stage: str = ""

    @property
    def feature(self) -> str:
        """The stage that is pooled where none is asked for."""
        return self.stage or find(self.trunk).stages[-1]

    def describe(self) -> dict[str, Any]:
        """All but the arrays, as JSON can hold it."""
        fields = ("trunk", "form", "image_size", "source", "sha256", "licence", "fallback_for")
        more = {"preprocessing": asdict(self.preprocessing), "notes": list(self.notes)}
        more |= {"stage": self.stage} if self.stage else {}
        return {name: getattr(self, name) for name in fields} | more


def load(
    trunk: str,
    weights: str | os.PathLike = "imagenet",
    *,
    offline_fallback: str | None = None,
    form: str | None = None,
    preprocessing: str | Preprocessing | Mapping[str, Any] | None = None,
    ignore: str | None = None,
    key: jax.Array | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> TrunkWeights:
    """A trunk's weights: "random", "imagenet" (its default), a named source, a file, a run folder.

    A file's format is told by its content: HDF5 and `.keras` of Keras, PyTorch's state dicts,
    checkpoints and modules (which are never executed), safetensors, npz. A wrapper's prefix
    ("module.", "backbone.") is dropped. What a file leaves open is decided as the configs beside it
    or its name tell (see `origin`), and logged in a line.

    Args:
      trunk: a name in TRUNKS.
      weights: see above. A name comes before a file of that name; write ./NAME for the file.
      offline_fallback: the trunk that is loaded, with its default weights and a FallbackWarning,
        where a named source can't be had on this machine.
      form: "keras" (TensorFlow's padding and epsilon) or "torch"; of Vision Transformers "torch" or
        "dino" (see `trunks.positions`); of MobileNetV3 also "torchvision" (its epsilon). Known for
        named sources, told from a file's names; give it for random weights, or for a file whose
        names do not tell.
      preprocessing: how pixels are scaled, in place of what a file tells; see `as_preprocessing`.
      ignore: a pattern (`re.search`) of a file's leaves that are no part of the trunk.
      key: for random weights.
      cache_dir: where downloads lie; $SIAMESE_JAX_CACHE or ~/.cache/siamese_jax by default.

    Raises:
      UserError: weights that can't be had, read, or that do not fit. If leaves are missing or
        unknown it has all their names in `lines`.
    """
    scaling = None if preprocessing is None else as_preprocessing(preprocessing)
    name = os.fspath(weights)
    row = find(trunk)
    if form is not None and form not in row.forms:
        raise UserError(f"{trunk} has no form {form!r}; it has: {', '.join(row.forms)}")
    named = name in ("random", "imagenet") or (trunk, name) in SOURCES
    if not named and _is_path(name):
        return _from_file(trunk, Path(name).expanduser(), form, scaling, ignore)
    if ignore is not None:
        raise UserError(f"ignore={ignore!r} is for a weights file, not for {name!r}")
    if name == "random":
        return _scaled(_random(trunk, form or row.forms[0], key), scaling)
    if hub := unlisted(trunk, name):
        try:
            path = obtain_described(hub, cache_dir)
        except Unavailable as e:
            return _fall_back(trunk, name, str(e), offline_fallback, cache_dir)
        return replace(_from_file(trunk, path, form, scaling, None), source=name)
    source = find_source(trunk, name)
    name = row.default_weights if name == "imagenet" else name
    if form not in (None, source.form):
        raise UserError(
            f"the weights {name!r} of {trunk} are of the form {source.form}, not {form}"
        )
    try:
        path = obtain(source, cache_dir)
    except Unavailable as e:
        return _fall_back(trunk, name, str(e), offline_fallback, cache_dir)
    return _scaled(_from_source(trunk, name, source, path), scaling)


def _scaled(found: TrunkWeights, scaling: Preprocessing | None) -> TrunkWeights:
    return found if scaling is None else replace(found, preprocessing=scaling)


def fetch(
    trunk: str,
    weights: str | os.PathLike = "imagenet",
    cache_dir: str | os.PathLike | None = None,
) -> Path | None:
    """The file of weights, downloaded where it has to be, unread; None for "random".

    Raises:
      UserError: it can't be had; as `load` says it.
    """
    name = os.fspath(weights)
    named = name == "imagenet" or (trunk, name) in SOURCES
    if name == "random":
        return None
    if not named and _is_path(name):
        path = Path(name).expanduser()
        return path if path.is_dir() else formats.existing(path)
    hub = unlisted(trunk, name)
    try:
        if hub:
            return obtain_described(hub, cache_dir)
        return obtain(find_source(trunk, name), cache_dir)
    except Unavailable as e:
        raise _unavailable(trunk, name, str(e)) from None


def with_stages(weights: TrunkWeights, stages: Collection[str]) -> TrunkWeights:
    """Weights for an encoder of these stages: with CLIP's projection, where "proj" is one of them.

    As parameters of the trunk it is trained, stored and fingerprinted with them; so it is among
    them only where it is used. Weights that have none are returned as they are.
    """
    last, width = weights.classifier, find(weights.trunk).projection
    if "proj" not in stages or last is None or np.any(last["bias"]) or len(last["bias"]) != width:
        return weights
    projection = {"proj": {"kernel": jnp.asarray(last["kernel"])}}
    params = weights.variables["params"] | projection
    return replace(weights, variables=weights.variables | {"params": params})


def save(path: str | os.PathLike, weights: TrunkWeights) -> None:
    """Write an `.npz` that `load` reads: every leaf by its path, and a description."""
    leaves = flatten(weights.variables)
    if weights.classifier is not None:
        leaves |= flatten({"classifier": weights.classifier})
    formats.write_npz(Path(path), leaves, weights.describe())


def _is_path(name: str) -> bool:
    known = Path(name).suffix.lower() in formats.EXTENSIONS
    return known or Path(name).expanduser().exists() or name.startswith((".", "/", "~"))


def _random(trunk: str, form: str, key: jax.Array | None) -> TrunkWeights:
    """He's initialisation: kernels N(0, 2 / fan in), norms that change nothing, zero biases.

    Tokens and positions are N(0, 0.02^2).
    NumPy draws it, in a second; compiling a trunk's own `init` takes ten times as long.
    """
    key = jax.random.key(0) if key is None else key
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("/kernel"):
            deviation = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
            return generator.standard_normal(shape, np.float32) * deviation
        if name.endswith(("/cls", "/registers", "/positions", "/latent")):
            return generator.standard_normal(shape, np.float32) * np.float32(0.02)
        one = re.search(r"/(scale|var|gain\d?)$", name) is not None
        return np.full(shape, one, np.float32)

    variables = unflatten({name: draw(name, shape) for name, shape in shapes(trunk, form).items()})
    scaling, row, last = _usual_preprocessing(trunk, form), find(trunk), None
    if row.projection:
        kernel = draw("proj/kernel", (row.width, row.projection))
        last = {"kernel": kernel, "bias": np.zeros(row.projection, np.float32)}
    return TrunkWeights(
        trunk, form, _on_device(variables), scaling, row.image_size, "random", classifier=last
    )


def _usual_preprocessing(trunk: str, form: str) -> Preprocessing:
    """The constants that weights of that form are trained with, where a file says nothing."""
    if form == "dino":
        return IMAGENET
    own = IMAGENET if "lite" in trunk else find(trunk).preprocessing
    keras = {"efficientnet_lite": LITE, "efficientnet": own, "mobilenetv3": HALF, "": CAFFE}
    found = next(scaling for start, scaling in keras.items() if trunk.startswith(start))
    return found if form == "keras" else own


def _from_source(trunk: str, name: str, source: Source, path: Path) -> TrunkWeights:
    ported = port(formats.read(path), trunk, where=str(path), form=source.form)
    return TrunkWeights(
        trunk,
        source.form,
        _on_device(ported.variables),
        source.preprocessing,
        source.image_size,
        name,
        formats.digest(path),
        source.licence,
        ported.classifier,
    )


def _from_file(
    trunk: str,
    path: Path,
    form: str | None,
    scaling: Preprocessing | None,
    ignore: str | None,
) -> TrunkWeights:
    if path.is_dir():
        if form or scaling or ignore:
            raise UserError(f"form, preprocessing and ignore are for a file; {path} is a folder")
        return _from_run(trunk, path)
    leaves, texts, left = formats.read_contents(path)
    meta = _description(leaves, path)
    if meta and meta["trunk"] != trunk:
        raise UserError(f"{path} holds the weights of {meta['trunk']}, not of {trunk}")
    told = origin.Origin() if meta else origin.find(path, texts, trunk, leaves)
    asked = form or meta.get("form")
    ported = port(leaves, trunk, where=str(path), form=asked or told.form, ignore=ignore)
    usual = meta.get("preprocessing") or _preprocessing(trunk, ported, leaves, told)
    left = (*ported.left, *left)
    new = [*ported.notes, *([f"left out: {first(left)}"] if left else []), *told.notes]
    size, resized = _native_size(trunk, ported, meta.get("image_size") or told.image_size)
    new += [resized] if resized and not meta else []
    if not meta:
        scaled = _scaled_as(scaling, usual, told, ported, find(trunk).forms)
        new = [_taken(trunk, ported, told, form), scaled, *new]
    if new:
        log.warning("%s: %s (--form, --preprocessing say otherwise)", path, "; ".join(new))
    return TrunkWeights(
        trunk,
        ported.form,
        _on_device(ported.variables),
        scaling or usual,
        size,
        str(path),
        formats.digest(path),
        meta.get("licence") or told.licence or UNKNOWN_LICENCE,
        ported.classifier,
        notes=(*meta.get("notes", ()), *new),
        stage=meta.get("stage", "") or ported.stage,
    )


def _native_size(trunk: str, ported: Ported, told: int | None) -> tuple[int, str]:
    """The side of images: as a config or a name has told, or as the file's own grid of positions.

    With a line where that grid is not the trunk's, or is resized for that many pixels.
    """
    plan, usual = vit_plan(trunk), find(trunk).image_size
    table = ported.variables["params"].get("stem", {}).get("positions")
    if plan is None or table is None:
        return told or usual, ""
    side = math.isqrt(len(table) - int(plan.class_token and plan.class_position))
    own = usual if side == plan.grid else side * plan.patch
    size, asked = told or own, (told or own) // plan.patch
    grid = f"its position embeddings are of {side} x {side} patches"
    if asked != side:
        return (
            size,
            f"{grid}, resized to {asked} x {asked}: image_size={own} takes them as they are",
        )
    return size, f"{grid}: images of {own} pixels" if own != usual and not told else ""


def _taken(trunk: str, ported: Ported, told: origin.Origin, form: str | None) -> str:
    """Which network a file's leaves are taken for, why, and which it could be as well."""
    why = "as its leaves are named"
    alike, told_apart = origin.SAME_LEAVES.get(trunk, ()), False
    if form:
        why = "as asked"
    elif told.name:
        why, told_apart = f"{told.name} by {told.where}", True
        alike = tuple(name for name in alike if name in TRUNKS)  # of others nobody need know
    elif ported.naming == "timm" and "keras" in find(trunk).forms:
        why, alike = "as nothing tells", (f"tf_{trunk} (--form=keras)", *alike)
    if ported.naming not in ("timm", "torch", "openai", "transformers"):
        alike = ()
    names = " and ".join(alike)
    also = f"; {names} would fit as well, and compute something else" if alike else ""
    if told_apart and alike:
        also = f" ({names} would fit as well: that tells them apart)"
    return f"taken as {trunk} in the {ported.form} form, {why}{also}"


def _scaled_as(
    asked: Preprocessing | None,
    usual: Preprocessing,
    told: origin.Origin,
    ported: Ported,
    forms: tuple[str, ...],
) -> str:
    used = asked or usual
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (used.mean, used.std))
    named = {value: name for name, value in PREPROCESSING.items()}
    how = named.get(used, f"(x - ({mean})) / ({std})")
    why = "as is usual" if used in named else "as its own layers do"
    if used == HALF and "dino" in forms:
        why += " (DINO's and MAE's are imagenet)"
    why = "as DINO is trained" if ported.naming == DISTILLED else why
    why = f"by {told.scaled_by}" if told.preprocessing else why
    return f"pixels scaled as {how}, {'as asked' if asked else why}"


def _from_run(trunk: str, folder: Path) -> TrunkWeights:
    """The trunk of a trained run, from the checkpoint that its results were measured on."""
    if not run_folder.is_run(folder):
        raise UserError(f"{folder} is no run folder; give a file, or the folder of a run")
    run = run_folder.read(folder)
    if (held := run.facts["trunk"]["trunk"]) != trunk:
        raise UserError(f"the run {folder} has the trunk {held}, not {trunk}")
    weights = stored_weights(run.facts, checkpoint.load_chosen(run)[1])
    return replace(weights, variables=_on_device(weights.variables), source=str(folder))


def _description(leaves: Leaves, path: Path) -> dict[str, Any]:
    if META not in leaves:
        return {}
    try:
        meta = json.loads(str(leaves[META]))
        form, trunk, scaling = meta["form"], meta["trunk"], meta["preprocessing"]
        size = meta["image_size"]
        if form not in find(trunk).forms or type(size) is not int or not 0 < size <= 2**15:
            raise ValueError
        mean, std = (tuple(float(v) for v in scaling[key]) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not np.isfinite(mean + std).all() or min(std) <= 0:
            raise ValueError
        stages = ("", *find(trunk).channels)
        if not isinstance(meta.get("notes", []), list) or meta.get("stage", "") not in stages:
            raise ValueError
        return meta | {"preprocessing": Preprocessing(mean, std, bool(scaling["bgr"]))}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"the description in {path} is damaged; export the weights again") from None


def _preprocessing(
    trunk: str, ported: Ported, leaves: Leaves, told: origin.Origin
) -> Preprocessing:
    if told.preprocessing:
        return told.preprocessing
    if ported.naming == DISTILLED:
        return IMAGENET
    if ported.naming.startswith("keras") and trunk.startswith("efficientnet"):
        return _of_normalization_layer(leaves)
    return _usual_preprocessing(trunk, ported.form)


def _of_normalization_layer(leaves: Leaves) -> Preprocessing:
    """Keras's EfficientNet scales its own pixels: x / 255, then (x - mean) / sqrt(variance).

    The published files store the standard deviation where the variance belongs, and their model
    divides by its square root twice, so their constants come out as ImageNet's.
    """
    found = {
        key.rpartition("/")[2]: value
        for key, value in leaves.items()
        if key.removeprefix("layers/").startswith("normalization")
    }
    if "mean" not in found or "variance" not in found:
        return IMAGENET
    mean, variance = (
        np.broadcast_to(found[k].ravel(), 3).astype(float) for k in ("mean", "variance")
    )
    if np.allclose(variance, np.array(IMAGENET.std) / 255, atol=1e-3):
        return IMAGENET
    scale = 255 * np.maximum(np.sqrt(variance), 1e-7)
    return Preprocessing(tuple((255 * mean).tolist()), tuple(scale.tolist()))


def _on_device(variables: dict[str, Any]) -> dict[str, Any]:
    """Arrays of jax's; a trunk without norms has no statistics, but always the collection."""
    return jax.tree.map(jnp.asarray, {"batch_stats": {}} | variables)


def _unavailable(trunk: str, name: str, reason: str) -> UserError:
    return UserError(
        f"the weights {name!r} of {trunk} can't be had here: {reason}. Three ways out: a local "
        "file (weights=PATH), another trunk (such as efficientnet_lite0, whose weights are a "
        "package), or random weights (weights=random)"
    )


def _fall_back(
    trunk: str, name: str, reason: str, fallback: str | None, cache_dir: str | os.PathLike | None
) -> TrunkWeights:
    """What an unreachable source leads to: the agreed other trunk, or an error."""
    if fallback is None:
        raise _unavailable(trunk, name, reason)
    message = (
        f"THE TRUNK IS {fallback}, NOT {trunk}: the weights {name!r} of {trunk} can't be had here "
        f"({reason}) and offline_fallback says {fallback!r}"
    )
    warnings.warn(message, FallbackWarning, stacklevel=3)
    found = load(fallback, "imagenet", cache_dir=cache_dir)
    return replace(found, fallback_for=f"{trunk} ({name}): {reason}")


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
        stage=run["trunk"].get("stage", ""),
        variables={kind: tree.nest(leaves, f"{kind}/trunk/") for kind in ("params", "batch_stats")},
    )
