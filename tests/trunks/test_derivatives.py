"""The derivatives that are written by hand, against NumPy's loops in float64 and finite steps."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from siamese_jax.trunks import activations
from siamese_jax.trunks.convolution import convolve
from siamese_jax.trunks.layers import BatchNorm, Norm, max_pool

# height, width, kernel, stride, padding
SHAPES = [
    (9, 7, 3, 1, ((1, 1), (1, 1))),
    (8, 9, 3, 2, ((0, 1), (1, 1))),
    (10, 31, 5, 2, ((1, 2), (2, 2))),
    (5, 5, 5, 1, ((2, 2), (2, 2))),
    (7, 6, 7, 1, ((3, 3), (3, 3))),
    (12, 12, 5, 3, ((0, 0), (2, 1))),
    (4, 4, 3, 2, ((0, 0), (0, 0))),
    (11, 60, 3, 1, ((4, 0), (0, 5))),
    (1, 1, 5, 2, ((2, 2), (2, 2))),
    (1, 3, 3, 4, ((1, 1), (1, 1))),
    (7, 7, 2, 2, ((0, 0), (0, 0))),
]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def sums(x, kernel, dy, stride, padding):
    """(dx, dkernel) of the sum over y * dy for a y of all channels, from its definition."""
    k, (top, bottom), (left, right) = len(kernel), *padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(dy.shape[1:3]):
        for a, b in np.ndindex(k, k):
            row, column = i * stride + a, j * stride + b
            dx[:, row, column] += dy[:, i, j] @ kernel[a, b].T
            dkernel[a, b] += padded[:, row, column].T @ dy[:, i, j]
    height, width = x.shape[1:3]
    return dx[:, top : top + height, left : left + width], dkernel


def loops(x, kernel, dy, stride, padding):
    """(dx, dkernel) of a depthwise y: of one whose kernel [k,k,c,c] is a diagonal in c."""
    diagonal = kernel[:, :, 0, :, None] * np.eye(kernel.shape[-1])
    dx, dkernel = sums(x, diagonal, dy, stride, padding)
    return dx, np.einsum("abcc->abc", dkernel)[:, :, None]


def close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max() + 1e-9
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance * scale)


def gradients(run, x, kernel):
    """A random dy, and what it gives of x and of the kernel: one program."""
    x, kernel = jnp.float32(x), jnp.float32(kernel)
    dy = normal(2, *jax.eval_shape(run, x, kernel).shape)
    pulled = quick.jit(lambda x, kernel, dy: jax.vjp(run, x, kernel)[1](dy))
    return dy, pulled(x, kernel, jnp.float32(dy))


@pytest.mark.parametrize(("height", "width", "k", "stride", "padding"), SHAPES)
def test_depthwise_gradients_are_the_sums_of_their_definition(height, width, k, stride, padding):
    x, kernel = normal(0, 3, height, width, 4), normal(1, k, k, 1, 4)
    run = lambda x, kernel: convolve(x, kernel, stride, padding, depthwise=True)  # noqa: E731
    dy, found = gradients(run, x, kernel)
    for one, wanted in zip(found, loops(x, kernel, dy, stride, padding), strict=True):
        close(one, wanted)


def test_depthwise_gradients_in_bfloat16_keep_the_dtype():
    x, kernel = (jnp.asarray(normal(*s), jnp.bfloat16) for s in ((0, 2, 9, 9, 4), (1, 3, 3, 1, 4)))
    padding = ((1, 1), (1, 1))
    y, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, 1, padding, True), x, kernel)
    found = pull(jnp.ones_like(y))
    wanted = loops(*(np.float64(a) for a in (x, kernel, jnp.ones_like(y))), 1, padding)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        close(one, other, 0.05)


def test_depthwise_gradients_under_vmap_scan_and_remat():
    xs, kernel = jnp.float32(normal(0, 3, 2, 6, 6, 4)), jnp.float32(normal(1, 3, 3, 1, 4))
    padding = ((1, 1), (1, 1))

    def loss(kernel, x):
        return jnp.sum(convolve(x, kernel, 2, padding, True) ** 2)

    slope = jax.grad(loss)
    wanted = jnp.stack([slope(kernel, x) for x in xs])
    close(jax.vmap(slope, (None, 0))(kernel, xs), np.float64(wanted))
    scanned = jax.grad(
        lambda k: jax.lax.scan(lambda s, x: (s + jax.checkpoint(loss)(k, x), None), 0.0, xs)[0]
    )
    close(scanned(kernel), np.float64(wanted.sum(0)))


def test_a_depthwise_layer_keeps_its_input_and_not_a_view_for_each_tap():
    x, kernel = jnp.zeros((4, 40, 40, 16)), jnp.zeros((5, 5, 1, 16))
    run = lambda x, k: jnp.sum(convolve(x, k, 1, ((2, 2), (2, 2)), True) ** 2)  # noqa: E731
    program = jax.jit(jax.grad(run, (0, 1))).lower(x, kernel).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * x.nbytes


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_product_of_pixels(stride):
    x, kernel = normal(0, 2, 6, 5, 7), normal(1, 1, 1, 7, 3)
    padding = ((0, 0), (0, 0))
    run = lambda x, kernel: convolve(x, kernel, stride, padding)  # noqa: E731
    y, pull = jax.vjp(run, jnp.float32(x), jnp.float32(kernel))
    dy = normal(2, *y.shape)
    dx, dkernel = pull(jnp.float32(dy))
    wanted = np.zeros_like(x)
    wanted[:, ::stride, ::stride] = dy @ kernel[0, 0].T
    close(dx, wanted)
    close(dkernel[0, 0], np.einsum("nhwi,nhwo->io", x[:, ::stride, ::stride], dy))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 1)]
)
def test_gradient_of_a_maximum_goes_to_the_first_of_the_largest(size, stride, padding):
    x = np.random.default_rng(0).integers(-3, 3, (2, 9, 8, 3)).astype(float)  # many are equal
    pool = lambda x: max_pool(x, size, stride, padding)  # noqa: E731
    y, pull = jax.vjp(pool, jnp.float32(x))
    dy = normal(1, *y.shape)
    padded = np.pad(x, ((0, 0), *((padding,) * 2,) * 2, (0, 0)), constant_values=-np.inf)
    dx = np.zeros_like(padded)
    for n, i, j, c in np.ndindex(y.shape):
        rows, columns = (slice(p * stride, p * stride + size) for p in (i, j))
        window = padded[n, rows, columns, c]
        assert y[n, i, j, c] == window.max()
        a, b = np.unravel_index(window.argmax(), window.shape)
        dx[n, i * stride + a, j * stride + b, c] += dy[n, i, j, c]
    close(
        pull(jnp.float32(dy))[0],
        dx[:, padding : padding + x.shape[1], padding : padding + x.shape[2]],
    )


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_gradients_of_batch_normalisation(offset):
    """Against finite differences in float64, statistics included."""
    x, dy = normal(0, 4, 3, 2, 5) + offset, normal(1, 4, 3, 2, 5)
    scale, bias = normal(2, 5), normal(3, 5)
    layer = BatchNorm(Norm(1e-3, 0.9))
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}

    def ours(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
        return jnp.sum(y * jnp.float32(dy))

    def by_hand(x, scale, bias):
        centred = x - x.mean((0, 1, 2))
        y = scale * centred / np.sqrt((centred**2).mean((0, 1, 2)) + 1e-3) + bias
        return (y * dy).sum()

    inputs = (x, scale, bias)
    found = jax.grad(ours, (0, 1, 2))(*map(jnp.float32, inputs))
    for i, gradient in enumerate(found):
        wanted = np.zeros_like(inputs[i])
        for place in np.ndindex(wanted.shape):
            step = np.zeros_like(wanted)
            step[place] = 1e-5
            ends = [
                by_hand(*(a + sign * step if j == i else a for j, a in enumerate(inputs)))
                for sign in (1, -1)
            ]
            wanted[place] = (ends[0] - ends[1]) / 2e-5
        close(gradient, wanted, 1e-4)


def gate(x):
    return 1 / (1 + math.exp(-x))


SLOPES = {
    "relu": lambda x: float(x > 0),
    "relu6": lambda x: float(0 < x < 6),
    "silu": lambda x: gate(x) + x * gate(x) * gate(-x),
    "gelu": lambda x: (
        (1 + math.erf(x / math.sqrt(2))) / 2 + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    ),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slopes_of_the_activations(name, dtype):
    x = jnp.asarray([-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 6.0, 7.5, 40.0], dtype)
    y, pull = jax.vjp(getattr(activations, name), x)
    (dx,) = pull(jnp.full_like(x, 2))
    assert y.dtype == dx.dtype == x.dtype
    wanted = [2 * SLOPES[name](float(value)) for value in x]
    np.testing.assert_allclose(np.float64(dx), wanted, atol=1e-6 if dtype == "float32" else 0.02)


def test_values_are_those_of_the_plain_forms():
    x = jnp.float32(normal(0, 1000) * 5)
    plain = {"relu": nn.relu, "relu6": lambda x: jnp.clip(x, 0, 6), "silu": nn.silu}
    for name, form in plain.items():
        np.testing.assert_array_equal(getattr(activations, name)(x), form(x))


@pytest.mark.parametrize(
    ("height", "width", "k", "stride", "padding", "channels"),
    [
        *((*shape, (16, 5)) for shape in SHAPES),
        *((*shape, (3, 5)) for shape in SHAPES[2:6:3]),  # few colours
        # Winograd's: whole tiles, parts of them, other numbers of channels.
        (8, 12, 3, 1, ((1, 1), (1, 1)), (32, 32)),
        (7, 5, 3, 1, ((1, 1), (1, 1)), (32, 40)),
        (9, 6, 3, 1, ((1, 1), (1, 1)), (64, 32)),
        # Not: a border of another width, few pixels to many channels.
        (8, 8, 3, 1, ((0, 2), (1, 1)), (32, 32)),
        (4, 4, 3, 1, ((1, 1), (1, 1)), (64, 64)),
    ],
)
def test_convolution_gradients_are_the_sums_of_their_definition(
    height, width, k, stride, padding, channels
):
    x, kernel = normal(0, 3, height, width, channels[0]), normal(1, k, k, *channels)
    run = lambda x, kernel: convolve(x, kernel, stride, padding)  # noqa: E731
    dy, found = gradients(run, x, kernel)
    for one, wanted in zip(found, sums(x, kernel, dy, stride, padding), strict=True):
        close(one, wanted, 2e-5)


def test_convolution_gradients_in_bfloat16_keep_the_dtype():
    x, kernel = (
        jnp.asarray(normal(*s), jnp.bfloat16) for s in ((0, 2, 9, 9, 32), (1, 3, 3, 32, 8))
    )
    padding = ((1, 1), (1, 1))
    y, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, 1, padding), x, kernel)
    wanted = sums(*(np.float64(a) for a in (x, kernel, jnp.ones_like(y))), 1, padding)
    for one, other in zip(pull(jnp.ones_like(y)), wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        close(one, other, 0.05)
