"""What a frozen trunk's weights become for speed: BatchNorm folded away, kernels transformed once.

In inference a norm is a straight line, so it disappears into the convolution before it:

    g (k * x + b - m) / sqrt(v + e) + c  =  (k g') * x + (b - m) g' + c,   g' = g / sqrt(v + e)
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.trunks.table import find


def fold_batch_norm(trunk: str, form: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for `build(form=form, folded=True)`, worked out in float64, kept in float32.

    variables {"params", "batch_stats"} -> {"params"}, where every convolution has a kernel and a
    bias and there is no norm. A trunk without statistics, or that is never folded, is what it was.
    """
    module = find(trunk).build(form=form)
    if not variables.get("batch_stats") or not hasattr(module, "folded"):
        return {kind: variables[kind] for kind in ("params", "batch_stats") if variables.get(kind)}
    epsilon = module.norm_epsilon
    return {"params": _fold(variables["params"], variables.get("batch_stats", {}), epsilon)}


def _fold(params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    if "kernel" not in params:
        return {name: _fold(child, stats.get(name, {}), epsilon) for name, child in params.items()}
    if "norm" not in params:
        return dict(params)
    kernel, norm, moments = params["kernel"], params["norm"], stats["norm"]
    gain = _wide(norm["scale"]) / np.sqrt(_wide(moments["var"]) + epsilon)
    bias = _wide(params["bias"]) if "bias" in params else 0.0
    folded = {
        "kernel": _wide(kernel) * gain,
        "bias": (bias - _wide(moments["mean"])) * gain + _wide(norm["bias"]),
    }
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in folded.items()}


def transformed_kernels(module: Any, folded: Mapping[str, Any], size: Sequence[int]) -> Any:
    """The "tiles" collection that images of [h, w, 3] use (see `trunks.winograd`); perhaps empty.

    Worked out once, here; without it, a folded trunk transforms its kernels in every call.
    """
    return _tiles(module, tuple(size), folded).get("tiles", {})


# One program for each module and size, whichever weights it is given.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _tiles(module: Any, size: tuple[int, ...], folded: Mapping[str, Any]) -> Any:
    return module.apply(folded, jnp.zeros((1, *size), module.dtype), mutable=["tiles"])[1]


def _wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64)
