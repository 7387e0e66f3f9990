"""The definition of rank(), in float64 and without blocks; and hard cases to compare it on."""

import numpy as np


def distances(x, y, distance):
    """float32 [q, g], rounded once from float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if distance == "dot":
        return np.stack([-(y * a).sum(1) for a in x]).astype(np.float32)
    if distance == "cosine":
        a, b = np.sqrt((x * x).sum(1)), np.sqrt((y * y).sum(1))
        x, y = x / np.where(a > 0, a, 1)[:, None], y / np.where(b > 0, b, 1)[:, None]
    found = np.stack([((y - v) ** 2).sum(1) for v in x])
    if distance == "cosine":
        found[found < 1e-24] = 0
        found[a == 0], found[:, b == 0] = 2, 2
        found /= 2
    return (np.sqrt(found) if distance == "euclidean" else found).astype(np.float32)


def ranking(x, y, k, distance, own=None, ids=None, keep=None):
    """(indices [q, k], distances [q, k]) by a stable sort of all distances."""
    away = distances(x, y, distance)
    if own is not None:
        away[own[:, None] == ids[None, :]] = np.inf
    if keep is not None:
        away[:, ~keep] = np.inf
    order = np.argsort(away, axis=1, kind="stable")
    away = np.take_along_axis(away, order, axis=1)
    order[np.isinf(away)] = -1
    more = ((0, 0), (0, max(0, k - len(y))))
    order = np.pad(order, more, constant_values=-1)[:, :k]
    return order, np.pad(away, more, constant_values=np.inf)[:, :k]


KINDS = ("normal", "lattice", "near", "scales", "equal", "copies", "parallel")


def case(rng, kind, q, g, d):
    """float32 queries [q, d] and gallery [g, d]; most queries are copies of gallery rows."""
    y = rng.normal(size=(g, d))
    if kind == "lattice":
        y = rng.integers(-1, 2, size=(g, d))
    elif kind == "near":
        centre = rng.normal(size=(1, d))
        y = 1e3 * centre / np.linalg.norm(centre) + 1e-3 * y
    elif kind == "scales":
        y = y * 10.0 ** rng.integers(-6, 7, size=(g, 1))
    elif kind == "equal":
        y = np.full((g, d), 3.0)
    elif kind == "copies":
        y = y[rng.integers(0, max(1, g // 4), size=g)] + 5
    elif kind == "parallel":
        y = y[rng.integers(0, max(1, g // 4), size=g)] * 2.0 ** rng.integers(-3, 4, size=(g, 1))
    y = y.astype(np.float32)
    x = y[rng.integers(0, g, size=q)].copy()
    scale = 1e-3 if kind == "near" else 1.0
    x[::2] += (scale * rng.normal(size=x[::2].shape)).astype(np.float32)
    if rng.random() < 0.2:
        x[rng.integers(q)], y[rng.integers(g)], y[rng.integers(g)] = 0, 0, 0
    return x, y
