"""Threads and memory that searches share: nothing waits for itself, and nothing is used twice."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ranking_oracle import case, ranking

from siamese_jax.search.engine import exact, parallel, reused_memory
from siamese_jax.search.engine.parallel import in_threads
from siamese_jax.search.ranking import rank


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """As on a machine with three cores, whatever this one has."""
    monkeypatch.setattr(parallel, "THREADS", 3)
    parallel._pool.cache_clear()
    yield
    parallel._pool.cache_clear()


def test_all_pieces_are_done_once_and_side_by_side():
    pieces, done, together = iter(range(300)), [], threading.Barrier(3, timeout=20)

    def work():
        together.wait()
        done.extend(pieces)

    in_threads(work)
    assert sorted(done) == list(range(300))


def test_work_may_itself_ask_for_threads_while_others_wait_for_it():
    pieces, lock, done = iter(range(60)), threading.Lock(), []

    def work():
        for n in pieces:
            with lock:
                inner = iter(range(n))
                in_threads(lambda inner=inner: done.extend(inner))

    runner = threading.Thread(target=in_threads, args=(work,), daemon=True)
    runner.start()
    runner.join(timeout=30)
    assert not runner.is_alive()
    assert len(done) == 59 * 60 // 2


def test_an_error_is_raised_and_the_next_work_runs():
    pieces = iter(range(9))

    def work():
        for n in pieces:
            if n == 4:
                raise ValueError("four")

    with pytest.raises(ValueError, match="four"):
        in_threads(work)
    done = []
    in_threads(lambda: done.append(1))
    assert len(done) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_has_threads_of_its_own():
    in_threads(lambda: None)
    child = os.fork()
    if child == 0:
        done = []
        in_threads(lambda: done.append(1))
        os._exit(0 if len(done) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_searches_at_the_same_time_do_not_disturb_each_other(rng, monkeypatch):
    monkeypatch.setattr(exact, "_FEW", 1 << 12)
    cases = [case(rng, "normal", 90, 3000, 33) for _ in range(6)]

    def search(n):
        return rank(*cases[n], 20)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(search, list(range(6)) * 3))
    for n, one in enumerate(found):
        indices, away = ranking(*cases[n % 6], 20, "euclidean")
        np.testing.assert_array_equal(one.indices, indices)
        np.testing.assert_allclose(one.distances, away, rtol=1.2e-7)


def test_what_is_given_back_is_lent_again_and_never_twice_at_once():
    with reused_memory.borrowed((5, 7), np.float32) as first:
        assert first.ctypes.data % 64 == 0
        with reused_memory.borrowed((7, 5), np.int32) as second:
            assert not np.shares_memory(first, second)
        with reused_memory.borrowed((35,), np.float32) as third:
            assert np.shares_memory(second, third)


def test_little_memory_is_kept(monkeypatch):
    monkeypatch.setattr(reused_memory, "_free", {})
    monkeypatch.setattr(reused_memory, "_kept", 0)
    monkeypatch.setattr(reused_memory, "_KEPT", 1000)

    def kept():
        return sum(v.nbytes for arrays in reused_memory._free.values() for v in arrays)

    for size in (400, 300, 500, 2000, 100):
        reused_memory.give((size,), np.empty(size, np.uint8))
        assert kept() == reused_memory._kept <= 1000
    # The oldest went to make room, and what is too large was not kept at all.
    assert list(reused_memory._free) == [(300,), (500,), (100,)]
    assert reused_memory.take((500,), lambda: None).nbytes == 500
    assert reused_memory.take((500,), lambda: "new") == "new"
    assert kept() == reused_memory._kept == 400
    reused_memory.clear()
    assert kept() == reused_memory._kept == 0


def test_few_more_than_the_answers_are_measured(rng, monkeypatch):
    x, y = (rng.normal(size=(n, 512)).astype(np.float32) for n in (256, 20000))
    measured = []
    kept = exact.pair_distances

    def watched(queries, rows, i, *others):
        measured.append(len(i))
        return kept(queries, rows, i, *others)

    monkeypatch.setattr(exact, "pair_distances", watched)
    rank(x, y, 100, precision="bfloat16")
    assert 256 * 100 <= sum(measured) < 256 * 130
