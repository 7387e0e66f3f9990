"""Vision Transformers (Dosovitskiy et al. 2021, arXiv:2010.11929) and what others made of them.

One module, as timm builds it. What differs stands in the `Plan`: LayerScale and registers (DINOv2,
arXiv:2304.07193 and 2309.16588), a norm before the blocks and QuickGELU (CLIP, arXiv:2103.00020),
attention pooling in place of a class token (SigLIP, arXiv:2303.15343), queries and keys turned by
their place in place of position embeddings, and gates inside an MLP (DINOv3, arXiv:2508.10104), two
layers on all patches side by side (Unicom, arXiv:2304.05884).

torch, dino: how position embeddings are resized, or angles rounded; see `positions`.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax.errors import UserError
from siamese_jax.trunks import positions
from siamese_jax.trunks.activations import Activation, gelu
from siamese_jax.trunks.layers import Conv, Dense, LayerNorm, Norm, Patches
from siamese_jax.trunks.stochastic_depth import dropped

ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu6": nn.relu6,
}
_small = nn.initializers.normal(0.02)


def attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k' / sqrt(d)) v in each head: q [n,t,heads,d], k and v [n,s,heads,d] -> like q.

    On a CPU, XLA is faster where heads come first and the sum divides the product, not the weights.
    """
    if jax.default_backend() != "cpu":
        with jax.numpy_dtype_promotion("standard"):  # its softmax is in float32 whatever the dtype
            return jax.nn.dot_product_attention(q, k, v)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("nhtd,nhsd->nhts", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    y = product("nhts,nhsd->nhtd", weights.astype(v.dtype), v) / weights.sum(-1, keepdims=True)
    return y.astype(q.dtype).transpose(0, 2, 1, 3)


class Plan(NamedTuple):
    """A variant.

    `patch` is the side of a patch in pixels, `grid` the side in patches that position embeddings
    are made for, `hidden` the width inside an MLP (4 times `width` if 0). `gains`: whether there is
    LayerScale, a gain of each channel on what a block adds. `class_position`: whether the class
    token has a position embedding too. `turned`: whether queries and keys are turned by their place
    instead, which leaves no position embeddings. `biased`: whether queries and values have biases,
    and keys too unless they are turned; by default all or, of a `turned` one, none. `gated`: an MLP
    is fc2(silu(fc1_g(x)) fc1_x(x)). `flat`: width of the feature that two layers make of all
    patches side by side, for images of the one `grid` alone; 0 if there is none. `rest`: pixels
    that images of its own size have beyond the `grid`, and that are not seen.
    """

    patch: int
    grid: int
    width: int
    depth: int
    heads: int
    hidden: int = 0
    act: str = "gelu"
    epsilon: float = 1e-6
    gains: bool = False
    registers: int = 0
    class_token: bool = True
    class_position: bool = True
    pre_norm: bool = False
    attention_pool: bool = False
    turned: bool = False
    biased: bool | None = None
    gated: bool = False
    flat: int = 0
    rest: int = 0

    def __repr__(self) -> str:
        """Fits know a trunk by it: what came later is left out where it changes nothing."""
        usual = self._field_defaults
        shown = {n: v for n, v in self._asdict().items() if n not in _LATER or v != usual[n]}
        return f"Plan({', '.join(f'{name}={v!r}' for name, v in shown.items())})"

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each output: maps of the patches, and last the token that sums them up.

        Of a `turned` one, timm's feature is the mean of the patches, so that map is last.
        """
        token = ["cls"] if self.class_token else ["attention"] if self.attention_pool else []
        last = [*token, "top"] if self.turned else ["top", *token]
        stages = ("stem", *(f"block{i + 1}" for i in range(self.depth)), *last)
        feature = {"feature": self.flat} if self.flat else {}
        return {**dict.fromkeys(stages, self.width), **feature}


_LATER = ("biased", "gated", "flat", "rest")


class Part(nn.Module):
    """What the parts of a transformer are made of."""

    plan: Plan
    dtype: Any

    def norm(self, name: str) -> LayerNorm:
        """Over the channels of each token."""
        return LayerNorm(self.plan.epsilon, name=name)

    def dense(self, width: int, name: str, bias: bool = True) -> Dense:
        """y = x kernel + bias."""
        return Dense(width, bias, self.dtype, name=name)

    def attend(self, q: Array, k: Array, v: Array, turns: tuple[Array, ...] = ()) -> Array:
        """A layer on softmax(q k' / sqrt(d)) v of each head: [n,t,c], twice [n,s,c] -> [n,t,c]."""
        q, k, v = (x.reshape(*x.shape[:2], self.plan.heads, -1) for x in (q, k, v))
        if turns:
            q, k = (positions.turn(x, *turns) for x in (q, k))
        y = attention(q, k, v)
        return self.dense(self.plan.width, "proj")(y.reshape(*y.shape[:2], -1))

    def mlp(self, x: Array) -> Array:
        """Two layers with the activation between them."""
        hidden = self.plan.hidden or 4 * self.plan.width
        if self.plan.gated:
            wide = nn.silu(self.dense(hidden, "fc1_g")(x)) * self.dense(hidden, "fc1_x")(x)
        else:
            wide = ACTIVATIONS[self.plan.act](self.dense(hidden, "fc1")(x))
        return self.dense(self.plan.width, "fc2")(wide)

    def offset(self, name: str) -> Array:
        """A bias that stands by itself."""
        bias = self.param(name, nn.initializers.zeros, (self.plan.width,), jnp.float32)
        return bias.astype(self.dtype)

    def gained(self, y: Array, name: str) -> Array:
        """LayerScale, where the trunk has it."""
        if not self.plan.gains:
            return y
        gain = self.param(name, nn.initializers.ones, (self.plan.width,), jnp.float32)
        return y * gain.astype(self.dtype)[None, None]


class Block(Part):
    """x [n,t,c] -> y = x + attention(norm(x)) -> y + mlp(norm(y)); `first`: of the first token."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        turns: tuple[Array, ...] = (),
        drop: Array | None = None,
        first: bool = False,
    ) -> Array:
        plan = self.plan
        project = self.dense(3 * plan.width, "qkv", not plan.turned and plan.biased is not False)
        q, k, v = jnp.split(project(self.norm("norm1")(x)), 3, axis=-1)
        if plan.turned and plan.biased:
            q, v = (y + self.offset(name)[None, None] for name, y in (("q_bias", q), ("v_bias", v)))
        if first:
            x, q = x[:, :1], q[:, :1]
        x = x + dropped(self.gained(self.attend(q, k, v, turns), "gain1"), drop, 0)
        return x + dropped(self.gained(self.mlp(self.norm("norm2")(x)), "gain2"), drop, 1)


class AttentionPool(Part):
    """One learnt query asks all tokens: [n,t,c] -> [n,1,c]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.plan.width
        latent = self.param("latent", _small, (1, width), jnp.float32)
        q = jnp.broadcast_to(self.dense(width, "q")(latent)[None], (len(x), 1, width))
        k, v = jnp.split(self.dense(2 * width, "kv")(x), 2, axis=-1)
        y = self.attend(q, k, v)
        return y + self.mlp(self.norm("norm")(y))


class Stem(Part):
    """Pixels -> class token, registers, patches, with what tells where they are: [n,t,c].

    Weights bring their own grid of positions: [places, c], that of the class token first. It is
    `plan.grid` x `plan.grid` only where there were none.
    """

    rule: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        plan, width = self.plan, self.plan.width
        bias = not plan.pre_norm  # CLIP has none
        x = Patches(width, plan.patch, bias, self.dtype, name="patches")(x)
        n, rows, columns, _ = x.shape
        before = int(plan.class_token and plan.class_position and not plan.turned)
        if not plan.turned:
            table = self._table(before + plan.grid**2)
            side = math.isqrt(len(table) - before)
            grid = table[before:].reshape(side, side, width)
            x = x + positions.resize(grid, (rows, columns), self.rule).astype(x.dtype)[None]
        tokens = [x.reshape(n, rows * columns, width)]

        def prepend(token: Array) -> None:
            tokens.insert(0, jnp.broadcast_to(token.astype(x.dtype)[None], (n, *token.shape)))

        if plan.registers:
            prepend(self.param("registers", _small, (plan.registers, width), jnp.float32))
        if plan.class_token:
            token = self.param("cls", _small, (1, width), jnp.float32)
            prepend(token + table[:1] if before else token)
        y = jnp.concatenate(tokens, axis=1)
        return self.norm("norm")(y) if plan.pre_norm else y

    def _table(self, places: int) -> Array:
        if self.has_variable("params", "positions"):  # of any grid, which `param` would refuse
            table: Array = self.get_variable("params", "positions")
            return table
        return self.param("positions", _small, (places, self.plan.width), jnp.float32)


class Top(Part):
    """The last norm."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.norm("norm")(x)


class Feature(Part):
    """Unicom's: norm(a layer on norm(a layer on all patches side by side)): [n,h,w,c] -> [n,1,1,d].

    The batch's norms; there are no biases.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x, norm = x.reshape(len(x), 1, 1, -1), Norm(2e-5, 0.9)
        for width, name in ((self.plan.width, "fc1"), (self.plan.flat, "fc2")):
            x = Conv(width, norm=norm, dtype=self.dtype, name=name)(x, train)
        return x


class ViT(nn.Module):
    """x [n,h,w,3], normalised -> {"stem", "block1", ..., "top": [n,h/patch,w/patch,c], "cls": ...}.

    A stage's map has the tokens of the patches; "top" is the last one's after the norm. Its class
    token, "cls", its attention pooling, "attention", or Unicom's "feature" is a map of one place:
    [n,1,1,c]. "block8:cls" is the class token of a block behind the last norm, as DINO's own linear
    evaluation takes those of the last four. "mean" is the norm of the mean of the last block's
    patches, where "top" is the norm of each: timm's `fc_norm`. "block8:tokens" are all of its
    tokens [n,t,c], which x is where the trunk goes on `after` it (of a square image). Nothing but
    "feature" depends on the batch. "proj" is CLIP's embedding, cls W, where the parameters hold W
    as "proj": of weights asked for it, see `weights.load.with_stages`.

    Raises:
      UserError: sides that are no multiples of the patch, or not those of a "feature".
    """

    plan: Plan
    form: str = "torch"
    dtype: Any = jnp.float32
    remat: bool = dataclasses.field(default=False, repr=False)  # the same numbers: no other trunk

    @nn.compact
    def __call__(
        self,
        x: Array,
        train_stages: tuple[str, ...] = (),
        *,
        after: str = "",
        drops: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        plan, shared = self.plan, (self.plan, self.dtype)
        rows, columns = _grid(x.shape, plan, after)
        turns: tuple[Array, ...] = ()
        if plan.turned:
            turns = positions.turns((rows, columns), plan.width // plan.heads, self.form)
        kind = nn.remat(Block) if self.remat else Block
        block = nn.jit(kind)  # the first one's trace serves them all
        top, outputs = Top(*shared, name="top"), {}
        blocks = [f"block{i + 1}" for i in range(plan.depth)]
        token = None
        names = ["stem", *blocks, "top"]
        for name in names[names.index(after) :] if after else names:
            if name == "stem" != after:
                x = Stem(*shared, self.form, name=name)(x)
            elif name != after:
                drop = drops[name][0] if drops and name in drops else None
                if name == blocks[-1] and plan.class_token and not (self.remat or turns):
                    # Where nothing but the class token is asked for, XLA drops the other one.
                    last = Block(*shared, name=name)
                    token, x = last(x, (), drop, first=True), last(x, (), drop)
                else:
                    x = top(x) if name == "top" else block(*shared, name=name)(x, turns, drop)
            outputs[f"{name}:tokens"] = x
            outputs[name] = x[:, -rows * columns :].reshape(-1, rows, columns, plan.width)
            if plan.class_token and name in blocks:
                outputs[f"{name}:cls"] = top(x[:, :1] if token is None else token)[:, :, None]
        if plan.flat:
            feature = Feature(*shared, name="feature")
            outputs["feature"] = feature(outputs["top"], "feature" in train_stages)
        elif plan.class_token:
            outputs["cls"] = x[:, :1, None] if token is None else top(token)[:, :, None]
            if after != "top":
                outputs["mean"] = top(outputs[blocks[-1]].mean((1, 2), keepdims=True))
            if self.has_variable("params", "proj"):
                width: int = self.get_variable("params", "proj")["kernel"].shape[1]
                project = Dense(width, False, self.dtype, name="proj")
                outputs["proj"] = project(outputs["cls"])
        elif plan.attention_pool:
            outputs["attention"] = AttentionPool(*shared, name="attention")(x)[:, :, None]
        return outputs


def _grid(shape: tuple[int, ...], plan: Plan, after: str) -> tuple[int, int]:
    """Rows and columns of patches: of images [n,h,w,3], or of a square one's tokens [n,t,c]."""
    if after:
        side = math.isqrt(shape[1] - plan.registers - int(plan.class_token))
        return side, side
    _check_size(shape[1], shape[2], plan)
    return shape[1] // plan.patch, shape[2] // plan.patch


def _check_size(height: int, width: int, plan: Plan) -> None:
    patch, own = plan.patch, plan.patch * plan.grid + plan.rest
    if height == width == own:
        return
    if plan.flat:
        raise UserError(
            f"images of {height} x {width} pixels: this trunk's layers on all patches side by side "
            f"are for images of {own} x {own} alone; set image_size={own}"
        )
    if height % patch or width % patch or not height or not width:
        below = max(1, min(height, width) // patch) * patch
        raise UserError(
            f"images of {height} x {width} pixels are no whole number of this trunk's patches of "
            f"{patch} x {patch}: set image_size to a multiple, such as {below} or {below + patch}"
        )
