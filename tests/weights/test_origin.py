"""What the name of a file and the configs beside it tell: pixels, size, activation, licence."""

import json

import numpy as np
import pytest

from siamese_jax.errors import UserError
from siamese_jax.trunks.table import CLIP, HALF, IMAGENET, SATELLITE, TRUNKS
from siamese_jax.weights import origin
from siamese_jax.weights.sources import SOURCES

CLIP_NUMBERS = {"mean": [0.48145466, 0.4578275, 0.40821073],
                "std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip


def find(folder, trunk, name="a.pth", leaves=(), **configs):
    """`configs` lie beside the file, by their names without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, config in configs.items():
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / (file if "." in file else f"{file}.json")).write_text(text)
    return origin.find(folder / name, (), trunk, leaves)


SAT = "vit_large_patch16_dinov3"
L14 = "vit_large_patch14_clip_224"


@pytest.mark.parametrize(
    ("name", "trunk", "pixels", "size"),
    [
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", SAT, SATELLITE, None),
        ("vit_large_patch16_dinov3.sat493m.safetensors", SAT, SATELLITE, None),
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", SAT, IMAGENET, None),
        ("facebook--dinov3-vitl16-pretrain-sat493m.bin", SAT, SATELLITE, None),
        ("vit_large_patch14_clip_224.laion2b.safetensors", L14, HALF, None),
        ("CLIP-ViT-L-14-laion2B-s32B-b82K.bin", L14, HALF, None),
        ("vit_large_patch14_clip_336.laion2b_ft_in1k.bin", L14.replace("224", "336"), HALF, None),
        ("vit_large_patch14_clip_224.datacompxl.bin", L14, None, None),
        ("vit_base_patch16_clip_224.laion2b.bin", "vit_base_patch16_clip_224", None, None),
        ("vit_base_patch16_clip_224.dfn2b.bin", "vit_base_patch16_clip_224", None, None),
        ("convnext_base.clip_laion2b.bin", "convnext_base", CLIP, 256),
        ("convnext_base.clip_laiona_augreg_320.bin", "convnext_base", CLIP, 320),
        ("convnext_tiny_22k_1k_384.pth", "convnext_tiny", None, 384),
        ("vit_small_patch16_224.dino.bin", "vit_small_patch16_224", IMAGENET, None),
        ("dino_deitsmall16_pretrain.pth", "vit_small_patch16_224", IMAGENET, None),
        ("facebook_dino-vits16.bin", "vit_small_patch16_224", IMAGENET, None),
        ("resnet50.a3_in1k.bin", "resnet50", None, 160),
    ],
)
def test_a_files_name_tells(name, trunk, pixels, size, tmp_path):
    """Constants as timm's, facebookresearch's and open_clip's own lists have them."""
    told = find(tmp_path, trunk, name)
    assert (told.name, told.where) == (trunk, "its name")
    assert (told.preprocessing, told.image_size) == (pixels, size)
    folder = tmp_path / f"models--x--{name}" / "snapshots" / "0123"
    again = find(folder, trunk, "model.safetensors")
    assert (again.preprocessing, again.where) == (pixels, "its folder's name")


def test_pixels_are_those_that_facebookresearch_gives():
    mean, std = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
    np.testing.assert_allclose(SATELLITE.mean, 255 * np.array(mean))
    np.testing.assert_allclose(SATELLITE.std, 255 * np.array(std))


@pytest.mark.slow
def test_every_name_of_timm_tells_what_timm_lists(tmp_path):
    """Pixels and size of all of timm's weights of our trunks, listed here or not."""
    models = pytest.importorskip("timm.models")
    checked = 0
    for full in models.list_pretrained():
        trunk = origin._QUICK.get(full, full.partition(".")[0].removeprefix("tf_"))
        if trunk not in TRUNKS:
            continue
        config, row = models.get_pretrained_cfg(full), TRUNKS[trunk]
        told = find(tmp_path, trunk, f"{full}.safetensors")
        pixels = told.preprocessing or row.preprocessing
        expected = 255 * np.array([*config.mean, *config.std])
        np.testing.assert_allclose([*pixels.mean, *pixels.std], expected, atol=1e-3, err_msg=full)
        assert (told.image_size or row.image_size) == config.input_size[-1], full
        if source := SOURCES.get((trunk, f"timm:{full}")):
            assert source.licence.lower().startswith(str(config.license)[:15].lower()), full
        checked += 1
    assert checked > 300


TRANSFORMERS = {
    "model_type": "clip",
    "text_config": {"hidden_act": "gelu"},
    "vision_config": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu",
    },
}  # fmt: skip
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"width": 512, "heads": 8},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
PLAIN, QUICK = "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("config", TRANSFORMERS),
        ("config", {"model_type": "clip"}),  # what is left out is as transformers has it
        ("config", TRANSFORMERS["vision_config"] | {"model_type": "clip_vision_model"}),
        ("config", OPEN_CLIP),
        ("open_clip_config", OPEN_CLIP),
    ],
)
def test_quickgelu_is_refused_by_a_trunk_of_gelu(file, config, tmp_path):
    told = find(tmp_path, QUICK, **{file: config})
    assert (told.name, told.where) == (QUICK, f"{file}.json beside it")
    with pytest.raises(UserError, match=f"act quick_gelu where {PLAIN} has gelu") as caught:
        find(tmp_path, PLAIN)
    assert f"is of {QUICK} (take that trunk), by {file}.json beside it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gelu_is_refused_by_a_trunk_of_quickgelu(tmp_path):
    """As LAION's repositories say."""
    config = {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}
    assert find(tmp_path, PLAIN, config=config).name == PLAIN
    with pytest.raises(UserError, match=rf"is of {PLAIN} .*act gelu where {QUICK} has quick_gelu"):
        find(tmp_path, QUICK)


def test_openais_own_leaf_tells_quickgelu(tmp_path):
    leaves = ("input_resolution", "context_length", "visual.proj")
    assert find(tmp_path, QUICK, leaves=leaves).name == QUICK
    with pytest.raises(UserError, match=rf"{QUICK}.*its leaf input_resolution"):
        find(tmp_path, PLAIN, leaves=leaves)


def test_heads_tell_networks_of_the_same_leaves_apart(tmp_path):
    config = {"model_type": "vit", "hidden_size": 384, "num_attention_heads": 12, "patch_size": 16}
    with pytest.raises(
        UserError, match=r"another network, by config.json .*heads 12 where .* has 6"
    ):
        find(tmp_path, "vit_small_patch16_224", config=config)
    with pytest.raises(
        UserError, match=r"heads 12 where .*patch 16 where .* has 8|patch 16 where .*heads 12"
    ):
        find(tmp_path, "vit_small_patch8_224")
    assert find(tmp_path, "resnet50").name == ""


def test_siglips_tanh_is_said(tmp_path):
    """transformers computes it by tanh, timm exactly; the two differ by less than said."""
    config = {"model_type": "siglip", "vision_config": {"image_size": 224}}
    told = find(tmp_path, "vit_base_patch16_siglip_224", config=config)
    assert told.notes == (
        "config.json beside it says act gelu_tanh where vit_base_patch16_siglip_224 has gelu: "
        "activations differ by up to 5e-4",
    )
    from math import erf

    x = np.linspace(-6, 6, 2001)
    exact = x / 2 * (1 + np.array([erf(v / 2**0.5) for v in x]))
    by_tanh = x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert 4e-4 < np.abs(exact - by_tanh).max() < 5e-4


def test_transformers_processor_tells_pixels(tmp_path):
    names = {"image_mean": CLIP_NUMBERS["mean"], "image_std": CLIP_NUMBERS["std"]}
    size = {"crop_size": {"height": 196, "width": 196}, "do_center_crop": True,
            "size": {"shortest_edge": 256}, "rescale_factor": 0.00392156862745098}  # fmt: skip
    trunk = "vit_small_patch14_dinov2"
    told = find(tmp_path, trunk, preprocessor_config=names | size)
    assert (told.preprocessing, told.image_size) == (CLIP, 196)
    assert told.scaled_by == "preprocessor_config.json beside it"
    told = find(tmp_path, trunk, preprocessor_config=names | {"do_normalize": False})
    assert told.preprocessing.std == (255.0, 255.0, 255.0)
    for other in ({"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"image_std": [0, 0, 0]},
                  {"image_mean": [float("nan")] * 3}, {"image_mean": "x"}):  # fmt: skip
        assert find(tmp_path, trunk, preprocessor_config=names | other).preprocessing is None


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dinov2_of_transformers_is_cut_as_its_preprocessor_says(kind, tmp_path):
    """config.json has the pixels that positions are made for: 518. Images are cut to 224."""
    config = {"model_type": kind, "hidden_size": 384, "patch_size": 14, "image_size": 518}
    trunk = "vit_small_patch14_dinov2"
    alone = find(tmp_path, trunk, config=config)
    assert alone.image_size == 518
    (line,) = alone.notes
    assert "cuts images to 224 pixels" in line
    assert "image_size=224 is as there" in line
    cut = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": True,
           "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}  # fmt: skip
    told = find(tmp_path, trunk, preprocessor_config=cut)
    assert told.image_size == 224
    assert told.notes == ("images of 224 pixels by preprocessor_config.json beside it",)


def test_open_clips_config_tells_pixels_and_timms_name(tmp_path):
    told = find(tmp_path, QUICK, open_clip_config=OPEN_CLIP)
    assert (told.preprocessing, told.scaled_by) == (HALF, "open_clip_config.json beside it")
    vision = {"timm_model_name": "convnext_base", "image_size": 256}
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": CLIP_NUMBERS}
    told = find(tmp_path, "convnext_base", open_clip_config=config)
    assert (told.name, told.preprocessing, told.image_size) == ("convnext_base", CLIP, 256)
    with pytest.raises(UserError, match="is of convnext_base, by open_clip_config"):
        find(tmp_path, "convnext_tiny")


def test_a_size_that_the_patch_does_not_divide_is_cut(tmp_path):
    """As a convolution without padding does: 384 pixels are 27 patches of 14."""
    tower = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = {
        "model_type": "siglip",
        "vision_config": tower | {"patch_size": 14, "image_size": 384},
    }
    assert find(tmp_path, "vit_so400m_patch14_siglip_378", config=config).image_size == 378


def test_a_licence_is_read_where_one_is_told(tmp_path):
    timm = {"architecture": "resnet18", "pretrained_cfg": {"license": "cc-by-nc-4.0"}}
    assert find(tmp_path / "a", "resnet18", config=timm).licence == "cc-by-nc-4.0"
    card = "---\ntags:\n- x\nlicense: apple-amlr\n---\n# A model\nlicense: mit\n"
    assert find(tmp_path / "b", "resnet18", **{"README.md": card}).licence == "apple-amlr"
    name = "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    assert find(tmp_path / "c", SAT, name).licence == "DINOv3-License"
    assert find(tmp_path / "d", "resnet18", "resnet18-f37072fd.pth").licence is None
    assert find(tmp_path / "e", "resnet18", **{"README.md": "license: mit\n"}).licence is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"model_type": 3}', '{"model_cfg": [1]}',
                                    '{"model_type": "vit", "hidden_size": "wide"}',
                                    '{"architecture": 1, "mean": 2}', "\x00"])  # fmt: skip
def test_damaged_configs_tell_nothing(damage, tmp_path):
    files = dict.fromkeys(("config", "open_clip_config", "preprocessor_config"), damage)
    told = find(tmp_path, "vit_small_patch16_224", **files)
    assert (told.preprocessing, told.image_size, told.notes) == (None, None, ())


@pytest.mark.parametrize(("pool", "said"), [("avg", True), ("token", False)])
def test_a_file_whose_feature_is_the_mean_of_patches_says_so(pool, said, tmp_path):
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": pool}
    notes = find(tmp_path, "vit_tiny_patch16_224", config=config).notes
    assert any("--stage=top" in note for note in notes) == said
    again = find(tmp_path, "vit_tiny_patch16_224", leaves=["fc_norm.weight"], config=config)
    assert not any("--stage=top" in note for note in again.notes)  # the norm stands behind the mean
