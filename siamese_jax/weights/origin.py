"""What a weights file tells of the network it is of, beyond its leaves' names and shapes.

Some networks share every name and shape and differ in what they compute: TensorFlow's EfficientNets
in timm (`tf_efficientnet_b0`: padding SAME, epsilon 1e-3) and timm's own; ResNets that blur or
average where others stride; CLIPs of GELU and of QuickGELU. What tells them apart is, in this
order: a text in the file (a checkpoint's `arch`, safetensors' metadata), the configs beside it (see
`beside`), the file's name, and the name of its folder or of its repository in the Hub's cache.
Pixels and their number are as a config beside says, else as the tag in such a name does.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from siamese_jax.errors import UserError
from siamese_jax.trunks.names import in_text
from siamese_jax.trunks.table import TRUNKS, Preprocessing
from siamese_jax.weights import beside, tags
from siamese_jax.weights.beside import Beside
from siamese_jax.weights.namings import vit_plan
from siamese_jax.weights.sources import FACEBOOK, SOURCES

# Networks of timm 1.0 with the leaves of a trunk, name by name and shape by shape.
SAME_LEAVES = {
    "resnet18": ("resnetblur18",),
    "resnet50": ("resnetaa50", "resnetblur50"),
    "efficientnet_b0": ("efficientnet_blur_b0",),
    **{name.replace("_quickgelu", ""): (name,) for name in TRUNKS if "_quickgelu" in name},
    **{name: (name.replace("_quickgelu", ""),) for name in TRUNKS if "_quickgelu" in name},
}
# timm's CLIPs that were trained with QuickGELU, which their repositories' names do not say.
_QUICK = {
    source.hub.removeprefix("timm/"): trunk
    for (trunk, _), source in SOURCES.items()
    if "_quickgelu" in trunk
}
_QUICK_NAME = re.compile(f"({'|'.join(map(re.escape, _QUICK))})(?![a-z0-9_])")
_KNOWN = sorted((*TRUNKS, *(name for names in SAME_LEAVES.values() for name in names)), key=len)
_NAME = re.compile(
    r"(?<![a-z0-9])(tf_)?("
    + "|".join(name.replace("efficientnet_", "efficientnet_?") for name in reversed(_KNOWN))
    + r")(?![a-z0-9])"
)
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_OPENAI_LEAF = "input_resolution"
_GELUS = {"gelu", "gelu_tanh"}  # which differ by less than 5e-4


class Origin(NamedTuple):
    """`name` of a network ("" where nothing tells) and `where` it was found.

    `scaled_by`: where `preprocessing` was found, and the `image_size`. `form`, where that tells it:
    TensorFlow's, or DINO's; else the leaves' names tell it. `notes`: lines on what differs.
    """

    name: str = ""
    where: str = ""
    preprocessing: Preprocessing | None = None
    scaled_by: str = ""
    image_size: int | None = None
    form: str | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()


def find(path: Path, texts: tuple[str, ...], trunk: str, leaves: Collection[str]) -> Origin:
    """What tells of the file's network; UserError if that is one which only looks like `trunk`."""
    configs = beside.read(path.parent)
    if _OPENAI_LEAF in leaves:
        where = f"its leaf {_OPENAI_LEAF}, which OpenAI's files have"
        configs.append(Beside(where, plan={"act": "quick_gelu"}))
    notes = [note for facts in configs for note in _same_plan(path, facts, trunk)]
    told, plan = _named(path, texts, configs, trunk), vit_plan(trunk)
    agreed = [facts.where for facts in configs if plan and facts.plan]
    if agreed and not told.name:
        told = told._replace(name=trunk, where=agreed[0])
    scaled = [facts for facts in configs if facts.preprocessing]
    if scaled:
        told = told._replace(preprocessing=scaled[0].preprocessing, scaled_by=scaled[0].where)
    # What transformers cuts images to comes before the size that positions are made for.
    sized = sorted((f for f in configs if f.image_size), key=lambda f: not f.crops)
    size, where = (sized[0].image_size, sized[0].where) if sized else (told.image_size, told.where)
    if size and plan:
        size = max(size // plan.patch, 1) * plan.patch  # as a convolution leaves the rest out
    if size and size != TRUNKS[trunk].image_size:
        notes.append(f"images of {size} pixels by {where}")
    if sized and sized[0].crop and not any(facts.crops for facts in configs):
        notes.append(
            f"transformers' own preprocessor cuts images to {sized[0].crop} pixels: "
            f"preprocessor_config.json is not beside it; image_size={sized[0].crop} is as there"
        )
    token = TRUNKS[trunk].stages[-1] == "cls"
    notes += [
        f"its feature is the mean of the patches by {facts.where} (global_pool=avg), which is "
        "--stage=top here: by default it is the class token"
        for facts in configs
        if facts.mean and token and not any(name.endswith("fc_norm.weight") for name in leaves)
    ]
    licence = next((facts.licence for facts in configs if facts.licence), told.licence)
    return told._replace(image_size=size, licence=licence, notes=tuple(notes))


def _named(path: Path, texts: tuple[str, ...], configs: Sequence[Beside], trunk: str) -> Origin:
    """By the first place that names a network."""
    for where, text, sure in _told(path, texts, configs):
        names = _recognised(text)
        others = [name for name in names if name.removeprefix("tf_") != trunk]
        if sure and not names:
            others = [text]
        if others and len(others) == max(len(names), 1) and (sure or _alike(others, trunk)):
            raise _another(path, f"{others[0]}, by {where} ({text[:80]!r})", trunk)
        if names:
            ours = next((name for name in names if name not in others), names[0])
            return Origin(
                ours,
                where,
                tags.pixels(ours, text),
                where,
                tags.size(ours, text),
                _form(ours, text),
                tags.licence(ours, text),
            )
    return Origin()


def _another(path: Path, told: str, trunk: str) -> UserError:
    return UserError(
        f"{path} is of {told}, not of {trunk}, though their leaves may be called the same; where "
        "this is wrong, copy the file alone under another name"
    )


def _told(
    path: Path, texts: tuple[str, ...], configs: Sequence[Beside]
) -> Iterator[tuple[str, str, bool]]:
    """(where, text, whether it is certain) of every place that may tell."""
    for text in texts:
        yield "the file's own text", text, False
    for facts in configs:
        if facts.name:
            yield facts.where, facts.name, True
    yield "its name", path.name, False
    above = path.absolute().parent
    folders = [folder.name for folder in [above, *above.parents] if "models--" in folder.name]
    for folder in [*folders, *([above.name] if path.name in _HUB_FILES else [])]:
        yield "its folder's name", folder, False


def _same_plan(path: Path, facts: Beside, trunk: str) -> list[str]:
    """UserError where a config is of another Vision Transformer; a line where that is as good."""
    plan = vit_plan(trunk)
    wrong = {k: v for k, v in facts.plan.items() if plan and getattr(plan, k) != v}
    if plan is None or not wrong or (plan.gated and wrong.keys() == {"act"}):
        return []
    said = " and ".join(
        f"{k} {value} where {trunk} has {getattr(plan, k)}" for k, value in wrong.items()
    )
    if wrong.keys() == {"act"} and {wrong["act"], plan.act} == _GELUS:
        return [f"{facts.where} says {said}: activations differ by up to 5e-4"]
    right = _trunks_of(plan._replace(**wrong), facts.image_size)
    named = f"{' or '.join(right)} (take that trunk)" if right else "another network"
    raise _another(path, f"{named}, by {facts.where} ({said})", trunk)


def _trunks_of(plan: Any, pixels: int | None) -> list[str]:
    """The trunks of that plan, for images of any size; those of that many pixels, if there are."""
    plans = [(name, vit_plan(name)) for name in TRUNKS]
    found = [name for name, other in plans if other and other._replace(grid=plan.grid) == plan]
    return [name for name in found if TRUNKS[name].image_size == pixels] or found


def _recognised(text: str) -> list[str]:
    """The networks that a text names.

    >>> _recognised("timm/tf_efficientnet_b0.ns_jft_in1k"), _recognised("resnet50-0676ba61.pth")
    (['tf_efficientnet_b0'], ['resnet50'])
    >>> _recognised("dinov2_vits14_pretrain"), _recognised("vit_base_patch16_clip_224.openai")
    (['vit_small_patch14_dinov2'], ['vit_base_patch16_clip_quickgelu_224'])
    """
    text = text.lower().replace("-", "_")
    text = _QUICK_NAME.sub(lambda found: _QUICK[found[1]], text)
    found = [tf + re.sub(r"efficientnet_?", "efficientnet_", n) for tf, n in _NAME.findall(text)]
    files = [trunk for file, (trunk, _) in FACEBOOK.items() if file in text]
    return [*found, *files] or in_text(text)


def _form(name: str, text: str) -> str | None:
    facebook = (form for file, (_, form) in FACEBOOK.items() if file in text.lower())
    dino = "dino" if "dino_vit" in text.lower().replace("-", "_") else None
    return "keras" if name.startswith("tf_") else next(facebook, dino)


def _alike(names: list[str], trunk: str) -> bool:
    return any(name in SAME_LEAVES.get(trunk, ()) for name in names)
