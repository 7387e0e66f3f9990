"""What lies beside a weights file and tells of its network.

config.json: of timm (`architecture`, `pretrained_cfg`), or of transformers (`model_type`,
`vision_config`); open_clip_config.json: of open_clip (`model_cfg`, `preprocess_cfg`);
preprocessor_config.json: how transformers scales pixels. Each is read for what it says of the
network, of pixels, of the image's side and of the licence; what is damaged is not taken.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from siamese_jax.trunks.table import PREPROCESSING, Preprocessing


class Beside(NamedTuple):
    """One file's facts. `name` is a network's as timm calls it, "" where the file gives none;
    `plan` are the fields of a Vision Transformer's Plan that it gives, `mean` says that its feature
    is the mean of the patches. `crops`: the image's side is what images are cut or scaled to,
    `crop`: what the library cuts them to as a rule, where that is another side."""

    where: str = ""
    name: str = ""
    preprocessing: Preprocessing | None = None
    image_size: int | None = None
    plan: Mapping[str, Any] = {}
    licence: str | None = None
    mean: bool = False
    crops: bool = False
    crop: int | None = None


_MAX_CONFIG = 1 << 20  # bytes; that of a model of timm's has 1 kB
# transformers' models that a trunk can be, and the activation where their config leaves it out.
_MODELS = {
    **dict.fromkeys(("clip", "clip_vision_model"), "quick_gelu"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "gelu_pytorch_tanh"),
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"), "gelu"),
}
# Those whose images are cut to another side than positions are made for.
_CROPS = dict.fromkeys(("dinov2", "dinov2_with_registers"), 224)
_FIELDS = {
    "patch": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def read(folder: Path) -> list[Beside]:
    """The facts of each file in a folder that has some, the most certain first."""
    readers = {
        "config.json": (_timm, _transformers, _open_clip),
        "open_clip_config.json": (_open_clip,),
        "preprocessor_config.json": (_processor,),
    }
    found = []
    for file, kinds in readers.items():
        config = _json(folder / file)
        made = [facts for reader in kinds if (facts := reader(config))]
        found += [facts._replace(where=f"{file} beside it") for facts in made[:1]]
    card = _licence(folder / "README.md")
    return [*found, Beside("README.md beside it", licence=card)] if card else found


def _json(path: Path) -> dict[str, Any]:
    try:
        small = path.is_file() and path.stat().st_size <= _MAX_CONFIG
        config = json.loads(path.read_text()) if small else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _licence(card: Path) -> str | None:
    """The `license:` of a model card's head, as the Hub has it."""
    try:
        text = card.read_text()[:_MAX_CONFIG] if card.is_file() else ""
    except (OSError, ValueError):
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]{1,60})\s*$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _timm(config: Mapping[str, Any]) -> Beside | None:
    if not isinstance(config.get("architecture"), str):
        return None
    told = {**_part(config, "pretrained_cfg"), **config}
    tag = f".{told['tag']}" if told.get("tag") else ""
    licence = told.get("license") if isinstance(told.get("license"), str) else None
    scaling = _scaling(told.get("mean"), told.get("std"))
    side = _side(told.get("input_size"))
    mean = told.get("global_pool") == "avg"
    return Beside("", f"{told['architecture']}{tag}", scaling, side, {}, licence, mean)


def _transformers(config: Mapping[str, Any]) -> Beside | None:
    """A model's config, or that of a model of texts and images, which holds that of its tower."""
    if (usual := _MODELS.get(str(config.get("model_type")))) is None:
        return None
    tower = _part(config, "vision_config") if "vision_config" in config else config
    plan: dict[str, Any] = {
        ours: tower[theirs] for ours, theirs in _FIELDS.items() if _whole(tower.get(theirs))
    }
    act = tower.get("hidden_act", usual)
    plan["act"] = _ACTIVATIONS.get(act, act) if isinstance(act, str) else usual
    crop = _CROPS.get(str(config["model_type"]))
    return Beside(image_size=_side(tower.get("image_size")), plan=plan, crop=crop)


def _open_clip(config: Mapping[str, Any]) -> Beside | None:
    model = _part(config, "model_cfg")
    vision, pixels = _part(model, "vision_cfg"), _part(config, "preprocess_cfg")
    if not vision:
        return None
    scaling = _scaling(pixels.get("mean"), pixels.get("std"))
    side = _side(vision.get("image_size")) or _side(pixels.get("size"))
    if isinstance(name := vision.get("timm_model_name"), str):
        return Beside("", name, scaling, side)
    plan: dict[str, Any] = {"act": "quick_gelu" if model.get("quick_gelu") is True else "gelu"}
    for ours, theirs in (("patch", "patch_size"), ("width", "width"), ("depth", "layers")):
        plan |= {ours: vision[theirs]} if _whole(vision.get(theirs)) else {}
    if "width" in plan:
        width = vision.get("head_width", 64)
        plan |= {"heads": plan["width"] // width} if _whole(width) else {}
    return Beside("", "", scaling, side, plan)


def _processor(config: Mapping[str, Any]) -> Beside | None:
    """Pixels from 0 to 1, then (x - mean) / std; another order of things is not taken."""
    factor = config.get("rescale_factor", 1 / 255)
    plain = isinstance(factor, float) and abs(255 * factor - 1) < 1e-3
    if not plain or config.get("do_rescale") is False:
        return None
    mean, std = config.get("image_mean"), config.get("image_std")
    if config.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    cut = config.get("crop_size") if config.get("do_center_crop") else None
    scaling, side = _scaling(mean, std), _side(cut) or _side(config.get("size"))
    return Beside("", "", scaling, side, crops=True) if scaling else None


def _part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value <= 2**15


def _side(size: Any) -> int | None:
    """Of 224, [224, 224], [3, 224, 224], {"height": 224, "width": 224}, {"shortest_edge": 224}."""
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    if isinstance(size, list) and size:
        size = size[-1]
    return size if _whole(size) else None


def _scaling(mean: Any, std: Any) -> Preprocessing | None:
    """From constants for pixels of 0 to 1; well-known ones are as our table has their digits."""
    try:
        ours, spread = (tuple(255 * float(v) for v in values) for values in (mean, std))
    except (TypeError, ValueError):
        return None
    sane = all(abs(value) <= 2**15 for value in (*ours, *spread))  # no NaN is
    if not sane or len(ours) != 3 or len(spread) != 3 or min(spread) <= 0:
        return None
    for known in PREPROCESSING.values():
        numbers = zip((*known.mean, *known.std), (*ours, *spread), strict=True)
        if not known.bgr and all(abs(a - b) < 1e-3 for a, b in numbers):
            return known
    return Preprocessing(ours, spread)
