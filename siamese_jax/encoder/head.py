"""The head: dense layers on the pooled features, and how the first one is fitted to start with."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.encoder import lda
from siamese_jax.encoder.pooling import GeM, l2_normalize
from siamese_jax.errors import UserError

Array = jax.Array

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "tanh": jnp.tanh}
NORMS = ("none", "batch", "layer")


class Head(nn.Module):
    """pooled features -> [signed root] -> [unit parts] -> [centre] -> dense -> [unit length].

    Every dense layer has dropout on its input; all but the last are followed by the normalisation
    and the activation. No layers at all gives the (possibly transformed) features themselves.

    Attributes:
      layers: widths of the dense layers; the last one is the embedding's.
      activation: one of ACTIVATIONS.
      dropout: probability of zeroing an input of a dense layer, in training.
      norm: "none", "batch" or "layer", after every dense layer but the last.
      signed_sqrt: x -> sign(x) sqrt(|x|) on the features: tames bursty activations (Perronnin et
        al., 2010, "Improving the Fisher kernel", section 3.2).
      unit: widths of the features' parts, one a stage, each of which is brought to unit length, so
        that their cosines count alike; nothing leaves the lengths as they are.
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
    unit: tuple[int, ...] = ()

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
        if self.unit:
            ends = np.cumsum(self.unit)[:-1].tolist()
            x = jnp.concatenate([l2_normalize(part) for part in jnp.split(x, ends, -1)], axis=-1)
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
    unit: bool = False,
    parts: tuple[int, ...] = (),
) -> Head:
    """A Head from config values, each checked. Raises UserError naming the field at fault.

    `parts` are the widths of the features' parts, which `unit` brings to unit length.
    """
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
        layers,
        activation,
        float(dropout),
        norm,
        signed_sqrt,
        centre,
        normalize,
        gem,
        dtype,
        tuple(parts) if unit else (),
    )


def fit_head(
    head: Head,
    variables: dict[str, Any],
    features: np.ndarray,
    *,
    init: str = "random",
    labels: np.ndarray | None = None,
    shrinkage: float = 0.5,
    block: int = lda.BLOCK,
) -> dict[str, Any]:
    """Fits what a head takes from the training features: their mean, and its first layer.

    With m the mean of the transformed features, the head's mean is m (if it centres) and the first
    dense layer computes P (x - m), the head's part or its own. "pca" takes the leading eigenvectors
    of the covariance for P, "lda" the map of `siamese_jax.encoder.lda`, scaled to rows of
    mean square length 1. Accumulated in float64, block by block, so `features` may be a memory
    map of any length.

    Args:
      head: the module.
      variables: {"params", "batch_stats"} of `head.init`.
      features: float [n, ...], inputs of the head; taken by places, int [m].
      init: "random", "pca" or "lda" of the first dense layer; with the latter two it must not be
        wider than the features.
      labels: of "lda", int [n] with -1 for none, or bool [n, c].
      shrinkage: of "lda".
      block: rows transformed at a time.

    Returns:
      New variables of the same structure.

    Raises:
      UserError: a layer that is too wide, or what `lda.closed_form` raises.
    """
    variables = jax.tree.map(lambda leaf: leaf, variables)
    fitted = init != "random" and bool(head.layers)
    if not (fitted or head.centre):
        return variables
    rows = head_inputs(head, variables, features)
    if fitted:
        width, most = head.layers[0], len(variables["params"]["dense1"]["kernel"])
        if width > most:
            raise UserError(
                f"head.init={init!r} cannot make {width} outputs of {most} features; "
                f"set head.layers to at most {most}, or head.init='random'"
            )
    none = np.full(len(features), -1)
    labels = none if labels is None else labels
    if fitted and init == "lda":
        options: Any = {"shrinkage": shrinkage, "width": width, "block": block}
        mean, axes = lda.fitted(rows, labels, **options)
        kernel = axes.T / np.sqrt(np.square(axes).sum() / width)
    else:
        mean, spread = lda.mean_and_covariance(lda.scatter(rows, none, block=block))
        kernel = lda.eigen(spread, width)[1] if fitted else spread
    if head.centre:
        offset = np.asarray(variables["batch_stats"]["mean"], np.float64)
        variables["batch_stats"]["mean"] = jnp.asarray(offset + mean, jnp.float32)
    if fitted:
        bias = np.zeros(width) if head.centre else -(mean @ kernel)
        variables["params"]["dense1"] = {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
    return variables


def head_inputs(
    head: Head, variables: dict[str, Any], features: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """What the first dense layer of a head sees of some rows: places int [m] -> float32 [m, c]."""
    # A head without layers is the transform of its features, and nothing else.
    plain = head.clone(layers=(), normalize=False)
    transform = jax.jit(lambda x: plain.apply(variables, x))

    def rows(places: np.ndarray) -> np.ndarray:
        x = np.asarray(features[places])
        # Blocks differ in length; padded to a power of two, they share a few compilations.
        pad = (1 << (len(x) - 1).bit_length()) - len(x)
        return np.asarray(transform(np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))))[: len(x)]

    return rows
