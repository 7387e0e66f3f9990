"""The optimiser: which parameters move, how fast, and when."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
import optax

from siamese_jax.errors import UserError
from siamese_jax.storage.tree import path_name

Schedule = Callable[[Any], Any]
Tree = Any


def matches(params: Tree, patterns: Sequence[str]) -> Tree:
    """A tree of bools: whether some pattern matches the start of the leaf's path.

    Args:
      params: any tree of arrays.
      patterns: regular expressions, anchored at the start of paths such as "head/dense1/kernel".

    Raises:
      UserError: a pattern is malformed, or matches nothing (a typing error, most likely).
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        try:
            found = any(re.match(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"the parameter pattern {pattern!r} is malformed: {error}") from None
        if not found:
            groups = sorted({"/".join(name.split("/")[:2]) for name in names})
            raise UserError(
                f"the parameter pattern {pattern!r} matches no parameter; the parameters begin "
                f"with {', '.join(groups)}"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.match(pattern, path_name(path)) for pattern in patterns), params
    )


def trainable(params: Tree, freeze: Sequence[str]) -> Tree:
    """A tree of bools, False where a pattern of `freeze` matches. Raises as `matches` does."""
    return jax.tree.map(lambda frozen: not frozen, matches(params, freeze))


def select(tree: Tree, mask: Tree) -> Tree:
    """The tree with an empty node (optax.MaskedNode) in place of every leaf outside the mask."""
    return jax.tree.map(lambda keep, leaf: leaf if keep else optax.MaskedNode(), mask, tree)


def merge(selected: Tree, tree: Tree, mask: Tree) -> Tree:
    """Undoes `select`: leaves of `selected` inside the mask, of `tree` outside."""
    return jax.tree.map(lambda keep, new, old: new if keep else old, mask, selected, tree)


# (learning rate, steps to the last one) -> a schedule of the steps after the warm-up.
SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "constant": lambda rate, rest: optax.constant_schedule(rate),
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda rate, rest: optax.linear_schedule(rate, 0.0, rest),
}


def warmup_schedule(
    learning_rate: float, *, schedule: str, warmup_steps: int, total_steps: int
) -> Schedule:
    """Linear warm-up from 0, then "constant", "cosine" or "linear" down to 0 at the last step."""
    rest = max(1, total_steps - warmup_steps)
    if schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={schedule!r}; choose one of {', '.join(SCHEDULES)}")
    after = SCHEDULES[schedule](learning_rate, rest)
    if not warmup_steps:
        return after
    # The first step already moves: 1/(w + 1) of the way, not 0.
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def lr_scales(params: Tree, groups: Sequence[tuple[str, float]]) -> Tree:
    """A tree of floats: the product of the factors of all patterns that match the leaf's path.

    Raises as `matches` does.
    """
    scales = jax.tree.map(lambda _: 1.0, params)
    for pattern, factor in groups:
        group = matches(params, [pattern])
        scales = jax.tree.map(lambda s, inside, f=factor: s * f if inside else s, scales, group)
    return scales


def _scale_leaves(scales: Tree) -> optax.GradientTransformation:
    """Each update times its own factor; what is masked stays so."""

    def scaled(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(
            lambda scale, update: update if _masked(update) else scale * update, scales, updates
        )

    return optax.stateless(scaled)


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def stage_scales(
    stages: Sequence[str], params: Tree, used: Collection[str], decay: float
) -> dict[str, float]:
    """{stage: decay^(stages between it and the head)}, for each that has parameters.

    The last stage that the head sees counts 0, the one before it 1, and so on, as in BEiT (Bao et
    al. 2022, arXiv:2106.08254), whose last norm goes with the head; after ELECTRA (Clark et al.
    2020, arXiv:2003.10555).

    Args:
      stages: all of the trunk's, in the order of their depth.
      params: of the trunk, by stage.
      used: the stages that the head sees; one without parameters ("cls") stands behind all.
      decay: above 0.
    """
    order = [stage for stage in stages if stage in params]
    end = len(order) - 1
    last = max((order.index(s) if s in order else end for s in used), default=end)
    return {stage: decay ** max(0, last - i) for i, stage in enumerate(order)}


# Tables and tokens that are learnt as they stand: they multiply nothing.
TOKENS = ("positions", "cls", "registers", "latent")

# What weight decay is on: (the leaf's own name, its axes) -> whether it is.
DECAY_ON: dict[str, Callable[[str, int], bool]] = {
    "kernels": lambda name, axes: axes > 1 and name not in TOKENS,
    "matrices": lambda name, axes: axes > 1,
    "all": lambda name, axes: True,
}


def decayed(params: Tree, decay_on: str) -> Tree:
    """A tree of bools: the leaves that weight decay is on.

    "kernels" are matrices, kernels and proxies, but no norms, biases or gains, nor the tables of
    positions, class tokens, registers and learnt queries of a transformer; "matrices" has these
    too, as all that has two axes or more; "all" is every leaf, as PyTorch's optimisers take them.
    """
    if decay_on not in DECAY_ON:
        raise UserError(f"optim.decay_on={decay_on!r}; choose one of {', '.join(DECAY_ON)}")
    rule = DECAY_ON[decay_on]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rule(path_name(path[-1:]), np.ndim(leaf)), params
    )


def decay_told(params: Tree, moving: Tree, decay_on: str) -> str:
    """One line: on how many moving leaves weight decay is, and what is left out, by name."""
    names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path[-1:]), params)
    rows = [jax.tree.leaves(tree) for tree in (names, moving, decayed(params, decay_on))]
    out = Counter(name for name, moves, on in zip(*rows, strict=True) if moves and not on)
    count = sum(moves and on for _, moves, on in zip(*rows, strict=True))
    left = ", ".join(f"{number} {name}" for name, number in sorted(out.items()))
    whole = count + out.total()
    return f"weight decay ({decay_on}) on {count} of {whole} moving leaves; left out: {left or 0}"


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "sgd": lambda: optax.trace(decay=0.9),
    "nesterov": lambda: optax.trace(decay=0.9, nesterov=True),
    "rmsprop": lambda: optax.scale_by_rms(decay=0.9),
    "lion": optax.scale_by_lion,
}


def make_optimizer(
    params: Tree,
    *,
    name: str = "adamw",
    learning_rate: float | Schedule,
    weight_decay: float = 0.0,
    decay_on: str = "kernels",
    clip_norm: float | None = None,
    freeze: Sequence[str] = (),
    lr_scale: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Clip, direction, decoupled weight decay, per-group scale, learning rate; masked.

    Frozen leaves have no state, take no part in the clipping norm and are not updated. Weight
    decay is decoupled (Loshchilov & Hutter, 2019, arXiv:1711.05101).

    Args:
      params: the whole tree {"trunk", "head", "loss"}; only shapes and paths are read.
      name: one of OPTIMIZERS.
      learning_rate: a number or an optax schedule of the step.
      weight_decay: times the learning rate.
      decay_on: one of DECAY_ON, see `decayed`.
      clip_norm: largest global norm of the gradient of the trainable leaves; None for no limit.
      freeze: patterns of frozen leaves, see `matches`.
      lr_scale: (pattern, factor) pairs, see `lr_scales`.

    Raises:
      UserError: unknown optimiser, or a pattern that matches nothing.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim.name={name!r}; choose one of {', '.join(OPTIMIZERS)}")
    mask = trainable(params, freeze)
    steps = [OPTIMIZERS[name]()]
    if clip_norm:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        steps.append(
            optax.add_decayed_weights(weight_decay, select(decayed(params, decay_on), mask))
        )
    if lr_scale:
        steps.append(_scale_leaves(lr_scales(params, lr_scale)))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    return optax.masked(optax.chain(*steps), mask)
