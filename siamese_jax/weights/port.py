"""Renames and transposes other libraries' leaves into a trunk's variables.

Each naming is a function from our layer's path to their (convolution, norm) names. The rest is
common: kernels are transposed, every leaf must find its place and fit it, and what is left over
must be known (the classifier, counters).
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax import trunks
from siamese_jax.errors import UserError
from siamese_jax.weights.formats import META, Leaves

Variables = dict[str, Any]
# Our layer's path, e.g. "stage2/block1/conv1" -> their names of its convolution and its norm.
Naming = Callable[[str], tuple[str, str]]


class Ported(NamedTuple):
    """`naming` is the library whose names fitted; `classifier` is its last layer, if it is linear
    on the pooled features: {"kernel": [c, classes], "bias": [classes]}."""

    variables: Variables
    form: str
    naming: str
    classifier: dict[str, np.ndarray] | None


# Namings.


def _keras_resnet(path: str) -> tuple[str, str]:
    if path == "stem/conv":
        return "conv1_conv", "conv1_bn"
    stage, block, conv = _numbers(path.replace("shortcut", "conv0"))
    base = f"conv{stage + 1}_block{block}_{conv}"
    return f"{base}_conv", f"{base}_bn"


def _torch_resnet(path: str) -> tuple[str, str]:
    if path == "stem/conv":
        return "conv1", "bn1"
    stage, block, *conv = _numbers(path)
    base = f"layer{stage}.{block - 1}"
    if not conv:
        return f"{base}.downsample.0", f"{base}.downsample.1"
    return f"{base}.conv{conv[0]}", f"{base}.bn{conv[0]}"


def _keras_vgg(path: str) -> tuple[str, str]:
    stage, conv = _numbers(path)
    return f"block{stage}_conv{conv}", ""


def _torch_vgg(depths: tuple[int, ...], normalised: bool, path: str) -> tuple[str, str]:
    stage, conv = _numbers(path)
    step = 3 if normalised else 2  # convolution, (norm,) relu; a pooling ends the stage
    at = sum(step * depth + 1 for depth in depths[: stage - 1]) + step * (conv - 1)
    return f"features.{at}", f"features.{at + 1}"


_KERAS_MB = {
    "expand": ("expand_conv", "expand_bn"),
    "depthwise": ("dwconv", "bn"),
    "se_reduce": ("se_reduce", ""),
    "se_expand": ("se_expand", ""),
    "project": ("project_conv", "project_bn"),
}


def _keras_efficientnet(path: str) -> tuple[str, str]:
    if (part := path.split("/")[0]) in ("stem", "top"):
        return f"{part}_conv", f"{part}_bn"
    stage, block = _numbers(path)
    conv, norm = _KERAS_MB[path.split("/")[-1]]
    base = f"block{stage}{chr(ord('a') + block - 1)}_"
    return base + conv, base + norm


def _torchvision_efficientnet(path: str) -> tuple[str, str]:
    ends = {"stem/conv": "features.0", "top/conv": "features.8"}
    if path in ends:
        return f"{ends[path]}.0", f"{ends[path]}.1"
    stage, block = _numbers(path)
    layer = path.split("/")[-1]
    at = ("expand", "depthwise", "se", "project").index(layer[:2] if "se_" in layer else layer)
    base = f"features.{stage}.{block - 1}.block.{at - (stage == 1)}"
    if layer.startswith("se_"):
        return f"{base}.fc{1 if layer == 'se_reduce' else 2}", ""
    return f"{base}.0", f"{base}.1"


_TIMM_MB = {
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "se_reduce": ("se.conv_reduce", ""),
    "se_expand": ("se.conv_expand", ""),
    "project": ("conv_pwl", "bn3"),
}
# timm's first stage has no expansion, so its layers are named as a depthwise-separable block's.
_TIMM_FIRST = {**_TIMM_MB, "depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}


def _timm_efficientnet(path: str) -> tuple[str, str]:
    ends = {"stem/conv": ("conv_stem", "bn1"), "top/conv": ("conv_head", "bn2")}
    if path in ends:
        return ends[path]
    stage, block = _numbers(path)
    conv, norm = (_TIMM_FIRST if stage == 1 else _TIMM_MB)[path.split("/")[-1]]
    base = f"blocks.{stage - 1}.{block - 1}."
    return base + conv, base + norm


_LUKEMELAS_MB = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "se_reduce": ("_se_reduce", ""),
    "se_expand": ("_se_expand", ""),
    "project": ("_project_conv", "_bn2"),
}


def _lukemelas_efficientnet(depths: tuple[int, ...], path: str) -> tuple[str, str]:
    ends = {"stem/conv": ("_conv_stem", "_bn0"), "top/conv": ("_conv_head", "_bn1")}
    if path in ends:
        return ends[path]
    stage, block = _numbers(path)
    conv, norm = _LUKEMELAS_MB[path.split("/")[-1]]
    base = f"_blocks.{sum(depths[: stage - 1]) + block - 1}."
    return base + conv, base + norm


def _numbers(path: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path)]


class Scheme(NamedTuple):
    """A library's names for one trunk; `form` is the one its weights are made for."""

    naming: Naming
    form: str
    keras: bool
    classifier: str
    ignored: str  # a regex of leaves that a trunk has no use for


def schemes(trunk: str) -> dict[str, Scheme]:
    """The namings in which weights of that trunk are found."""
    build = trunks.find(trunk).build
    keras_ignored = (
        r"(predictions|fc\d|probs)/|normalization(_\d+)?/(mean|variance|count)$|rescaling"
    )
    torch_ignored = r".*num_batches_tracked$|(fc|classifier|head|pre_logits|_fc)\."

    def keras(naming: Naming) -> Scheme:
        return Scheme(naming, "keras", True, "predictions", keras_ignored)

    def torch(naming: Naming, classifier: str, form: str = "torch") -> Scheme:
        return Scheme(naming, form, False, classifier, torch_ignored)

    if trunk.startswith("resnet"):
        named = {"torch": torch(_torch_resnet, "fc")}
        both = "keras" in trunks.find(trunk).forms
        return named | {"keras": keras(_keras_resnet)} if both else named
    if trunk.startswith("vgg"):
        depths, normalised = build.args  # type: ignore[attr-defined]
        plain = torch(partial(_torch_vgg, depths, normalised), "")
        return {"torch": plain} if normalised else {"keras": keras(_keras_vgg), "torch": plain}
    depths = tuple(stage.depth for stage in trunks.efficientnet.plan(*build.args))  # type: ignore
    lukemelas = partial(_lukemelas_efficientnet, depths)
    return {
        "keras": keras(_keras_efficientnet),
        "torchvision": torch(_torchvision_efficientnet, "classifier.1"),
        "timm": torch(_timm_efficientnet, "classifier"),
        "lukemelas": torch(lukemelas, "_fc", form="keras"),
    }


# Our variables.


@lru_cache(maxsize=64)
def shapes(trunk: str, form: str) -> dict[str, tuple[int, ...]]:
    """Every leaf of a trunk's variables, such as "params/stem/conv/kernel", with its shape."""
    module = trunks.find(trunk).build(form=form)
    image = jnp.zeros((1, 64, 64, 3))
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), image))
    return {"/".join(path): leaf.shape for path, leaf in _walk(tree)}


def _walk(tree: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, *above, key)
        else:
            yield (*above, key), value


def flatten(tree: Mapping[str, Any]) -> Leaves:
    """{"params": {"stem": {...}}} -> {"params/stem/...": array}."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in _walk(tree)}


def unflatten(leaves: Mapping[str, Any]) -> Variables:
    """The inverse of `flatten`."""
    tree: Variables = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


# The port itself.

_KERAS_LEAVES = {
    "kernel": "/kernel",
    "bias": "/bias",
    "norm/scale": "/gamma",
    "norm/bias": "/beta",
    "norm/mean": "/moving_mean",
    "norm/var": "/moving_variance",
}
_TORCH_LEAVES = {
    "kernel": ".weight",
    "bias": ".bias",
    "norm/scale": ".weight",
    "norm/bias": ".bias",
    "norm/mean": ".running_mean",
    "norm/var": ".running_var",
}


def names(trunk: str, form: str, scheme: Scheme) -> dict[str, str]:
    """Our leaf -> their leaf, for a whole trunk."""
    suffixes = _KERAS_LEAVES if scheme.keras else _TORCH_LEAVES
    found = {}
    for ours in shapes(trunk, form):
        _, path = ours.split("/", 1)
        layer, leaf = re.fullmatch(r"(.*?)/((?:norm/)?\w+)", path).groups()  # type: ignore
        conv, norm = scheme.naming(layer)
        found[ours] = (norm if leaf.startswith("norm/") else conv) + suffixes[leaf]
    return found


def port(leaves: Leaves, trunk: str, *, where: str, form: str | None = None) -> Ported:
    """A library's leaves as the variables of `trunk`, in float32.

    The naming is the one that most leaves fit. Raises UserError with both sets of keys (- expected,
    + found) if a leaf is missing or unknown, or with the leaf's name if a shape differs.
    """
    if any(name.startswith("params/") for name in leaves):
        return _ours(leaves, trunk, where=where, form=form)
    candidates = schemes(trunk)

    found: dict[str, tuple[Leaves, dict[str, str]]] = {}
    for name, scheme in candidates.items():
        wanted = names(trunk, form or scheme.form, scheme)
        found[name] = _without_prefix(leaves, wanted), wanted
    naming = max(found, key=lambda name: len(set(found[name][1].values()) & found[name][0].keys()))
    scheme = candidates[naming]
    form = form or scheme.form
    leaves, wanted = found[naming]
    extra = leaves.keys() - set(wanted.values())
    unknown = {key for key in extra if not re.match(scheme.ignored, key)}
    missing = set(wanted.values()) - leaves.keys()
    if missing or unknown:
        raise UserError(mismatch(missing, unknown, trunk, where))
    flat = {ours: _to_ours(leaves[theirs], ours, scheme) for ours, theirs in wanted.items()}
    _check_shapes(flat, trunk, form, where)
    return Ported(unflatten(flat), form, naming, _classifier(leaves, scheme, trunk))


def _ours(leaves: Leaves, trunk: str, *, where: str, form: str | None) -> Ported:
    """Our own npz: names are paths already; the form is the one whose leaves these are."""
    forms = [form] if form else list(trunks.find(trunk).forms)
    head = {key: value for key, value in leaves.items() if key.startswith("classifier/")}
    body = {key: leaf for key, leaf in leaves.items() if key not in head and key != META}
    form = min(forms, key=lambda f: len(shapes(trunk, f).keys() ^ body.keys()))
    expected = shapes(trunk, form).keys()
    if expected ^ body.keys():
        raise UserError(mismatch(expected - body.keys(), body.keys() - expected, trunk, where))
    _check_shapes(body, trunk, form, where)
    classifier = unflatten(head)["classifier"] if head else None
    return Ported(unflatten(body), form, "siamese_jax", classifier)


def _without_prefix(leaves: Leaves, wanted: Mapping[str, str]) -> Leaves:
    """Drop a wrapper's prefix, such as "module." or "backbone.", from the leaves that carry it."""
    first = next(iter(wanted.values()))
    if first in leaves:
        return leaves
    for key in leaves:
        if key.endswith("." + first):
            prefix = key.removesuffix(first)
            return {name.removeprefix(prefix): leaf for name, leaf in leaves.items()}
    return leaves


def _to_ours(leaf: np.ndarray, ours: str, scheme: Scheme) -> np.ndarray:
    leaf = np.asarray(leaf, np.float32)
    if ours.endswith("/kernel") and leaf.ndim == 4:
        if not scheme.keras:
            leaf = leaf.transpose(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
        elif ours.endswith("/depthwise/kernel"):
            leaf = leaf.transpose(0, 1, 3, 2)  # [h, w, c, 1] -> [h, w, 1, c]
    return np.ascontiguousarray(leaf)


def _check_shapes(flat: Leaves, trunk: str, form: str, where: str) -> None:
    for name, shape in shapes(trunk, form).items():
        if flat[name].shape != shape:
            raise UserError(
                f"{where}: leaf {name} has the shape {flat[name].shape}, but {trunk} in the {form} "
                f"form needs {shape}; are these the weights of another trunk?"
            )
        if not np.isfinite(flat[name]).all():
            raise UserError(f"{where}: leaf {name} holds NaN or infinity; get the file again")


def _classifier(leaves: Leaves, scheme: Scheme, trunk: str) -> dict[str, np.ndarray] | None:
    suffixes = _KERAS_LEAVES if scheme.keras else _TORCH_LEAVES
    kernel = leaves.get(scheme.classifier + suffixes["kernel"])
    bias = leaves.get(scheme.classifier + suffixes["bias"])
    if kernel is None or bias is None:
        return None
    kernel = np.asarray(kernel, np.float32)
    kernel = kernel if scheme.keras else kernel.T
    fits = kernel.ndim == 2 and kernel.shape[0] == trunks.find(trunk).width
    return {"kernel": kernel, "bias": np.asarray(bias, np.float32)} if fits else None


def mismatch(missing: set[str], unknown: set[str], trunk: str, where: str) -> str:
    """Both sets of keys as lines of a difference: - expected and absent, + found and unknown."""
    lines = [f"- {key}" for key in sorted(missing)] + [f"+ {key}" for key in sorted(unknown)]
    shown = lines if len(lines) <= 40 else [*lines[:40], f"... and {len(lines) - 40} more"]
    close = difflib.get_close_matches(trunk, set(trunks.TRUNKS) - {trunk}, 3)
    hint = f"; are these the weights of another trunk ({', '.join(close)})?" if close else ""
    return (
        f"{where} does not fit {trunk}: {len(missing)} leaves are missing (-) and {len(unknown)} "
        f"are unknown (+){hint}\n" + "\n".join(shown)
    )
