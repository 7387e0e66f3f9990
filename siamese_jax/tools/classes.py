"""Whether the classes of two sides are the same things; where they are not, none are compared."""

import logging
from dataclasses import replace

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.tools.images import Side

log = logging.getLogger(__name__)


def match_classes(query: Side, gallery: Side, *, needed: bool) -> tuple[Side, Side]:
    """Both sides with labels that can be compared; what they have in common is told.

    Where they have no class in common, or one side has several labels an image and the other one,
    labels mean different things on the two sides: they are dropped, and that is told.

    Raises:
      UserError: so it is, and labels are needed.
    """
    from siamese_jax.data.labels import ONE_CLASS
    from siamese_jax.data.sources import tell

    said = ""
    known = [side for side in (query, gallery) if side.labelled.any()]
    if len(known) < 2:
        if known:
            bare = "gallery has" if known[0] is query else "queries have"
            tell([f"the {bare} no labels: nothing is measured"])
        return query, gallery
    if query.labels.ndim != gallery.labels.ndim:
        said = "one side has several labels an image and the other has one"
    elif query.labels.ndim == 2:
        query, gallery = _align_columns(query, gallery)
    asked, searched = (_held(side) for side in (query, gallery))
    shared = asked & searched
    if not said and not shared:
        said = (
            f"the {len(asked)} classes of the queries ({_some(asked)}) and the {len(searched)} of "
            f"the gallery ({_some(searched)}) have none in common"
        )
    if said and needed:
        raise UserError(f"{said}: name both sides' classes alike, or use equal CSVs")
    if said:
        tell([f"{said}: both sides are taken as unlabelled, and nothing is measured"])
        return _unlabelled(query), _unlabelled(gallery)
    if len(searched) == 1 and shared:
        tell([ONE_CLASS])
    if asked != searched:
        # Queries without an answer are worth a warning; a larger gallery is only a fact.
        log.log(
            logging.WARNING if asked - searched else logging.INFO,
            "%d of the %d classes of the queries are in the gallery, which has %d",
            len(shared),
            len(asked),
            len(searched),
        )
    return query, gallery


def _held(side: Side) -> set[str]:
    """The classes that a side's images are of."""
    if side.labels.ndim == 2:
        return {side.classes[j] for j in np.flatnonzero(side.labels.any(axis=0))}
    return {str(name) for name in np.unique(side.labels[side.labelled])}


def _some(classes: set[str]) -> str:
    return ", ".join(map(repr, sorted(classes)[:3])) + (", ..." if len(classes) > 3 else "")


def _unlabelled(side: Side) -> Side:
    bare = np.zeros(len(side.ids), bool)
    return replace(side, labels=np.full(len(side.ids), ""), labelled=bare, classes=())


def _align_columns(query: Side, gallery: Side) -> tuple[Side, Side]:
    """Multi-hot columns of both sides brought to one order of classes."""
    sides = (query, gallery)
    classes = sorted({name for side in sides for name in side.records.class_names})

    def brought(side: Side) -> Side:
        labels = np.zeros((len(side.labels), len(classes)), bool)
        labels[:, np.searchsorted(classes, side.records.class_names)] = side.labels
        return replace(side, labels=labels, classes=tuple(classes))

    return brought(query), brought(gallery)
