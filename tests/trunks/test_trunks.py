"""Trunks: exact sizes of every variant, convolutions against a loop, norms, folding, stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.trunks import convolution, table, winograd
from siamese_jax.trunks.folding import fold_batch_norm, transformed_kernels
from siamese_jax.trunks.parameters import PARAMETERS
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.weights.port import shapes

# What timm 1.0.31 and torchvision count, without the classifier.
THEIRS = {
    "resnet50": 23_508_032,
    "vgg16": 14_714_688,
    "efficientnet_b0": 4_007_548,
    "mobilenetv3_large_100": 4_202_032,
    "convnext_tiny": 27_820_128,
    "convnextv2_base": 87_692_800,
    "deit3_large_patch16_384": 303_738_880,
    "vit_small_patch14_reg4_dinov2": 22_057_344,
    "vit_large_patch16_dinov3": 303_079_424,
    "vit_huge_plus_patch16_dinov3_qkvb": 840_591_360,
    "vit_base_patch32_clip_224": 87_456_000,
    "vit_base_patch16_siglip_384": 93_176_064,
    "vit_so400m_patch14_siglip_384": 428_225_600,
}
# Of a BatchNorm, means and variances.
STATISTICS = {
    "resnet18": 9_600,
    "resnet34": 17_024,
    "resnet50": 53_120,
    "resnet101": 105_344,
    "resnet152": 151_424,
    "vgg16_bn": 8_448,
    "vgg19_bn": 11_008,
    "efficientnet_b0": 42_016,
    "efficientnet_b1": 62_048,
    "efficientnet_b2": 67_568,
    "efficientnet_b3": 87_296,
    "efficientnet_b4": 125_200,
    "efficientnet_lite0": 42_016,
    "efficientnet_lite1": 53_664,
    "efficientnet_lite2": 58_096,
    "efficientnet_lite3": 76_672,
    "efficientnet_lite4": 112_368,
    "vit_base_patch32_unicom_224": 2_560,
    "vit_base_patch16_unicom_224": 3_072,
    "vit_large_patch14_unicom_224": 3_584,
    "vit_large_patch14_unicom_336": 3_584,
    "mobilenetv3_large_075": 19_088,
    "mobilenetv3_large_100": 24_400,
    "mobilenetv3_small_050": 6_496,
    "mobilenetv3_small_075": 9_680,
    "mobilenetv3_small_100": 12_112,
}
KERAS_BIASES = {"resnet50": 26_560, "resnet101": 52_672, "resnet152": 75_712}


def varied(variables, seed=0):
    """The same tree with statistics, gains and biases that are far from an identity."""
    rng = np.random.default_rng(seed)

    def vary(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return leaf
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.3, 0.3)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(vary, variables)


def test_every_variant_is_listed():
    assert PARAMETERS.keys() == TRUNKS.keys()


# All of them are a minute's work; these are one of each module, and of each way to be built.
USUAL = (
    "resnet18", "resnet50", "vgg16_bn", "efficientnet_b0", "efficientnet_lite0", "convnext_tiny",
    "convnextv2_nano", "mobilenetv3_small_100", "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224",
    "vit_small_patch16_dinov3", "vit_base_patch32_unicom_224",
)  # fmt: skip


@pytest.mark.parametrize("tested", [USUAL, pytest.param(tuple(TRUNKS), marks=pytest.mark.long)])
def test_a_variant_has_its_listed_size(tested):
    for name, form in [(each, form) for each in tested for form in TRUNKS[each].forms]:
        found = {"params": 0, "batch_stats": 0}
        for leaf, shape in shapes(name, form).items():
            found[leaf.split("/")[0]] += int(np.prod(shape))
        more = KERAS_BIASES.get(name, 0) if form == "keras" else 0
        listed = (PARAMETERS[name] + more, STATISTICS.get(name, 0))
        assert (found["params"], found["batch_stats"]) == listed, (name, form)


def test_sizes_are_those_that_others_count():
    assert {name: PARAMETERS[name] for name in THEIRS} == THEIRS


@pytest.mark.parametrize("name", ["vgg16", "efficientnet_b0", "mobilenetv3_small_050"])
def test_leaves_are_the_same_in_every_form(name):
    """As `shapes` takes for granted of all but ResNets."""
    forms = TRUNKS[name].forms
    trees = []
    for form in forms:
        module, image = TRUNKS[name].build(form=form), jnp.zeros((1, 32, 32, 3))
        trees.append(jax.eval_shape(lambda m=module, x=image: m.init(jax.random.key(0), x)))
    assert len(forms) > 1
    assert all(tree == trees[0] for tree in trees)


# name -> the stages' (stride, channels), from the papers' tables.
OUTPUTS = {
    "resnet18": [(4, 64), (4, 64), (8, 128), (16, 256), (32, 512)],
    "resnet50": [(4, 64), (4, 256), (8, 512), (16, 1024), (32, 2048)],
    "vgg16_bn": [(2, 64), (4, 128), (8, 256), (16, 512), (32, 512)],
    "efficientnet_b0": [
        *((2, 32), (2, 16), (4, 24), (8, 40), (16, 80), (16, 112), (32, 192), (32, 320)),
        (32, 1280),
    ],
    "efficientnet_lite4": [
        *((2, 32), (2, 24), (4, 32), (8, 56), (16, 112), (16, 160), (32, 272), (32, 448)),
        (32, 1280),
    ],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_stage_is_reachable_by_name(name):
    row = TRUNKS[name]
    module = row.build(form=row.forms[-1])
    image = jnp.zeros((2, 96, 64, 3))
    make = lambda: module.apply(module.init(jax.random.key(0), image), image)  # noqa: E731
    found = jax.eval_shape(make)
    assert tuple(found) == tuple(sorted(row.stages)) or tuple(found) == row.stages
    for stage, (stride, channels) in zip(row.stages, OUTPUTS[name], strict=True):
        assert found[stage].shape == (2, 96 // stride, 64 // stride, channels)
        assert any(leaf.startswith(f"params/{stage}/") for leaf in shapes(name, row.forms[-1]))
    assert [*row.widths.values()] == [channels for _, channels in OUTPUTS[name]]
    assert row.width == OUTPUTS[name][-1][1]


def test_odd_sizes_round_as_the_form_says():
    """Both forms give ceil(n / 2), but their borders differ wherever n is even."""
    image = np.random.default_rng(0).integers(0, 256, (1, 74, 74, 3), np.uint8)
    outputs = []
    for form in ("keras", "torch"):
        found = weights.load("efficientnet_lite0", "random", form=form)
        x = table.normalise(image, found.preprocessing)
        module = TRUNKS["efficientnet_lite0"].build(form=form)
        outputs.append(jax.jit(module.apply)(found.variables, x))
    keras, torch = outputs
    assert keras["stage3"].shape == torch["stage3"].shape == (1, 10, 10, 40)
    assert np.abs(keras["stem"] - torch["stem"]).max() > 1e-3


def loop(x, kernel, stride, pads, depthwise):
    """The definition, one output at a time, in float64."""
    x = np.pad(np.float64(x), ((0, 0), *pads, (0, 0)))
    k = kernel.shape[0]
    rows, columns = ((size - k) // stride + 1 for size in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + k, j * stride : j * stride + k, :]
            if depthwise:
                y[:, i, j] = np.sum(window * np.float64(kernel)[None, :, :, 0], (1, 2))
            else:
                y[:, i, j] = np.einsum("nabc,abco->no", window, np.float64(kernel))
    return y


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 2), (7, 2)]
)
@pytest.mark.parametrize(("depthwise", "channels"), [(True, 5), (False, 5), (False, 3)])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_form_of_a_convolution_is_the_sum(
    size, stride, same, depthwise, channels, platform, rng, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = rng.normal(size=(2, 11, 8, channels)).astype(np.float32)
    shape = (size, size, 1, channels) if depthwise else (size, size, channels, 6)
    kernel = rng.normal(size=shape).astype(np.float32)
    padding = convolution.pads(x.shape[1:3], size, stride, same)
    found = convolution.convolve(jnp.asarray(x), jnp.asarray(kernel), stride, padding, depthwise)
    expected = loop(x, kernel, stride, padding, depthwise)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    if same:
        assert found.shape[1:3] == (-(-11 // stride), -(-8 // stride))


@pytest.mark.parametrize(
    ("n", "size", "channels"), [(3, (13, 9), 32), (8, (4, 5), 64), (4, (48, 45), 128)]
)
def test_fewer_products_give_the_same_sum(n, size, channels, rng):
    """Sizes that fill their last tile and that do not."""
    x = rng.normal(size=(n, *size, channels)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, channels, 40)) / np.sqrt(9 * channels)).astype(np.float32)
    assert winograd.suits(x.shape, kernel.shape, 1)
    assert not winograd.suits(x.shape, kernel.shape, 2)
    found = jax.jit(winograd.convolve)(jnp.asarray(x), winograd.transform(jnp.asarray(kernel)))
    expected = loop(x, kernel, 1, ((1, 1), (1, 1)), False)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [16, 100, 112, 448])
def test_the_images_taken_at_once_divide_them_all(n, size, monkeypatch):
    found = convolution.images_at_once((n, size, size, 3))
    assert n % found == 0
    assert found == 1 or found * size**2 <= 1.5 * 112**2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolution.images_at_once((n, size, size, 3)) == n


def test_only_the_trained_stages_use_and_update_the_statistics_of_the_batch(rng):
    found = weights.load("resnet18", "random")
    variables = varied(found.variables)
    module = TRUNKS["resnet18"].build()
    x = jnp.asarray(rng.normal(size=(4, 32, 32, 3)), jnp.float32)
    frozen = module.apply(variables, x)
    train = jax.jit(
        lambda v, x: module.apply(v, x, train_stages=("stage4",), mutable=["batch_stats"])
    )
    trained, updates = train(variables, x)
    for stage in ("stem", "stage1", "stage2", "stage3"):
        scale = np.abs(frozen[stage]).max()
        np.testing.assert_allclose(trained[stage], frozen[stage], rtol=0, atol=1e-5 * scale)
        jax.tree.map(
            np.testing.assert_array_equal,
            updates["batch_stats"][stage],
            variables["batch_stats"][stage],
        )
    assert np.abs(trained["stage4"] - frozen["stage4"]).max() > 0.1
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]["stage4"]),
        jax.tree.leaves(updates["batch_stats"]["stage4"]),
        strict=True,
    ):
        assert np.all(before != after)


def test_batch_norm_trains_as_defined(rng):
    from siamese_jax.trunks.layers import BatchNorm, Norm

    x = rng.normal(2, 3, size=(4, 3, 2, 5)).astype(np.float32)
    module = BatchNorm(Norm(1e-3, 0.9))
    variables = varied(module.init(jax.random.key(0), jnp.asarray(x), False))
    y, updates = module.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    wide = x.astype(np.float64)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    scale, bias = (np.float64(variables["params"][key]) for key in ("scale", "bias"))
    np.testing.assert_allclose(y, (wide - mean) / np.sqrt(var + 1e-3) * scale + bias, atol=1e-5)
    for key, value in (("mean", mean), ("var", var)):
        before = np.float64(variables["batch_stats"][key])
        np.testing.assert_allclose(updates["batch_stats"][key], 0.9 * before + 0.1 * value, 1e-5)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("resnet18", "torch"),
        ("resnet50", "keras"),
        pytest.param("vgg16_bn", "torch", marks=pytest.mark.long),
        pytest.param("vgg16", "keras", marks=pytest.mark.long),
        ("efficientnet_b0", "keras"),
        pytest.param("efficientnet_lite0", "torch", marks=pytest.mark.long),
    ],
)
def test_folding_the_norms_changes_nothing(name, form, rng, monkeypatch):
    """With the early stages taking two images at a time."""
    monkeypatch.setattr(convolution, "_PART", 2 * 48 * 40)
    found = weights.load(name, "random", form=form)
    variables = varied(found.variables)
    images = rng.integers(0, 256, (4, 48, 40, 3), np.uint8)
    assert convolution.images_at_once(images.shape) == 2
    x = table.normalise(images, found.preprocessing)
    expected = jax.jit(TRUNKS[name].build(form=form).apply)(variables, x)
    folded = fold_batch_norm(name, form, variables)
    assert "norm" not in str(jax.tree_util.tree_structure(folded))
    module = TRUNKS[name].build(form=form, folded=True)
    tiles = transformed_kernels(module, folded, images.shape[1:])
    for variables in (folded, folded | {"tiles": tiles}):
        outputs = jax.jit(module.apply)(variables, x)
        assert outputs.keys() == expected.keys()
        for stage, output in outputs.items():
            scale = np.abs(expected[stage]).max()
            np.testing.assert_allclose(output, expected[stage], rtol=0, atol=2e-5 * scale)


def test_bfloat16_is_close_and_keeps_float32_parameters(rng):
    found = weights.load("efficientnet_lite0", "random")
    images = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    outputs = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        module = TRUNKS["efficientnet_lite0"].build(form=found.form, dtype=dtype)
        x = table.normalise(images, found.preprocessing, dtype)
        outputs[dtype] = jax.jit(module.apply)(found.variables, x)["top"]
        assert outputs[dtype].dtype == dtype
    exact = np.asarray(outputs[jnp.float32])
    near = np.asarray(outputs[jnp.bfloat16].astype(jnp.float32))
    assert np.linalg.norm(near - exact) < 0.1 * np.linalg.norm(exact)
    module = TRUNKS["efficientnet_lite0"].build(dtype=jnp.bfloat16)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_pixels_are_scaled_as_keras_and_torch_do(rng):
    images = rng.integers(0, 256, (2, 3, 4, 3), np.uint8)
    wide = images.astype(np.float64)
    caffe = wide[..., ::-1] - np.array([103.939, 116.779, 123.68])
    torch = (wide / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for scaling, expected in ((table.CAFFE, caffe), (table.IMAGENET, torch)):
        np.testing.assert_allclose(table.normalise(images, scaling), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_trunk_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"no trunk is called 'resnet51'.*resnet50"):
        table.find("resnet51")
