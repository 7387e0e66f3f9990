"""Pairwise cross-entropy of distances in hyperbolic space: Hyp-ViT's loss."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax import distances
from siamese_jax.losses.core import Loss, Params, Terms, no_params, view
from siamese_jax.losses.info_nce import pair_cross_entropy
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss

CLIP_RADIUS = 2.3  # the paper's
# Of the ball's radius: nothing lies beyond it, as in the authors' code, where distances overflow.
_EDGE = 1 - 1e-3


@checked_loss
def hyperbolic(
    temperature: float = 0.2, *, curvature: float = 0.1, clip_radius: float = CLIP_RADIUS
) -> Loss:
    """Pairwise cross-entropy in the Poincare ball of curvature -c, D its distance:

        u = tanh(sqrt(c) |x|) x / (sqrt(c) |x|), of x cut to length clip_radius
        D(u, w) = 2 / sqrt(c) artanh(sqrt(c) |(-u) (+) w|),  (+) the Moebius addition
                = 2 / sqrt(c) arsinh(sqrt(c) |u - w| / sqrt((1 - c |u|^2) (1 - c |w|^2)))
        l_ap = -log(e^(-D_ap / t) / (e^(-D_ap / t) + sum_N e^(-D_an / t)))

    Ermolov et al.: Hyperbolic Vision Transformers: Combining Improvements in Metric Learning
    (2022). The embedding is x, in the plane that touches the ball at its centre. As in `nt_xent`, a
    positive pair has only itself and the anchor's negatives in the denominator: the whole batch,
    as in the paper, with two images a class. (With more, the authors' code makes batches of two a
    class out of it, so each pair meets fewer negatives.) Values are per anchor [n], the mean over
    its positives; weights count them, so the loss is the mean over positive pairs.

    The paper's x is what a linear layer gives, of any length, cut only where it is too long. With
    `head.normalize`, the default, all have length 1: a clip radius above that never acts, and D
    depends on the angle alone. A run says so; `head.normalize=False` is the paper's way.

    What a gallery is ranked by is not D but the distance chosen there. Among embeddings of one
    length D grows with the angle alone, so the cosine and the Euclidean distance give its very
    order: with `head.normalize`, and by the cosine where all are longer than the clip radius.
    Between embeddings of different lengths neither does.

    Args:
      curvature: c. The smaller, the flatter: D goes to 2 |x - y| as c goes to 0.
      clip_radius: longer embeddings are cut to this length, which keeps their gradient alive. The
        paper's settings are the defaults.

    Defined values: 0 for a pair without negatives (which counts) and where there is no pair. Equal
    points have distance 0 with gradient 0.
    """
    root = math.sqrt(curvature)
    longest = min(clip_radius, math.atanh(_EDGE) / root)

    def in_ball(x: Array) -> tuple[Array, Array]:
        """The rows in the ball [n, d], and their 1 / sqrt(1 - c |u|^2) [n]."""
        full = root * distances.safe_sqrt(jnp.sum(x * x, axis=1))
        angle = jnp.minimum(full, root * longest)
        curved = full > 1e-6  # below it tanh(a) is a
        scale = jnp.where(curved, jnp.tanh(angle) / jnp.where(curved, full, 1), 1)
        return x * scale[:, None], jnp.cosh(angle)

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        v = view(embeddings, labels, mask, mined, references, normalize=False)
        (u, stretch_u), (w, stretch_w) = in_ball(v.x), in_ball(v.y)
        stretch = stretch_u[:, None] * stretch_w[None, :]
        d = 2 / root * jnp.arcsinh(root * distances.pairwise(u, w) * stretch)
        return pair_cross_entropy(-d / temperature, v)

    return Loss(no_params, jax.jit(apply))
