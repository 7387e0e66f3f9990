"""Trunks: exact sizes of every variant, convolutions against a loop, norms, folding, stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.trunks import convolution, table, winograd
from siamese_jax.trunks.folding import fold_batch_norm, transformed_kernels
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.weights.port import shapes

# As timm counts them, without the classifier.
WITHOUT_STATISTICS = {
    "convnext_base": 87_566_464,
    "convnext_large": 196_230_336,
    "convnext_small": 49_454_688,
    "convnext_tiny": 27_820_128,
    "convnextv2_base": 87_692_800,
    "convnextv2_large": 196_419_840,
    "convnextv2_nano": 14_982_800,
    "convnextv2_tiny": 27_866_496,
    "deit3_base_patch16_224": 85_816_320,
    "deit3_base_patch16_384": 86_108_160,
    "deit3_large_patch16_224": 303_349_760,
    "deit3_large_patch16_384": 303_738_880,
    "deit3_small_patch16_224": 21_674_496,
    "deit3_small_patch16_384": 21_820_416,
    "deit_base_patch16_224": 85_798_656,
    "deit_base_patch16_384": 86_090_496,
    "deit_small_patch16_224": 21_665_664,
    "deit_tiny_patch16_224": 5_524_416,
    "vit_base_patch14_dinov2": 86_579_712,
    "vit_base_patch14_reg4_dinov2": 86_582_016,
    "vit_base_patch16_224": 85_798_656,
    "vit_base_patch16_384": 86_090_496,
    "vit_base_patch16_clip_224": 85_799_424,
    "vit_base_patch16_clip_384": 86_091_264,
    "vit_base_patch16_clip_quickgelu_224": 85_799_424,
    "vit_base_patch16_dinov3": 85_641_216,
    "vit_large_patch16_dinov3": 303_079_424,
    "vit_small_patch16_dinov3": 21_586_944,
    "vit_base_patch16_dinov3_qkvb": 85_659_648,
    "vit_huge_plus_patch16_dinov3": 840_509_440,
    "vit_huge_plus_patch16_dinov3_qkvb": 840_591_360,
    "vit_large_patch16_dinov3_qkvb": 303_128_576,
    "vit_small_patch16_dinov3_qkvb": 21_596_160,
    "vit_small_plus_patch16_dinov3": 28_683_264,
    "vit_small_plus_patch16_dinov3_qkvb": 28_692_480,
    "vit_tiny_patch16_dinov3_qkvb": 5_489_664,
    "vit_base_patch16_siglip_224": 92_884_224,
    "vit_base_patch16_siglip_256": 92_930_304,
    "vit_base_patch16_siglip_384": 93_176_064,
    "vit_base_patch16_siglip_512": 93_520_128,
    "vit_base_patch32_224": 87_455_232,
    "vit_base_patch32_384": 87_528_192,
    "vit_base_patch32_clip_224": 87_456_000,
    "vit_base_patch32_clip_256": 87_467_520,
    "vit_base_patch32_clip_384": 87_528_960,
    "vit_base_patch32_clip_448": 87_568_896,
    "vit_base_patch32_clip_quickgelu_224": 87_456_000,
    "vit_base_patch32_siglip_256": 94_552_320,
    "vit_base_patch8_224": 85_807_872,
    "vit_large_patch14_clip_224": 303_179_776,
    "vit_large_patch14_clip_336": 303_507_456,
    "vit_large_patch14_clip_quickgelu_224": 303_179_776,
    "vit_large_patch14_clip_quickgelu_336": 303_507_456,
    "vit_large_patch14_dinov2": 304_367_616,
    "vit_large_patch14_reg4_dinov2": 304_370_688,
    "vit_large_patch16_224": 303_301_632,
    "vit_large_patch16_384": 303_690_752,
    "vit_large_patch16_siglip_256": 315_956_224,
    "vit_large_patch16_siglip_384": 316_283_904,
    "vit_large_patch16_siglip_512": 316_742_656,
    "vit_large_patch32_224": 305_510_400,
    "vit_large_patch32_384": 305_607_680,
    "vit_small_patch14_dinov2": 22_056_192,
    "vit_small_patch14_reg4_dinov2": 22_057_344,
    "vit_small_patch16_224": 21_665_664,
    "vit_small_patch16_384": 21_811_584,
    "vit_small_patch32_224": 22_493_952,
    "vit_small_patch32_384": 22_530_432,
    "vit_small_patch8_224": 21_670_272,
    "vit_so400m_patch14_siglip_224": 427_680_704,
    "vit_so400m_patch14_siglip_378": 428_225_600,
    "vit_so400m_patch16_siglip_256": 427_888_064,
    "vit_so400m_patch16_siglip_384": 428_256_704,
    "vit_so400m_patch16_siglip_512": 428_772_800,
    "vit_tiny_patch16_224": 5_524_416,
    "vit_tiny_patch16_384": 5_597_376,
}
# (trunk, form) -> trainable numbers, BatchNorm statistics. Without the classifier.
SIZES = {
    ("resnet18", "torch"): (11_176_512, 9_600),
    ("resnet34", "torch"): (21_284_672, 17_024),
    ("resnet50", "keras"): (23_534_592, 53_120),
    ("resnet50", "torch"): (23_508_032, 53_120),
    ("resnet101", "keras"): (42_552_832, 105_344),
    ("resnet101", "torch"): (42_500_160, 105_344),
    ("resnet152", "keras"): (58_219_520, 151_424),
    ("resnet152", "torch"): (58_143_808, 151_424),
    ("vgg16", "keras"): (14_714_688, 0),
    ("vgg16", "torch"): (14_714_688, 0),
    ("vgg19", "keras"): (20_024_384, 0),
    ("vgg19", "torch"): (20_024_384, 0),
    ("vgg16_bn", "torch"): (14_723_136, 8_448),
    ("vgg19_bn", "torch"): (20_035_392, 11_008),
    ("efficientnet_b0", "keras"): (4_007_548, 42_016),
    ("efficientnet_b0", "torch"): (4_007_548, 42_016),
    ("efficientnet_b1", "keras"): (6_513_184, 62_048),
    ("efficientnet_b1", "torch"): (6_513_184, 62_048),
    ("efficientnet_b2", "keras"): (7_700_994, 67_568),
    ("efficientnet_b2", "torch"): (7_700_994, 67_568),
    ("efficientnet_b3", "keras"): (10_696_232, 87_296),
    ("efficientnet_b3", "torch"): (10_696_232, 87_296),
    ("efficientnet_b4", "keras"): (17_548_616, 125_200),
    ("efficientnet_b4", "torch"): (17_548_616, 125_200),
    ("efficientnet_lite0", "keras"): (3_371_008, 42_016),
    ("efficientnet_lite0", "torch"): (3_371_008, 42_016),
    ("efficientnet_lite1", "keras"): (4_135_680, 53_664),
    ("efficientnet_lite1", "torch"): (4_135_680, 53_664),
    ("efficientnet_lite2", "keras"): (4_811_072, 58_096),
    ("efficientnet_lite2", "torch"): (4_811_072, 58_096),
    ("efficientnet_lite3", "keras"): (6_916_096, 76_672),
    ("efficientnet_lite3", "torch"): (6_916_096, 76_672),
    ("efficientnet_lite4", "keras"): (11_725_568, 112_368),
    ("efficientnet_lite4", "torch"): (11_725_568, 112_368),
    ("vit_base_patch32_unicom_224", "torch"): (116_723_200, 2_560),
    ("vit_base_patch16_unicom_224", "torch"): (201_967_872, 3_072),
    ("vit_large_patch14_unicom_224", "torch"): (572_328_448, 3_584),
    ("vit_large_patch14_unicom_336", "torch"): (908_200_448, 3_584),
    **{
        (f"mobilenetv3_{name}", form): sizes
        for form in ("torch", "torchvision", "keras")
        for name, sizes in {
            "large_075": (2_712_528, 19_088),
            "large_100": (4_202_032, 24_400),
            "small_050": (568_224, 6_496),
            "small_075": (1_016_872, 9_680),
            "small_100": (1_517_856, 12_112),
        }.items()
    },
} | {(name, form): (n, 0) for name, n in WITHOUT_STATISTICS.items() for form in TRUNKS[name].forms}


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


def test_every_variant_has_its_listed_size():
    assert {(name, form) for name, row in TRUNKS.items() for form in row.forms} == SIZES.keys()
    for (name, form), (trainable, statistics) in SIZES.items():
        found = {"params": 0, "batch_stats": 0}
        for leaf, shape in shapes(name, form).items():
            found[leaf.split("/")[0]] += int(np.prod(shape))
        assert (found["params"], found["batch_stats"]) == (trainable, statistics), (name, form)


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
        ("vgg16_bn", "torch"),
        ("vgg16", "keras"),
        ("efficientnet_b0", "keras"),
        ("efficientnet_lite0", "torch"),
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
