"""What others call the trunks here, as people type it: the trunk, and its weights of that name.

Of torch.hub (`dino_vits16`, `dinov2_vits14_reg`), of open_clip and OpenAI (`ViT-B-32`, `ViT-B/16`),
of the Hub (`facebook/dinov2-small`, `openai/clip-vit-base-patch32`), of torchvision (`vit_b_16`).
"""

import re
from typing import NamedTuple


class Named(NamedTuple):
    """A trunk and the name of its weights, as `weights.load` takes them."""

    trunk: str
    weights: str


# A letter or word for the size, as they write it.
_SIZES = {"s": "small", "b": "base", "l": "large"}
_LETTERS = {"s16plus": "small_plus", "h16plus": "huge_plus"}


def _timm(trunk: str, tag: str) -> Named:
    return Named(trunk, f"timm:{trunk}.{tag}")


def _dino() -> dict[str, Named]:
    """Meta's own."""
    found = {}
    for letter, patch in (("s", 16), ("s", 8), ("b", 16), ("b", 8)):
        file = f"deitsmall{patch}" if letter == "s" else f"vitbase{patch}"
        trunk = f"vit_{_SIZES[letter]}_patch{patch}_224"
        found[f"dino-vit{letter}{patch}"] = Named(trunk, f"facebookresearch:dino_{file}")
    for letter, size in _SIZES.items():
        plain, registers = f"vit_{size}_patch14_dinov2", f"vit_{size}_patch14_reg4_dinov2"
        file = f"dinov2_vit{letter}14"
        for name in (f"dinov2-vit{letter}14", f"dinov2-{size}"):
            found[name] = Named(plain, f"facebookresearch:{file}")
        for name in (f"dinov2-vit{letter}14-reg", f"dinov2-with-registers-{size}"):
            found[name] = Named(registers, f"facebookresearch:{file}_reg4")
    for short, size in {**{f"{k}16": v for k, v in _SIZES.items()}, **_LETTERS}.items():
        named = _timm(f"vit_{size}_patch16_dinov3", "lvd1689m")
        found |= dict.fromkeys(
            (f"dinov3-vit{short}", f"dinov3-vit{short}-pretrain-lvd1689m"), named
        )
    found["dinov3-vitl16-pretrain-sat493m"] = _timm("vit_large_patch16_dinov3", "sat493m")
    for size in ("tiny", *_SIZES.values()):
        if size != "large":
            name = f"deit-{size}-patch16-224"
            found[name] = _timm(name.replace("-", "_"), "fb_in1k")
    return found


def _clip() -> dict[str, Named]:
    """OpenAI's, and LAION's."""
    found = {}
    for letter, patch, pixels in (("b", 32, 224), ("b", 16, 224), ("l", 14, 224), ("l", 14, 336)):
        size, larger = _SIZES[letter], "" if pixels == 224 else f"-{pixels}"
        named = _timm(f"vit_{size}_patch{patch}_clip_quickgelu_{pixels}", "openai")
        found[f"clip-vit-{size}-patch{patch}{larger}"] = named
        found[f"vit-{letter}-{patch}{larger}"] = named
        found[f"vit-{letter}-{patch}{larger}-quickgelu"] = named
    for letter, patch, seen in (
        ("b", 32, "34b-b79k"),
        ("b", 16, "34b-b88k"),
        ("l", 14, "32b-b82k"),
    ):
        trunk, name = f"vit_{_SIZES[letter]}_patch{patch}_clip_224", f"clip-vit-{letter}-{patch}"
        found[f"{name}-laion2b-s{seen}"] = _timm(trunk, "laion2b")
        found[f"{name}-datacomp.xl-s13b-b90k"] = _timm(trunk, "datacompxl")
    return found


def _google() -> dict[str, Named]:
    """SigLIP, and the ViT of the Hub, whose first weights were the paper's own."""
    found = {}
    for size, patch, pixels in (
        *(("base", 16, pixels) for pixels in (224, 256, 384, 512)),
        *(("large", 16, pixels) for pixels in (256, 384)),
        *(("so400m", 14, pixels) for pixels in (224, 384)),
    ):
        # 384 pixels are 27 patches of 14 and a rest.
        trunk = f"vit_{size}_patch{patch}_siglip_{pixels // patch * patch}"
        for family, tag in (("siglip", "webli"), ("siglip2", "v2_webli")):
            found[f"{family}-{size}-patch{patch}-{pixels}"] = _timm(trunk, tag)
    for size, patch, pixels, tag in (
        ("base", 16, 224, "orig_in21k_ft_in1k"),
        ("base", 16, 384, "orig_in21k_ft_in1k"),
        ("large", 32, 384, "orig_in21k_ft_in1k"),
        ("base", 16, 224, "orig_in21k"),
        ("base", 32, 224, "orig_in21k"),
        ("large", 16, 224, "orig_in21k"),
        ("large", 32, 224, "orig_in21k"),
    ):
        end = "-in21k" if tag == "orig_in21k" else ""
        trunk = f"vit_{size}_patch{patch}_{pixels}"
        found[f"vit-{size}-patch{patch}-{pixels}{end}"] = _timm(trunk, tag)
    return found


# torchvision's own, by the names that only it writes so; of its transformers there are no weights
# here, so that these are timm's.
_TORCHVISION = {
    "vit_b_16": _timm("vit_base_patch16_224", "augreg_in21k_ft_in1k"),
    "vit_b_32": _timm("vit_base_patch32_224", "augreg_in21k_ft_in1k"),
    "vit_l_16": _timm("vit_large_patch16_224", "augreg_in21k_ft_in1k"),
    "mobilenet_v3_large": Named("mobilenetv3_large_100", "torchvision:IMAGENET1K_V2"),
    "mobilenet_v3_small": Named("mobilenetv3_small_100", "torchvision:IMAGENET1K_V1"),
}
NAMES: dict[str, Named] = {**_dino(), **_clip(), **_google()}
_OWNERS = re.compile(r"^((hf-hub|timm):)?(facebook|facebookresearch|openai|laion|google|timm)/")


def elsewhere(name: str) -> Named | None:
    """What a name of another library is called here.

    >>> elsewhere("facebook/dinov2-small").trunk, elsewhere("ViT-B/16").trunk
    ('vit_small_patch14_dinov2', 'vit_base_patch16_clip_quickgelu_224')
    """
    lower = name.lower()
    return _TORCHVISION.get(lower) or NAMES.get(_plain(lower))


def advice(name: str) -> str | None:
    """A line that says so, or None.

    >>> advice("dino_vits8")
    "'dino_vits8' is here the trunk vit_small_patch8_224 with the weights \
facebookresearch:dino_deitsmall8"
    """
    if (found := elsewhere(name)) is None:
        return None
    line = f"{name!r} is here the trunk {found.trunk} with the weights {found.weights}"
    if not re.match(r"vit-[bl]-\d+$", _plain(name.lower())):
        return line
    plain = found.trunk.replace("_quickgelu", "")
    return f"{line}, or for LAION's {plain} with timm:{plain}.laion2b"


def _plain(name: str) -> str:
    """ "openai/ViT-L/14@336px" -> "vit-l-14-336"."""
    name = _OWNERS.sub("", name)
    return re.sub(r"(?<=\d)px$", "", re.sub(r"[_/@ ]+", "-", name))


# Of CLIP the name of the architecture alone leaves the activation open.
_TOLD = sorted((name for name in NAMES if not re.match(r"vit-[bl]-", name)), key=len, reverse=True)
_TEXT = re.compile(f"(?<![a-z0-9])({'|'.join(map(re.escape, _TOLD))})(?![a-z0-9])")


def in_text(text: str) -> list[str]:
    """The trunks that others' names in a text mean, such as those of a file or a folder.

    >>> in_text("models--facebook--dinov2-with-registers-small")
    ['vit_small_patch14_reg4_dinov2']
    """
    return [NAMES[name].trunk for name in _TEXT.findall(text.lower().replace("_", "-"))]
