"""Samplers: pure in (seed, step), and every rule they state."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_jax.data.samplers import SAMPLERS, classes, hierarchical, pairs, shuffled, triplets
from siamese_jax.errors import UserError

LABELS = np.array([5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 9, 9, 4, 4, 4, 4, 7])  # 7 has one image
label_lists = st.lists(st.integers(0, 6), min_size=6, max_size=60).map(np.array)
OPTIONS = {"hierarchical": {"super_labels": LABELS % 2, "per_super": 2, "per_class": 3}}


def usable(labels):
    return [c for c, n in Counter(labels.tolist()).items() if n > 1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_is_a_pure_function(name):
    def make(seed):
        return SAMPLERS[name](LABELS, 12, seed=seed, **OPTIONS.get(name, {}))

    one, two = make(0), make(0)
    forwards = [one(step) for step in range(40)]
    backwards = [two(step) for step in reversed(range(40))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert all(f.dtype == np.int32 and f.shape == (12,) for f in forwards)
    assert len({tuple(f) for f in forwards}) > 20
    assert any((make(1)(step) != forwards[step]).any() for step in range(5))


@given(label_lists, st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_classes_are_distinct_and_their_images_spread_evenly(labels, seed, k, step):
    p = len(usable(labels))
    if p == 0:
        with pytest.raises(UserError, match="at least 2 images"):
            classes(labels, k, seed=seed, per_class=k)
        return
    rows = classes(labels, p * k, seed=seed, per_class=k)(step).reshape(p, k)
    assert sorted(labels[rows[:, 0]]) == sorted(usable(labels))
    for row in rows:
        assert len(set(labels[row].tolist())) == 1
        n = int((labels == labels[row[0]]).sum())
        times = Counter(row.tolist())
        assert len(times) == min(n, k)
        assert max(times.values()) - min(times.values()) <= 1
        assert max(times.values()) == -(-k // n)


def test_every_class_and_image_is_drawn_equally_often():
    sample = classes(LABELS, 4, seed=3, per_class=2)
    drawn = Counter(int(i) for step in range(6000) for i in sample(step))
    for c in usable(LABELS):
        mine = np.array([drawn[i] for i in np.flatnonzero(c == LABELS)])
        assert abs(mine.sum() - 6000) < 250  # 24,000 draws over 4 classes; 4 sigma is about 220
        expected = mine.sum() / len(mine)
        assert (abs(mine - expected) < 5 * np.sqrt(expected)).all()


def test_the_order_within_a_class_is_random():
    sample = classes(np.zeros(3, int), 3, seed=0, per_class=3)
    orders = Counter(tuple(sample(step).tolist()) for step in range(1200))
    assert len(orders) == 6
    assert min(orders.values()) > 130


def test_class_weights():
    by_images = classes(LABELS, 2, seed=0, per_class=2, class_weight="images")
    drawn = Counter(int(LABELS[by_images(step)[0]]) for step in range(4000))
    for c, n in ((5, 7), (2, 3), (9, 2), (4, 4)):
        assert abs(drawn[c] / 4000 - n / 16) < 0.03
    weights = np.zeros(10)
    weights[[2, 9]] = 3.0, 1.0
    given_weights = classes(LABELS, 2, seed=0, per_class=2, class_weight=weights)
    drawn = Counter(int(LABELS[given_weights(step)[0]]) for step in range(4000))
    assert set(drawn) == {2, 9}
    assert abs(drawn[2] / 4000 - 0.75) < 0.03
    both = classes(LABELS, 4, seed=0, per_class=2, class_weight=weights)
    assert all(set(LABELS[both(step)]) == {2, 9} for step in range(20))


def test_classes_with_one_image_can_be_asked_for():
    sample = classes(LABELS, 10, seed=0, per_class=2, min_images=1)
    assert all(set(LABELS[sample(step)]) == {5, 2, 9, 4, 7} for step in range(5))


def test_domains_take_turns(rng):
    labels = np.repeat(np.arange(12), 5)
    domain = np.tile([0, 0, 0, 1, 2], 12)
    domain[labels == 11] = 1  # within one domain: never drawn
    sample = classes(labels, 22, seed=0, per_class=2, domain=domain)
    first = Counter()
    for step in range(300):
        rows = sample(step).reshape(11, 2)
        assert (labels[rows[:, 0]] == labels[rows[:, 1]]).all()
        assert (domain[rows[:, 0]] != domain[rows[:, 1]]).all()
        assert 11 not in labels[rows]
        first.update(domain[rows[:, 0]].tolist())
    assert set(first) == {0, 1, 2}
    four = classes(labels, 20, seed=0, per_class=4, domain=domain)(0).reshape(5, 4)
    assert all(sorted(Counter(domain[row]).values()) == [1, 1, 2] for row in four)


@pytest.mark.parametrize("with_domain", [False, True])
@pytest.mark.parametrize("make", [triplets, pairs])
def test_positives_and_negatives(make, with_domain, rng):
    domain = np.arange(len(LABELS)) % 2 if with_domain else None
    size = 3 if make is triplets else 2
    sample = make(LABELS, 8 * size, seed=0, domain=domain)
    seen = Counter()
    for step in range(300):
        rows = sample(step).reshape(8, size)
        if make is triplets:
            positive, negative = rows[:, :2], rows[:, [0, 2]]
            if with_domain:
                assert (domain[rows[:, 1]] == domain[rows[:, 2]]).all()
        else:
            positive, negative = rows[::2], rows[1::2]
        assert (LABELS[positive[:, 0]] == LABELS[positive[:, 1]]).all()
        assert (positive[:, 0] != positive[:, 1]).all()
        assert (LABELS[negative[:, 0]] != LABELS[negative[:, 1]]).all()
        if with_domain:
            assert (domain[positive[:, 0]] != domain[positive[:, 1]]).all()
        seen.update(negative[:, 1].tolist())
        assert 7 not in LABELS[rows[:, 0]]  # one image: never an anchor
    assert len(seen) == len(LABELS)  # every image, the lonely one too, is a negative at times


def test_each_usable_image_is_an_anchor_equally_often():
    sample = triplets(LABELS, 48, seed=0)
    anchors = Counter(int(i) for step in range(1000) for i in sample(step)[::3])
    assert set(anchors) == set(range(16))
    assert max(abs(n - 1000) for n in anchors.values()) < 160


def test_a_domain_of_one_class_takes_its_negatives_elsewhere():
    labels, domain = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 0])
    rows = np.concatenate([triplets(labels, 30, seed=0, domain=domain)(s) for s in range(9)])
    rows = rows.reshape(-1, 3)
    assert (labels[rows[:, 0]] == 0).all()
    assert (labels[rows[:, 2]] == 1).all()


def test_shuffled_gives_every_image_once_an_epoch():
    sample = shuffled(np.arange(10), 4, seed=0)
    steps = [sample(step) for step in range(5)]  # two epochs of ten in five batches of four
    order = np.concatenate(steps)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert (order[:10] != order[10:]).any()
    assert len(shuffled(np.arange(3), 8, seed=0)(1)) == 8  # a batch of more than an epoch


def test_hierarchical_stays_within_its_super_classes():
    labels = np.repeat(np.arange(30), 4)
    kind = labels // 6
    sample = hierarchical(labels, 2 * 3 * 2, seed=0, super_labels=kind, per_class=2, per_super=3)
    kinds = Counter()
    for step in range(200):
        rows = sample(step).reshape(2, 3, 2)
        assert (kind[rows] == kind[rows[:, :1, :1]]).all()
        assert len(set(kind[rows[:, 0, 0]].tolist())) == 2
        for group in rows:
            assert len(set(labels[group[:, 0]].tolist())) == 3
            assert (labels[group[:, 0]] == labels[group[:, 1]]).all()
            assert (group[:, 0] != group[:, 1]).all()
        kinds.update(kind[rows[:, 0, 0]].tolist())
    assert set(kinds) == set(range(5))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (triplets, {"batch_size": 10}, "multiple of 3"),
        (pairs, {"batch_size": 7}, "multiple of 2"),
        (classes, {"batch_size": 10, "per_class": 4}, "multiple of 4"),
        (classes, {"batch_size": 20, "per_class": 4}, "needs 5 classes"),
        (classes, {"batch_size": 8, "class_weight": "often"}, "equal, images"),
        (classes, {"batch_size": 8, "class_weight": [1.0, 2.0]}, "largest label is 9"),
        (classes, {"batch_size": 8, "class_weight": [0.0] * 10}, "not all zero"),
        (classes, {"batch_size": 8, "class_weight": [1.0] * 3 + [0.0] * 7}, "fewer than the 2"),
        (classes, {"batch_size": 8, "domain": (LABELS == 2).astype(int)}, "two domains"),
        (hierarchical, {"batch_size": 16, "super_labels": np.arange(17)}, "two super-classes"),
        (hierarchical, {"batch_size": 16, "super_labels": LABELS * 0, "per_super": 9}, "multiple"),
        (hierarchical, {"batch_size": 36, "super_labels": LABELS * 0, "per_super": 9}, "lower"),
    ],
)
def test_mistakes_are_one_line(make, options, message):
    with pytest.raises(UserError, match=message) as caught:
        make(LABELS, seed=0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.arange(5)])
def test_without_a_positive_or_a_negative_there_is_no_triplet(labels):
    with pytest.raises(UserError, match="no anchor"):
        triplets(labels, 3, seed=0)


def test_an_image_with_several_labels_stands_in_each_of_its_classes():
    rng = np.random.default_rng(4)
    hot = rng.random((40, 6)) < 0.3
    domain = rng.integers(0, 2, 40)
    sample = SAMPLERS["classes"](hot, 12, seed=3, per_class=3)
    drawn = np.concatenate([sample(step) for step in range(60)]).reshape(-1, 3)
    # Each group of three different images shares a class, and every image with a label comes up.
    assert hot[drawn].all(axis=1).any(axis=1).all()
    assert all(len(set(group)) == 3 for group in drawn)
    assert set(drawn.ravel()) == set(np.flatnonzero(hot.any(axis=1)))
    np.testing.assert_array_equal(sample(7), SAMPLERS["classes"](hot, 12, seed=3, per_class=3)(7))
    both = SAMPLERS["classes"](hot, 8, seed=3, per_class=2, domain=domain)
    pairs = np.concatenate([both(step) for step in range(20)]).reshape(-1, 2)
    assert (domain[pairs].sum(axis=1) == 1).all()
    assert hot[pairs].all(axis=1).any(axis=1).all()
    with pytest.raises(UserError, match="one label an image"):
        SAMPLERS["triplets"](hot, 12, seed=0)


@pytest.mark.parametrize(("make", "size"), [(classes, 4), (pairs, 4), (triplets, 6)])
def test_images_without_a_label_are_no_class(make, size):
    labels = np.array([3, -1, 3, -1, 5, -1, 5, 3])
    sample = make(labels, batch_size=size, seed=0)
    for step in range(20):
        # Anchors and their positives; what is no class may still be a negative.
        batch = labels[sample(step)].reshape(-1, size // 2)[:, :2]
        positive = batch[:1] if make is pairs else batch
        assert (positive[:, 0] == positive[:, 1]).all()
        assert (positive > 0).all()
