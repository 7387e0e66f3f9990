"""The trunks: what each is called, how it is built, what it gives, how its pixels are scaled."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.trunks import convnext, efficientnet, mobilenetv3, resnet, vgg, vit
from siamese_jax.trunks.names import advice
from siamese_jax.values import check, flag, number, several

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How pixels of 0 to 255 become a trunk's input: (x - mean) / std, in BGR order if `bgr`."""

    mean: Triple
    std: Triple
    bgr: bool = False


_WRITTEN = {
    "mean": several(number(), 3, 3),
    "std": several(number(above=0), 3, 3),
    "bgr": flag(),
}

# Keras's name for it is "caffe": blue first, the mean of ImageNet's pixels taken off, no scaling.
CAFFE = Preprocessing((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), bgr=True)
# torchvision's transforms, times 255.
IMAGENET = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# -1 to 1, as TensorFlow's EfficientNet-Lite was trained.
LITE = Preprocessing((127.0,) * 3, (128.0,) * 3)
# timm's "inception" constants: 0.5 and 0.5, times 255.
HALF = Preprocessing((127.5,) * 3, (127.5,) * 3)
# Those of OpenAI's CLIP.
CLIP = Preprocessing(
    (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)
)
# Those of Meta's satellite pictures, SAT-493M, that a DINOv3 was trained on.
SATELLITE = Preprocessing((109.65, 104.805, 75.48), (54.315, 39.78, 36.465))
# Pixels from 0 to 1.
UNIT = Preprocessing((0.0,) * 3, (255.0,) * 3)
PREPROCESSING = {
    "imagenet": IMAGENET,
    "inception": HALF,
    "lite": LITE,
    "caffe": CAFFE,
    "clip": CLIP,
    "satellite": SATELLITE,
    "unit": UNIT,
}


def as_preprocessing(value: str | Preprocessing | Mapping[str, Any]) -> Preprocessing:
    """A name in the table, or "MEAN/STD" for pixels from 0 to 1: one number or three (RGB) each.

    >>> as_preprocessing("0.5/0.5") == HALF
    True
    """
    if isinstance(value, Preprocessing):
        return value
    if isinstance(value, Mapping):  # as JSON keeps one
        for name, kind in _WRITTEN.items():
            check(f"preprocessing.{name}", value.get(name), kind)
        return Preprocessing(tuple(value["mean"]), tuple(value["std"]), value["bgr"])
    if str(value) in PREPROCESSING:
        return PREPROCESSING[value]
    try:
        mean, std = (_three(part) for part in str(value).split("/"))
        if min(std) <= 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"preprocessing={value!r}: choose from {', '.join(PREPROCESSING)}, or give MEAN/STD "
            "for pixels from 0 to 1, such as 0.485,0.456,0.406/0.229,0.224,0.225"
        ) from None
    return Preprocessing(mean, std)


def _three(text: str) -> Triple:
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) not in (1, 3) or not all(0 <= number <= 1 for number in numbers):
        raise ValueError
    red, green, blue = (255 * number for number in (numbers * 3 if len(numbers) == 1 else numbers))
    return red, green, blue


def normalise(images: ArrayLike, preprocessing: Preprocessing, dtype: Any = jnp.float32) -> Array:
    """uint8 [n,h,w,3] -> `dtype` [n,h,w,3], worked out in float32.

    >>> float(normalise(jnp.full((1, 1, 1, 3), 191, jnp.uint8), LITE)[0, 0, 0, 0])
    0.5
    """
    x = jnp.asarray(images).astype(jnp.float32)
    x = x[..., ::-1] if preprocessing.bgr else x
    mean = jnp.array(preprocessing.mean, jnp.float32)[None, None, None]
    std = jnp.array(preprocessing.std, jnp.float32)[None, None, None]
    return ((x - mean) / std).astype(dtype)


# Of a Vision Transformer with a class token: the norm of the patches' mean, not of each.
MEAN = "mean"
# The stages of a Vision Transformer that are one vector.
VECTORS = ("cls", MEAN, "attention", "feature", "proj")


@dataclass(frozen=True)
class Trunk:
    """One row of the table.

    `build(form=..., dtype=..., folded=...)` gives a Linen module; its
    `apply({"params", "batch_stats"}, x [n,h,w,3], train_stages=())` gives {stage: [n,h',w',c]}, the
    parameters of a stage lie under its name, and only the stages in `train_stages` use (and update)
    the statistics of the batch. `apply(..., x, after=stage)` goes on from `carried(outputs, stage)`
    of an earlier call: the outputs from that stage on. `widths` are the channels of each stage.
    `preprocessing` is what most of its weights are trained with. `projection`: channels of "proj",
    a stage that only some weights have: CLIP's class token in the space that it shares with texts.
    0 of other trunks. `blocks`: how many blocks that add to their input the stages have; such a
    trunk also takes `drops` (see `siamese_jax.trunks.stochastic_depth`).
    """

    build: Callable[..., nn.Module]
    widths: Mapping[str, int]
    forms: tuple[str, ...]
    image_size: int
    default_weights: str
    preprocessing: Preprocessing = IMAGENET
    projection: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the outputs, in the order of their depth."""
        return tuple(self.widths)

    @property
    def width(self) -> int:
        """The last stage's channels."""
        return self.widths[self.stages[-1]]

    @property
    def channels(self) -> dict[str, int]:
        """Of each stage, of the mean before the norm, and of what only some weights have."""
        mean = {MEAN: self.width} if "cls" in self.widths else {}
        return {**self.widths, **mean, **({"proj": self.projection} if self.projection else {})}


def carried(outputs: Mapping[str, Array], stage: str) -> Array:
    """What a stage hands to the next one: its map, but of a transformer all of its tokens."""
    return outputs.get(f"{stage}:tokens", outputs[stage])


_BOTH = ("keras", "torch")


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> Trunk:
    build = partial(resnet.ResNet, depths, bottleneck)
    forms, weights = (_BOTH, "keras") if bottleneck else (("torch",), "torchvision:IMAGENET1K_V1")
    blocks = dict(zip(resnet.STAGES[1:], depths, strict=True))
    return Trunk(build, resnet.widths(bottleneck), forms, 224, weights, blocks=blocks)


def _vgg(depths: tuple[int, ...], normalised: bool) -> Trunk:
    build = partial(vgg.VGG, depths, normalised)
    forms, weights = (("torch",), "torchvision:IMAGENET1K_V1") if normalised else (_BOTH, "keras")
    return Trunk(build, dict(zip(vgg.STAGES, vgg.WIDTHS, strict=True)), forms, 224, weights)


def _efficientnet(width: float, depth: float, image_size: int, lite: bool, weights: str) -> Trunk:
    build = partial(efficientnet.EfficientNet, width, depth, lite)
    widths = efficientnet.widths(width, depth, lite)
    plan = efficientnet.plan(width, depth, lite)
    blocks = {f"stage{i}": stage.depth for i, stage in enumerate(plan, 1)}
    return Trunk(build, widths, _BOTH, image_size, weights, blocks=blocks)


def _mobilenetv3(size: str, width: float, weights: str) -> Trunk:
    build = partial(mobilenetv3.MobileNetV3, size, width)
    plan = mobilenetv3.plan(size, width)
    blocks = {f"stage{i}": len(stage.ratios) for i, stage in enumerate(plan, 1)}
    widths = mobilenetv3.widths(size, width)
    return Trunk(build, widths, (*mobilenetv3.NORMS,), 224, weights, blocks=blocks)


def _convnext(name: str, depths: tuple[int, ...], width: int, tag: str) -> dict[str, Trunk]:
    features = (width, 2 * width, 4 * width, 8 * width)
    build = partial(convnext.ConvNeXt, depths, features, name.startswith("convnextv2"))
    blocks = dict(zip(convnext.STAGES[1:-1], depths, strict=True))
    weights = f"timm:{name}.{tag}"
    widths = convnext.widths(features)
    return {name: Trunk(build, widths, ("torch",), 224, weights, blocks=blocks)}


# (width, blocks, heads, width inside an MLP: four times the width if 0); "plus" differs in `gated`
_VITS = {
    "tiny": (192, 12, 3, 0),
    "small": (384, 12, 6, 0),
    "base": (768, 12, 12, 0),
    "large": (1024, 24, 16, 0),
    "huge": (1280, 32, 20, 0),
    "so400m": (1152, 27, 16, 4304),
}

# Channels of the space that pictures share with texts.
_CLIP_SPACE = {"base": 512, "large": 768}


def _vits(
    names: str, tag: str, usual: Preprocessing, forms: tuple[str, ...] = ("torch",), **options: Any
) -> dict[str, Trunk]:
    """Vision Transformers, whose names tell their size, patch and pixels; `options` of the plan."""
    rows = {}
    for name in names.split():
        size, patch = re.findall(rf"_({'|'.join(_VITS)})(?:_plus)?_patch(\d+)", name)[0]
        told = name.removesuffix("_qkvb").replace("dinov2", "518").replace("dinov3", "256")
        pixels = int(re.findall(r"_(\d+)$", told)[0])
        grid, rest = divmod(pixels, int(patch))
        plan = vit.Plan(int(patch), grid, *_VITS[size], rest=rest, **options)
        projection = _CLIP_SPACE[size] if "_clip_" in name else 0
        source = f"timm:{name}.{tag}"
        build = partial(vit.ViT, plan)
        blocks = {f"block{i + 1}": 1 for i in range(plan.depth)}
        rows[name] = Trunk(build, plan.widths, forms, pixels, source, usual, projection, blocks)
    return rows


_DINO = ("torch", "dino")
_CLIP: dict[str, Any] = {"epsilon": 1e-5, "pre_norm": True}
_SIGLIP: dict[str, Any] = {"class_token": False, "attention_pool": True}
_DINOV3: dict[str, Any] = {"epsilon": 1e-5, "gains": True, "registers": 4, "turned": True}


def _unicom(name: str, flat: int) -> dict[str, Trunk]:
    plan = {"class_token": False, "biased": False, "act": "relu6", "epsilon": 1e-5, "flat": flat}
    row = _vits(name, "", CLIP, ("torch",), **plan)[name]
    return {name: replace(row, default_weights="unicom")}


_TRANSFORMERS: dict[str, Trunk] = {
    **_vits(
        "vit_tiny_patch16_224 vit_tiny_patch16_384 vit_small_patch32_224 vit_small_patch32_384 "
        "vit_small_patch16_224 vit_small_patch16_384 vit_base_patch32_224 vit_base_patch32_384 "
        "vit_base_patch16_224 vit_base_patch16_384 vit_base_patch8_224 vit_large_patch16_224 "
        "vit_large_patch16_384",
        "augreg_in21k_ft_in1k",
        HALF,
        _DINO,
    ),
    **_vits("vit_small_patch8_224", "dino", IMAGENET, _DINO),
    **_vits("vit_large_patch32_224", "orig_in21k", HALF),
    **_vits("vit_large_patch32_384", "orig_in21k_ft_in1k", HALF),
    **_vits(
        "deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_224 deit_base_patch16_384",
        "fb_in1k",
        IMAGENET,
    ),
    **_vits(
        "deit3_small_patch16_224 deit3_small_patch16_384 deit3_base_patch16_224 "
        "deit3_base_patch16_384 deit3_large_patch16_224 deit3_large_patch16_384",
        "fb_in22k_ft_in1k",
        IMAGENET,
        gains=True,
        class_position=False,
    ),
    **_vits(
        "vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2",
        "lvd142m",
        IMAGENET,
        _DINO,
        gains=True,
    ),
    **_vits(
        "vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 vit_large_patch14_reg4_dinov2",
        "lvd142m",
        IMAGENET,
        gains=True,
        registers=4,
        class_position=False,
    ),
    **_vits(
        "vit_small_patch16_dinov3 vit_base_patch16_dinov3 vit_large_patch16_dinov3",
        "lvd1689m",
        IMAGENET,
        _DINO,
        **_DINOV3,
    ),
    **_vits(
        "vit_small_plus_patch16_dinov3 vit_huge_plus_patch16_dinov3",
        "lvd1689m",
        IMAGENET,
        _DINO,
        gated=True,
        **_DINOV3,
    ),
    **_vits(
        "vit_small_patch16_dinov3_qkvb vit_base_patch16_dinov3_qkvb vit_large_patch16_dinov3_qkvb",
        "lvd1689m",
        IMAGENET,
        _DINO,
        biased=True,
        **_DINOV3,
    ),
    **_vits(
        "vit_tiny_patch16_dinov3_qkvb", "eupe_lvd1689m", IMAGENET, _DINO, biased=True, **_DINOV3
    ),
    **_vits(
        "vit_small_plus_patch16_dinov3_qkvb vit_huge_plus_patch16_dinov3_qkvb",
        "lvd1689m",
        IMAGENET,
        _DINO,
        gated=True,
        biased=True,
        **_DINOV3,
    ),
    **_unicom("vit_base_patch32_unicom_224", 512),
    **_unicom("vit_base_patch16_unicom_224", 768),
    **_unicom("vit_large_patch14_unicom_224", 768),
    **_unicom("vit_large_patch14_unicom_336", 768),
    **_vits(
        "vit_base_patch32_clip_224 vit_base_patch16_clip_224 vit_large_patch14_clip_224",
        "laion2b",
        CLIP,
        **_CLIP,
    ),
    **_vits("vit_base_patch32_clip_256", "datacompxl", CLIP, **_CLIP),
    **_vits(
        "vit_base_patch32_clip_384 vit_base_patch32_clip_448 vit_base_patch16_clip_384 "
        "vit_large_patch14_clip_336",
        "laion2b_ft_in12k_in1k",
        CLIP,
        **_CLIP,
    ),
    **_vits(
        "vit_base_patch32_clip_quickgelu_224 vit_base_patch16_clip_quickgelu_224 "
        "vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336",
        "openai",
        CLIP,
        act="quick_gelu",
        **_CLIP,
    ),
    **_vits(
        "vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384 "
        "vit_base_patch16_siglip_512 vit_large_patch16_siglip_256 vit_large_patch16_siglip_384 "
        "vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_378",
        "v2_webli",
        HALF,
        **_SIGLIP,
    ),
    # Its own size is no multiple of its patch.
    **_vits("vit_so400m_patch14_siglip_384", "webli", HALF, **_SIGLIP),
    **_vits(
        "vit_base_patch32_siglip_256 vit_large_patch16_siglip_512 vit_so400m_patch16_siglip_256 "
        "vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512",
        "v2_webli",
        HALF,
        act="gelu_tanh",
        **_SIGLIP,
    ),
}

TRUNKS: dict[str, Trunk] = {
    "resnet18": _resnet((2, 2, 2, 2), bottleneck=False),
    "resnet34": _resnet((3, 4, 6, 3), bottleneck=False),
    "resnet50": _resnet((3, 4, 6, 3), bottleneck=True),
    "resnet101": _resnet((3, 4, 23, 3), bottleneck=True),
    "resnet152": _resnet((3, 8, 36, 3), bottleneck=True),
    "vgg16": _vgg((2, 2, 3, 3, 3), normalised=False),
    "vgg19": _vgg((2, 2, 4, 4, 4), normalised=False),
    "vgg16_bn": _vgg((2, 2, 3, 3, 3), normalised=True),
    "vgg19_bn": _vgg((2, 2, 4, 4, 4), normalised=True),
    "efficientnet_b0": _efficientnet(1.0, 1.0, 224, False, "keras"),
    "efficientnet_b1": _efficientnet(1.0, 1.1, 240, False, "keras"),
    "efficientnet_b2": _efficientnet(1.1, 1.2, 260, False, "keras"),
    "efficientnet_b3": _efficientnet(1.2, 1.4, 300, False, "keras"),
    "efficientnet_b4": _efficientnet(1.4, 1.8, 380, False, "keras"),
    "efficientnet_lite0": _efficientnet(1.0, 1.0, 224, True, "lite0"),
    "efficientnet_lite1": _efficientnet(1.0, 1.1, 240, True, "lite1"),
    "efficientnet_lite2": _efficientnet(1.1, 1.2, 260, True, "lite2"),
    "efficientnet_lite3": _efficientnet(1.2, 1.4, 280, True, "timm:tf_efficientnet_lite3.in1k"),
    "efficientnet_lite4": _efficientnet(1.4, 1.8, 300, True, "timm:tf_efficientnet_lite4.in1k"),
    "mobilenetv3_large_075": _mobilenetv3("large", 0.75, "keras"),
    "mobilenetv3_large_100": _mobilenetv3("large", 1.0, "timm:mobilenetv3_large_100.ra_in1k"),
    "mobilenetv3_small_050": _mobilenetv3("small", 0.5, "timm:mobilenetv3_small_050.lamb_in1k"),
    "mobilenetv3_small_075": _mobilenetv3("small", 0.75, "timm:mobilenetv3_small_075.lamb_in1k"),
    "mobilenetv3_small_100": _mobilenetv3("small", 1.0, "timm:mobilenetv3_small_100.lamb_in1k"),
    **_convnext("convnext_tiny", (3, 3, 9, 3), 96, "in12k_ft_in1k"),
    **_convnext("convnext_small", (3, 3, 27, 3), 96, "in12k_ft_in1k"),
    **_convnext("convnext_base", (3, 3, 27, 3), 128, "fb_in22k_ft_in1k"),
    **_convnext("convnext_large", (3, 3, 27, 3), 192, "fb_in22k_ft_in1k"),
    **_convnext("convnextv2_nano", (2, 2, 8, 2), 80, "fcmae_ft_in22k_in1k"),
    **_convnext("convnextv2_tiny", (3, 3, 9, 3), 96, "fcmae_ft_in22k_in1k"),
    **_convnext("convnextv2_base", (3, 3, 27, 3), 128, "fcmae_ft_in22k_in1k"),
    **_convnext("convnextv2_large", (3, 3, 27, 3), 192, "fcmae_ft_in22k_in1k"),
    **_TRANSFORMERS,
}


def find(name: str) -> Trunk:
    """The trunk of that name; UserError with what it is called here, or is like, otherwise."""
    if name not in TRUNKS:
        if known := advice(name, TRUNKS):
            raise UserError(f"no trunk is called so: {known}")
        near = difflib.get_close_matches(name.lower(), TRUNKS, 8, 0.5) or [*TRUNKS][:8]
        raise UserError(
            f"no trunk is called {name!r}; of {len(TRUNKS)} there are {', '.join(near)}; "
            "`siamese-jax weights trunks` has them all"
        )
    return TRUNKS[name]
