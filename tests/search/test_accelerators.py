"""A gallery split over 1, 2 and 8 devices gives the answers of one without a split."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ranking_oracle import case, ranking

from siamese_jax.errors import UserError
from siamese_jax.search.engine import device_program
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import rank

_EIGHT = """
import numpy as np, jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
from ranking_oracle import KINDS, case, ranking
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import rank
rng = np.random.default_rng(1)
assert len(jax.devices()) == 8
for n, (kind, distance) in enumerate(
    [("copies", "euclidean"), ("normal", "dot"), ("near", "sqeuclidean"), ("parallel", "cosine")]
):
    # 3,000 rows divide by neither the devices nor the blocks.
    x, y = case(rng, kind, 13, 3000, 24)
    own, ids = rng.integers(0, 40, size=13), rng.integers(0, 40, size=3000)
    keep = rng.random(3000) < 0.7
    expected = ranking(x, y, 50, distance, own, ids, keep)
    for devices in (1, 2, 8) if n < 2 else (8,):
        found = rank(
            x, y, 50, distance=distance, query_ids=own, gallery_ids=ids, keep=keep,
            devices=jax.devices()[:devices], memory_limit=2**20 if n == 1 else 2**28,
        )
        np.testing.assert_array_equal(found.indices, expected[0])
        np.testing.assert_allclose(found.distances, expected[1], rtol=1.2e-7)
print("equal")
"""


def test_one_two_and_eight_devices_agree():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_kept_gallery_is_placed_once(rng):
    x, y = case(rng, "normal", 5, 900, 16)
    gallery = Gallery(y)
    for _ in range(2):
        found = rank(x, gallery, 7, devices=jax.devices()[:1])
        np.testing.assert_array_equal(found.indices, ranking(x, y, 7, "euclidean")[0])
    assert len(gallery._slabs) == 1
    gallery.remove([int(found.indices[0, 0])])
    less = rank(x, gallery, 7, devices=jax.devices()[:1])
    np.testing.assert_array_equal(less.indices[0, :6], found.indices[0, 1:])


def test_uncertain_queries_are_searched_again(rng):
    # More near duplicates than the devices keep candidates: no certificate, same answer.
    x, y = case(rng, "near", 6, 2000, 16)
    calls = []
    kept = device_program.certain

    def watched(*arguments):
        sure = kept(*arguments)
        calls.append(sure.all())
        return sure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_program, "certain", watched)
        y[:100] += 50
        found = rank(x, y, 5, devices=jax.devices()[:1])
    assert not all(calls)
    np.testing.assert_array_equal(found.indices, ranking(x, y, 5, "euclidean")[0])


def test_bad_rows_are_refused_by_number_here_too(rng):
    x, y = case(rng, "normal", 5, 900, 16)
    y[777] = np.nan
    with pytest.raises(UserError, match="gallery row 777 is not finite"):
        rank(x, y, 7, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="queries row 777 is not finite"):
        rank(y, x, 1, devices=jax.devices()[:1])


def test_zero_rows_are_at_distance_1_here_too(rng):
    x, y = (rng.normal(size=(n, 12)).astype(np.float32) + 2 for n in (9, 600))
    x[3], y[::50] = 0, 0
    found = rank(x, y, 600, distance="cosine", devices=jax.devices()[:1])
    expected = ranking(x, y, 600, "cosine")
    np.testing.assert_array_equal(found.indices, expected[0])
    np.testing.assert_allclose(found.distances, expected[1], rtol=1.2e-7)
    found = rank(x, y, 5, distance="cosine", devices=jax.devices()[:1])
    np.testing.assert_array_equal(found.indices, expected[0][:, :5])
