"""Checkpoints of DINO, iBOT and DINOv2 in training: the teacher's backbone by itself.

They hold `student` and `teacher`, each a backbone with heads ("module.backbone.", "module.head.",
"backbone.", "dino_head.", "ibot_head."), beside the optimiser and the loss's centre. The teacher is
the average that the papers evaluate; a student is taken where the teacher is of another trunk.
"""

import re
from typing import NamedTuple

from siamese_jax.weights.formats import Leaves

_BACKBONE = re.compile(r"(.*[./])?(teacher|student)[./](module\.)?(_orig_mod\.)?backbone[./]")
# Of a file of the teacher alone: a backbone, and beside it the heads that only these methods have.
_ALONE = re.compile(r"((?:module\.)?)(?:dino_head|ibot_head|head\.last_layer)\.")
_MASKED = "masked_embed"  # what iBOT puts in place of a hidden patch


class Backbone(NamedTuple):
    """A backbone's leaves without the prefix that they had, and the parts of the file left out."""

    prefix: str
    leaves: Leaves
    left: list[str]


def backbones(leaves: Leaves) -> list[Backbone]:
    """Those of the teacher and of the student, in this order; none of another kind of file."""
    found = dict.fromkeys(match[0] for name in leaves if (match := _BACKBONE.match(name)))
    if not found:
        heads = (match[1] + "backbone." for name in leaves if (match := _ALONE.match(name)))
        found = dict.fromkeys(p for p in heads if any(name.startswith(p) for name in leaves))
    return [_backbone(leaves, prefix) for prefix in sorted(found, key=_is_students)]


def _is_students(prefix: str) -> bool:
    return "teacher" not in re.split(r"[./]", prefix)


def _backbone(leaves: Leaves, prefix: str) -> Backbone:
    own = {n.removeprefix(prefix): leaf for n, leaf in leaves.items() if n.startswith(prefix)}
    hidden = [prefix + _MASKED] if own.pop(_MASKED, None) is not None else []
    rest = dict.fromkeys(_part(name) for name in leaves if not name.startswith(prefix))
    return Backbone(prefix, own, [*hidden, *rest])


def _part(name: str) -> str:
    """What a leaf left out is of: "teacher/head", "optimizer".

    >>> _part("teacher/module.head.mlp.0.weight"), _part("dino_loss/center")
    ('teacher/head', 'dino_loss')
    """
    parts = re.split(r"[./]", re.sub(r"\b(module|_orig_mod)\.", "", name))
    return "/".join(parts[: 2 if parts[0] in ("student", "teacher") else 1])
