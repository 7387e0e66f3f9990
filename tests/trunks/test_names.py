"""Names of other libraries: each is answered with a trunk and weights that there are."""

import re

import pytest

import siamese_jax as sj
from siamese_jax.errors import UserError
from siamese_jax.trunks.names import _TORCHVISION, FAMILIES, NAMES, in_text
from siamese_jax.trunks.table import TRUNKS, find
from siamese_jax.weights.sources import SOURCES, find_source


@pytest.mark.parametrize("name", [*NAMES, *_TORCHVISION])
def test_every_name_has_a_source(name):
    named = {**NAMES, **_TORCHVISION}[name]
    assert (named.trunk, named.weights) in SOURCES


@pytest.mark.parametrize(
    ("name", "trunk", "source"),
    [
        ("dino_vits16", "vit_small_patch16_224", "facebookresearch:dino_deitsmall16"),
        ("dino_vitb8", "vit_base_patch8_224", "facebookresearch:dino_vitbase8"),
        ("dinov2_vits14", "vit_small_patch14_dinov2", "facebookresearch:dinov2_vits14"),
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4"),
        ("facebook/dinov2-small", "vit_small_patch14_dinov2", "facebookresearch:dinov2_vits14"),
        ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2", "vitb14_reg4"),
        ("facebook/dinov3-vits16plus-pretrain-lvd1689m", "vit_small_plus_patch16_dinov3", "lvd"),
        ("facebook/dinov3-vitl16-pretrain-sat493m", "vit_large_patch16_dinov3", ".sat493m"),
        ("ViT-B-32", "vit_base_patch32_clip_quickgelu_224", ".openai, or for LAION's vit_base_pa"),
        ("ViT-B/16", "vit_base_patch16_clip_quickgelu_224", "timm:vit_base_patch16_clip_224.lai"),
        ("ViT-L/14@336px", "vit_large_patch14_clip_quickgelu_336", ".openai"),
        ("openai/clip-vit-base-patch32", "vit_base_patch32_clip_quickgelu_224", ".openai"),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "vit_large_patch14_clip_224", ".laion2b"),
        ("google/siglip-base-patch16-224", "vit_base_patch16_siglip_224", ".webli"),
        ("google/siglip2-so400m-patch14-384", "vit_so400m_patch14_siglip_378", ".v2_webli"),
        ("google/vit-base-patch16-224-in21k", "vit_base_patch16_224", ".orig_in21k"),
        ("timm/vit_small_patch16_224.dino", "vit_small_patch16_224", "224.dino"),
        ("hf-hub:timm/convnext_tiny.in12k_ft_in1k", "convnext_tiny", "timm:convnext_tiny.in12k"),
        ("tf_efficientnet_b0.ns_jft_in1k", "efficientnet_b0", "timm:tf_efficientnet_b0.ns_jft"),
        (
            "vit_base_patch16_clip_224.openai",
            "vit_base_patch16_clip_quickgelu_224",
            "gelu_224.openai",
        ),
        ("ViT-B-16-SigLIP", "vit_base_patch16_siglip_224", ".webli"),
        ("ViT-L-16-SigLIP2-384", "vit_large_patch16_siglip_384", ".v2_webli"),
        ("hf-hub:timm/ViT-SO400M-14-SigLIP-384", "vit_so400m_patch14_siglip_384", ".webli"),
        ("facebook/dinov3-convnext-tiny-pretrain-lvd1689m", "convnext_tiny", ".dinov3_lvd1689m"),
        ("vit_b_16", "vit_base_patch16_224", "timm:"),
        ("mobilenet_v3_large", "mobilenetv3_large_100", "torchvision:"),
    ],
)
def test_names_that_people_type(name, trunk, source):
    """As torch.hub, open_clip, OpenAI and the Hub publish them."""
    asked = (
        lambda: find(name),
        lambda: sj.load_encoder(name),
        lambda: find_source("resnet50", name),
    )
    for ask in asked:
        with pytest.raises(UserError, match=f"is here the trunk {trunk} with") as caught:
            ask()
        assert source in str(caught.value)
        assert "\n" not in str(caught.value)


FAMILY = {
    "dinov2": ("DINOv2", "vit_small_patch14_dinov2, vit_base", None),
    "DINOv3": ("DINOv3", "vit_small_patch16_dinov3, vit_base", None),
    "dino_vitx16": ("DINO", "vit_small_patch16_224", None),
    "clip": ("CLIP", "vit_base_patch32_clip_224", None),
    "siglip": ("SigLIP", "vit_base_patch16_siglip_224", None),
    "unicom": ("Unicom", "vit_base_patch32_unicom_224", None),
    "ViT-H-14": ("CLIP", "vit_base_patch32_clip_224", "ViT-H"),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("CLIP", "vit_base_patch32_clip_224", "ViT-bigG"),
    "RN50": ("CLIP", "vit_base_patch32_clip_224", "CLIP's ResNets"),
    "RN50x16": ("CLIP", "vit_base_patch32_clip_224", "CLIP's ResNets"),
    "dinov2_vitg14": ("DINOv2", "vit_small_patch14_dinov2", "giant"),
    "facebook/dinov2-giant": ("DINOv2", "vit_small_patch14_dinov2", "giant"),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": ("DINOv3", "vit_small_patch16_dinov3", "billion"),
    "vit_huge_patch14_clip_224.laion2b": ("CLIP", "vit_base_patch32_clip_224", None),
    "ConvNeXt": ("ConvNeXt", "convnext_tiny", None),
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_familys_name_is_answered_with_its_trunks(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    title, trunk, absent = FAMILY[name]
    for ask in (find, sj.load_encoder):
        with pytest.raises(UserError, match=f"of {title} there are .*{trunk}") as caught:
            ask(name)
        assert ("are not here" in str(caught.value)) == (absent is not None)
        assert (absent or "") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "resnet" not in str(caught.value)


def test_every_family_is_in_the_table():
    for title, _, ours in FAMILIES:
        assert any(re.search(ours, trunk) for trunk in TRUNKS), title


@pytest.mark.parametrize(
    ("name", "trunk"),
    [("ResNet50", "resnet50"), ("resnet-50", "resnet50"), ("EfficientNetB0", "efficientnet_b0"),
     ("VIT_BASE_PATCH16_224", "vit_base_patch16_224"), ("ConvNeXt-Tiny", "convnext_tiny")],
)  # fmt: skip
def test_capitals_and_dashes_are_seen_through(name, trunk):
    for ask in (find, sj.load_encoder):
        with pytest.raises(UserError, match=f"'{name}' is here the trunk {trunk}$"):
            ask(name)


def test_a_path_is_no_family():
    for name in ("runs/clip", "./dinov2"):
        with pytest.raises(UserError, match="does not exist"):
            sj.load_encoder(name)


def test_our_own_names_are_ours():
    for name in TRUNKS:
        assert find(name) is TRUNKS[name]
    with pytest.raises(
        UserError, match=r"of \d+ there are resnet50, .*`siamese-jax weights trunks`"
    ):
        find("RESNET51")
    with pytest.raises(UserError, match=r"of \d+ there are"):
        find("swin_base_patch4_window7_224.ms_in1k")


def test_a_config_answers_too():
    from configs.common import base
    from siamese_jax.train.fields import check_config

    config = base()
    config.trunk.name = "dino_vits8"
    with pytest.raises(UserError, match="is here the trunk vit_small_patch8_224"):
        check_config(config)


def test_the_name_of_clips_architecture_alone_tells_no_activation():
    assert in_text("ViT-B-32.pt") == in_text("my-dinov2-smaller.pth") == []
    assert in_text("vit_b_32-quickgelu-laion400m_e32-46683a32.pt") == [
        "vit_base_patch32_clip_quickgelu_224"
    ]
    assert in_text("CLIP-ViT-B-32-laion2B-s34B-b79K.bin") == ["vit_base_patch32_clip_224"]


def test_what_is_not_of_clip_is_not_said_to_be_of_laion():
    with pytest.raises(UserError, match=r"augreg_in21k_ft_in1k") as error:
        find("vit_b_16")
    assert "LAION" not in str(error.value)
