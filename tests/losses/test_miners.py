"""Every miner against a loop over items, and its promises: fixed shapes, masks, no gradient."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from loss_oracles import Case, dist

from siamese_jax import losses
from siamese_jax.errors import UserError
from siamese_jax.losses import memory, miners
from siamese_jax.losses.miners import MINERS, Pairs, Triplets

N, D, REFERENCES = 14, 4, 6

OPTIONS = [
    ("all", {}),
    ("hard", {}),
    ("hard", {"distance": "dot", "normalize": False}),
    ("semi_hard", {}),
    ("semi_hard", {"margin": 0.6, "distance": "cosine"}),
    *(
        ("easy_hard", {"positive": p, "negative": n})
        for p, n in itertools.product(("easy", "semi_hard", "hard", "all"), repeat=2)
        if not (p == n == "semi_hard" or {p, n} == {"semi_hard", "all"})
    ),
    ("distance_weighted", {}),
    ("multi_similarity", {}),
    ("multi_similarity", {"epsilon": 0.4}),
    ("pair_margin", {}),
    ("pair_margin", {"positive_margin": 1.2, "negative_margin": 1.3, "distance": "sqeuclidean"}),
    ("angular", {"angle": 45.0}),
    ("angular", {}),
]
IDS = [f"{name}-{'-'.join(map(str, o.values()))}" for name, o in OPTIONS]

DEFAULT = {name: i for i, (name, _) in reversed(list(enumerate(OPTIONS)))}


@functools.cache
def built(index):
    """A miner jitted for (x, labels, mask, key, references); compiling is most of the time here."""
    name, options = OPTIONS[index]
    miner = MINERS[name](**options)

    @quick.jit
    def mine(x, labels, mask, key, kept):
        return miner(x, labels, mask, key, references=kept)

    return lambda *batch: jax.device_get(mine(*batch))


def batch(rng, *, multi_hot=False):
    """Rows of the batch and of a memory, as arrays and as a `Case` for the loops."""
    rows = N + REFERENCES
    x = (rng.normal(size=(rows, D)) * rng.uniform(0.5, 2, size=(rows, 1))).astype(np.float32)
    if multi_hot:
        labels = rng.random((rows, 5)) < 0.25
        sets = [set(np.flatnonzero(row)) for row in labels]
    else:
        labels = rng.integers(0, 4, rows).astype(np.int32)
        sets = [{int(label)} for label in labels]
    mask = rng.random(rows) < 0.85
    kept = memory.Memory(x[N:], labels[N:], mask[N:], np.int32(0))
    case = Case(x.astype(np.float64), sets, mask.tolist(), N)
    return (x[:N], labels[:N], mask[:N]), kept, case


def chosen(mined):
    """The triplets as a set of tuples, or the pairs as two sets."""
    if isinstance(mined, Triplets):
        keep = np.asarray(mined.mask)
        rows = np.stack([np.asarray(i)[keep] for i in mined[:3]], axis=1)
        assert len(rows) == len({tuple(row) for row in rows.tolist()})
        return {tuple(row) for row in rows.tolist()}
    return tuple({tuple(pair) for pair in np.argwhere(side).tolist()} for side in mined)


def expected(name, options, case):
    """What the miner's docstring says, as a loop."""
    plain = {"distance", "normalize"} & set(options)
    measure = functools.partial(dist, **{k: options[k] for k in plain})

    def d(i, j):
        return measure(case.x[i], case.x[j])

    triplets, positive, negative = set(), set(), set()
    for a in range(N):
        p, n = case.positives(a), case.negatives(a)
        if name == "all":
            positive |= {(a, j) for j in p}
            negative |= {(a, j) for j in n}
        elif name == "hard" and p and n:
            triplets.add(
                (a, max(p, key=lambda j, a=a: d(a, j)), min(n, key=lambda j, a=a: d(a, j)))
            )
        elif name == "semi_hard":
            for j in p:
                reach = d(a, j) + options.get("margin", 0.2)
                between = [k for k in n if d(a, j) < d(a, k) < reach]
                if between:
                    triplets.add((a, j, min(between, key=lambda k, a=a: d(a, k))))
        elif name == "easy_hard":
            ps, ns = easy_hard(a, p, n, d, options["positive"], options["negative"])
            if ps and ns:
                positive |= {(a, j) for j in ps}
                negative |= {(a, j) for j in ns}
                triplets |= {(a, j, k) for j in ps for k in ns}
        elif name == "multi_similarity" and p and n:
            epsilon = options.get("epsilon", 0.1)
            s = {j: 1 - dist(case.x[a], case.x[j], "cosine") for j in p + n}
            positive |= {(a, j) for j in p if s[j] < max(s[k] for k in n) + epsilon}
            negative |= {(a, k) for k in n if s[k] > min(s[j] for j in p) - epsilon}
        elif name == "pair_margin":
            positive |= {(a, j) for j in p if d(a, j) > options.get("positive_margin", 0.2)}
            negative |= {(a, k) for k in n if d(a, k) < options.get("negative_margin", 0.8)}
        elif name == "angular":
            u = [row / np.linalg.norm(row) for row in case.x]
            for j in p:
                centre = (u[a] + u[j]) / 2
                half = np.linalg.norm(u[a] - u[j]) / 2
                angle = {k: math.atan2(half, np.linalg.norm(u[k] - centre)) for k in n}
                if n and math.degrees(max(angle.values())) > options.get("angle", 20.0):
                    triplets.add((a, j, max(angle, key=lambda k, angle=angle: angle[k])))
    pairs_only = name in ("all", "multi_similarity", "pair_margin") or "all" in options.values()
    return (positive, negative) if pairs_only else triplets


def easy_hard(a, p, n, d, positive, negative):
    def near(items):
        return sorted(items, key=lambda j: d(a, j))

    rules = {
        "positive": {"easy": near(p)[:1], "hard": near(p)[-1:], "all": p},
        "negative": {"easy": near(n)[-1:], "hard": near(n)[:1], "all": n},
    }
    if positive == "semi_hard":
        ns = rules["negative"][negative]
        return near(j for j in p if ns and d(a, j) < d(a, ns[0]))[-1:], ns
    ps = rules["positive"][positive]
    if negative == "semi_hard":
        return ps, near(k for k in n if ps and d(a, k) > d(a, ps[0]))[:1]
    return ps, rules["negative"][negative]


@pytest.mark.parametrize("index", range(len(OPTIONS)), ids=IDS)
def test_a_loop_chooses_the_same(index, rng):
    """Also where masked rows hold NaN, and with rows from outside the batch."""
    name, options = OPTIONS[index]
    found = 0
    for multi_hot in (False, True) if index in DEFAULT.values() else (False,):
        for _ in range(4):
            (x, labels, mask), kept, case = batch(rng, multi_hot=multi_hot)
            x = np.where(mask[:, None], x, np.nan)
            mined = built(index)(x, labels, mask, jax.random.key(0), kept)
            if name == "distance_weighted":
                for a, p, n in chosen(mined):
                    assert p in case.positives(a)
                    assert n in case.negatives(a)
                    assert dist(case.x[a], case.x[n]) < 1.4
                reachable = {
                    (a, p)
                    for a in range(N)
                    for p in case.positives(a)
                    if any(dist(case.x[a], case.x[n]) < 1.4 for n in case.negatives(a))
                }
                assert {(a, p) for a, p, _ in chosen(mined)} == reachable
            else:
                assert chosen(mined) == expected(name, options, case)
            found += sum(map(len, chosen(mined)))
    assert found > 15


def test_every_miner_is_tested():
    assert {name for name, _ in OPTIONS} == set(MINERS)


@pytest.mark.parametrize("name", MINERS)
def test_one_compilation_in_fifty_steps(name, rng):
    """Miner, loss and memory in one jitted step; classes and masks vary from batch to batch."""
    loss = losses.LOSSES["triplet"]() if name != "all" else losses.LOSSES["circle"]()
    miner = MINERS[name]()
    traces = []

    @quick.jit
    def step(x, labels, mask, kept, key):
        traces.append(name)

        def value(x):
            extra = {"references": memory.references(kept)}
            mined = miner(x, labels, mask, key, **extra)
            return losses.mean(loss, {}, x, labels, mask, mined=mined, **extra)

        return *jax.value_and_grad(value)(x), memory.push(kept, x, labels, mask)

    kept, values = memory.init(REFERENCES, D), []
    for i in range(50):
        x = rng.normal(size=(N, D)).astype(np.float32)
        labels = rng.integers(0, 1 + i % 7, N).astype(np.int32)
        mask = rng.random(N) < 0.5 + i / 100
        value, gradient, kept = step(x, labels, mask, kept, jax.random.key(i))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        values.append(float(value))
    assert traces == [name]
    assert len(set(values)) > 25


def test_distance_weighted_draws_by_its_formula():
    """10,000 draws for one pair, each candidate's share within five standard errors."""
    rng = np.random.default_rng(3)
    k = 8
    x = rng.normal(size=(9, k)).astype(np.float32)
    x[4:] = x[0] + np.linspace(0.2, 1.2, 5)[:, None] * x[4:]  # near, far, and beyond reach
    labels = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7], np.int32)
    draws = 10_000
    miner = MINERS["distance_weighted"](cutoff=0.5, nonzero_loss_cutoff=1.2)
    keys = jax.random.split(jax.random.key(0), draws)
    mined = quick.jit(jax.vmap(lambda key: miner(x, labels, None, key)))(keys)
    pair = (np.asarray(mined.anchor[0]) == 0) & (np.asarray(mined.positive[0]) == 1)
    drawn = np.asarray(mined.negative)[:, pair][:, 0]
    assert np.asarray(mined.mask)[:, pair].all()

    d = np.array([dist(x[0].astype(float), x[n].astype(float)) for n in range(9)])
    clipped = np.maximum(d, 0.5)
    weight = 1 / (clipped ** (k - 2) * (1 - clipped**2 / 4) ** ((k - 3) / 2))
    weight[(d >= 1.2) | (labels == 0)] = 0
    probability = weight / weight.sum()
    assert (probability > 0.01).sum() >= 3
    assert (probability == 0).sum() >= 3
    share = np.bincount(drawn, minlength=9) / draws
    error = np.sqrt(probability * (1 - probability) / draws)
    assert (np.abs(share - probability) <= 5 * error).all()


def test_distance_weighted_is_a_function_of_its_key(rng):
    (x, labels, mask), kept, _ = batch(rng)
    miner = built(DEFAULT["distance_weighted"])
    first, again, other = (miner(x, labels, mask, jax.random.key(i), kept) for i in (1, 1, 2))
    assert (np.asarray(first.negative) == np.asarray(again.negative)).all()
    assert (np.asarray(first.negative) != np.asarray(other.negative)).any()
    with pytest.raises(UserError, match="key"):
        MINERS["distance_weighted"]()(x, labels, mask)


def test_no_gradient_passes_through_a_miner(rng):
    (x, labels, mask), kept, _ = batch(rng)
    loss = losses.LOSSES["triplet"]()
    miner = MINERS["semi_hard"]()

    def value(x, y):
        mined = miner(y, labels, mask, references=kept)
        return losses.mean(loss, {}, x, labels, mask, mined=mined, references=kept)

    through_loss, through_miner = quick.jit(jax.grad(value, argnums=(0, 1)))(x, x)
    assert (np.asarray(through_loss) != 0).any()
    assert (np.asarray(through_miner) == 0).all()


@pytest.mark.parametrize("name", MINERS)
def test_nothing_to_mine(name, rng):
    """All masked, one class, all distinct: no triplet, and no pair of the missing kind."""
    (x, labels, _), kept, _ = batch(rng)
    empty = kept._replace(mask=np.zeros(REFERENCES, bool))
    distinct, everyone = np.arange(N, dtype=np.int32), np.ones(N, bool)
    for marks, mask in ((0 * labels, ~everyone), (0 * labels, everyone), (distinct, everyone)):
        mined = built(DEFAULT[name])(x, marks, mask, jax.random.key(0), empty)
        if isinstance(mined, Triplets):
            assert not mined.mask.any()
        else:
            assert not mined.positive.any() or not mined.negative.any()
            assert mask.any() or not (mined.positive.any() or mined.negative.any())


def test_relevance_of_labels():
    positive, negative = miners.relations(jnp.array([7, 7, 9]), jnp.array([True, True, True]), None)
    assert positive.astype(int).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert negative.astype(int).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    # An item without a label matches nothing, and is not its own negative either.
    bare = miners.relations(jnp.array([[True, False], [False, False]]), None, None)
    assert not bare.positive.any()
    assert bare.negative.astype(int).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("easy_hard", {"positive": "simple"}, "simple"),
        ("easy_hard", {"positive": "semi_hard", "negative": "semi_hard"}, "other side"),
        ("easy_hard", {"positive": "all", "negative": "semi_hard"}, "other side"),
        ("hard", {"distance": "l1"}, "l1"),
        ("pair_margin", {"distance": "l1"}, "l1"),
    ],
)
def test_a_wrong_option_is_one_clear_line(name, options, words):
    with pytest.raises(UserError, match=words) as caught:
        MINERS[name](**options)
    assert "\n" not in str(caught.value)


def test_positives_take_turns(rng):
    """Each positive once, in column order, and as many turns as the longest row has."""
    positive = rng.random((5, 9)) < 0.4

    def body(p, has, carry):
        count, order = carry
        order = order.at[jnp.arange(5), jnp.where(has, count, 9)].set(p, mode="drop")
        return count + has.astype(jnp.int32), order

    start = jnp.zeros(5, jnp.int32), jnp.full((5, 9), -1, jnp.int32)
    count, order = miners.in_turn(body, jnp.asarray(positive), start)
    assert count.tolist() == positive.sum(1).tolist()
    for row, found in zip(positive, order.tolist(), strict=True):
        assert [i for i in found if i >= 0] == np.flatnonzero(row).tolist()


def test_pairs_and_triplets_are_trees():
    assert len(jax.tree.leaves(Pairs(jnp.zeros(1), jnp.zeros(1)))) == 2
