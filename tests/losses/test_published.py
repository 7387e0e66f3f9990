"""Values and gradient norms that a published implementation gives, in float64.

Input: x = sin(1..32) as 8 x 4, labels 0,0,0,1,1,2,2,3, and a proxy per class, cos(1..16) as 4 x 4.
Where pytorch-metric-learning is installed, it is asked again, on other numbers and for gradients.
"""

import math

import jax
import jax.numpy as jnp
import loss_oracles as oracles
import numpy as np
import pytest
import quick

from siamese_jax import evaluate, losses
from siamese_jax.losses import LOSSES, memory

X = np.sin(np.arange(1.0, 33.0)).reshape(8, 4)
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3])
PROXIES = np.cos(np.arange(1.0, 17.0)).reshape(4, 4)

PUBLISHED = [
    ("triplet", {"margin": 0.05}, 0.7392852817, 0.1676820276),
    ("triplet", {"margin": 0.2}, 0.7061793148, None),
    ("contrastive", {"positive_margin": 0, "negative_margin": 1}, 2.0802468343, 0.2887897326),
    ("multi_similarity", {"alpha": 2, "beta": 50, "base": 0.5}, 1.4837963506, 0.3450403341),
    ("nt_xent", {"temperature": 0.07}, 19.8984088813, 4.6642144563),
    ("sup_con", {"temperature": 0.1}, 14.3009014468, 3.5132862824),
    ("proxy_anchor", {"margin": 0.1, "alpha": 32}, 56.2927965209, 8.9492234999),
    ("proxy_nca", {"scale": 1}, 2.3222792721, None),
    ("proxy_nca", {"scale": 32}, 61.8303269856, None),
    ("arcface", {"margin_degrees": 28.6, "scale": 64}, 78.8291261811, None),
    ("normalized_softmax", {"temperature": 0.05}, 19.3901478394, None),
    ("circle", {"margin": 0.4, "scale": 80}, 258.8961004859, None),
]


def value_and_gradient(name, options, x, labels, params):
    loss = LOSSES[name](**options)
    with jax.enable_x64(True):
        # In float64 all through: the parameters too.
        params = {k: jnp.asarray(v, jnp.float64) for k, v in params.items()}
        assert set(loss.init(jax.random.key(0), x.shape[1], 4)) == set(params)

        def mean(x):
            return losses.mean(loss, params, x, jnp.asarray(labels))

        value, gradient = quick.jit(jax.value_and_grad(mean))(jnp.asarray(x, jnp.float64))
        assert value.dtype == gradient.dtype == jnp.float64
        return float(value), np.asarray(gradient)


def test_smooth_ap_with_the_anchor_among_its_positives():
    """As pytorch-metric-learning 2.9 has it, which keeps precisions in float32."""
    x, labels = np.sin(np.arange(1.0, 37.0)).reshape(9, 4), np.repeat(np.arange(3), 3)
    options = {"temperature": 0.1, "self_included": True}
    found, gradient = value_and_gradient("smooth_ap", options, x, labels, {})
    assert found == pytest.approx(0.48990604281425476, rel=5e-8)
    assert np.linalg.norm(gradient) == pytest.approx(0.04959920125649177, rel=5e-8)


@pytest.mark.parametrize(("name", "options", "value", "norm"), PUBLISHED)
def test_published_values(name, options, value, norm):
    has_proxies = name in ("proxy_anchor", "proxy_nca", "arcface", "normalized_softmax")
    params = {"proxies": PROXIES} if has_proxies else {}
    found, gradient = value_and_gradient(name, options, X, LABELS, params)
    # The values are given to ten places.
    assert found == pytest.approx(value, rel=0, abs=6e-11)
    if norm is not None:
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=0, abs=6e-11)


def mean(name, options, x, labels):
    loss = LOSSES[name](**options)
    with jax.enable_x64(True):
        params = loss.init(jax.random.key(0), x.shape[1], 4)
        return float(losses.mean(loss, params, jnp.asarray(x), jnp.asarray(labels)))


def test_sup_ap_is_above_the_loss_in_average_precision(rng):
    x, labels = rng.normal(size=(30, 4)), rng.integers(0, 5, 30)
    bound = mean("roadmap", {"calibration": 0.0, "rho": 1.0}, x, labels)
    loss = 1 - evaluate(x, labels, distance="cosine")["map"]
    assert loss < bound < loss + 0.3


def test_recall_at_k_of_ranks_that_are_whole():
    """On a quarter of a circle: the two zeros at ranks 2 and 2, their neighbour between them."""
    angles = np.radians([0, 20, 50])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    options = {"ks": (1, 2, 4), "temperature": 1e-4, "k_temperature": (0.5, 1.0, 2.0)}
    sigmoids = [1 / (1 + math.exp(-t)) for t in (-1 / 0.5, 0, 2 / 2.0)]
    found = mean("recall_at_k", options, x, np.array([0, 1, 0]))
    assert found == pytest.approx(1 - np.mean(sigmoids), rel=1e-12)


def test_half_a_class_mixes_each_of_its_pairs_once(rng):
    """Of classes of 1, 2, 3 and 6; 11 rows have a positive."""
    x, labels = rng.normal(size=(12, 5)), rng.permutation(np.repeat(np.arange(4), (1, 2, 3, 6)))
    for mixup, pairs in ((1, 1 + 3 + 6), (4, 1 + 3 + 15)):
        _, weights = LOSSES["recall_at_k"](mixup=mixup).apply({}, x, labels)
        assert weights.shape == (12 * (1 + mixup),)
        assert weights.sum() == 11 + pairs


def test_mixed_embeddings_beside_a_memory(rng):
    x, labels = rng.normal(size=(12, 5)), np.array([0, 0, 1, 1, 2, 2, 1, 1, 0, 1, 2, 0])
    there = np.arange(4) > 0
    kept = memory.Memory(x[8:] / 3, labels[8:], there, np.int32(0))
    case = oracles.Case(x, [{i} for i in labels], [True] * 8 + there.tolist(), 8)
    with jax.enable_x64(True):
        loss = LOSSES["recall_at_k"](mixup=1)
        found = losses.mean(loss, {}, jnp.asarray(x[:8]), labels[:8], references=kept)
    assert float(found) == pytest.approx(oracles.recall_at_k(case, mixup=1), rel=1e-9)


def test_hyperbolic_distances_on_a_line_and_their_order(rng):
    """Along a line through the ball's centre D is twice the difference of the lengths."""
    at = np.array([0.3, -0.5, 1.1])
    x = at[:, None] * np.array([[0.6, 0.8]])
    for curvature in (0.1, 2.0):
        options = {"temperature": 0.5, "curvature": curvature}
        found = mean("hyperbolic", options, x, np.array([0, 0, 1]))
        near, far, cross = (2 * abs(at[i] - at[j]) / 0.5 for i, j in ((0, 1), (0, 2), (1, 2)))
        expected = (math.log1p(math.exp(near - far)) + math.log1p(math.exp(near - cross))) / 2
        assert found == pytest.approx(expected, rel=1e-9)

    def orders_agree(rows):
        ball = [oracles.in_ball(row, 0.1, 2.3) for row in rows]
        d = np.array([oracles.ball_distance(ball[0], u, 0.1) for u in ball[1:]])
        cosine = np.array([oracles.cos(rows[0], row) for row in rows[1:]])
        return (np.argsort(d) == np.argsort(-cosine)).all()

    rows = rng.normal(size=(30, 5))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    assert orders_agree(rows / lengths)
    assert orders_agree(rows / lengths * rng.uniform(2.4, 9, size=(30, 1)))
    assert not orders_agree(rows / lengths * rng.uniform(0.1, 2, size=(30, 1)))


def test_pairwise_sigmoid_starts_where_the_paper_does():
    """Four rows at right angles in two classes: one positive and two negatives each, logit -10."""
    found = mean("pairwise_sigmoid", {}, np.eye(4), np.array([0, 0, 1, 1]))
    assert found == pytest.approx(math.log1p(math.exp(10)) + 2 * math.log1p(math.exp(-10)), 1e-12)
    params = LOSSES["pairwise_sigmoid"]().init(jax.random.key(0), 4, 2)
    assert params == {"logit_scale": np.float32(math.log(10)), "logit_bias": -10}


def peers():
    """(our name, our options, their loss, the name of their proxies) for losses we define alike."""
    from pytorch_metric_learning import distances as d
    from pytorch_metric_learning import losses as p

    classes = {"num_classes": 4, "embedding_size": 6}
    return [
        ("triplet", {"margin": 0.2}, p.TripletMarginLoss(0.2), None),
        ("triplet", {"soft": True}, p.TripletMarginLoss(0.2, smooth_loss=True), None),
        ("triplet", {"swap": True}, p.TripletMarginLoss(0.2, swap=True), None),
        (
            "triplet",
            {"distance": "sqeuclidean", "normalize": False},
            p.TripletMarginLoss(0.2, distance=d.LpDistance(normalize_embeddings=False, power=2)),
            None,
        ),
        ("contrastive", {}, p.ContrastiveLoss(0, 1), None),
        ("nt_xent", {}, p.NTXentLoss(0.07), None),
        ("sup_con", {}, p.SupConLoss(0.1), None),
        ("multi_similarity", {}, p.MultiSimilarityLoss(2, 50, 0.5), None),
        ("circle", {}, p.CircleLoss(0.4, 80), None),
        ("fast_ap", {}, p.FastAPLoss(10), None),
        ("proxy_anchor", {}, p.ProxyAnchorLoss(**classes, margin=0.1, alpha=32), "proxies"),
        ("proxy_nca", {"scale": 9.0}, p.ProxyNCALoss(**classes, softmax_scale=9), "proxies"),
        ("normalized_softmax", {}, p.NormalizedSoftmaxLoss(**classes, temperature=0.05), "W"),
        ("arcface", {}, p.ArcFaceLoss(**classes, margin=28.6, scale=64), "W"),
        ("cosface", {}, p.CosFaceLoss(**classes, margin=0.35, scale=64), "W"),
        (
            "sub_center_arcface",
            {},
            p.SubCenterArcFaceLoss(**classes, margin=28.6, scale=64, sub_centers=3),
            "W",
        ),
        (
            "soft_triple",
            {"tau": 0.0, "centers": 5},
            p.SoftTripleLoss(**classes, centers_per_class=5, la=20, gamma=0.1, margin=0.01),
            "fc",
        ),
    ]


def test_pytorch_metric_learning_gives_the_same(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorch_metric_learning")
    x = rng.normal(size=(12, 6))
    labels = np.array([0, 0, 1, 1, 2, 2, 1, 1, 0, 3, 3, 3])
    for name, options, theirs, weights in peers():
        theirs = theirs.double()
        params = {}
        if weights:
            matrix = getattr(theirs, weights).detach().numpy()
            rows = matrix if weights == "proxies" else matrix.T  # one class (and centre) a row
            many = rows.shape[0] != 4
            params = {"proxies": rows.reshape(4, -1, 6) if many else rows}
        value, gradient = value_and_gradient(name, options, x, labels, params)
        point = torch.tensor(x, requires_grad=True)
        expected = theirs(point, torch.tensor(labels))
        expected.backward()
        np.testing.assert_allclose(value, expected.item(), rtol=1e-7, err_msg=name)
        np.testing.assert_allclose(gradient, point.grad.numpy(), rtol=1e-5, atol=1e-7, err_msg=name)
