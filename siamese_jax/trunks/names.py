"""What others call the trunks here, as people type it: the trunk, and its weights of that name.

Of torch.hub (`dino_vits16`, `dinov2_vits14_reg`), of open_clip and OpenAI (`ViT-B-32`, `ViT-B/16`),
of the Hub (`facebook/dinov2-small`, `openai/clip-vit-base-patch32`), of torchvision (`vit_b_16`).
"""

import re
from collections.abc import Collection
from typing import NamedTuple


class Named(NamedTuple):
    """A trunk and the name of its weights, as `weights.load` takes them."""

    trunk: str
    weights: str


def _timm(trunk: str, tag: str) -> Named:
    return Named(trunk, f"timm:{trunk}.{tag}")


# Without their owner, in small letters, with - between the parts.
NAMES: dict[str, Named] = {
    # DINO, by torch.hub and by the Hub.
    "dino-vits16": Named("vit_small_patch16_224", "facebookresearch:dino_deitsmall16"),
    "dino-vits8": Named("vit_small_patch8_224", "facebookresearch:dino_deitsmall8"),
    "dino-vitb16": Named("vit_base_patch16_224", "facebookresearch:dino_vitbase16"),
    "dino-vitb8": Named("vit_base_patch8_224", "facebookresearch:dino_vitbase8"),
    # DINOv2.
    "dinov2-vits14": Named("vit_small_patch14_dinov2", "facebookresearch:dinov2_vits14"),
    "dinov2-small": Named("vit_small_patch14_dinov2", "facebookresearch:dinov2_vits14"),
    "dinov2-vits14-reg": Named(
        "vit_small_patch14_reg4_dinov2", "facebookresearch:dinov2_vits14_reg4"
    ),
    "dinov2-with-registers-small": Named(
        "vit_small_patch14_reg4_dinov2", "facebookresearch:dinov2_vits14_reg4"
    ),
    "dinov2-vitb14": Named("vit_base_patch14_dinov2", "facebookresearch:dinov2_vitb14"),
    "dinov2-base": Named("vit_base_patch14_dinov2", "facebookresearch:dinov2_vitb14"),
    "dinov2-vitb14-reg": Named(
        "vit_base_patch14_reg4_dinov2", "facebookresearch:dinov2_vitb14_reg4"
    ),
    "dinov2-with-registers-base": Named(
        "vit_base_patch14_reg4_dinov2", "facebookresearch:dinov2_vitb14_reg4"
    ),
    "dinov2-vitl14": Named("vit_large_patch14_dinov2", "facebookresearch:dinov2_vitl14"),
    "dinov2-large": Named("vit_large_patch14_dinov2", "facebookresearch:dinov2_vitl14"),
    "dinov2-vitl14-reg": Named(
        "vit_large_patch14_reg4_dinov2", "facebookresearch:dinov2_vitl14_reg4"
    ),
    "dinov2-with-registers-large": Named(
        "vit_large_patch14_reg4_dinov2", "facebookresearch:dinov2_vitl14_reg4"
    ),
    # DINOv3.
    "dinov3-vits16": _timm("vit_small_patch16_dinov3", "lvd1689m"),
    "dinov3-vits16-pretrain-lvd1689m": _timm("vit_small_patch16_dinov3", "lvd1689m"),
    "dinov3-vitb16": _timm("vit_base_patch16_dinov3", "lvd1689m"),
    "dinov3-vitb16-pretrain-lvd1689m": _timm("vit_base_patch16_dinov3", "lvd1689m"),
    "dinov3-vitl16": _timm("vit_large_patch16_dinov3", "lvd1689m"),
    "dinov3-vitl16-pretrain-lvd1689m": _timm("vit_large_patch16_dinov3", "lvd1689m"),
    "dinov3-vits16plus": _timm("vit_small_plus_patch16_dinov3", "lvd1689m"),
    "dinov3-vits16plus-pretrain-lvd1689m": _timm("vit_small_plus_patch16_dinov3", "lvd1689m"),
    "dinov3-vith16plus": _timm("vit_huge_plus_patch16_dinov3", "lvd1689m"),
    "dinov3-vith16plus-pretrain-lvd1689m": _timm("vit_huge_plus_patch16_dinov3", "lvd1689m"),
    "dinov3-vitl16-pretrain-sat493m": _timm("vit_large_patch16_dinov3", "sat493m"),
    **{
        f"dinov3-convnext-{size}-pretrain-lvd1689m": _timm(f"convnext_{size}", "dinov3_lvd1689m")
        for size in ("tiny", "small", "base", "large")
    },
    # DeiT.
    "deit-tiny-patch16-224": _timm("deit_tiny_patch16_224", "fb_in1k"),
    "deit-small-patch16-224": _timm("deit_small_patch16_224", "fb_in1k"),
    "deit-base-patch16-224": _timm("deit_base_patch16_224", "fb_in1k"),
    # OpenAI's CLIP, by open_clip, by OpenAI and by the Hub.
    "clip-vit-base-patch32": _timm("vit_base_patch32_clip_quickgelu_224", "openai"),
    "vit-b-32": _timm("vit_base_patch32_clip_quickgelu_224", "openai"),
    "vit-b-32-quickgelu": _timm("vit_base_patch32_clip_quickgelu_224", "openai"),
    "clip-vit-base-patch16": _timm("vit_base_patch16_clip_quickgelu_224", "openai"),
    "vit-b-16": _timm("vit_base_patch16_clip_quickgelu_224", "openai"),
    "vit-b-16-quickgelu": _timm("vit_base_patch16_clip_quickgelu_224", "openai"),
    "clip-vit-large-patch14": _timm("vit_large_patch14_clip_quickgelu_224", "openai"),
    "vit-l-14": _timm("vit_large_patch14_clip_quickgelu_224", "openai"),
    "vit-l-14-quickgelu": _timm("vit_large_patch14_clip_quickgelu_224", "openai"),
    "clip-vit-large-patch14-336": _timm("vit_large_patch14_clip_quickgelu_336", "openai"),
    "vit-l-14-336": _timm("vit_large_patch14_clip_quickgelu_336", "openai"),
    "vit-l-14-336-quickgelu": _timm("vit_large_patch14_clip_quickgelu_336", "openai"),
    # LAION's.
    "clip-vit-b-32-laion2b-s34b-b79k": _timm("vit_base_patch32_clip_224", "laion2b"),
    "clip-vit-b-32-datacomp.xl-s13b-b90k": _timm("vit_base_patch32_clip_224", "datacompxl"),
    "clip-vit-b-16-laion2b-s34b-b88k": _timm("vit_base_patch16_clip_224", "laion2b"),
    "clip-vit-b-16-datacomp.xl-s13b-b90k": _timm("vit_base_patch16_clip_224", "datacompxl"),
    "clip-vit-l-14-laion2b-s32b-b82k": _timm("vit_large_patch14_clip_224", "laion2b"),
    "clip-vit-l-14-datacomp.xl-s13b-b90k": _timm("vit_large_patch14_clip_224", "datacompxl"),
    # SigLIP; 384 pixels are 27 patches of 14 and a rest.
    "siglip-base-patch16-224": _timm("vit_base_patch16_siglip_224", "webli"),
    "siglip-base-patch16-256": _timm("vit_base_patch16_siglip_256", "webli"),
    "siglip-base-patch16-384": _timm("vit_base_patch16_siglip_384", "webli"),
    "siglip-base-patch16-512": _timm("vit_base_patch16_siglip_512", "webli"),
    "siglip-large-patch16-256": _timm("vit_large_patch16_siglip_256", "webli"),
    "siglip-large-patch16-384": _timm("vit_large_patch16_siglip_384", "webli"),
    "siglip-so400m-patch14-224": _timm("vit_so400m_patch14_siglip_224", "webli"),
    "siglip-so400m-patch14-384": _timm("vit_so400m_patch14_siglip_378", "webli"),
    # SigLIP 2.
    "siglip2-base-patch16-224": _timm("vit_base_patch16_siglip_224", "v2_webli"),
    "siglip2-base-patch16-256": _timm("vit_base_patch16_siglip_256", "v2_webli"),
    "siglip2-base-patch16-384": _timm("vit_base_patch16_siglip_384", "v2_webli"),
    "siglip2-base-patch16-512": _timm("vit_base_patch16_siglip_512", "v2_webli"),
    "siglip2-large-patch16-256": _timm("vit_large_patch16_siglip_256", "v2_webli"),
    "siglip2-large-patch16-384": _timm("vit_large_patch16_siglip_384", "v2_webli"),
    "siglip2-so400m-patch14-224": _timm("vit_so400m_patch14_siglip_224", "v2_webli"),
    "siglip2-so400m-patch14-384": _timm("vit_so400m_patch14_siglip_378", "v2_webli"),
    # Google's ViT, whose first weights were the paper's own.
    "vit-base-patch16-224": _timm("vit_base_patch16_224", "orig_in21k_ft_in1k"),
    "vit-base-patch16-384": _timm("vit_base_patch16_384", "orig_in21k_ft_in1k"),
    "vit-large-patch32-384": _timm("vit_large_patch32_384", "orig_in21k_ft_in1k"),
    "vit-base-patch16-224-in21k": _timm("vit_base_patch16_224", "orig_in21k"),
    "vit-base-patch32-224-in21k": _timm("vit_base_patch32_224", "orig_in21k"),
    "vit-large-patch16-224-in21k": _timm("vit_large_patch16_224", "orig_in21k"),
    "vit-large-patch32-224-in21k": _timm("vit_large_patch32_224", "orig_in21k"),
}
# SigLIP by open_clip, whose names leave out the pixels where they are 224 (256 of B-32).
_SIZES = {"B": "base", "L": "large", "SO400M": "so400m"}
_OPEN_CLIP = (
    ("webli", "SigLIP", "B-16 B-16-256 B-16-384 B-16-512 L-16-256 L-16-384 SO400M-14 SO400M-14-378 "
     "SO400M-14-384"),
    ("webli_i18n", "SigLIP-i18n", "B-16-256 SO400M-16-256"),
    ("v2_webli", "SigLIP2", "B-32-256 B-16 B-16-256 B-16-384 B-16-512 L-16-256 L-16-384 L-16-512 "
     "SO400M-14 SO400M-14-378 SO400M-16-256 SO400M-16-384 SO400M-16-512"),
)  # fmt: skip
for _tag, _kind, _listed in _OPEN_CLIP:
    for _size, _patch, *_pixels in (row.split("-") for row in _listed.split()):
        _trunk = f"vit_{_SIZES[_size]}_patch{_patch}_siglip_{(_pixels or ['224'])[0]}"
        _name = "-".join(("ViT", _size, _patch, _kind, *_pixels)).lower()
        NAMES[_name] = _timm(_trunk, _tag)
# torchvision's own, by the names that only it writes so; of its transformers there are no weights
# here, so that these are timm's.
_TORCHVISION = {
    "vit_b_16": _timm("vit_base_patch16_224", "augreg_in21k_ft_in1k"),
    "vit_b_32": _timm("vit_base_patch32_224", "augreg_in21k_ft_in1k"),
    "vit_l_16": _timm("vit_large_patch16_224", "augreg_in21k_ft_in1k"),
    "mobilenet_v3_large": Named("mobilenetv3_large_100", "torchvision:IMAGENET1K_V2"),
    "mobilenet_v3_small": Named("mobilenetv3_small_100", "torchvision:IMAGENET1K_V1"),
}
# A family as people call it, the words that mean it, and the names of its trunks here.
FAMILIES = (
    ("DINOv2", "dinov2.*", "_dinov2$"),
    ("DINOv3", "dinov3.*", "_dinov3"),
    ("DINO", "dino(-vit.*)?", "^vit_(small|base)_patch(8|16)_224$"),
    ("SigLIP", ".*siglip.*", "_siglip_"),
    ("CLIP", r".*clip.*|rn\d+(x\d+)?|vit-(b|l|h|g|bigg)-\d+.*", "_clip_"),
    ("Unicom", "unicom.*", "_unicom_"),
    ("MAE", "mae|.*-mae-.*", "^vit_(base|large)_patch16_224$"),
    ("DeiT", "deit", "^deit_"),
    ("DeiT III", "deit-?(3|iii)", "^deit3_"),
    ("Vision Transformers", "vit|vit-(tiny|small|base|large)", r"^vit_[a-z]+_patch\d+_\d+$"),
    ("ResNet", "resnet", "^resnet"),
    ("VGG", "vgg", "^vgg"),
    ("EfficientNet", "efficientnet", "^efficientnet"),
    ("MobileNetV3", "mobilenet(-?v3)?", "^mobilenetv3"),
    ("ConvNeXt", "convnext", "^convnext"),
)
# What is known by these words and is no trunk here.
_ABSENT = (
    (r"rn\d+(x\d+)?", "CLIP's ResNets, which pool by attention"),
    (r"(clip-)?vit-(h|g|bigg)-\d+.*|.*clip.*(huge|giant).*", "CLIP's ViT-H, ViT-g and ViT-bigG"),
    (".*siglip.*(giant|naflex).*|vit-gopt.*", "SigLIP's giant and NaFlex models"),
    ("dinov2.*(g14|giant).*", "DINOv2's giant"),
    ("dinov3.*7b.*", "DINOv3 of 7 billion parameters"),
)
_OWNERS = re.compile(r"^((hf-hub|timm):)?(facebook|facebookresearch|openai|laion|google|timm)/")


def elsewhere(name: str) -> Named | None:
    """What a name of another library is called here; any of timm's is taken for one of ours.

    >>> elsewhere("facebook/dinov2-small").trunk, elsewhere("ViT-B/16").trunk
    ('vit_small_patch14_dinov2', 'vit_base_patch16_clip_quickgelu_224')
    >>> elsewhere("timm/vit_small_patch16_224.dino").weights
    'timm:vit_small_patch16_224.dino'
    """
    lower = name.lower()
    if timm := re.fullmatch(r"(?:(?:hf-hub:)?timm/|timm:)?([a-z0-9_]+\.[a-z0-9_]+)", lower):
        # OpenAI's have QuickGELU, which an older name of timm's leaves to the tag.
        weights = re.sub(r"_clip_(?=\d+\.openai$)", "_clip_quickgelu_", timm[1])
        return Named(weights.removeprefix("tf_").split(".")[0], f"timm:{weights}")
    return _TORCHVISION.get(lower) or NAMES.get(_plain(lower))


def advice(name: str, trunks: Collection[str]) -> str | None:
    """A line that says so, or which of our `trunks` are of that family; None where none is meant.

    >>> advice("dino_vits8", {"vit_small_patch8_224"})
    "'dino_vits8' is here the trunk vit_small_patch8_224 with the weights \
facebookresearch:dino_deitsmall8"
    >>> advice("ResNet-50", ["resnet50"])
    "'ResNet-50' is here the trunk resnet50"
    >>> advice("RN50", ["vit_base_patch32_clip_224", "resnet50"])
    "'RN50': CLIP's ResNets, which pool by attention, are not here; of CLIP there are \
vit_base_patch32_clip_224"
    """
    found = elsewhere(name)
    if found is None or found.trunk not in trunks or name.lower() in trunks:
        return _same_letters(name, trunks) or _family(name, trunks)
    line = f"{name!r} is here the trunk {found.trunk} with the weights {found.weights}"
    if name.lower() in _TORCHVISION or not re.match(r"vit-[bl]-\d+$", _plain(name.lower())):
        return line
    plain = found.trunk.replace("_quickgelu", "")
    return f"{line}, or for LAION's {plain} with timm:{plain}.laion2b"


def _same_letters(name: str, trunks: Collection[str]) -> str | None:
    """Written with capitals, or with - or nothing between the parts."""
    wanted = re.sub("[^a-z0-9]", "", name.lower())
    same = [trunk for trunk in trunks if re.sub("[^a-z0-9]", "", trunk) == wanted != name]
    return f"{name!r} is here the trunk {same[0]}" if same else None


def _family(name: str, trunks: Collection[str]) -> str | None:
    plain = _plain(name.lower())
    if "/" in _OWNERS.sub("", name.lower()):  # a path
        return None
    for title, words, ours in FAMILIES:
        if re.fullmatch(words, plain):
            there = ", ".join(trunk for trunk in trunks if re.search(ours, trunk))
            kinds = (what for pattern, what in _ABSENT if re.fullmatch(pattern, plain))
            absent = next((f": {what}, are not here" for what in kinds), " is no trunk's name")
            return f"{name!r}{absent}; of {title} there are {there}" if there else None
    return None


def _plain(name: str) -> str:
    """ "openai/ViT-L/14@336px" -> "vit-l-14-336"."""
    name = _OWNERS.sub("", name)
    return re.sub(r"(?<=\d)px$", "", re.sub(r"[_/@ ]+", "-", name))


# Of CLIP the name of the architecture alone leaves the activation open.
_TOLD = sorted((n for n in NAMES if not re.match(r"vit-[bl]-[\d-]+$", n)), key=len, reverse=True)
_TEXT = re.compile(f"(?<![a-z0-9])({'|'.join(map(re.escape, _TOLD))})(?![a-z0-9])")


def in_text(text: str) -> list[str]:
    """The trunks that others' names in a text mean, such as those of a file or a folder.

    >>> in_text("models--facebook--dinov2-with-registers-small")
    ['vit_small_patch14_reg4_dinov2']
    """
    return [NAMES[name].trunk for name in _TEXT.findall(text.lower().replace("_", "-"))]
