"""Embeddings that `embed` wrote, as a side of a search: the vectors are taken as they are.

They must be of the encoder in use, by its fingerprint; where both sides are such files they must be
of one encoder, which then need not be given.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.storage.arrays import read_arrays
from siamese_jax.storage.json_files import json_text
from siamese_jax.storage.writing import written

if TYPE_CHECKING:
    from siamese_jax.data.records import Records

SUFFIX = ".npz"


def is_stored(where: str) -> bool:
    """Whether a place is a file of embeddings."""
    return where.lower().endswith(SUFFIX) and Path(where).is_file()


def write(path: str, columns: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes vectors, paths, labels and what else there is, with where they came from."""
    with written(path, "wb") as file:
        np.savez(file, **columns, provenance=np.array(json_text(facts)))


def _read(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of these names that are there; UserError where it is no file of embeddings."""
    what = "file of embeddings that `embed` wrote"
    return read_arrays(path, what, ("vectors", "paths", "labels", "provenance"), names)


def read_facts(path: str) -> dict[str, Any]:
    """What it came from: {"encoder": {"fingerprint": ...}, ...}."""
    return json.loads(str(_read(path, ["provenance"])["provenance"]))


def read_stored(path: str) -> "Records":
    """The images whose embeddings the file holds, in its order."""
    from siamese_jax.data.records import make_records

    held = _read(path, ["paths", "labels", "box", "hot", "classes"])
    records = make_records(
        [str(p) for p in held["paths"]],
        [str(name) or None for name in held["labels"]],
        root=str(Path(path).parent),
        box=held.get("box"),
    )
    if "hot" not in held:
        return records
    return replace(records, label=held["hot"], class_names=tuple(map(str, held["classes"])))


def read_vectors(path: str, records: "Records") -> tuple[np.ndarray, list[bytes]]:
    """float32 [n, d] and the contents' keys of n records of the file."""
    from siamese_jax.data.records import content_keys

    held = _read(path, ["vectors", "keys"])
    # Files of earlier versions have no keys, but there may be the images.
    keys = [held["keys"][i].tobytes() for i in records.id] if "keys" in held else None
    return held["vectors"][records.id], keys or content_keys(records)


def check_encoder(places: Sequence[str], fingerprint: str | None) -> None:
    """UserError where files of embeddings are not of one encoder: the one in use, if there is."""
    made = {where: str(read_facts(where)["encoder"]["fingerprint"]) for where in places}
    for where, own in made.items():
        wanted = fingerprint or next(iter(made.values()))
        if own != wanted:
            raise UserError(
                f"{where} holds embeddings of another encoder ({own[:8]}) than "
                f"{'the one in use' if fingerprint else places[0]} ({wanted[:8]}): embed both with "
                "one encoder, with the same options"
            )
