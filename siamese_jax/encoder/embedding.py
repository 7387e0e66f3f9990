"""Embed a data set, with a cache on disk: what has been computed for an image is never again.

A cached vector is found by the fingerprint of the function (weights, preprocessing, size, options)
and the content of the image, so it cannot be stale: touch an image or an option and the key is
another one.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from siamese_jax import processes, stopping
from siamese_jax.data.embedded import Embedded
from siamese_jax.encoder.lda import Rows
from siamese_jax.errors import UserError, naming
from siamese_jax.storage.vectors import VectorStore

if TYPE_CHECKING:
    from siamese_jax.data.records import Records
    from siamese_jax.encoder.combined import Combined
    from siamese_jax.encoder.encoder import Encoder

Batch = dict[str, np.ndarray]


class Kept(NamedTuple):
    """What is kept of n records: parts that lie side by side.

    Attributes:
      vectors: float [rows, ...] of each part, memory maps.
      rows: int64 [parts, n], the row of each record; -1 for one that cannot be read.
    """

    vectors: tuple[np.ndarray, ...]
    rows: np.ndarray

    @property
    def there(self) -> np.ndarray:
        """bool [n], the records of which all parts are there."""
        return np.asarray((self.rows >= 0).all(axis=0))

    def select(self, chosen: np.ndarray) -> "Kept":
        """The same of the records of these places, int [m]."""
        return Kept(self.vectors, self.rows[:, chosen])

    def by_id(self, ids: np.ndarray) -> "Kept":
        """The same with each record in the place of its id, int [n]; none where there is no id."""
        rows = np.full((len(self.rows), int(ids.max()) + 1), -1, np.int64)
        rows[:, ids] = self.rows
        return Kept(self.vectors, rows)

    def take(self, chosen: np.ndarray) -> np.ndarray:
        """float [m, ...] of the records of these places, int [m], all of them there."""
        parts = [part[rows[chosen]] for part, rows in zip(self.vectors, self.rows, strict=True)]
        return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=-1)


class CachedVectors:
    """What `compute` gives for each record, by way of stores on disk.

    Args:
      stores: where vectors are kept; several for parts that lie side by side along the last axis.
      batches: rows -> batches of those records, as `siamese_jax.data.pipeline` makes them; the
        "id" of a batch's row is the record's.
      compute: uint8 [b, h, w, 3] -> float32 [b, ...], all parts.
    """

    def __init__(
        self,
        stores: Sequence[VectorStore],
        batches: Callable[[np.ndarray], Iterable[Batch]],
        compute: Callable[[np.ndarray], np.ndarray],
    ):
        self.stores, self.batches, self.compute = stores, batches, compute

    def kept(self, ids: np.ndarray, keys: list[bytes], *, describe: str = "") -> Kept:
        """Computes what is missing, block by block, and returns what there is of each record.

        Args:
          ids: int [n], ids of the records.
          keys: the n keys.
          describe: title of the progress bar; nothing is shown where nothing is missing.
        """
        tried = self._others_share(keys)
        while True:
            kept = self._kept(keys)
            # Two copies of one image have one key, and are computed once; the second is asked where
            # the first could not be read, or had changed.
            asked = np.flatnonzero(~kept.there & ~tried).tolist()
            todo = np.array(sorted({keys[i]: i for i in reversed(asked)}.values()), np.int64)
            if not len(todo):
                return self._exchanged(kept, keys)
            tried[todo] = True
            key_of = {int(ids[i]): keys[i] for i in todo}
            self._compute(todo, key_of, describe, len(ids) - int((~kept.there).sum()), len(ids))

    def _others_share(self, keys: list[bytes]) -> np.ndarray:
        """bool [n], what this process is not to compute, as another has it or is to do it.

        Of what no process has each takes its share by content, so that a start of others goes on.
        """
        if processes.count() == 1:
            return np.zeros(len(keys), bool)
        made = [(store.folder.name, store.shape, str(store.dtype)) for store in self.stores]
        told = {"images": _digest(keys), "encoder": made}
        processes.agree("encoder or set of images", told)
        known = np.logical_or.reduce(processes.told_by_all(self._kept(keys).there))
        share = np.array([int.from_bytes(key[:8], "little") for key in keys], np.uint64)
        return known | (share % np.uint64(processes.count()) != processes.index())

    def _exchanged(self, kept: Kept, keys: list[bytes]) -> Kept:
        """The same with what other processes have and this one has not, which is appended here."""
        if processes.count() == 1:
            return kept
        there: np.ndarray = np.stack(processes.told_by_all(kept.there))
        wanted = np.flatnonzero(there.any(axis=0) & ~there.all(axis=0))
        giver = there.argmax(axis=0)
        size = max(1, processes.PIECE // max(1, sum(store.row_bytes for store in self.stores)))
        for at in range(0, len(wanted), size):
            block = wanted[at : at + size]
            mine = block[giver[block] == processes.index()]
            for places, rows in processes.told_by_all((mine, kept.take(mine))):
                new = ~there[processes.index(), places]
                if new.any():
                    self._append([keys[i] for i in places[new]], rows[new])
        return self._kept(keys) if len(wanted) else kept

    def _compute(
        self, todo: np.ndarray, key_of: dict[int, bytes], describe: str, known: int, total: int
    ) -> None:
        """Computes these records' rows, block by block."""
        folder = self.stores[0].folder
        title = f"{describe} ({known} of {total} known)" if known else describe
        shown: dict[str, Any] = {"unit": "image", "disable": not processes.is_first()}
        with (
            logging_redirect_tqdm(),  # or a warning would end up inside the bar
            tqdm(total=len(todo), desc=title, smoothing=0.05, **shown) as bar,
        ):
            done = 0
            for batch in self.batches(todo):
                kept = f"{done} of {len(todo)} images are done and kept in {folder}"
                stopping.check(kept)
                good = np.asarray(batch["mask"])
                if good.any():  # or a program would be compiled for nothing
                    vectors = np.asarray(self.compute(batch["image"]))[good]
                    with naming(folder, kept):
                        self._append([key_of[int(i)] for i in batch["id"][good]], vectors)
                more = min(len(good), len(todo) - done)
                done += more
                bar.update(more)

    def _kept(self, keys: list[bytes]) -> Kept:
        rows = np.stack([store.rows(keys) for store in self.stores])
        return Kept(tuple(store.vectors() for store in self.stores), rows)

    def _append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        ends = np.cumsum([store.shape[-1] for store in self.stores])[:-1]
        for store, part in zip(self.stores, np.split(vectors, ends, axis=-1), strict=True):
            store.append(keys, part)


def _digest(keys: list[bytes]) -> str:
    return hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest()


def feature_batches(
    views: Sequence[Kept],
    labels: np.ndarray,
    ids: np.ndarray,
    sample: Callable[[int], np.ndarray],
    *,
    seed: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Training batches of cached features; the view of each item is drawn from (seed, step).

    Args:
      views: what is kept of the n records, a view.
      labels, ids: of the n records.
      sample: a sampler: step -> indices into the records.
      seed: of the draw.
      start_step: the first step to give.
    """
    step = start_step
    while True:
        chosen = sample(step)
        drawn = np.random.default_rng((seed, step)).integers(0, len(views), len(chosen))
        none = views[0].take(chosen[:0])
        feature = np.zeros((len(chosen), *none.shape[1:]), none.dtype)
        mask = np.zeros(len(chosen), bool)
        for view, kept in enumerate(views):
            here = (drawn == view) & kept.there[chosen]
            feature[here], mask[here] = kept.take(chosen[here]), True
        yield {"feature": feature, "label": labels[chosen], "id": ids[chosen], "mask": mask}
        step += 1


def embed_records(
    encoder: "Encoder | Combined",
    records: "Records",
    *,
    batch_size: int = 32,
    cache_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    keys: list[bytes] | None = None,
) -> Embedded:
    """Embeds every image of a data set; images that cannot be read are left out and listed.

    Args:
      encoder: of `siamese_jax.load_encoder`.
      records: of `siamese_jax.data.sources.load_records`.
      batch_size: images in memory at a time.
      cache_dir: where embeddings are kept; $SIAMESE_JAX_CACHE or ~/.cache/siamese_jax by default.
      strict: a broken image raises UserError.
      keys: `content_keys(records)` where they are known already.

    Returns:
      Embedded, in the order of the records.

    Raises:
      UserError: no image could be read, or one could not under `strict`.
    """
    rows, kept = embedded_rows(
        encoder, records, batch_size=batch_size, cache_dir=cache_dir, strict=strict, keys=keys
    )
    return _named(encoder, rows(np.arange(len(kept))), kept)


def embedded_rows(
    encoder: "Encoder | Combined",
    records: "Records",
    *,
    batch_size: int = 32,
    cache_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    keys: list[bytes] | None = None,
) -> tuple[Rows, "Records"]:
    """The same, without all of them in memory: arguments and errors as `embed_records`.

    Returns:
      Places int [m] -> float32 [m, d], read from the cache when they are asked for; and the records
      that can be read, whose places these are.
    """
    from siamese_jax.data.pipeline import Reading, eval_batches
    from siamese_jax.data.records import content_keys

    keys = content_keys(records) if keys is None else keys
    known = dict(zip(records.id.tolist(), keys, strict=True))

    def batches(part: "Encoder", rows: np.ndarray) -> Iterable[Batch]:
        how: Any = {"batch_size": batch_size, "strict": strict, "keys": known}
        return eval_batches(records.select(rows), Reading(part.image_size, part.fit, **how))

    rows, there = _rows(encoder, records, keys, batches, cache_dir)
    good = np.flatnonzero(there)
    return lambda places: rows(good[places]), records.select(good)


def embed_folder(
    encoder: "Encoder | Combined",
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    **options: Any,
) -> Embedded:
    """Embeds the images of a folder: class folders give labels, a flat folder has none ("").

    Args:
      encoder: of `siamese_jax.load_encoder`.
      folder: read as it is, without a split; or a list of images, as for `embed_images`.
      **options: of `embed_records`.
    """
    from siamese_jax.data.sources import load_images

    if not isinstance(folder, str | os.PathLike):
        return embed_images(encoder, folder, **options)
    return embed_records(encoder, load_images(folder), **options)


def embed_images(
    encoder: "Encoder | Combined",
    images: Iterable[Any],
    *,
    labels: Any = None,
    batch_size: int = 32,
    cache_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> Embedded:
    """Embeds a list of images, each brought to the encoder's size as a file in a folder is.

    Args:
      encoder: of `siamese_jax.load_encoder`.
      images: n paths; or n images in memory, of any sizes: Pillow images and arrays uint8
        [h, w, 3] (or [h, w], [h, w, 4]).
      labels: n names (`siamese_jax.data.labels`); None where they are not known.
      batch_size, cache_dir, strict: as for `embed_records`.

    Returns:
      Embedded, in the order of the list. Files that can't be read are left out and listed.

    Raises:
      UserError: something in the list is no image, or what `embed_records` raises.

    >>> embed_images(None, [np.zeros((2, 2, 3))])
    Traceback (most recent call last):
    siamese_jax.errors.UserError: image 0 is ndarray float64 [2, 2, 3]: give uint8 [h, w, 3] (or \
[h, w], [h, w, 4]), a Pillow image, or only paths
    """
    from siamese_jax.data.given import given_records, picture_batches, picture_keys

    records, pictures = given_records(images, labels)
    if not pictures:
        options: dict[str, Any] = {"cache_dir": cache_dir, "strict": strict}
        return embed_records(encoder, records, batch_size=batch_size, **options)

    def batches(part: "Encoder", rows: np.ndarray) -> Iterable[Batch]:
        return picture_batches(
            pictures, rows, image_size=part.image_size, fit=part.fit, batch_size=batch_size
        )

    return _embedded(encoder, records, picture_keys(pictures), batches, cache_dir)


def item_ids(records: "Records") -> np.ndarray:
    """str [n], what each image is wherever it is met: its real path, and its box if it has one."""
    from siamese_jax.data.given import HERE

    folder = functools.cache(os.path.realpath)
    ids = []
    for path in records.path.tolist():
        if path.startswith(HERE):
            ids.append(path)
        elif os.path.islink(path):
            ids.append(os.path.realpath(path))
        else:
            ids.append(os.path.join(folder(os.path.dirname(path)), os.path.basename(path)))
    if records.box is not None:  # several things in one picture are several items
        boxes = [f"#{tuple(b)}" if any(b) else "" for b in records.box.tolist()]
        ids = [i + box for i, box in zip(ids, boxes, strict=True)]
    return np.array(ids, np.str_)


def label_names(records: "Records") -> np.ndarray:
    """The class of each image, str [n], "" where unknown; object [n] of tuples where images may
    have several."""
    if records.label.ndim == 1:
        names = np.array([*records.class_names, ""], np.str_)  # -1, unknown, is the last
        return names[np.maximum(records.label, -1)]
    held = [tuple(records.class_names[j] for j in np.flatnonzero(row)) for row in records.label]
    return np.fromiter(held, object, len(held))


def _embedded(
    encoder: "Encoder | Combined",
    records: "Records",
    keys: list[bytes],
    batches: Callable[["Encoder", np.ndarray], Iterable[Batch]],
    cache_dir: str | os.PathLike[str] | None,
) -> Embedded:
    """The records with their vectors; `batches` gives some of them as an encoder sees them."""
    rows, there = _rows(encoder, records, keys, batches, cache_dir)
    good = np.flatnonzero(there)
    return _named(encoder, rows(good), records.select(good))


def _named(encoder: "Encoder | Combined", vectors: np.ndarray, kept: "Records") -> Embedded:
    distance = getattr(encoder, "distance", "cosine")
    names = (item_ids(kept), label_names(kept), kept.path)
    return Embedded(vectors, *names, distance, encoder.fingerprint, kept)


def _rows(
    encoder: "Encoder | Combined",
    records: "Records",
    keys: list[bytes],
    batches: Callable[["Encoder", np.ndarray], Iterable[Batch]],
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[Rows, np.ndarray]:
    """Places of the n records -> their vectors, float32 [m, d]; and which can be read, bool [n]."""
    from siamese_jax.encoder.combined import Combined
    from siamese_jax.encoder.encoder import Apart
    from siamese_jax.storage.cache import cache_root

    if isinstance(encoder, Combined):
        parts = [_rows(part, records, keys, batches, cache_dir) for part in encoder.parts]
        # A file that is gone since the first pass is gone for all.
        good = np.logical_and.reduce([there for _, there in parts])
        return lambda places: encoder.join([rows(places) for rows, _ in parts]), good
    root = Path(cache_dir) if cache_dir else cache_root()
    whole = Apart((encoder,), encoder, np.asarray)
    own, compute, finish = encoder.apart() if hasattr(encoder, "apart") else whole
    stores = [VectorStore(root / "embeddings" / p.fingerprint, (p.embedding_dim,)) for p in own]
    cached = CachedVectors(stores, functools.partial(batches, encoder), compute)
    mirrored = ", mirrored" if getattr(encoder, "mirror", False) else ""
    title = f"embedding at {encoder.image_size} px{mirrored}"
    kept = cached.kept(records.id, keys, describe=title)
    if not kept.there.any():
        raise UserError(f"{records.name}: none of the {len(records)} images can be read")
    return lambda places: finish(kept.take(places)), kept.there
