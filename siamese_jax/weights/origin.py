"""What a weights file tells of the network it is of, beyond its leaves' names and shapes.

Some networks share every name and shape and differ in what they compute: TensorFlow's EfficientNets
in timm (`tf_efficientnet_b0`: padding SAME, epsilon 1e-3) and timm's own; ResNets that blur or
average where others stride. What tells them apart is, in this order: a text in the file (a
checkpoint's `arch`, safetensors' metadata), config.json beside it as the Hub has it, the file's
name, and the name of its folder or of its repository in the Hub's cache.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from siamese_jax.errors import UserError
from siamese_jax.trunks.table import HALF, IMAGENET, TRUNKS, UNIT, Preprocessing
from siamese_jax.weights.sources import FACEBOOK

# Networks of timm 1.0 with the leaves of a trunk, name by name and shape by shape.
SAME_LEAVES = {
    "resnet18": ("resnetblur18",),
    "resnet50": ("resnetaa50", "resnetblur50"),
    "efficientnet_b0": ("efficientnet_blur_b0",),
    **{name.replace("_quickgelu", ""): (name,) for name in TRUNKS if "_quickgelu" in name},
    **{name: (name.replace("_quickgelu", ""),) for name in TRUNKS if "_quickgelu" in name},
}
# Tags of timm's CLIPs that were trained with QuickGELU, which the architecture's name does not say.
_QUICK = re.compile(r"_clip_(?=\d+\.(openai|metaclip_[a-z0-9]+|dfn2b)(?![a-z0-9_]))")
_KNOWN = sorted((*TRUNKS, *(name for names in SAME_LEAVES.values() for name in names)), key=len)
_NAME = re.compile(
    r"(?<![a-z0-9])(tf_)?("
    + "|".join(name.replace("efficientnet_", "efficientnet_?") for name in reversed(_KNOWN))
    + r")(?![a-z0-9])"
)
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# timm trained these, and TensorFlow its AdvProp and Lite models, on pixels from -1 to 1.
_HALF = re.compile(r"(?<![a-z0-9])(ap|adv|ra4)(?![a-z0-9])")
# Of Vision Transformers, Google trained on pixels from -1 to 1, but Meta on ImageNet's constants.
_IMAGENET = re.compile(r"(?<![a-z0-9])(dino|mae|moco)")


class Origin(NamedTuple):
    """`name` of a network ("" where nothing tells) and `where` it was found.

    `form`, where that tells it: TensorFlow's, or DINO's. Else the leaves' names tell it.
    """

    name: str = ""
    where: str = ""
    preprocessing: Preprocessing | None = None
    image_size: int | None = None
    form: str | None = None


_MAX_CONFIG = 1 << 20  # bytes; that of a model of timm's has 1 kB


def find(path: Path, texts: tuple[str, ...], trunk: str) -> Origin:
    """What tells of the file's network; UserError if that is one which only looks like `trunk`."""
    for where, text, config in _told(path, texts):
        names = _recognised(text)
        others = [name for name in names if name.removeprefix("tf_") != trunk]
        if config and not names:
            others = [text]
        if others and len(others) == max(len(names), 1) and (config or _alike(others, trunk)):
            raise UserError(
                f"{path} is of {others[0]}, by {where} ({text[:80]!r}), not of {trunk}, though "
                "their leaves may be called the same; where this is wrong, copy the file alone "
                "under another name"
            )
        if names:
            ours = next((name for name in names if name not in others), names[0])
            return Origin(ours, where, *_scaling(ours, text, config), _form(ours, text))
    return Origin()


def _told(path: Path, texts: tuple[str, ...]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(where, text, config.json) of every place that may tell."""
    for text in texts:
        yield "the file's own text", text, {}
    config = _config(path.parent / "config.json")
    if config:
        tag = f".{config['tag']}" if config.get("tag") else ""
        yield "config.json beside it", config["architecture"] + tag, config
    yield "its name", path.name, {}
    above = path.absolute().parent
    folders = [folder.name for folder in [above, *above.parents] if "models--" in folder.name]
    for folder in [*folders, *([above.name] if path.name in _HUB_FILES else [])]:
        yield "its folder's name", folder, {}


def _config(path: Path) -> dict[str, Any]:
    """timm's config.json; {} for any other."""
    try:
        small = path.is_file() and path.stat().st_size <= _MAX_CONFIG
        config = json.loads(path.read_text()) if small else {}
    except (OSError, ValueError, RecursionError):
        return {}
    named = isinstance(config, dict) and isinstance(config.get("architecture"), str)
    if not named:
        return {}
    inner = config.get("pretrained_cfg")
    return {**(inner if isinstance(inner, dict) else {}), **config}


def _recognised(text: str) -> list[str]:
    """The networks that a text names.

    >>> _recognised("timm/tf_efficientnet_b0.ns_jft_in1k"), _recognised("resnet50-0676ba61.pth")
    (['tf_efficientnet_b0'], ['resnet50'])
    >>> _recognised("dinov2_vits14_pretrain"), _recognised("vit_base_patch16_clip_224.openai")
    (['vit_small_patch14_dinov2'], ['vit_base_patch16_clip_quickgelu_224'])
    """
    text = _QUICK.sub("_clip_quickgelu_", text.lower().replace("-", "_"))
    found = [tf + re.sub(r"efficientnet_?", "efficientnet_", n) for tf, n in _NAME.findall(text)]
    return [*found, *(trunk for file, (trunk, _) in FACEBOOK.items() if file in text)]


def _form(name: str, text: str) -> str | None:
    facebook = (form for file, (_, form) in FACEBOOK.items() if file in text.lower())
    return "keras" if name.startswith("tf_") else next(facebook, None)


def _alike(names: list[str], trunk: str) -> bool:
    return any(name in SAME_LEAVES.get(trunk, ()) for name in names)


def _scaling(
    name: str, text: str, config: Mapping[str, Any]
) -> tuple[Preprocessing | None, int | None]:
    """The pixels' scaling and size: as config.json has them, or as timm's tables do."""
    tag = config.get("tag") if isinstance(config.get("tag"), str) else ""
    half = name.startswith(("tf_efficientnet_lite", "tf_mobilenetv3"))
    half = half or _HALF.search(f"{text.lower()} {tag}") is not None
    meta = name.startswith("vit_") and _IMAGENET.search(f"{text.lower()} {tag}")
    scaling = HALF if half else IMAGENET if meta else UNIT if "miil" in text.lower() else None
    try:
        mean, std = (tuple(255 * float(v) for v in config[key]) for key in ("mean", "std"))
        scaling = Preprocessing(mean, std) if len(mean) == len(std) == 3 and min(std) > 0 else None
    except (KeyError, TypeError, ValueError):
        pass
    size = config.get("input_size")
    last = size[-1] if isinstance(size, list) and len(size) == 3 else None
    return scaling, last if type(last) is int and last > 0 else None
