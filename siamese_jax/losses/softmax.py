"""Losses that classify: plain softmax, and its variants on the unit sphere."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import distances
from siamese_jax.losses import miners
from siamese_jax.losses.core import (
    Loss,
    Params,
    Terms,
    as_weights,
    class_targets,
    cross_entropy,
    refuse,
    similarity,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss
from siamese_jax.losses.proxies import init_proxies

_WHY = "it compares embeddings with its own class weights, not with each other"


@checked_loss
def softmax() -> Loss:
    """Softmax classification: the baseline, whose penultimate features are the embedding.

        z = x W + b,  l_i = -log softmax(z_i)[y_i]

    init gives {"kernel": [d, classes], "bias": [classes]}. Values and weights [n], the loss is
    their mean. With multi-hot labels, l_i is the mean over the item's labels; an item without a
    label of 0 .. classes - 1 has weight 0.
    """

    def init(key: Array, embedding_dim: int, num_classes: int) -> Params:
        kernel = jax.random.normal(key, (embedding_dim, num_classes), jnp.float32)
        bias = jnp.zeros(num_classes, jnp.float32)
        return {"kernel": kernel * embedding_dim**-0.5, "bias": bias}

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        refuse("softmax", _WHY, mined=mined, references=references)
        x = miners.candidates(embeddings, mask, None)
        kernel, bias = params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype)
        logits = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST) + bias[None, :]
        return cross_entropy(logits, class_targets(labels, kernel.shape[1]), mask)

    return Loss(init, jax.jit(apply))


@checked_loss
def normalized_softmax(temperature: float = 0.05) -> Loss:
    """Softmax on the cosines s of embeddings and class weights: l_i = -log softmax(s_i / t)[y_i].

    Wang et al.: NormFace (2017); Zhai, Wu: Classification is a Strong Baseline for Deep Metric
    Learning (2019), with t = 0.05. init gives {"proxies": [classes, d]}. Values, weights and
    several labels as `softmax`. A zero vector has cosine 0 with all.
    """
    return _on_sphere("normalized_softmax", lambda s, targets: s / temperature)


@checked_loss
def arcface(margin_degrees: float = 28.6, scale: float = 64.0) -> Loss:
    """ArcFace: an angle is added between an embedding and its own class, theta = arccos s.

        z_c = scale cos(theta_c) for the others, and for the item's own class (or classes)
        z_y = scale cos(theta_y + m)              if theta_y <= pi - m
            = scale (cos(theta_y) - m sin(m))     beyond, where the first would rise again
        l_i = -log softmax(z_i)[y_i]

    Deng et al.: ArcFace: Additive Angular Margin Loss for Deep Face Recognition (2019), where the
    margin is 0.5 radians, about 28.6 degrees. init gives {"proxies": [classes, d]}. Values,
    weights and several labels as `softmax`.

    Defined values: where an embedding lies exactly on its class weight, sin(theta) has gradient 0.
    """
    return _on_sphere("arcface", _angular_margin(margin_degrees, scale))


@checked_loss
def sub_center_arcface(
    margin_degrees: float = 28.6, scale: float = 64.0, *, centers: int = 3
) -> Loss:
    """`arcface` with several weights a class, of which the nearest to the embedding counts.

    Deng et al.: Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces
    (2020). init gives {"proxies": [classes, centers, d]}.
    """
    return _on_sphere(
        "sub_center_arcface",
        _angular_margin(margin_degrees, scale),
        centers=centers,
        merge=lambda s: jnp.max(s, axis=2),
    )


@checked_loss
def cosface(margin: float = 0.35, scale: float = 64.0) -> Loss:
    """CosFace: z_y = scale (s_y - margin), z_c = scale s_c; l_i = -log softmax(z_i)[y_i].

    Wang et al.: CosFace: Large Margin Cosine Loss for Deep Face Recognition (2018). init gives
    {"proxies": [classes, d]}. Values, weights and several labels as `softmax`.
    """
    return _on_sphere("cosface", lambda s, targets: scale * jnp.where(targets, s - margin, s))


@checked_loss
def soft_triple(
    scale: float = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    *,
    centers: int = 10,
    tau: float = 0.2,
) -> Loss:
    """SoftTriple: several centres a class, joined by a soft maximum, w_ck the k-th of class c.

        S_c = sum_k softmax_k(<x, w_ck> / gamma) <x, w_ck>
        l_i = -log softmax(scale (S - margin [c = y]))[y]
            + tau / (C K (K - 1)) sum_c sum_(j < k) |w_cj - w_ck|

    Qian et al.: SoftTriple Loss: Deep Metric Learning Without Triplet Sampling (2019). The second
    part draws a class's centres together; it is added to every value, so once to the mean. init
    gives {"proxies": [classes, centers, d]}. Values, weights and several labels as `softmax`.

    Defined values: centres that coincide have distance 0 with gradient 0.
    """

    def spread(w: Array) -> Array:
        if centers == 1:
            return jnp.zeros((), w.dtype)
        # About the class's mean: centres that have met must not cancel.
        w = w - lax.stop_gradient(jnp.mean(w, axis=1, keepdims=True))
        products = jnp.einsum("cjd,ckd->cjk", w, w, precision=lax.Precision.HIGHEST)
        norms = jnp.sum(w * w, axis=2)
        first, second = jnp.triu_indices(centers, 1)
        squared = norms[:, first] + norms[:, second] - 2 * products[:, first, second]
        apart = distances.safe_sqrt(jnp.maximum(squared, 0))
        return tau * jnp.sum(apart) / (w.shape[0] * centers * (centers - 1))

    return _on_sphere(
        "soft_triple",
        lambda s, targets: scale * jnp.where(targets, s - margin, s),
        centers=centers,
        merge=lambda s: jnp.sum(jax.nn.softmax(s / gamma, axis=2) * s, axis=2),
        penalty=spread,
    )


def _angular_margin(margin_degrees: float, scale: float) -> Callable[[Array, Array], Array]:
    m = math.radians(margin_degrees)

    def logits(s: Array, targets: Array) -> Array:
        sine = distances.safe_sqrt(jnp.maximum(1 - s * s, 0))
        further = jnp.where(
            s >= -math.cos(m),  # theta <= pi - m
            s * math.cos(m) - sine * math.sin(m),
            s - m * math.sin(m),
        )
        return scale * jnp.where(targets, further, s)

    return logits


def _on_sphere(
    name: str,
    logits: Callable[[Array, Array], Array],
    *,
    centers: int | None = None,
    merge: Callable[[Array], Array] = lambda s: s,
    penalty: Callable[[Array], Array] | None = None,
) -> Loss:
    """Cross-entropy of logits(cosines [n, classes], targets), the frame of the losses above.

    With centers, proxies are [classes, centers, d] and merge takes [n, classes, centers] to
    [n, classes]; penalty(unit proxies) is added to each value.
    """

    def init(key: Array, embedding_dim: int, num_classes: int) -> Params:
        proxies = init_proxies(key, embedding_dim, num_classes * (centers or 1))["proxies"]
        return {
            "proxies": proxies
            if centers is None
            else proxies.reshape(num_classes, centers, embedding_dim)
        }

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        refuse(name, _WHY, mined=mined, references=references)
        x = distances.unit(miners.candidates(embeddings, mask, None))
        proxies = params["proxies"].astype(x.dtype)
        flat = distances.unit(proxies.reshape(-1, proxies.shape[-1]))
        s = merge(similarity(x, flat, "cosine").reshape(len(x), *proxies.shape[:-1]))
        targets = class_targets(labels, proxies.shape[0])
        values, weights = cross_entropy(logits(s, targets), targets, mask)
        if penalty is not None:
            values = values + penalty(flat.reshape(proxies.shape))
        return values, as_weights(weights, values)

    return Loss(init, jax.jit(apply))
