"""Which images make a batch: pure functions of (seed, step), in NumPy alone.

A sampler has no state: `sample(step)` is the same whatever was asked before, so a run resumed at
step N sees the batches that an uninterrupted one saw. What depends on the data set's size is done
once, when the sampler is made; a step costs what its batch costs, and for class weights one pass
over the classes.

Rules that all share. An anchor needs a positive that is another image, so a class with one image
is a negative only (in `triplets` and `pairs`), or left out (in `classes` and `hierarchical`, where
`min_images=1` lets two augmented views of one image be each other's positives). Where `domain` is
given, an anchor's positive comes from another domain, and classes within one domain count as
classes without a positive.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from siamese_jax.data.labels import MISSING
from siamese_jax.errors import UserError

Sampler = Callable[[int], np.ndarray]
Weights = str | Sequence[float] | np.ndarray


class Groups(NamedTuple):
    """Items sorted into groups: group g is `items[start[g] : start[g] + sizes[g]]`."""

    items: np.ndarray
    start: np.ndarray
    sizes: np.ndarray


def group(key: np.ndarray) -> tuple[np.ndarray, Groups]:
    """The distinct keys in ascending order, and the rows that have each of them."""
    keys, count = np.unique(key, return_counts=True)
    return keys, Groups(np.argsort(key, kind="stable"), np.cumsum(count) - count, count)


def draw(rng: Generator, groups: Groups, which: np.ndarray, k: int) -> np.ndarray:
    """Draws k items from each of the groups `which` [g]: [g, k].

    Without replacement where a group has k items; a smaller group of n gives each of its items
    floor(k / n) or ceil(k / n) times, in cycles of one random order.
    """
    n = groups.sizes[which][:, None]
    # Floyd's algorithm, all groups at a time: k distinct numbers below n in k rounds.
    picked = np.full((len(which), k), -1, np.int64)
    for r in range(k):
        last = np.maximum(n[:, 0] - k + r, 0)
        t = rng.integers(0, last + 1)
        picked[:, r] = np.where((picked == t[:, None]).any(axis=1), last, t)
    picked = rng.permuted(picked, axis=1)  # a later slot of Floyd's favours high numbers
    column = np.arange(k)
    order = np.argsort(np.where(column < n, rng.random(picked.shape), 2.0), axis=1)
    cycled = np.take_along_axis(order, column % np.minimum(n, k), axis=1)
    return groups.items[groups.start[which][:, None] + np.where(n < k, cycled, picked)]


def classes(
    labels: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    per_class: int = 4,
    class_weight: Weights = "equal",
    min_images: int = 2,
    domain: np.ndarray | None = None,
) -> Sampler:
    """P classes x K images: `batch_size / per_class` different classes, their images adjacent.

    A class with fewer than K images gives each of them as equally often as K allows. With `domain`
    the K images of a class take turns among its domains, beginning with a random one. An image
    with several labels stands in each of its classes, and may be drawn for more than one of them.

    Args:
      labels: int [n], or bool [n, c] where an image may have several.
      batch_size: a multiple of `per_class`.
      seed: of all draws.
      per_class: K.
      class_weight: how likely each class is: "equal", "images" (as many as it has), or a
        non-negative number for each label.
      min_images: classes with fewer images are left out.
      domain: int [n], for example who drew or photographed each image.

    Returns:
      step -> int32 [batch_size], indices into `labels`.

    Raises:
      UserError: a batch size that does not divide, or too few classes.

    >>> sample = classes(np.array([0, 0, 1, 1, 1, 2]), 4, seed=0, per_class=2)
    >>> [int(i < 2) for i in sample(0)] in ([1, 1, 0, 0], [0, 0, 1, 1])
    True
    """
    number = _parts(batch_size, per_class, "per_class")
    rows = np.arange(len(labels))
    if labels.ndim == 2:
        rows, labels = np.nonzero(labels)
        domain = None if domain is None else domain[rows]
    cells = _Cells(labels, domain, min_images)
    if not cells.n:
        raise UserError(
            f"no class of the training split has {cells.needs}, so there is no positive to train on"
        )
    if cells.n < number:
        raise UserError(
            f"a batch of {batch_size} with {per_class} images a class needs {number} classes "
            f"with {cells.needs}; the training split has {cells.n}: lower sampler.batch_size"
        )
    weight = cells.weights(class_weight)
    if np.count_nonzero(weight) < number:
        raise UserError(f"class_weight leaves fewer than the {number} classes that a batch needs")

    def sample(step: int) -> np.ndarray:
        rng = default_rng((seed, step))
        drawn = cells.draw(rng, _distinct(rng, weight, number), per_class)
        return rows[drawn].astype(np.int32)

    return sample


def hierarchical(
    labels: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    super_labels: np.ndarray,
    per_class: int = 4,
    per_super: int = 4,
    min_images: int = 2,
    domain: np.ndarray | None = None,
) -> Sampler:
    """Classes x images within few super-classes, so that a batch's negatives are alike.

    `batch_size / (per_class * per_super)` different super-classes, `per_super` different classes
    in each, `per_class` images in each of those. A super-class with fewer than `per_super` usable
    classes is left out.

    Args:
      labels, batch_size, seed, per_class, min_images, domain: as for `classes`.
      super_labels: int [n], the super-class of each image; a class lies in one.
      per_super: classes drawn from a super-class.

    Raises:
      UserError: as for `classes`; an image without a super-class, a class in two of them.
    """
    if (super_labels < 0).any():
        raise UserError(
            f"hierarchical sampler: {int((super_labels < 0).sum())} images have no super-class"
        )
    number = _parts(batch_size, per_class * per_super, "per_class x per_super")
    cells = _Cells(labels, domain, min_images)
    _, by_class = group(labels)
    super_of = super_labels[by_class.items[by_class.start]]
    if not (np.repeat(super_of, by_class.sizes) == super_labels[by_class.items]).all():
        raise UserError("hierarchical sampler: a class lies in two super-classes")
    _, supers = group(super_of[cells.rank])
    usable = supers.sizes >= per_super
    if usable.sum() < number:
        raise UserError(
            f"a batch of {batch_size} needs {number} super-classes with {per_super} classes each; "
            f"the training split has {usable.sum()}: lower sampler.batch_size or per_super"
        )

    def sample(step: int) -> np.ndarray:
        rng = default_rng((seed, step))
        chosen = _distinct(rng, usable.astype(np.float64), number)
        within = draw(rng, supers, chosen, per_super).ravel()
        return cells.draw(rng, within, per_class).astype(np.int32)

    return sample


def triplets(
    labels: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    class_weight: Weights = "images",
    domain: np.ndarray | None = None,
) -> Sampler:
    """Explicit triplets, interleaved: a0, p0, n0, a1, p1, n1, ...

    The positive is another image of the anchor's class. The negative is any image of another class,
    classes with one image included; with `domain`, one of the positive's domain, as a search would
    meet it, where that domain holds another class.

    Args:
      labels: int [n].
      batch_size: a multiple of 3, three images an entry.
      seed: of all draws.
      class_weight: how likely an anchor's class is; see `classes`. "images" draws each usable
        image equally often.
      domain: int [n].

    Returns:
      step -> int32 [batch_size].

    Raises:
      UserError: a batch size that does not divide, or no usable class.
    """
    number = _parts(batch_size, 3, "3 images an entry")
    pick = _Tuples(labels, class_weight, domain)

    def sample(step: int) -> np.ndarray:
        rng = default_rng((seed, step))
        anchor, positive = pick.positives(rng, number)
        return np.stack([anchor, positive, pick.negatives(rng, anchor, positive)], 1).ravel()

    return sample


def pairs(
    labels: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    class_weight: Weights = "images",
    domain: np.ndarray | None = None,
) -> Sampler:
    """Pairs, interleaved x0, y0, x1, y1, ...: pair 0, 2, 4, ... is of one class, the others of two.

    Args and rules as for `triplets`; `batch_size` is a multiple of 2.
    """
    number = _parts(batch_size, 2, "2 images a pair")
    pick = _Tuples(labels, class_weight, domain)

    def sample(step: int) -> np.ndarray:
        rng = default_rng((seed, step))
        x, y = pick.positives(rng, number)
        y[1::2] = pick.negatives(rng, x, y)[1::2]
        return np.stack([x, y], 1).ravel()

    return sample


def shuffled(labels: np.ndarray, batch_size: int, *, seed: int) -> Sampler:
    """Every image once an epoch, in an order of its own for each epoch; labels do not matter.

    A batch may hold the end of one epoch and the beginning of the next.

    >>> sample = shuffled(np.zeros(6, int), 3, seed=0)
    >>> sorted(int(i) for step in (0, 1) for i in sample(step))
    [0, 1, 2, 3, 4, 5]
    """
    n = len(labels)
    if n == 0 or batch_size < 1:
        raise UserError("the shuffled sampler needs an image and a batch size of 1 or more")
    kept: dict[int, np.ndarray] = {}  # the order of the newest epochs: only a saving of time

    def order(epoch: int) -> np.ndarray:
        if epoch not in kept:
            while len(kept) >= 2:
                kept.pop(min(kept))
            kept[epoch] = default_rng((seed, epoch)).permutation(n).astype(np.int32)
        return kept[epoch]

    def sample(step: int) -> np.ndarray:
        epoch, place = np.divmod(step * batch_size + np.arange(batch_size), n)
        orders = [order(int(e))[place[epoch == e]] for e in np.unique(epoch)]
        return np.concatenate(orders)

    return sample


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "classes": classes,
    "hierarchical": hierarchical,
    "pairs": pairs,
    "shuffled": shuffled,
    "triplets": triplets,
}


class _Cells:
    """Usable classes, each as its images by domain (one domain where none is given).

    Images without a label are no class.

    Class c is number `rank[c]` among all labels; its cells are `first[c] : first[c] + domains[c]`.
    """

    def __init__(self, labels: np.ndarray, domain: np.ndarray | None, min_images: int):
        if labels.ndim != 1:
            raise UserError("this sampler needs one label an image; use 'classes' or 'shuffled'")
        domain = np.zeros(len(labels), np.int64) if domain is None else domain
        values, dense = np.unique(labels, return_inverse=True)
        _, dense_domain = np.unique(domain, return_inverse=True)
        span = int(dense_domain.max(initial=0)) + 1
        key, self.groups = group(dense * np.int64(span) + dense_domain)
        first = np.searchsorted(key // span, np.arange(len(values)))
        domains = np.bincount(key // span, minlength=len(values))
        images = np.bincount(dense, minlength=len(values))
        usable = (images >= min_images) & (values != MISSING)
        self.needs = f"at least {min_images} images"
        if span > 1:
            usable &= domains > 1
            self.needs += " from two domains"
        self.rank = np.flatnonzero(usable)
        self.n = len(self.rank)
        self.first, self.domains, self.images = (x[usable] for x in (first, domains, images))
        self.labels = values[usable]

    def weights(self, weight: Weights) -> np.ndarray:
        """float64 [usable classes], not negative, not all zero."""
        if isinstance(weight, str):
            table = {"equal": np.ones(self.n), "images": self.images.astype(np.float64)}
            if weight not in table:
                raise UserError(f"class_weight '{weight}': use equal, images, or a list of numbers")
            return table[weight]
        values = np.asarray(weight, np.float64)
        if values.ndim != 1 or len(values) <= self.labels.max(initial=-1):
            raise UserError(
                f"class_weight has {values.size} numbers; the largest label is {self.labels.max()}"
            )
        values = values[self.labels]
        if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            raise UserError("class_weight must be finite, not negative, and not all zero")
        return values

    def draw(self, rng: Generator, which: np.ndarray, k: int) -> np.ndarray:
        """k images of each of the classes `which` [p], the domains taking turns: [p * k]."""
        domains = self.domains[which]
        turns = min(int(self.domains.max()), k)
        turn = (rng.integers(0, domains)[:, None] + np.arange(turns)) % domains[:, None]
        cells = (self.first[which][:, None] + turn).ravel()
        per_turn = k if turns == 1 else (k + 1) // 2  # a usable class has two domains or more
        drawn = draw(rng, self.groups, cells, per_turn).reshape(len(which), turns, per_turn)
        slot = np.arange(k)
        column = slot % domains[:, None]
        return drawn[np.arange(len(which))[:, None], column, slot // domains[:, None]].ravel()


class _Tuples:
    """Anchors with a positive and a negative."""

    def __init__(self, labels: np.ndarray, weight: Weights, domain: np.ndarray | None):
        self.cells = _Cells(labels, domain, min_images=2)
        _, self.label = np.unique(labels, return_inverse=True)
        if self.cells.n == 0 or self.label.max() < 1:
            raise UserError(
                f"no anchor has a positive and a negative: this needs two classes, one of them "
                f"with {self.cells.needs}"
            )
        cumulative = np.cumsum(self.cells.weights(weight))
        self.cumulative = cumulative / cumulative[-1]
        everywhere = np.zeros(len(labels), np.int64)
        self.anywhere = _Others(self.label, everywhere)
        self.near = self.anywhere if domain is None else _Others(self.label, domain)

    def positives(self, rng: Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
        which = np.searchsorted(self.cumulative, rng.random(number), side="right")
        drawn = self.cells.draw(rng, which, 2).reshape(number, 2).astype(np.int32)
        return drawn[:, 0], drawn[:, 1]

    def negatives(self, rng: Generator, anchor: np.ndarray, positive: np.ndarray) -> np.ndarray:
        """An image of another class than the anchor, of the positive's domain where it can be."""
        near, found = self.near.pick(rng, positive, self.label[anchor])
        if found.all():
            return near
        anywhere, _ = self.anywhere.pick(rng, positive, self.label[anchor])
        return np.where(found, near, anywhere)


class _Others:
    """Draws images of a domain that are not of a class.

    Images are sorted by domain, then class; those of one class are one run within their domain, so
    a number drawn from all others is moved past that run.
    """

    def __init__(self, label: np.ndarray, domain: np.ndarray):
        _, self.domain = np.unique(domain, return_inverse=True)
        self.label, self.classes = label, np.int64(label.max() + 1)
        key = self.domain * self.classes + label
        self.order = np.argsort(key, kind="stable").astype(np.int32)
        self.key = key[self.order]

    def pick(self, rng: Generator, like: np.ndarray, label: np.ndarray) -> tuple:
        """Images of the domains of `like` [b], not of the classes `label` [b], and which exist."""
        first = self.domain[like] * self.classes
        low, high, start, end = (
            np.searchsorted(self.key, key)
            for key in (first, first + self.classes, first + label, first + label + 1)
        )
        others = (high - low) - (end - start)
        r = low + rng.integers(0, np.maximum(others, 1))
        r = np.where(r < start, r, r + end - start)
        return self.order[np.minimum(r, len(self.order) - 1)], others > 0


def _distinct(rng: Generator, weight: np.ndarray, number: int) -> np.ndarray:
    """`number` different classes, drawn one after another in proportion to their weights.

    The smallest of n exponential variables with rates w is i with probability w_i / sum(w), and
    the order of all is that of drawing without replacement (Efraimidis and Spirakis, 2006).
    """
    if (weight == weight[0]).all():
        return rng.choice(len(weight), number, replace=False)
    with np.errstate(divide="ignore"):
        time = rng.exponential(size=len(weight)) / weight
    first = np.argpartition(time, number - 1)[:number]
    return first[np.argsort(time[first])]


def _parts(batch_size: int, size: int, what: str) -> int:
    if size < 1 or batch_size < size or batch_size % size:
        raise UserError(
            f"sampler.batch_size {batch_size} must be a positive multiple of {size} ({what})"
        )
    return batch_size // size
