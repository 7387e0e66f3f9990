"""An encoder's folder: a whitening beside the run that it was fitted to, or beside a pointer.

whitening.npz   the map, and the encoder and images that it was fitted to
encoder.json    what `load_encoder` is to be called with, and whether there is no map, because none
                was better; a run's own folder needs none
"""

import contextlib
import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siamese_jax.encoder.combined import Combined, whitened
from siamese_jax.encoder.whitening import Whitening, fit_whitening
from siamese_jax.errors import UserError
from siamese_jax.storage import run_folder, tree
from siamese_jax.storage.json_files import json_text, read_json
from siamese_jax.storage.writing import written
from siamese_jax.values import PIXELS, check, flag, optional, text

if TYPE_CHECKING:
    from siamese_jax.data.records import Records
    from siamese_jax.encoder.encoder import Encoder

log = logging.getLogger(__name__)
POINTER, WHITENING = "encoder.json", "whitening.npz"
# What a pointer may hold; `load_encoder` checks more.
ARGUMENTS = {
    **dict.fromkeys(("name", "weights", "pool", "dtype"), text()),
    **dict.fromkeys(("stage", "offline_fallback", "form", "ignore"), optional(text())),
    "image_size": optional(PIXELS),
    "signed_sqrt": flag(),
    "preprocessing": None,
}
BARE = "bare"  # of a pointer: the encoder as it is


def whiten(
    encoder: "Encoder | Combined",
    images: "str | os.PathLike[str] | Records",
    out: str | os.PathLike[str] | None = None,
    *,
    method: str | None = None,
    dim: int | None = None,
    shrinkage: float = 1.0,
    **options: Any,
) -> Combined:
    """Fits a whitening to an encoder's embeddings of images that will not be tested on.

    Args:
      encoder: of `load_encoder`, without a whitening.
      images: a folder, a CSV file, or records.
      out: a folder for `load_encoder`: the run's own, or a new one; None saves nothing.
      method: "pca" or "learned", which needs labels; None takes "learned" where there are any.
      dim: dimensions to keep, at most the encoder's; all if not given.
      shrinkage: as in `fit_whitening`; 1 was best on the emoji's training classes.
      **options: of `siamese_jax.encoder.embedding.embed_records`.

    Returns:
      The encoder, whitened.

    Raises:
      UserError: labels that "learned" lacks, no image, or what `fit_whitening` raises.
    """
    from siamese_jax.data.records import Records, content_keys, fingerprint
    from siamese_jax.data.sources import load_images
    from siamese_jax.encoder.embedding import embed_records

    records = images if isinstance(images, Records) else load_images(images)
    known = records.label.ndim == 1 and bool((records.label >= 0).all())
    method = method or ("learned" if known else "pca")
    if method not in ("pca", "learned"):
        raise UserError(f"method={method!r} is no whitening: choose pca or learned")
    if method == "learned" and not known:
        raise UserError(
            f"{records.name}: learned whitening needs one label for each image; make class folders "
            "or a CSV with labels, or take pca"
        )
    keys = options.pop("keys", None) or content_keys(records)
    found = embed_records(encoder, records, keys=keys, **options)
    labels = found.labels if method == "learned" else None
    fitted = fit_whitening(found.vectors, labels, dim=dim, shrinkage=shrinkage)
    about = {
        "method": method,
        "dim": len(fitted.projection),
        "shrinkage": shrinkage,
        "images": len(found.vectors),
        "data": fingerprint(records, keys),
        "encoder": encoder.fingerprint,
    }
    whitening = dataclasses.replace(fitted, about=about, fitted_to=frozenset(keys))
    made = whitened(encoder, whitening)
    if out is not None:
        save(out, encoder, whitening)
    return made


def save(
    folder: str | os.PathLike[str], encoder: "Encoder | Combined", whitening: Whitening | None
) -> None:
    """Writes what `load_encoder(folder)` needs to give the encoder, whitened; or as it is.

    Raises:
      UserError: an encoder that did not come from `load_encoder`, or a folder of another run.
    """
    folder, arguments = Path(folder), dict(encoder.arguments)
    if not arguments:
        raise UserError("only an encoder that load_encoder made can be saved with its whitening")
    own = Path(arguments["name"])
    if own.is_dir() and folder.exists() and own.samefile(folder):
        arguments = {}
    elif folder.is_file() or run_folder.is_run(folder):
        raise UserError(f"{folder} is a file or another run; choose a new folder")
    if (folder / WHITENING).exists():
        log.warning("%s: what was fitted there before is replaced", folder)
    if arguments and whitening is None:
        arguments[BARE] = True
    with contextlib.ExitStack() as both:
        if arguments:
            if own.is_dir():
                arguments["name"] = str(own.resolve())
            # It takes its place after the whitening has: neither is new without the other.
            pointer = both.enter_context(written(folder / POINTER))
            pointer.write(json_text(arguments, indent=2) + "\n")
            pointer.flush()  # on a full disk neither takes its place
            os.fsync(pointer.fileno())
        if whitening is not None:
            whitening.save(folder / WHITENING)
    if whitening is None:
        (folder / WHITENING).unlink(missing_ok=True)


def load_arguments(folder: Path) -> dict[str, Any] | None:
    """What `load_encoder` is to be called with in a folder's place, or None for a run's folder.

    Raises:
      UserError: it is no such thing, or damaged.
    """
    path = folder / POINTER
    if not path.is_file():
        return None
    held = read_json(path)
    if isinstance(held, dict):
        held.pop(BARE, None)
    unknown = {*held} - {*ARGUMENTS} if isinstance(held, dict) else {"content"}
    if unknown or "name" not in held:
        what = f"{min(unknown)} is unknown" if unknown else "it has no name"
        raise UserError(f"{path} is damaged: {what}; run `whiten` again")
    for name, value in held.items():
        if kind := ARGUMENTS[name]:
            check(f"{path}: {name}", value, kind)
    return held


def home(folder: str | os.PathLike[str]) -> Path:
    """The run's folder that an encoder's folder stands for: itself, or the one it points to."""
    pointed = load_arguments(Path(folder))
    return Path(folder) if pointed is None else Path(pointed["name"])


def with_whitening(folder: Path, encoder: "Encoder | Combined") -> "Encoder | Combined":
    """The encoder, with the folder's whitening where there is one.

    Raises:
      UserError: the whitening was fitted to another encoder, or is gone.
    """
    path, pointer = folder / WHITENING, folder / POINTER
    if pointer.exists() and read_json(pointer).get(BARE):
        return encoder
    if not path.exists():
        if pointer.exists():
            raise UserError(
                f"{path} is missing: run `whiten` again, or load without it (--no-whitening)"
            )
        return encoder
    whitening = Whitening.load(path)
    if whitening.about.get("encoder") not in (encoder.fingerprint, _former_identity(encoder)):
        raise UserError(
            f"{path} was fitted to another encoder (a checkpoint, image size or trunk that is not "
            "the one here): run `whiten` again, or load without it (--no-whitening)"
        )
    return whitened(encoder, whitening)


def _former_identity(encoder: "Encoder | Combined") -> str:
    """What version 0.1.0 wrote into a whitening in place of `Encoder.fingerprint`."""
    from siamese_jax.storage.tree import fingerprint

    if isinstance(encoder, Combined):
        parts = [_former_identity(part) for part in encoder.parts]
        return fingerprint(parts=parts, how=dict(encoder.how))
    leaves = tree.flatten({"params": encoder.params, "head": encoder.batch_stats.get("head", {})})
    model = encoder.model
    return fingerprint(
        leaves=tree.digest(leaves),
        model=(model.name, model.stage, model.pool, str(model.preprocessing)),
        reading=(encoder.image_size, encoder.fit, encoder.mirror),
    )
