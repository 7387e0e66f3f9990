"""Renames and transposes other libraries' leaves into a trunk's variables.

Kernels are transposed, every leaf must find its place and fit it, and what is left over must be
known (the classifier, counters) or be named by the user.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.trunks import table
from siamese_jax.weights import distilled
from siamese_jax.weights import fit as fitting
from siamese_jax.weights.formats import META, Leaves
from siamese_jax.weights.namings import (
    KERAS_LEAVES,
    TORCH_LEAVES,
    Scheme,
    names,
    same_size,
    schemes,
    shapes,
    vit_plan,
    walk,
)
from siamese_jax.weights.vit_files import as_timm, mean_first

__all__ = ["Ported", "candidates", "flatten", "names", "port", "schemes", "shapes", "unflatten"]

Variables = dict[str, Any]
_DISTILLATION = re.compile(r"(^|[./])(dist_token|distillation_token)$")
DISTILLED = "a checkpoint of self-distillation"


class Ported(NamedTuple):
    """`naming` is the library whose names fitted; `classifier` is its last layer, if it is linear
    on the pooled features: {"kernel": [c, classes], "bias": [classes]}. `notes` are lines on what
    was chosen and what was left. `stage` is the one that the weights are made for, where it is not
    the trunk's last. `left`: what else the file holds, by name."""

    variables: Variables
    form: str
    naming: str
    classifier: dict[str, np.ndarray] | None
    notes: tuple[str, ...] = ()
    stage: str = ""
    left: tuple[str, ...] = ()


# Our variables.


def flatten(tree: Mapping[str, Any]) -> Leaves:
    """{"params": {"stem": {...}}} -> {"params/stem/...": array}."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in walk(tree)}


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


def port(
    leaves: Leaves, trunk: str, *, where: str, form: str | None = None, ignore: str | None = None
) -> Ported:
    """A library's leaves as the variables of `trunk`, in float32.

    The naming, and the wrapper's prefix, are those that most leaves fit; `ignore` is a pattern
    (`re.search`) of leaves to leave out first. Of a checkpoint of DINO's the teacher's backbone is
    taken (see `distilled`). Raises Mismatch if a leaf is missing or unknown, UserError with the
    leaf's name if a shape differs.
    """
    left = _matching(leaves, ignore, where) if ignore else []
    leaves = {name: leaf for name, leaf in leaves.items() if name not in set(left)}
    asked = [f"{len(left)} leaves are ignored: {fitting.first(left)}"] if left else []
    entries = {name.partition("/")[0] for name in leaves} - {META}
    if "params" in entries and entries <= {"params", "batch_stats", "classifier"}:
        return _ours(leaves, trunk, where, form, asked)
    if found := distilled.backbones(leaves):
        made = _port_distilled(found, trunk, where, form)
    else:
        made = _port_plain(leaves, trunk, where, form, set(left))
    return made._replace(notes=(*made.notes, *asked))


def candidates(leaves: Leaves, where: str) -> list[str]:
    """The trunks that a file has all leaves of, by whatever library's names, the largest first."""
    return fitting.complete(_usual_names(leaves, where))


def nearest(leaves: Leaves, where: str) -> tuple[str, float]:
    """The trunk that a file has most of, and its share: see `fit.nearest`."""
    return fitting.nearest(_usual_names(leaves, where))


def _usual_names(leaves: Leaves, where: str) -> Leaves:
    found = distilled.backbones(leaves)
    leaves, _ = mean_first(found[0].leaves if found else leaves)
    made = as_timm(leaves, where, biased=True)
    return made.leaves if made else leaves


def _port_distilled(
    found: list[distilled.Backbone], trunk: str, where: str, form: str | None
) -> Ported:
    """The first of the backbones that fits; the first one's misfit where none does."""
    problems = []
    usual = form or ("dino" if "dino" in table.find(trunk).forms else None)
    for backbone in found:
        try:
            made = _port_plain(backbone.leaves, trunk, where, usual, set())
        except UserError as e:
            problems.append(e)
            continue
        note = f"the backbone below '{backbone.prefix}' is taken"
        note += f", left out: {', '.join(backbone.left)}" if backbone.left else ""
        return made._replace(naming=DISTILLED, notes=(note, *made.notes))
    raise problems[0]


def _port_plain(
    leaves: Leaves, trunk: str, where: str, form: str | None, ignored: set[str]
) -> Ported:
    plan, stage = vit_plan(trunk), ""
    if plan and any(_DISTILLATION.search(name) for name in leaves):
        raise UserError(
            f"{where} is of a distilled DeiT, whose feature is the mean of two tokens: no trunk "
            f"here has the second; take weights of DeiT without it, such as {trunk}'s own"
        )
    if plan and plan.class_token:
        leaves, mean = mean_first(leaves)
        stage = table.MEAN if mean else ""
    made = as_timm(leaves, where, bool(plan.biased)) if plan else None
    notes, left = [], made.left if made else []
    if made:
        leaves, form = made.leaves, form or made.form
    fit, chosen, branches = fitting.choose(leaves, trunk, form, where, ignored)
    sizes = shapes(trunk, fit.form)
    flat = {
        ours: _to_ours(leaves[theirs], ours, fit.scheme, sizes[ours])
        for ours, theirs in fit.wanted.items()
    }
    _check_shapes(flat, trunk, fit.form, where)
    classifier = _classifier(leaves, fit, trunk)
    naming = made.naming if made else fit.naming
    if stage:
        notes.append(f"its feature is the norm of the patches' mean (fc_norm): --stage={stage}")
    told = (*chosen, *notes)
    return Ported(unflatten(flat), fit.form, naming, classifier, told, stage, (*branches, *left))


def _matching(leaves: Leaves, pattern: str, where: str) -> list[str]:
    try:
        found = [name for name in leaves if re.search(pattern, name)]
    except re.error as e:
        raise UserError(f"ignore={pattern!r} is no regular expression: {e}") from None
    if not found:
        raise UserError(
            f"ignore={pattern!r} matches no leaf of {where}; they are called "
            f"{fitting.first(list(leaves))}"
        )
    return found


def _ours(leaves: Leaves, trunk: str, where: str, form: str | None, notes: list[str]) -> Ported:
    """Our own npz: names are paths already; the form is the one whose leaves these are."""
    forms = [form] if form else list(table.find(trunk).forms)
    head = {key: value for key, value in leaves.items() if key.startswith("classifier/")}
    body = {key: leaf for key, leaf in leaves.items() if key not in head and key != META}
    form = min(forms, key=lambda f: len(shapes(trunk, f).keys() ^ body.keys()))
    expected = shapes(trunk, form).keys()
    if expected ^ body.keys():
        raise fitting.mismatch(
            f"{where} does not fit {trunk} in the {form} form",
            expected - body.keys(),
            body.keys() - expected,
            "export it again",
        )
    _check_shapes(body, trunk, form, where)
    classifier = unflatten(head)["classifier"] if head else None
    return Ported(unflatten(body), form, "siamese_jax", classifier, tuple(notes))


def _to_ours(leaf: np.ndarray, ours: str, scheme: Scheme, shape: tuple[int, ...]) -> np.ndarray:
    leaf = np.asarray(leaf, np.float32)
    if leaf.ndim == len(shape) + 1 and len(leaf) == 1:  # a token, as torch adds it to a batch
        leaf = leaf[0]
    if ours.endswith("/kernel") and leaf.ndim == 2 and not scheme.keras:
        # [out, in] -> [in, out], or as a 1 x 1 convolution has it
        leaf = leaf.T if len(shape) == 2 else leaf[:, :, None, None]
    if ours.endswith("/kernel") and leaf.ndim == 4:
        if not scheme.keras:
            leaf = leaf.transpose(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
        elif ours.endswith("/depthwise/kernel"):
            leaf = leaf.transpose(0, 1, 3, 2)  # [h, w, c, 1] -> [h, w, 1, c]
    return np.ascontiguousarray(leaf)


def _check_shapes(flat: Leaves, trunk: str, form: str, where: str) -> None:
    for name, shape in shapes(trunk, form).items():
        found = flat[name]
        if found.shape != shape and not (
            found.shape[1:] == shape[1:] and same_size(name, found.size, shape)
        ):
            advice = "are these the weights of another trunk?"
            if name.endswith("/positions") and found.shape[1:] == shape[1:]:
                advice = (
                    "only a square grid of patches is taken: where this one is not, resize its "
                    "positions to a square one (in timm: resample_abs_pos_embed) and save it again"
                )
            raise UserError(
                f"{where}: leaf {name} has the shape {found.shape}, but {trunk} in the {form} "
                f"form needs {shape}; {advice}"
            )
        if not np.isfinite(flat[name]).all():
            raise UserError(f"{where}: leaf {name} holds NaN or infinity; get the file again")


def _classifier(leaves: Leaves, fit: fitting.Fit, trunk: str) -> dict[str, np.ndarray] | None:
    suffixes = KERAS_LEAVES if fit.scheme.keras else TORCH_LEAVES
    owner = fit.prefix + fit.scheme.classifier
    kernel, bias = (leaves.get(owner + suffixes[leaf]) for leaf in ("kernel", "bias"))
    if bias is None and kernel is not None and table.find(trunk).projection:
        bias = np.zeros(len(kernel))  # CLIP's projection has none
    if kernel is None or bias is None:
        return None
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim == 4 and kernel.shape[:2] == (1, 1):  # a convolution of Keras's MobileNetV3
        kernel = kernel[0, 0]
    kernel = kernel if fit.scheme.keras else kernel.T
    fits = kernel.ndim == 2 and kernel.shape[0] == table.find(trunk).width
    return {"kernel": kernel, "bias": np.asarray(bias, np.float32)} if fits else None
