"""MobileNetV3 against NumPy in float64, from state dicts as timm and torchvision name them.

`benchmarks/timm_trunks.py` compares the same with timm itself; `tests/weights/test_keras.py` with
Keras.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from siamese_jax import weights
from siamese_jax.trunks.folding import fold_batch_norm
from siamese_jax.trunks.table import HALF, IMAGENET, TRUNKS, UNIT
from siamese_jax.weights.sources import SOURCES

# The paper's tables: kernel, expansion, channels out, squeeze-and-excite, hard-swish, stride; and
# where timm begins a new stage.
LARGE = """
1 3  16  16 - - 1
2 3  64  24 - - 2
2 3  72  24 - - 1
3 5  72  40 s - 2
3 5 120  40 s - 1
3 5 120  40 s - 1
4 3 240  80 - h 2
4 3 200  80 - h 1
4 3 184  80 - h 1
4 3 184  80 - h 1
5 3 480 112 s h 1
5 3 672 112 s h 1
6 5 672 160 s h 2
6 5 960 160 s h 1
6 5 960 160 s h 1
"""
SMALL = """
1 3  16  16 s - 2
2 3  72  24 - - 2
2 3  88  24 - - 1
3 5  96  40 s h 2
3 5 240  40 s h 1
3 5 240  40 s h 1
4 5 120  48 s h 1
4 5 144  48 s h 1
5 5 288  96 s h 2
5 5 576  96 s h 1
5 5 576  96 s h 1
"""
ROWS = {
    size: [row.split() for row in table.strip().splitlines()]
    for size, table in (("large", LARGE), ("small", SMALL))
}
ENDS = {"large": (960, 1280), "small": (576, 1024)}
EXCITED = {"large": (24, 32, 32, 120, 168, 168, 240, 240), "small": (8, 24, 64, 64, 32, 40, 72)}
EXCITED["small"] += (144, 144)


def layers(size, library):
    """(name of the convolution, of its norm, shape) in the order in which an image meets them."""
    torch = library == "torchvision"
    stem, last, top = {
        "timm": (("conv_stem", "bn1"), ("blocks.{}.0.conv", "blocks.{}.0.bn1"), "conv_head"),
        "torchvision": (
            ("features.0.0", "features.0.1"),
            ("features.{}.0", "features.{}.1"),
            "classifier.0",
        ),
    }[library]
    found, before, excited = [(*stem, (16, 3, 3, 3))], 16, iter(EXCITED[size])
    for i, (stage, k, wide, out, squeeze, _, _) in enumerate(ROWS[size]):
        k, wide, out = int(k), int(wide), int(out)
        first = [row[0] for row in ROWS[size]].index(stage)
        base = f"features.{i + 1}.block" if torch else f"blocks.{int(stage) - 1}.{i - first}"
        plan = [("conv_pw", (wide, before, 1, 1))] if i else []
        plan += [("conv_dw", (wide, 1, k, k))]
        if squeeze == "s":
            narrow = next(excited)
            plan += [("conv_reduce", (narrow, wide, 1, 1)), ("conv_expand", (wide, narrow, 1, 1))]
        plan += [("conv_pwl" if i else "conv_pw", (out, wide, 1, 1))]
        step = norm = 0
        for name, shape in plan:
            norm += "se" not in name and "reduce" not in name and "expand" not in name
            if "reduce" in name or "expand" in name:
                fc = f"{base}.{step}.fc{1 if 'reduce' in name else 2}"
                found.append((fc if torch else f"{base}.se.{name}", None, shape))
                step += "expand" in name
                continue
            names = (f"{base}.{step}.0", f"{base}.{step}.1")
            found.append((*(names if torch else (f"{base}.{name}", f"{base}.bn{norm}")), shape))
            step += 1
        before = out
    wide, features = ENDS[size]
    at = len(ROWS[size]) + 1 if torch else int(ROWS[size][-1][0])
    found.append((*(name.format(at) for name in last), (wide, before, 1, 1)))
    return [*found, (top, None, (features, wide) if torch else (features, wide, 1, 1))]


def state_dict(size, library):
    """Random leaves, the same for both libraries."""
    rng, state = np.random.default_rng(1), {}
    for conv, norm, shape in layers(size, library):
        draw = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        state[f"{conv}.weight"] = draw
        bias = rng.uniform(-0.3, 0.3, shape[0])
        if norm is None:
            state[f"{conv}.bias"] = bias
        else:
            state |= {
                f"{norm}.bias": bias,
                f"{norm}.running_mean": rng.uniform(-0.2, 0.2, shape[0]),
            }
            for leaf in ("weight", "running_var"):
                state[f"{norm}.{leaf}"] = rng.uniform(0.5, 1.5, shape[0])
    head = "classifier.3" if library == "torchvision" else "classifier"
    state[f"{head}.weight"] = rng.normal(size=(7, ENDS[size][1]))
    state[f"{head}.bias"] = rng.normal(size=7)
    return {name: leaf.astype(np.float32) for name, leaf in state.items()}


def convolve(x, kernel, stride, same):
    """The definition: kernel [out, in or 1, k, k], one of its places after the other."""
    k, rest = kernel.shape[-1], [size % stride or stride for size in x.shape[1:3]]
    total = [max(kernel.shape[-1] - r, 0) if same else k // 2 * 2 for r in rest]
    pads = [(t // 2, t - t // 2) for t in total]
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n in x.shape[1:3])
    y = 0.0
    for i in range(k):
        for j in range(k):
            part = x[:, i : i + rows * stride : stride, j : j + columns * stride : stride]
            part, weight = part[:, :rows, :columns], kernel[:, :, i, j]
            y = y + (
                part * weight[:, 0]
                if len(weight) == x.shape[-1] and weight.shape[1] == 1
                else part @ weight.T
            )
    return y


def oracle(state, x, size, epsilon, same):
    """{stage: output} of float64 images [n,h,w,3], from timm's names."""
    s = {name: leaf.astype(np.float64) for name, leaf in state.items()}
    queue = iter(layers(size, "timm"))
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    gate = lambda x: np.clip(x + 3, 0, 6) / 6  # noqa: E731
    swish = lambda x: x * gate(x)  # noqa: E731

    def layer(x, act, stride=1):
        conv, norm, _ = next(queue)
        y = convolve(x, s[f"{conv}.weight"], stride, same)
        if norm is None:
            return act(y + s[f"{conv}.bias"])
        y = (y - s[f"{norm}.running_mean"]) / np.sqrt(s[f"{norm}.running_var"] + epsilon)
        return act(y * s[f"{norm}.weight"] + s[f"{norm}.bias"])

    outputs = {"stem": layer(x, swish, 2)}
    x = outputs["stem"]
    for i, (stage, _, _, _, squeeze, hard, stride) in enumerate(ROWS[size]):
        act, y = swish if hard == "h" else relu, x
        y = layer(y, act) if i else y
        y = layer(y, act, int(stride))
        if squeeze == "s":
            mean = y.mean((1, 2), keepdims=True)
            y = y * layer(layer(mean, relu), gate)
        y = layer(y, lambda x: x)
        x = x + y if x.shape == y.shape else y
        outputs[f"stage{stage}"] = x
    outputs[f"stage{int(stage) + 1}"] = y = layer(x, swish)
    return outputs | {"top": layer(y.mean((1, 2), keepdims=True), swish)}


@pytest.mark.parametrize(
    ("size", "file", "form"),
    [
        ("small", "model", "torch"),
        ("small", "mobilenet_v3_small-047dcff4", "torchvision"),
        ("small", "tf_mobilenetv3_small_100", "keras"),
        ("large", "mobilenetv3_large_100", "torch"),
    ],
)
def test_every_stage_is_that_of_the_definition(size, file, form, tmp_path, rng):
    """On sides odd and even, folded and not; names of leaves and of the file tell the form."""
    library = "torchvision" if form == "torchvision" else "timm"
    trunk, path = f"mobilenetv3_{size}_100", tmp_path / f"{file}.safetensors"
    save_file(state_dict(size, library), path)
    found = weights.load(trunk, path)
    assert (found.form, found.preprocessing) == (form, HALF if form == "keras" else IMAGENET)
    assert found.classifier["kernel"].shape == (ENDS[size][1], 7)
    state = state_dict(size, "timm")
    epsilon = 1e-5 if form == "torch" else 1e-3
    x = rng.normal(size=(2, 75, 66, 3))
    module, variables = TRUNKS[trunk].build(form=form), found.variables
    if form == "torchvision":
        module, variables = module.clone(folded=True), fold_batch_norm(trunk, form, variables)
    outputs = jax.jit(module.apply)(variables, jnp.asarray(x, jnp.float32))
    expected = oracle(state, x, size, epsilon, form == "keras")
    assert outputs.keys() == expected.keys() == TRUNKS[trunk].widths.keys()
    for stage, output in outputs.items():
        scale = np.abs(expected[stage]).max()
        np.testing.assert_allclose(output, expected[stage], rtol=0, atol=3e-5 * scale)


@pytest.mark.parametrize("size", ["small", "large"])
def test_both_namings_are_one_network(size, tmp_path):
    found = []
    for library in ("timm", "torchvision"):
        save_file(state_dict(size, library), tmp_path / f"{library}.safetensors")
        found.append(weights.load(f"mobilenetv3_{size}_100", tmp_path / f"{library}.safetensors"))
    assert [weights.form for weights in found] == ["torch", "torchvision"]
    jax.tree.map(np.testing.assert_array_equal, *(weights.variables for weights in found))


def test_sources_are_as_their_libraries_list_them():
    """(form, pixels, address)."""
    for trunk, name, *expected in (
        ("large_100", "timm:{}.ra_in1k", "torch", IMAGENET, "timm/{}.ra_in1k"),
        ("large_100", "timm:{}.ra4_e3600_r224_in1k", "torch", HALF, "timm/{}.ra4_e3600_r224_in1k"),
        ("large_100", "timm:{}.miil_in21k", "torch", UNIT, "timm/{}.miil_in21k"),
        ("small_050", "timm:{}.lamb_in1k", "torch", IMAGENET, "timm/{}.lamb_in1k"),
        ("large_075", "timm:tf_{}.in1k", "keras", HALF, "/v0.1-weights/tf_{}-150ee8b0.pth"),
        ("large_100", "torchvision:IMAGENET1K_V2", "torchvision", IMAGENET, "5c1a4163.pth"),
        ("small_075", "keras", "keras", HALF, "/weights_mobilenet_v3_small_224_0.75_float.h5"),
    ):
        trunk = f"mobilenetv3_{trunk}"
        source = SOURCES[trunk, name.format(trunk)]
        assert [source.form, source.preprocessing] == expected[:2]
        assert source.address.endswith(expected[2].format(trunk))
