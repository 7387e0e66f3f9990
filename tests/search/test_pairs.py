"""The parts of rank() that take distances from products, against their definition."""

import tracemalloc

import numpy as np
import pytest
from ranking_oracle import KINDS, case, distances

from siamese_jax.distances import DISTANCES
from siamese_jax.search.engine import all_distances, exact
from siamese_jax.search.engine.candidates import even, plan
from siamese_jax.search.engine.rows import Rows
from siamese_jax.search.ranking import rank


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_program_gives_the_definition_to_the_last_bit(distance, monkeypatch):
    monkeypatch.setattr(exact, "_FEW", 1)
    rng = np.random.default_rng(DISTANCES.index(distance))
    for n in range(20 * len(KINDS)):
        kind = KINDS[n % len(KINDS)]
        q, g, d = int(rng.integers(1, 9)), int(rng.choice([20, 300])), int(rng.choice([1, 33, 130]))
        x, y = case(rng, kind, q, g, d)
        if n % 2:
            # The smallest numbers there are, which a program takes for zero, and zero itself.
            x[0] *= np.float32(1e-38)
            y[: g // 2] *= np.float32(1e-30)
            y[0], y[1], y[2] = 0, 1e-42, -1e-42
        # Runs of all lengths, some too short for a product, and in any order.
        runs = rng.integers(0, g, size=q)
        i = np.repeat(np.arange(q), runs)
        j = rng.integers(0, g, size=len(i))
        if n % 3 == 0:
            order = rng.permutation(len(i))
            i, j = i[order], j[order]

        rows = Rows([y], "gallery")
        found = exact.pair_distances(x, rows, i, j, distance)
        one_by_one = [exact._defined(x, rows, i[p : p + 1], j[p : p + 1], distance)[0] for p in
                      range(0, len(i), 7)]  # fmt: skip
        np.testing.assert_array_equal(found[::7], np.array(one_by_one, np.float32), f"{n} {kind}")
        np.testing.assert_array_equal(found, exact._defined(x, rows, i, j, distance))
        np.testing.assert_allclose(found, distances(x, y, distance)[i, j], rtol=1.2e-7)


def test_the_program_is_what_is_used(rng, monkeypatch):
    """Where nearly all candidates are certain, only they and a few others are computed."""
    x, y = case(rng, "normal", 40, 900, 64)
    left = []
    kept = exact._defined

    def watched(queries, rows, i, j, distance):
        left.append(len(i))
        return kept(queries, rows, i, j, distance)

    monkeypatch.setattr(exact, "_defined", watched)
    i, j = (v.ravel() for v in np.indices((40, 900)))
    exact.pair_distances(x + 1, Rows([y], "gallery"), i, j, "euclidean")
    assert sum(left) < 40


def test_memory_for_pairs_does_not_grow_with_queries():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 256)).astype(np.float32)
    y = rng.normal(size=(50, 256)).astype(np.float32)
    i, j = (v.ravel() for v in np.indices((20000, 25)))
    exact.pair_distances(x[:10], Rows([y], "gallery"), i[:250], j[:250], "euclidean")
    tracemalloc.start()
    exact.pair_distances(x, Rows([y], "gallery"), i, j, "euclidean")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All queries in float64 are 41 MB, and all pairs' rows 512; the answer has 2, and the rows that
    # are looked at together have 17.
    assert peak < 36e6, peak


@pytest.mark.parametrize("k", [1, 7, 100, 2999, 3000])
def test_limits_leave_at_least_k(rng, k):
    values = rng.normal(size=(9, 3000)).astype(np.float32)
    values[0] = 1
    # The best are exactly where the sample does not look.
    values[1] = np.where(np.arange(3000) % all_distances._SAMPLE == 0, 5, -5)
    # And here only there.
    values[2] = np.where(np.arange(3000) % all_distances._SAMPLE == 0, -5, 5)
    values[3, 5:] = np.inf
    limits = all_distances._limits(values.copy(), k)
    assert (np.count_nonzero(values <= limits[:, None], axis=1) >= k).all()


def test_a_share_of_the_gallery_is_the_float64_sort(rng):
    """Where k is 1 to 5 % of the gallery: several blocks, uneven ones, and many candidates."""
    for distance in DISTANCES:
        x, y = case(rng, "copies", 70, 5003, 40)
        away = distances(x, y, distance)
        order = np.argsort(away, axis=1, kind="stable")
        for k in (50, 260):
            found = rank(x, y, k, distance=distance)
            np.testing.assert_array_equal(found.indices, order[:, :k], f"{distance} {k}")
            expected = np.take_along_axis(away, order[:, :k], axis=1)
            np.testing.assert_allclose(found.distances, expected, rtol=1.2e-7)


def test_sizes_fit_one_another():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        q, g, d, k = (int(2 ** rng.uniform(0, top)) for top in (14, 21, 12, 11))
        sizes = plan(q, g, d, k, "float32", int(2 ** rng.uniform(20, 30)))
        assert sizes.block % sizes.group == 0
        assert min(sizes.chunk, sizes.hold, sizes.pairs) >= 1
        most = int(rng.choice([64, 1024, 4096]))
        part = even(g, most, 512)
        assert part <= most
        # No more parts than of the largest size.
        assert -(-g // part) == -(-g // most)
