"""Where training and evaluation get their inputs: images, or what is kept of them.

Kept are a frozen trunk's features, or where only its first stages are frozen their last map.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from siamese_jax import processes, stopping
from siamese_jax.data.labels import label_codes
from siamese_jax.data.pipeline import Batches, Reading, eval_batches, train_batches
from siamese_jax.data.records import Records
from siamese_jax.encoder.embedding import Batch, CachedVectors, Kept, feature_batches
from siamese_jax.encoder.model import Model, in_blocks, run_embed, run_features
from siamese_jax.errors import UserError
from siamese_jax.storage.tree import fingerprint
from siamese_jax.storage.vectors import VectorStore
from siamese_jax.train import mesh
from siamese_jax.train.frozen import Once

Sampler = Callable[[int], np.ndarray]


class Inputs(NamedTuple):
    """What the loop needs of the data, whichever way it comes.

    Attributes:
      records: the data set, less the images that are known to be unreadable.
      batches: (sampler, start_step) -> training batches.
      features: records -> float32 [n, ...], the head's plain inputs, and the records that have one.
      embed: (params, batch_stats, records) -> float32 [n, d], and those records.
      skipped: path -> what is wrong with it, of the images left out so far.
    """

    records: Records
    batches: Callable[[Sampler, int], Iterator[Batch]]
    features: Callable[[Records], tuple[np.ndarray, Records]]
    embed: Callable[[Any, Any, Records], tuple[np.ndarray, Records]]
    skipped: dict[str, str]


def image_inputs(model: Model, trunk_variables: Any, records: Records, reading: Reading) -> Inputs:
    """Images all the way: the trunk runs in every step."""
    labels, skipped = train_labels(records), dict[str, str]()
    train = records.where("train")

    def batches(sample: Sampler, start_step: int) -> Iterator[Batch]:
        here = mesh.mine(len(sample(start_step)), mesh.make_mesh())
        source = train_batches(train, sample, reading, start_step=start_step, here=here)
        for step, batch in enumerate(_noting(source, skipped), start_step):
            ids = batch["id"] if here.all() else train.id[sample(step)]
            yield {**batch, "id": ids, "label": labels[ids]}

    def run(compute: Callable[[Any], jax.Array], chosen: Records) -> tuple[np.ndarray, Records]:
        """Of several processes each does its share."""
        rows, good = [], [np.zeros(0, chosen.id.dtype)]
        share = chosen.select(np.arange(processes.index(), len(chosen), processes.count()))
        for batch in _noting(_plain(share, reading), skipped):
            stopping.check("this pass over the images begins again; what came before is kept")
            images = batch["image"]
            rows.append(in_blocks(compute, images, len(images))[batch["mask"]])
            good.append(batch["id"][batch["mask"]])
        told = processes.told_by_all((rows, np.concatenate(good)))
        ids = np.concatenate([some for _, some in told])
        vectors = np.concatenate([row for some, _ in told for row in some])
        place = np.full(int(chosen.id.max()) + 1, -1)
        place[ids] = np.arange(len(ids))
        order = place[chosen.id]
        return vectors[order[order >= 0]], chosen.select(order >= 0)

    def features_of(chosen: Records) -> tuple[np.ndarray, Records]:
        return run(lambda images: run_features(model, trunk_variables, images), chosen)

    def embed_all(params: Any, batch_stats: Any, chosen: Records) -> tuple[np.ndarray, Records]:
        return run(lambda images: run_embed(model, params, batch_stats, images), chosen)

    return Inputs(records, batches, features_of, embed_all, skipped)


def cached_inputs(
    model: Model,
    trunk_variables: Any,
    records: Records,
    keys: list[bytes],
    reading: Reading,
    once: Once,
    *,
    views: int,
    folder: Path,
) -> Inputs:
    """What stays of a trunk: one pass over the images and their augmented views, kept on disk.

    An augmented view depends on the seed, the view's number, the image's id and its content, and
    all four are in its key. Where only the first stages stay (`model.after` names the last one),
    the others run in every step, and the maps are read batch by batch.
    """
    skipped: dict[str, str] = {}
    records, plain, sources = _views(
        once, records, keys, reading, views=views, folder=folder, skipped=skipped
    )
    train = records.where("train")

    def batches(sample: Sampler, start_step: int) -> Iterator[Batch]:
        labels, seed = train_labels(records)[train.id], reading.seed
        return feature_batches(sources, labels, train.id, sample, seed=seed, start_step=start_step)

    def by_batch(compute: Callable[[Any], jax.Array], ids: np.ndarray) -> np.ndarray:
        size = reading.batch_size
        parts = (plain.take(ids[at : at + size]) for at in range(0, len(ids), size))
        return np.concatenate([in_blocks(compute, part, size) for part in parts])

    def features_of(chosen: Records) -> tuple[np.ndarray, Records]:
        chosen = chosen.select(plain.there[chosen.id])
        if not model.after:
            return plain.take(chosen.id), chosen
        return by_batch(functools.partial(run_features, model, trunk_variables), chosen.id), chosen

    def embed_all(params: Any, batch_stats: Any, chosen: Records) -> tuple[np.ndarray, Records]:
        embed = functools.partial(run_embed, model, params, batch_stats)
        if model.after:
            chosen = chosen.select(plain.there[chosen.id])
            return by_batch(embed, chosen.id), chosen
        vectors, chosen = features_of(chosen)
        return in_blocks(embed, vectors, 512), chosen

    return Inputs(records, batches, features_of, embed_all, skipped)


def _views(
    once: Once,
    records: Records,
    keys: list[bytes],
    reading: Reading,
    *,
    views: int,
    folder: Path,
    skipped: dict[str, str],
) -> tuple[Records, Kept, list[Kept]]:
    """The records that can be read, what is kept of each id, and each view of the training's."""
    assert isinstance(reading.augment, Mapping)
    drawn = {"augment": dict(reading.augment), "seed": reading.seed}

    def stores(**more: Any) -> list[VectorStore]:
        names = {n: fingerprint(plain=n, **more) if more else n for n in once.shapes}
        return [VectorStore(folder / names[n], s, once.dtype) for n, s in once.shapes.items()]

    cached = CachedVectors(
        stores(), lambda rows: _noting(_plain(records.select(rows), reading), skipped), once.compute
    )
    plain = cached.kept(records.id, keys, describe=f"{once.title} on plain images")
    if not plain.there.any():
        raise UserError(f"{records.name}: none of the {len(records)} images can be read")
    plain = plain.by_id(records.id)
    key_of = dict(zip(records.id.tolist(), keys, strict=True))
    records = records.select(plain.there[records.id])

    train = records.where("train")
    sources, view_stores = [plain.select(train.id)], stores(**drawn)
    for view in range(1, views + 1):

        def read(rows: np.ndarray, view: int = view) -> Iterable[Batch]:
            return _noting(eval_batches(train.select(rows), reading, view=view), skipped)

        view_keys = [_view_key(key_of[i], i, view) for i in train.id.tolist()]
        said = f"{once.title} on augmented view {view} of {views}"
        augmented_views = CachedVectors(view_stores, read, once.compute)
        sources.append(augmented_views.kept(train.id, view_keys, describe=said))
    return records, plain, sources


def _plain(records: Records, reading: Reading) -> Batches:
    return eval_batches(records, reading._replace(augment=None))


def _noting(batches: Batches, skipped: dict[str, str]) -> Iterator[Batch]:
    """The same batches; what they could not read is added to `skipped`."""
    for batch in batches:
        skipped.update(batches.broken)
        yield batch


def train_labels(records: Records) -> np.ndarray:
    """Labels for the loss, by record id: training classes numbered from 0; others and unknown -1.

    Multi-hot labels stay as they are.
    """
    size = int(records.id.max()) + 1
    if records.label.ndim == 2:
        hot = np.zeros((size, records.label.shape[1]), bool)
        hot[records.id] = records.label
        return hot
    train = records.split == "train"
    table = np.full(size, -1, np.int32)
    table[records.id[train]] = label_codes(records.label[train])[1][0]
    return table


def _view_key(key: bytes, image: int, view: int) -> bytes:
    text = key + image.to_bytes(8, "little") + view.to_bytes(8, "little")
    return hashlib.blake2b(text, digest_size=16).digest()
