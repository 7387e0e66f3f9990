"""Values and gradient norms that a published implementation gives, in float64.

Input: x = sin(1..32) as 8 x 4, labels 0,0,0,1,1,2,2,3, and a proxy per class, cos(1..16) as 4 x 4.
Where pytorch-metric-learning is installed, it is asked again, on other numbers and for gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siamese_jax import losses
from siamese_jax.losses import LOSSES

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

        # Compiling is all of the time here, so it is not asked to optimise.
        quick = {"xla_backend_optimization_level": 0}
        step = jax.jit(jax.value_and_grad(mean), compiler_options=quick)
        value, gradient = step(jnp.asarray(x, jnp.float64))
        assert value.dtype == gradient.dtype == jnp.float64
        return float(value), np.asarray(gradient)


@pytest.mark.parametrize(("name", "options", "value", "norm"), PUBLISHED)
def test_published_values(name, options, value, norm):
    has_proxies = name in ("proxy_anchor", "proxy_nca", "arcface", "normalized_softmax")
    params = {"proxies": PROXIES} if has_proxies else {}
    found, gradient = value_and_gradient(name, options, X, LABELS, params)
    # The values are given to ten places.
    assert found == pytest.approx(value, rel=0, abs=6e-11)
    if norm is not None:
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=0, abs=6e-11)


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
