"""Every loss against a float64 loop: values, gradients, masks, several labels, references."""

import functools
import inspect

import jax
import jax.numpy as jnp
import loss_oracles as oracles
import numpy as np
import pytest
import quick

from siamese_jax import losses
from siamese_jax.distances import DISTANCES
from siamese_jax.errors import UserError
from siamese_jax.losses import LOSSES, ON_DISTANCE, memory
from siamese_jax.losses.miners import Pairs, Triplets

# More classes than the integer labels use: one is absent from the batch.
N, D, CLASSES, REFERENCES = 12, 5, 5, 5

# Each loss with its defaults, and with every option at another value.
CASES = [
    ("triplet", {}),
    ("triplet", {"margin": 0.05, "distance": "sqeuclidean", "average": "all"}),
    ("triplet", {"distance": "cosine", "swap": True}),
    ("triplet", {"distance": "dot", "normalize": False, "soft": True, "margin": 0.0}),
    ("triplet", {"soft": True, "swap": True, "normalize": False}),
    ("triplet", {"mining": "hard", "swap": True}),
    ("triplet", {"mining": "hard", "soft": True, "distance": "cosine"}),
    ("triplet", {"mining": "semi_hard", "margin": 0.5}),
    ("triplet", {"mining": "explicit"}),
    ("triplet", {"mining": "explicit", "swap": True, "normalize": False, "average": "all"}),
    ("contrastive", {}),
    ("contrastive", {"positive_margin": 0.6, "squared": True, "distance": "cosine"}),
    ("contrastive", {"normalize": False, "negative_margin": 2.5}),
    ("contrastive", {"pairs": "explicit", "squared": True}),
    ("n_pairs", {}),
    ("n_pairs", {"l2": 0.02, "distance": "cosine"}),
    ("nt_xent", {}),
    ("nt_xent", {"temperature": 0.5, "distance": "dot"}),
    ("sup_con", {}),
    ("sup_con", {"temperature": 0.5, "distance": "dot"}),
    ("multi_similarity", {}),
    ("multi_similarity", {"alpha": 3.0, "beta": 10.0, "base": 0.2, "distance": "dot"}),
    ("circle", {}),
    ("circle", {"margin": 0.25, "scale": 8.0}),
    ("lifted_structure", {}),
    ("lifted_structure", {"margin": 0.4, "normalize": False, "distance": "sqeuclidean"}),
    ("margin", {}),
    ("margin", {"beta_by": "class", "nu": 0.3, "margin": 0.1, "beta": 0.9}),
    ("margin", {"distance": "cosine"}),
    ("margin", {"normalize": False, "beta": 2.0}),
    ("fast_ap", {}),
    ("fast_ap", {"bins": 5}),
    ("smooth_ap", {}),
    ("smooth_ap", {"temperature": 0.2}),
    ("smooth_ap", {"temperature": 0.1, "self_included": True}),
    ("roadmap", {}),
    (
        "roadmap",
        {
            **{"temperature": 0.2, "rho": 3.0, "delta": 0.3, "calibration": 0.2},
            **{"positive_threshold": 0.5, "negative_threshold": 0.1, "self_included": True},
        },
    ),
    ("recall_at_k", {}),
    ("recall_at_k", {"ks": (2, 3), "temperature": 0.2, "k_temperature": (0.5, 2.0)}),
    ("recall_at_k", {"mixup": 2, "temperature": 0.2}),
    ("hyperbolic", {}),
    ("hyperbolic", {"temperature": 0.5, "curvature": 1.0, "clip_radius": 1.2}),
    ("pairwise_sigmoid", {}),
    ("pairwise_sigmoid", {"scale": 3.0, "bias": 0.5}),
    ("softmax", {}),
    ("normalized_softmax", {}),
    ("normalized_softmax", {"temperature": 0.3}),
    ("arcface", {}),
    ("arcface", {"margin_degrees": 80.0, "scale": 4.0}),
    ("sub_center_arcface", {}),
    ("sub_center_arcface", {"centers": 2, "margin_degrees": 60.0, "scale": 8.0}),
    ("cosface", {}),
    ("cosface", {"margin": 0.1, "scale": 5.0}),
    ("soft_triple", {"centers": 3}),
    ("soft_triple", {"scale": 5.0, "gamma": 0.3, "margin": 0.2, "centers": 2, "tau": 2.0}),
    ("soft_triple", {"centers": 1}),
    ("proxy_nca", {}),
    ("proxy_nca", {"scale": 9.0, "own_in_denominator": False}),
    ("proxy_anchor", {}),
    ("proxy_anchor", {"margin": 0.3, "alpha": 5.0}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in o.items()) or 'default'}" for name, o in CASES]
PAIR_LOSSES = [
    *("triplet", "contrastive", "nt_xent", "sup_con", "multi_similarity", "circle"),
    *("lifted_structure", "margin", "fast_ap", "smooth_ap", "roadmap", "recall_at_k"),
    *("hyperbolic", "pairwise_sigmoid"),
]
# With several labels an item: every loss once, and each place that treats labels by itself.
MULTI_HOT = [
    i
    for i, (name, o) in enumerate(CASES)
    if not o or "explicit" in o.values() or {"beta_by", "own_in_denominator", "mixup"} & set(o)
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def oracle(name, case, options, **more):
    options = {"average_over" if k == "average" else k: v for k, v in options.items()}
    if name == "circle":
        more.setdefault("detached", case)
    return getattr(oracles, name)(case, **options, **more)


def batch(rng, *, multi_hot=False, rows=N):
    """Random embeddings of unequal lengths, unequal classes, two masked rows."""
    x = rng.normal(size=(rows, D)) * rng.uniform(0.5, 2, size=(rows, 1))
    if multi_hot:
        labels = rng.random((rows, CLASSES)) < 0.3
        labels[0] = False
        labels[3:8:2] |= labels[2:8:2]  # some neighbours match, as the explicit layouts want
    else:
        labels = np.array([0, 0, 1, 1, 2, 2, 1, 1, 0, 3, 1, 1, 2, 0, 3, 1, 2])[:rows]
    mask = np.ones(rows, bool)
    mask[[5, rows - 1]] = False
    return x, labels, mask


def sets_of(labels):
    return [set(np.flatnonzero(row)) if labels.ndim == 2 else {int(row)} for row in labels]


def random_params(loss, rng):
    params = loss.init(jax.random.key(1), D, CLASSES)
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    return {
        k: np.asarray(v, np.float64) + 0.1 * rng.normal(size=v.shape) for k, v in params.items()
    }


@functools.cache
def built(index):
    """The loss, and its jitted value and gradients with respect to params and embeddings."""
    name, options = CASES[index]
    loss = LOSSES[name](**options)
    return loss, quick.jit(jax.value_and_grad(functools.partial(losses.mean, loss), argnums=(0, 1)))


def check_gradient(gradient, value_at, point, rng, directions=3, h=1e-5):
    """Central differences of value_at(point), a tree of arrays, along random directions."""
    for _ in range(directions):
        way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)
        ahead = value_at(jax.tree.map(lambda a, b: a + h * b, point, way))
        behind = value_at(jax.tree.map(lambda a, b: a - h * b, point, way))
        slope = sum(
            float(np.sum(np.asarray(a) * b))
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True)
        )
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("index", "multi_hot"),
    [(i, False) for i in range(len(CASES))] + [(i, True) for i in MULTI_HOT],
    ids=[*IDS, *(f"{IDS[i]}-multi_hot" for i in MULTI_HOT)],
)
def test_value_and_gradient_match_a_loop(index, multi_hot, rng):
    name, options = CASES[index]
    loss, step = built(index)
    x, labels, mask = batch(rng, multi_hot=multi_hot)
    params = random_params(loss, rng)
    value, gradient = step(params, x, labels, mask)
    centre = oracles.Case(x, sets_of(labels), mask.tolist(), N, params)

    def value_at(point):
        moved = oracles.Case(point[1], centre.sets, centre.keep, N, point[0])
        return oracle(name, moved, options, **({"detached": centre} if name == "circle" else {}))

    assert value.dtype == jnp.float64
    assert abs(value_at((params, x))) > 1e-3  # a case in which the loss says something
    np.testing.assert_allclose(value, value_at((params, x)), rtol=1e-9)
    check_gradient(gradient, value_at, (params, x), rng)
    assert (np.asarray(gradient[1])[~mask] == 0).all()


def test_every_loss_and_every_option_is_tested():
    assert {name for name, _ in CASES} == set(LOSSES)
    for name, factory in LOSSES.items():
        tried = set().union(*(options for other, options in CASES if other == name))
        assert tried == set(inspect.signature(factory).parameters), name


def test_the_losses_on_a_distance_are_those_that_take_any():
    def takes(factory, distance):
        try:
            factory(distance=distance)
        except (TypeError, UserError):
            return False
        return True

    on_any = {n for n, factory in LOSSES.items() if all(takes(factory, d) for d in DISTANCES)}
    assert on_any == ON_DISTANCE


def with_references(rng, multi_hot=False):
    x, labels, mask = batch(rng, multi_hot=multi_hot, rows=N + REFERENCES)
    dirty = np.where(mask[N:, None], x[N:], np.nan)
    kept = memory.Memory(dirty, labels[N:], mask[N:], np.int32(0))
    case = oracles.Case(x, sets_of(labels), mask.tolist(), N)
    return x[:N], labels[:N], mask[:N], kept, case


def moved_case(case, point):
    x = np.concatenate([point[1], case.x[N:]])
    fields = case.sets, case.keep, N, point[0], case.mined_positive, case.mined_negative
    return oracles.Case(x, *fields)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_mined_pairs_and_references(name, rng):
    """Half of the pairs, among them pairs with rows outside the batch."""
    loss = LOSSES[name]()
    x, labels, mask, kept, case = with_references(rng)
    mined = Pairs(*(rng.random((2, N, N + REFERENCES)) < 0.5))
    case.params = random_params(loss, rng)
    case.mined_positive, case.mined_negative = mined

    @quick.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def step(params, x, others, mined):
        references = kept._replace(embeddings=others)
        extra = {"mined": mined, "references": references}
        return losses.mean(loss, params, x, labels, mask, **extra)

    value, gradient = step(case.params, x, kept.embeddings, mined)

    def value_at(point):
        more = {"detached": case} if name == "circle" else {}
        return oracle(name, moved_case(case, point), {}, **more)

    np.testing.assert_allclose(value, value_at((case.params, x)), rtol=1e-9)
    check_gradient(gradient[:2], value_at, (case.params, x), rng)
    assert (np.asarray(gradient[2]) == 0).all()


def test_references_add_negatives_to_n_pairs(rng):
    x, labels, mask, kept, case = with_references(rng)
    loss = LOSSES["n_pairs"]()
    value = losses.mean(loss, {}, x, labels, mask, references=kept)
    np.testing.assert_allclose(value, oracles.n_pairs(case), rtol=1e-9)
    assert value > losses.mean(loss, {}, x, labels, mask)


@pytest.mark.parametrize("swap", [False, True])
def test_mined_triplets_are_the_ones_used(swap, rng):
    x, labels, mask, kept, case = with_references(rng)
    chosen = [(0, 1, 3), (0, 14, 3), (2, 3, 0), (2, 3, 0), (9, 15, 14), (6, 7, 1)]
    indices = np.array(chosen, np.int32).T
    mined = Triplets(*indices, np.array([True, True, True, True, True, False]))
    loss = LOSSES["triplet"](0.9, swap=swap)
    values, weights = loss.apply({}, x, labels, mask, mined=mined, references=kept)
    assert values.shape == weights.shape == (6,)
    expected = oracles.triplets(case, chosen[:5], 0.9, "euclidean", True, False, swap)
    np.testing.assert_allclose(losses.reduce(values, weights), expected, rtol=1e-9)


def test_margin_counts_a_pair_as_often_as_it_was_drawn(rng):
    x, labels, mask = batch(rng)
    drawn = Triplets(*np.array([[0, 0, 2], [1, 1, 3], [3, 4, 0]], np.int32), np.ones(3, bool))
    loss = LOSSES["margin"](1.0)
    value = losses.mean(loss, {"beta": np.float64(1.2)}, x, labels, mask, mined=drawn)
    terms = [1.0 + oracles.dist(x[a], x[p]) - 1.2 for a, p in ((0, 1), (0, 1), (2, 3))]
    terms += [1.0 + 1.2 - oracles.dist(x[a], x[n]) for a, n in ((0, 3), (0, 4), (2, 0))]
    np.testing.assert_allclose(value, np.mean([t for t in terms if t > 0]), rtol=1e-9)


def test_pair_losses_take_the_pairs_of_mined_triplets(rng):
    x, labels, mask = batch(rng)
    mined = Triplets(*np.array([[0, 2, 2], [1, 3, 6], [3, 0, 8]], np.int32), np.ones(3, bool))
    positive, negative = np.zeros((N, N), bool), np.zeros((N, N), bool)
    positive[[0, 2, 2], [1, 3, 6]] = negative[[0, 2, 2], [3, 0, 8]] = True
    loss = LOSSES["multi_similarity"]()
    by_triplets = losses.mean(loss, {}, x, labels, mask, mined=mined)
    by_pairs = losses.mean(loss, {}, x, labels, mask, mined=Pairs(positive, negative))
    np.testing.assert_allclose(by_triplets, by_pairs, rtol=1e-12)
    case = oracles.Case(x, sets_of(labels), mask.tolist(), N, {}, positive, negative)
    np.testing.assert_allclose(by_pairs, oracles.multi_similarity(case), rtol=1e-9)


# --- invariances -------------------------------------------------------------------------------

FIXED_ORDER = [i for i, (n, o) in enumerate(CASES) if n == "n_pairs" or "explicit" in o.values()]
RAW = [
    i
    for i, (name, o) in enumerate(CASES)
    if o.get("normalize") is False
    or o.get("distance") == "dot"
    or name in ("softmax", "hyperbolic")
] + [CASES.index(("n_pairs", {}))]
INVARIANT = [CASES.index((name, {})) for name in LOSSES if (name, {}) in CASES]
INVARIANT += [CASES.index(("soft_triple", {"centers": 3}))] + [
    i for i in RAW if "soft" in CASES[i][1]
]
INVARIANT_IDS = [IDS[i] for i in INVARIANT]


@pytest.mark.parametrize("index", INVARIANT, ids=INVARIANT_IDS)
def test_invariances(index, rng):
    """Order of the batch, rotation of the space, scale of the rows, what masked rows hold."""
    loss, step = built(index)
    x, labels, mask = batch(rng)
    params = random_params(loss, rng)
    value, (_, gradient) = step(params, x, labels, mask)

    # Whole groups of 6 rows change places where the layout has a meaning.
    order = np.roll(np.arange(N), 6) if index in FIXED_ORDER else rng.permutation(N)
    other, (_, moved) = step(params, x[order], labels[order], mask[order])
    np.testing.assert_allclose(other, value, rtol=1e-9)
    np.testing.assert_allclose(moved, np.asarray(gradient)[order], atol=1e-9)

    turn, _ = np.linalg.qr(rng.normal(size=(D, D)))
    turned = {
        k: turn.T @ v if k == "kernel" else v @ turn if k == "proxies" else v
        for k, v in params.items()
    }
    other, (_, moved) = step(turned, x @ turn, labels, mask)
    np.testing.assert_allclose(other, value, rtol=1e-9)
    np.testing.assert_allclose(moved, gradient @ turn, atol=1e-8)

    scaled = x * rng.uniform(0.1, 10, size=(N, 1))
    other, _ = step(params, scaled, labels, mask)
    assert np.isclose(other, value, rtol=1e-9) == (index not in RAW)

    noise = np.where(mask[:, None], x, np.nan)
    other, (_, moved) = step(params, noise, labels, mask)
    np.testing.assert_allclose(other, value, rtol=1e-9)
    np.testing.assert_allclose(moved, gradient, atol=1e-9)


def test_labels_are_names_for_pair_losses(rng):
    x, labels, mask = batch(rng)
    for name in ("triplet", "fast_ap"):
        loss = LOSSES[name]()
        params = loss.init(jax.random.key(0), D, CLASSES)
        value = losses.mean(loss, params, x, labels, mask)
        renamed = losses.mean(loss, params, x, 2**24 + labels, mask)
        np.testing.assert_allclose(renamed, value, rtol=1e-12)
        one_hot = np.eye(CLASSES, dtype=bool)[labels]
        np.testing.assert_allclose(losses.mean(loss, params, x, one_hot, mask), value, rtol=1e-9)


def test_rotation_of_raw_euclidean_triplets_and_shift(rng):
    x, labels, mask = batch(rng)
    loss = LOSSES["triplet"](normalize=False)
    value = losses.mean(loss, {}, x, labels, mask)
    np.testing.assert_allclose(losses.mean(loss, {}, x + 3.0, labels, mask), value, rtol=1e-9)


# --- the interface -----------------------------------------------------------------------------


def test_values_are_per_term_with_the_documented_shapes(rng):
    x, labels, mask = batch(rng)
    shapes = {
        ("triplet", "explicit"): N // 3,
        ("triplet", "semi_hard"): N * N,
        ("contrastive", "explicit"): N // 2,
        ("n_pairs", None): N // 2,
        ("proxy_anchor", None): CLASSES,
    }
    for name, options in CASES:
        layout = options.get("mining", options.get("pairs"))
        loss = LOSSES[name](**options)
        shape = jax.eval_shape(
            loss.apply, loss.init(jax.random.key(0), D, CLASSES), x, labels, mask
        )
        expected = (shapes.get((name, layout), N) * (1 + options.get("mixup", 0)),)
        assert shape[0].shape == shape[1].shape == expected, (name, options)


def test_items_without_a_class_do_not_count(rng):
    x, labels, mask = batch(rng)
    outside = labels.copy()
    outside[0] = -1
    without = mask.copy()
    without[0] = False
    for name in ("softmax", "arcface", "proxy_nca"):
        loss = LOSSES[name]()
        params = loss.init(jax.random.key(0), D, CLASSES)
        np.testing.assert_allclose(
            losses.mean(loss, params, x, outside, mask),
            losses.mean(loss, params, x, labels, without),
            rtol=1e-12,
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LOSSES["triplet"](distance="manhattan"), "manhattan"),
        (lambda: LOSSES["triplet"](mining="hardest"), "hardest"),
        (lambda: LOSSES["triplet"](average="median"), "median"),
        (lambda: LOSSES["contrastive"](pairs="some"), "some"),
        (lambda: LOSSES["circle"](scale=0.0), "scale=0.0"),
        (lambda: LOSSES["nt_xent"](temperature=-1.0), "temperature"),
        (lambda: LOSSES["sup_con"](distance="euclidean"), "cosine, dot"),
        (lambda: LOSSES["margin"](beta_by="image"), "beta_by"),
        (lambda: LOSSES["recall_at_k"](ks=()), "ks=\\(\\): must be 1 or more"),
        (lambda: LOSSES["recall_at_k"](k_temperature=(1.0, 2.0)), "each of the 5 ks"),
    ],
)
def test_a_wrong_option_is_one_clear_line(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_wrong_batch_is_one_clear_line(rng):
    x, labels, _ = batch(rng)
    everything = Pairs(np.ones((N, N), bool), np.ones((N, N), bool))
    kept = memory.init(4, D)
    wrong = [
        (("triplet", {"mining": "explicit"}), x[:11], labels[:11], {}, "multiple of 3"),
        (("triplet", {"mining": "explicit"}), x, labels, {"mined": everything}, "no mined"),
        (("triplet", {"mining": "hard"}), x, labels, {"mined": everything}, "no mined"),
        (("contrastive", {"pairs": "explicit"}), x[:11], labels[:11], {}, "odd"),
        (("contrastive", {"pairs": "explicit"}), x, labels, {"references": kept}, "no references"),
        (("n_pairs", {}), x[:11], labels[:11], {}, "odd"),
        (("n_pairs", {}), x, labels, {"mined": everything}, "no mined"),
        (("recall_at_k", {"mixup": 1}), x, labels, {"mined": everything}, "no mined"),
        (("softmax", {}), x, labels, {"references": kept}, "no references"),
        (("arcface", {}), x, labels, {"mined": everything}, "no mined"),
        (("proxy_anchor", {}), x, labels, {"mined": everything}, "no mined"),
        (("proxy_nca", {}), x, np.ones((N, CLASSES + 1), bool), {}, "initialised for 5"),
        (("circle", {}), x, labels, {"mined": everything, "references": kept}, "same references"),
        (("circle", {}), x, np.ones((N, 3), bool), {"references": kept}, "multi-hot"),
    ]
    for (name, options), x_, labels_, extra, words in wrong:
        loss = LOSSES[name](**options)
        params = loss.init(jax.random.key(0), D, CLASSES)
        with pytest.raises(UserError, match=words) as caught:
            losses.mean(loss, params, x_, labels_, None, **extra)
        assert "\n" not in str(caught.value)
