"""The head: dense layers on the pooled features, and how a linear one starts from a PCA."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.encoder.pooling import GeM, l2_normalize
from siamese_jax.errors import UserError

Array = jax.Array

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "tanh": jnp.tanh}
NORMS = ("none", "batch", "layer")


class Head(nn.Module):
    """pooled features -> [signed root] -> [centre] -> dense layers -> [unit length].

    Every dense layer has dropout on its input; all but the last are followed by the normalisation
    and the activation. No layers at all gives the (possibly transformed) features themselves.

    Attributes:
      layers: widths of the dense layers; the last one is the embedding's.
      activation: one of ACTIVATIONS.
      dropout: probability of zeroing an input of a dense layer, in training.
      norm: "none", "batch" or "layer", after every dense layer but the last.
      signed_sqrt: x -> sign(x) sqrt(|x|) on the features: tames bursty activations (Perronnin et
        al., 2010, "Improving the Fisher kernel", section 3.2).
      centre: subtract `batch_stats["mean"]`, fitted once on training features by `fit_head`.
      normalize: L2-normalise the embedding.
      gem: pool feature maps by GeM first; its power is a parameter of the head.
      dtype: the compute type; parameters and the embedding stay float32.
    """

    layers: tuple[int, ...] = (512, 256, 256)
    activation: str = "relu"
    dropout: float = 0.0
    norm: str = "none"
    signed_sqrt: bool = False
    centre: bool = False
    normalize: bool = True
    gem: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, mask: Array | None = None) -> Array:
        """x: float [n, c], or [n, h, w, c] under GeM -> float32 [n, d].

        Args:
          x: features.
          train: dropout on, and batch statistics in use by `norm="batch"`. Needs a "dropout" key.
          mask: bool [n], rows that count in the batch statistics; all by default.
        """
        x = self._transform(x)
        for i, width in enumerate(self.layers):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.Dense(width, dtype=self.dtype, name=f"dense{i + 1}")(x)
            if i + 1 < len(self.layers):
                x = ACTIVATIONS[self.activation](self._norm(x, i, train, mask))
        x = x.astype(jnp.float32)
        return l2_normalize(x) if self.normalize else x

    def _transform(self, x: Array) -> Array:
        """What happens to the features before the first dense layer: [n, ...] -> float32 [n, c]."""
        if self.gem:
            x = GeM(name="gem")(x)
        x = x.astype(jnp.float32)
        if self.signed_sqrt:
            # The slope is infinite at 0; where the feature is 0, it has none to pass on.
            size = jnp.sqrt(jnp.where(x == 0, 1.0, jnp.abs(x)))
            x = jnp.where(x == 0, 0.0, jnp.sign(x) * size)
        if self.centre:
            mean = self.variable("batch_stats", "mean", jnp.zeros, (x.shape[-1],))
            x = x - mean.value[None]
        return x

    def _norm(self, x: Array, i: int, train: bool, mask: Array | None) -> Array:
        if self.norm == "batch":
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f"norm{i + 1}")(
                x, mask=None if mask is None else mask[:, None]
            )
        if self.norm == "layer":
            return nn.LayerNorm(dtype=self.dtype, name=f"norm{i + 1}")(x)
        return x


def make_head(
    layers: tuple[int, ...] | int = (),
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    norm: str = "none",
    signed_sqrt: bool = False,
    centre: bool = False,
    normalize: bool = True,
    gem: bool = False,
    dtype: Any = jnp.float32,
) -> Head:
    """A Head from config values, each checked. Raises UserError naming the field at fault."""
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    if any(width < 1 for width in layers):
        raise UserError(f"head.layers={layers} has a width below 1; give positive widths")
    if activation not in ACTIVATIONS:
        raise UserError(f"head.activation={activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if norm not in NORMS:
        raise UserError(f"head.norm={norm!r}; choose one of {', '.join(NORMS)}")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"head.dropout={dropout} is not in [0, 1)")
    return Head(
        layers, activation, float(dropout), norm, signed_sqrt, centre, normalize, gem, dtype
    )


def fit_head(
    head: Head, variables: dict[str, Any], features: np.ndarray, *, pca: bool, block: int = 4096
) -> dict[str, Any]:
    """Fits what a head takes from the training features: their mean, and a PCA as first layer.

    With mu and V the mean and the leading eigenvectors of the covariance of the transformed
    features, the head's mean is mu (if it centres) and the first dense layer computes V^T x, less
    V^T mu where the head does not centre. Accumulated in float64, block by block, so `features`
    may be a memory map of any length.

    Args:
      head: the module.
      variables: {"params", "batch_stats"} of `head.init`.
      features: float [n, ...], inputs of the head.
      pca: whether the first dense layer starts as the PCA; it must not be wider than the features.
      block: rows transformed at a time.

    Returns:
      New variables of the same structure.
    """
    variables = jax.tree.map(lambda leaf: leaf, variables)
    if not (pca or head.centre):
        return variables
    # A head without layers is the transform of its features, and nothing else.
    transform = jax.jit(lambda x: head.clone(layers=(), normalize=False).apply(variables, x))
    moments = _moments(transform, features, block, second=pca)
    mean, offset = moments[0], _stored_mean(head, variables)
    if head.centre:
        variables["batch_stats"]["mean"] = jnp.asarray(offset + mean, jnp.float32)
    if pca:
        kernel = _leading_eigenvectors(moments[1], head.layers[0])
        bias = np.zeros(head.layers[0]) if head.centre else -(mean @ kernel)
        variables["params"]["dense1"] = {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
    return variables


def _stored_mean(head: Head, variables: dict[str, Any]) -> np.ndarray | float:
    return np.asarray(variables["batch_stats"]["mean"], np.float64) if head.centre else 0.0


def _moments(
    transform: Callable[[np.ndarray], Any], features: np.ndarray, block: int, *, second: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean [c] and covariance [c, c] (zeros unless asked for) of the transformed features."""
    total: Any = 0.0
    products: Any = 0.0
    for start in range(0, len(features), block):
        x = np.asarray(transform(np.asarray(features[start : start + block])), np.float64)
        total = total + x.sum(axis=0)
        if second:
            products = products + x.T @ x
    mean = total / len(features)
    return mean, products / len(features) - np.outer(mean, mean) if second else np.zeros(())


def _leading_eigenvectors(covariance: np.ndarray, width: int) -> np.ndarray:
    """[c, width], by falling eigenvalue, the largest entry of each made positive."""
    if width > len(covariance):
        raise UserError(
            f"head.init='pca' cannot make {width} outputs of {len(covariance)} features; "
            f"set head.layers to at most {len(covariance)}, or head.init='random'"
        )
    vectors = np.linalg.eigh(covariance)[1][:, ::-1][:, :width]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return vectors * np.sign(largest)
