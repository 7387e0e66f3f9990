"""Records to batches: tf.data reads, resizes and augments images in parallel, ahead of the step.

The work on an image is Pillow's and NumPy's, run by tf.data's threads: measured on 480 x 360
photographs to 224 px, TensorFlow's own antialiased resize takes 2.5 times as long, its colour
changes 10 times, and one broken file would end its iterator. Only indices and random numbers go
in, and one batch of uint8 pixels comes out: memory does not depend on the size of the data set.
"""

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from siamese_jax import values
from siamese_jax.data.augment import (
    Augment,
    change_pixels,
    colour,
    crop_region,
    erase_box,
    make_augment,
    uniforms,
)
from siamese_jax.data.preprocess import FITS, read_image
from siamese_jax.data.records import Records, content_key
from siamese_jax.data.tf import tensorflow
from siamese_jax.errors import UserError

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
Plan = Callable[[int], tuple[np.ndarray, np.ndarray]]  # step -> rows [b] (-1: padding), u [b, 16]


class Reading(NamedTuple):
    """How images are read.

    Attributes:
      image_size: height and width in pixels; one number for both.
      fit: how a picture becomes `image_size`; see `read_image`.
      augment: an Augment, a mapping of its fields, or None: images stay as they are.
      seed: of the augmentation.
      batch_size: of batches in order; a sampler says itself how many it draws.
      strict: an image that cannot be read raises UserError; else it is a row of zeros with the mask
        False, listed in `.broken` and logged once.
      workers: images read at a time; None for the number of cores.
      keys: id -> the key that the image's content had (`siamese_jax.data.records.content_keys`). An
        image with another content by now is one that cannot be read: what is known of it is wrong.
    """

    image_size: int | tuple[int, int]
    fit: str = "squash"
    augment: Augment | Mapping[str, Any] | None = None
    seed: int = 0
    batch_size: int = 32
    strict: bool = False
    workers: int | None = None
    keys: Mapping[int, bytes] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width. UserError where they, or `fit`, make no sense."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if self.fit not in FITS:
            raise UserError(f"unknown fit '{self.fit}'; use {', '.join(FITS)}")
        if min(height, width) < 1:
            raise UserError(f"image_size {size}: must be 1 or more")
        return height, width


class Batches(Iterator[Batch]):
    """An iterator over batches that remembers which images could not be read.

    Attributes:
      broken: path -> what is wrong, of all images met so far (read-ahead included).
      steps: how many batches there are in all, None for no end.
      close: ends the reading ahead; also done when the iterator is dropped or Python ends.
    """

    def __init__(
        self,
        records: Records,
        dataset: Any,
        *,
        steps: int | None,
        broken: dict[str, str],
        strict: bool,
        needs_one: bool,
    ):
        self.steps, self.broken = steps, broken
        self._records, self._strict, self._needs_one = records, strict, needs_one
        self._batches = [dataset.as_numpy_iterator()]
        # Reading ahead must end before the interpreter does: a thread that then asks for Python's
        # global lock never gets it, and the process would wait for that thread for ever.
        self.close = weakref.finalize(self, self._batches.clear)
        self._told: set[str] = set()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if not self._batches:  # closed
            raise StopIteration
        row, image, good = next(self._batches[0])
        here = row >= 0
        bad = [str(p) for p in self._records.path[row[here & ~good]]]
        for path in bad:
            if self._strict:
                raise UserError(f"{self.broken[path]}; mend or remove it, or set data.strict=False")
            if path not in self._told:
                self._told.add(path)
                log.warning("skipped %s", self.broken[path])
        if self._needs_one and not good.any():
            raise UserError(
                f"not one image of a batch of {len(row)} can be read: {self.broken[bad[0]]}"
            )
        label, ids = self._records.label[row], self._records.id[row]
        label[~here], ids[~here] = (False if label.ndim == 2 else -1), -1
        return {"image": image, "label": label, "id": ids, "mask": good}


def train_batches(
    records: Records,
    sample: Callable[[int], np.ndarray],
    reading: Reading,
    *,
    start_step: int = 0,
    steps: int | None = None,
    here: np.ndarray | None = None,
) -> Batches:
    """Training batches, one a step, each a pure function of (seed, step).

    Args:
      records: what `sample` indexes, n rows.
      sample: step -> indices [b]; see `siamese_jax.data.samplers`.
      reading: how the images are read.
      start_step: the first step to give.
      steps: how many batches to give; None for no end.
      here: bool [b], the rows to read, where others read the rest: that is padding (mask False,
        label and id -1). None for all.

    Returns:
      An iterator of {"image": uint8 [b, h, w, 3], "label": int32 [b] or bool [b, c],
      "id": int32 [b], "mask": bool [b]}.

    Raises:
      UserError: at once, for a wrong option; later, under `strict`, or if no image of a batch can
        be read.
    """

    def plan(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(sample(step), np.int64)
        u = uniforms(reading.seed, step, 0, len(rows))
        return (rows if here is None else np.where(here, rows, -1)), u

    span = (start_step, None if steps is None else start_step + steps)
    size, alone = len(sample(start_step)), here is None or bool(here.all())
    return _batches(records, plan, reading, size, span, needs_one=alone)


def eval_batches(records: Records, reading: Reading, *, view: int = 0) -> Batches:
    """Every record once, in order; the last batch is padded with the mask False, label and id -1.

    Args:
      records: n of them.
      reading: how they are read. What augmentation does to an image depends on (seed, view, its id)
        alone, so that it can be cached.
      view: the number of the augmented view.
    """
    size = reading.batch_size
    values.check("batch_size", size, values.BATCH)

    def plan(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        rows[rows >= len(records)] = -1
        ids = np.where(rows < 0, 0, records.id[rows])
        return rows, np.concatenate([uniforms(reading.seed, view, int(i), 1) for i in ids])

    stop = -(-len(records) // size)
    return _batches(records, plan, reading, size, (0, stop), needs_one=False)


def _batches(
    records: Records,
    plan: Plan,
    reading: Reading,
    batch_size: int,
    span: tuple[int, int | None],
    *,
    needs_one: bool,
) -> Batches:
    """The planned steps of a span, read ahead of their use."""
    height, width = reading.size
    broken: dict[str, str] = {}
    planned, read = _work(records, plan, reading, broken)
    tf = tensorflow()
    workers = reading.workers or os.cpu_count() or 1

    def numbers(step: Any) -> Any:
        types = (tf.int64, tf.float64, tf.bool, tf.float32, tf.float32, tf.int32)
        shapes = ((), (16,), (), (3, 3), (), (5,))
        columns = tf.numpy_function(planned, [step], types, stateful=False)
        return tuple(
            tf.ensure_shape(c, (batch_size, *s)) for c, s in zip(columns, shapes, strict=True)
        )

    def load(row: Any, *draws: Any) -> Any:
        image, good = tf.numpy_function(read, [row, *draws], (tf.uint8, tf.bool), stateful=False)
        return row, tf.ensure_shape(image, (height, width, 3)), tf.ensure_shape(good, ())

    plain = tf.autograph.experimental.do_not_convert  # the functions are graphs as they stand
    data, (start, stop) = tf.data.Dataset, span
    steps = data.counter(start) if stop is None else data.range(start, stop)
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers + 1  # one for the plan of the next step
    options.deterministic = True
    dataset = (
        steps.map(plain(numbers))
        .unbatch()
        .map(plain(load), num_parallel_calls=workers)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )
    return Batches(
        records,
        dataset,
        steps=None if stop is None else stop - start,
        broken=broken,
        strict=reading.strict,
        needs_one=needs_one,
    )


def _work(
    records: Records, plan: Plan, reading: Reading, broken: dict[str, str]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What is drawn for a step, and an image read by it; what cannot be read goes into `broken`."""
    augment, size, keys = make_augment(reading.augment), reading.size, reading.keys

    def planned(step: np.ndarray) -> tuple[np.ndarray, ...]:
        rows, u = plan(int(step))
        matrix, k = colour(augment, u)
        return rows, u, u[:, 4] < 0.5, matrix, k, erase_box(augment, u, *size)

    def read(row: np.ndarray, u: np.ndarray, *change: Any) -> tuple[np.ndarray, np.bool_]:
        if row >= 0:
            box = None if records.box is None else records.box[row]
            path = str(records.path[row])

            def check(data: bytes) -> None:
                if keys is not None and content_key(data, box) != keys[int(records.id[row])]:
                    raise UserError("its content has changed since it was first read; run again")

            try:
                region = crop_region(augment, u)
                how: Any = {"box": box, "region": region, "check": check if keys else None}
                image = read_image(path, size, fit=reading.fit, **how)
                return change_pixels(augment, image, *change), np.True_
            except UserError as e:
                broken[path] = str(e)
        return np.zeros((*size, 3), np.uint8), np.False_

    return planned, read
