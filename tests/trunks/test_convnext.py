"""ConvNeXt against NumPy in float64, straight from a state dict as timm names it.

`benchmarks/timm_trunks.py` compares the same with timm itself.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from siamese_jax import weights
from siamese_jax.trunks import convnext
from siamese_jax.trunks.table import CLIP, IMAGENET, TRUNKS, Trunk
from siamese_jax.weights.sources import SOURCES

DEPTHS, WIDTHS = (1, 2, 1, 1), (4, 6, 8, 10)


def entries(v2, as_convolutions):
    """Names and shapes of timm's state dict."""
    named = [("stem.0.weight", (WIDTHS[0], 3, 4, 4)), ("stem.0.bias", WIDTHS[:1])]
    norm = lambda name, c: [(f"{name}.weight", (c,)), (f"{name}.bias", (c,))]  # noqa: E731
    named += norm("stem.1", WIDTHS[0])
    one = (1, 1) if as_convolutions else ()
    for i, (depth, c) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        if i:
            named += norm(f"stages.{i}.downsample.0", WIDTHS[i - 1])
            named += [(f"stages.{i}.downsample.1.weight", (c, WIDTHS[i - 1], 2, 2))]
            named += [(f"stages.{i}.downsample.1.bias", (c,))]
        for j in range(depth):
            base = f"stages.{i}.blocks.{j}"
            named += [(f"{base}.conv_dw.weight", (c, 1, 7, 7)), (f"{base}.conv_dw.bias", (c,))]
            named += norm(f"{base}.norm", c)
            named += [
                (f"{base}.mlp.fc1.weight", (4 * c, c, *one)),
                (f"{base}.mlp.fc1.bias", (4 * c,)),
            ]
            named += [(f"{base}.mlp.fc2.weight", (c, 4 * c, *one)), (f"{base}.mlp.fc2.bias", (c,))]
            named += norm(f"{base}.mlp.grn", 4 * c) if v2 else [(f"{base}.gamma", (c,))]
    last = WIDTHS[-1]
    return [*named, *norm("head.norm", last), ("head.fc.weight", (7, last)), ("head.fc.bias", (7,))]


def norm(s, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def dense(s, name, x):
    return x @ np.squeeze(s[f"{name}.weight"]).T + s[f"{name}.bias"]


def squares(s, name, x):
    kernel = s[f"{name}.weight"]
    p = kernel.shape[-1]
    out = np.zeros((len(x), x.shape[1] // p, x.shape[2] // p, len(kernel)))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            out[:, i, j] = np.einsum("nabc,ocab->no", window, kernel)
    return out + s[f"{name}.bias"]


def depthwise(s, name, x):
    kernel, padded = s[f"{name}.weight"][:, 0], np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    out = np.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.einsum("nabc,cab->nc", padded[:, i : i + 7, j : j + 7], kernel)
    return out + s[f"{name}.bias"]


def oracle(state, x, v2):
    s = {name: leaf.astype(np.float64) for name, leaf in state.items()}
    x = norm(s, "stem.1", squares(s, "stem.0", x))
    outputs = {"stem": x}
    for i, depth in enumerate(DEPTHS):
        if i:
            name = f"stages.{i}.downsample"
            x = squares(s, f"{name}.1", norm(s, f"{name}.0", x))
        for j in range(depth):
            base = f"stages.{i}.blocks.{j}"
            y = dense(
                s, f"{base}.mlp.fc1", norm(s, f"{base}.norm", depthwise(s, f"{base}.conv_dw", x))
            )
            y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
            if v2:
                g = np.sqrt((y**2).sum((1, 2), keepdims=True))
                share = g / (g.mean(-1, keepdims=True) + 1e-6)
                grn = f"{base}.mlp.grn"
                y = y + s[f"{grn}.weight"] * y * share + s[f"{grn}.bias"]
            x = x + s.get(f"{base}.gamma", 1.0) * dense(s, f"{base}.mlp.fc2", y)
        outputs[f"stage{i + 1}"] = x
    return outputs | {"top": norm(s, "head.norm", x.mean((1, 2), keepdims=True))}


@pytest.mark.parametrize(("v2", "as_convolutions"), [(False, False), (True, True)])
def test_every_stage_is_that_of_the_definition(v2, as_convolutions, tmp_path, rng, monkeypatch):
    build = partial(convnext.ConvNeXt, DEPTHS, WIDTHS, v2)
    row = Trunk(build, convnext.widths(WIDTHS), ("torch",), 32, "none")
    monkeypatch.setitem(TRUNKS, name := f"convnext_small{v2}", row)
    named = entries(v2, as_convolutions)
    state = {key: rng.normal(0, 0.4, shape).astype(np.float32) for key, shape in named}
    save_file(state, tmp_path / "a.safetensors")
    found = weights.load(name, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found.classifier["kernel"], state["head.fc.weight"].T)
    x = rng.normal(size=(2, 69, 34, 3))  # no multiples: what is left over is not seen
    outputs = jax.jit(build().apply)(found.variables, jnp.asarray(x, jnp.float32))
    expected = oracle(state, x, v2)
    assert outputs.keys() == expected.keys() == row.widths.keys()
    for stage, output in outputs.items():
        scale = np.abs(expected[stage]).max()
        np.testing.assert_allclose(output, expected[stage], rtol=0, atol=1e-5 * scale)


@pytest.mark.long
def test_a_frozen_trunk_takes_a_few_images_at_a_time_and_gives_the_same(rng):
    build = partial(convnext.ConvNeXt, DEPTHS, WIDTHS, True)
    x = jnp.asarray(rng.normal(size=(4, 64, 64, 3)), jnp.float32)
    variables = jax.jit(build().init)(jax.random.key(0), x)
    found, expected = (
        jax.jit(build(folded=folded).apply)(variables, x) for folded in (True, False)
    )
    for stage, values in expected.items():
        np.testing.assert_allclose(found[stage], values, atol=1e-5)


def test_a_channel_without_signal_has_a_finite_gradient():
    module, x = convnext.ResponseNorm(), jnp.zeros((1, 2, 2, 3)).at[..., 0].set(1.0)
    variables = module.init(jax.random.key(0), x)
    found = jax.grad(lambda x: module.apply(variables, x).sum())(x)
    assert np.isfinite(found).all()


def test_sources_are_as_timm_1_0_31_lists_them():
    """(pixels, size, licence)."""
    for trunk, tag, expected in (
        ("convnext_base", "clip_laion2b", (CLIP, 256, "Apache-2.0")),
        ("convnext_base", "clip_laiona_320", (CLIP, 320, "Apache-2.0")),
        ("convnext_tiny", "in12k_ft_in1k_384", (IMAGENET, 384, "Apache-2.0")),
        ("convnext_tiny", "dinov3_lvd1689m", (IMAGENET, 224, "DINOv3-License")),
        ("convnextv2_tiny", "fcmae_ft_in1k", (IMAGENET, 224, "CC-BY-NC-4.0")),
    ):
        source = SOURCES[trunk, f"timm:{trunk}.{tag}"]
        assert (source.preprocessing, source.image_size, source.licence) == expected
