"""Vision Transformers as others than timm name and cut their leaves, brought to timm's names.

openai: the state dicts of OpenAI's CLIP and of open_clip, below "visual.", or the tower alone.
open_clip: those of its models whose tower is timm's own, below "visual.trunk.".
transformers: models of Hugging Face's library: CLIP's and SigLIP's vision tower, below
"vision_model." or alone; ViT, DINOv2 and DINOv3.
dinov2, dinov3: facebookresearch's files; positions count the class token, also before registers.
timm: what its own DINOv3 calls otherwise than its other transformers.

What stands outside the tower (the text tower, a temperature) is no part of a trunk. Only CLIP's
projection to the space that texts share is taken, as timm takes it: a last layer without biases.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.weights.formats import Leaves

Rules = tuple[tuple[str, str], ...]


class Converted(NamedTuple):
    """Leaves by timm's names, the library they were of, the form that it makes its weights for,
    and the names of what is left out."""

    leaves: Leaves
    naming: str
    form: str
    left: list[str]


_OPENAI: Rules = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_", ".norm"),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
_TRANSFORMERS: Rules = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),  # as it is spelt
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.(attention\.out_)?", "attn_pool."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm", ".norm"),
    (r"\.self_attn\.(out_)?", ".attn."),
)

# ViTModel, Dinov2Model and Dinov2WithRegistersModel.
_TRANSFORMERS_VIT: Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_TRANSFORMERS_DINOV3: Rules = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.", ""),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def _openai(leaves: Leaves) -> Leaves:
    found = _renamed(leaves, _OPENAI)
    found["cls_token"] = found["cls_token"][None]
    if "proj" in found:
        found["head.weight"] = found.pop("proj").T
    return found


def _transformers(leaves: Leaves) -> Leaves:
    found = _renamed(leaves, _TRANSFORMERS)
    found.pop("embeddings.position_ids", None)
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"][None]
    _join(found, ("q_proj", "k_proj", "v_proj"))
    for end in ("weight", "bias"):
        if (joined := found.pop(f"attn_pool.qkv.{end}", None)) is not None:
            cut = len(joined) // 3
            found |= {f"attn_pool.q.{end}": joined[:cut], f"attn_pool.kv.{end}": joined[cut:]}
    return found


def _join(found: Leaves, parts: tuple[str, str, str]) -> None:
    """Queries, keys and values, which timm has in one layer."""
    first = parts[0]
    for name in [name for name in found if re.search(rf"\.{first}\.\w+$", name)]:
        three = [found.pop(name.replace(f".{first}.", f".{part}.")) for part in parts]
        found[name.replace(f".{first}.", ".qkv.")] = np.concatenate(three)


def _transformers_vit(leaves: Leaves) -> Leaves:
    """Its pooler, a layer on the class token, is no part of the feature."""
    own = {name: leaf for name, leaf in leaves.items() if not name.startswith("pooler.")}
    found = _renamed(own, _TRANSFORMERS_VIT)
    _join(found, ("query", "key", "value"))
    return _dinov2(found)


def _transformers_dinov3(leaves: Leaves) -> Leaves:
    gated = any(name.endswith(".mlp.gate_proj.weight") for name in leaves)
    up = (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
    found = _renamed(leaves, (*_TRANSFORMERS_DINOV3, up))
    _join(found, ("q", "k", "v"))
    found.pop("mask_token", None)
    return found


def _dinov2(leaves: Leaves) -> Leaves:
    """t + p_0 is one token, where registers stand between the class token t and the patches.

    In a checkpoint of its training, blocks may lie in chunks: blocks.1.7 is blocks.7.
    """
    own = {name: leaf for name, leaf in leaves.items() if name != "mask_token"}
    found = _renamed(own, ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),))
    if "register_tokens" in found:
        positions = found["pos_embed"]
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["pos_embed"] = positions[:, 1:]
    return found


_DINOV3: Rules = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def _dinov3(leaves: Leaves) -> Leaves:
    """k's bias is masked out; periods are computed (see `positions`)."""
    unused = re.compile(r"\.qkv\.(bias|bias_mask)$|^mask_token$|^rope_embed\.|^local_cls_norm\.")
    found = {name: leaf for name, leaf in leaves.items() if not unused.search(name)}
    for name in (name for name in leaves if name.endswith(".qkv.bias")):
        q, _, v = np.split(leaves[name], 3)
        base = name.removesuffix("qkv.bias")
        found |= {f"{base}q_bias": q, f"{base}v_bias": v}
    return _renamed(found, _DINOV3)


def _unbiased(leaves: Leaves) -> Leaves:
    """Without the biases of queries and values that most of DINOv3's files have, all of them 0."""
    biases = {name for name in leaves if name.endswith((".attn.q_bias", ".attn.v_bias"))}
    if any(leaves[name].any() for name in biases):
        raise ValueError("a bias of queries or values that is not 0: that of a trunk ..._qkvb")
    return {name: leaf for name, leaf in leaves.items() if name not in biases}


def _gains(leaves: Leaves) -> Leaves:
    """LayerScale as timm's DINOv3 and facebookresearch's DeiT 3 call it."""
    return _renamed(leaves, ((r"\.gamma_([12])$", r".ls\1.gamma"),))


_FC_NORM = re.compile(r"(^|.*[./])fc_norm\.(weight|bias)$")


def mean_first(leaves: Leaves) -> tuple[Leaves, bool]:
    """Leaves with timm's `fc_norm` as the last norm, and whether there was one.

    A fine-tune on the patches' mean (timm's global_pool="avg", MAE's code) has it behind that mean,
    and no other last norm.
    """
    named = {}
    for name in leaves:
        found = _FC_NORM.match(name)
        if found and f"{found[1]}norm.weight" not in leaves:
            named[name] = f"{found[1]}norm.{found[2]}"
    return {named.get(name, name): leaf for name, leaf in leaves.items()}, bool(named)


class Library(NamedTuple):
    """A library's tower in a file: its prefix, leaves that it has alone, and the way to timm's.

    `form` is the one that it makes its weights for, where they have no registers: a place of those
    is resized as timm does. `projection` is CLIP's, [out, in], where it stands outside the tower.
    """

    name: str
    tower: str
    leaves: tuple[str, ...]
    convert: Callable[[Leaves], Leaves]
    form: str = "torch"
    projection: str = ""


_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_LIBRARIES = (
    Library("openai", "visual.", ("class_embedding",), _openai),
    Library(
        "open_clip", "visual.trunk.", ("pos_embed",), dict, projection="visual.head.proj.weight"
    ),
    Library(
        "transformers",
        "vision_model.",
        ("embeddings.patch_embedding.weight",),
        _transformers,
        projection="visual_projection.weight",
    ),
    # The towers alone.
    Library("openai", "", ("class_embedding", "conv1.weight", "ln_pre.weight"), _openai),
    Library("transformers", "", ("embeddings.patch_embedding.weight",), _transformers),
    Library(
        "transformers",
        "",
        ("encoder.layer.0.layer_scale1.lambda1", _PROJECTION),
        _transformers_vit,
        "dino",
    ),
    Library("transformers", "", (_PROJECTION,), _transformers_vit),
    Library("transformers", "", ("embeddings.patch_embeddings.weight",), _transformers_dinov3),
    Library("dinov3", "", ("storage_tokens",), _dinov3, "dino"),
    Library("dinov2", "", ("blocks.0.ls1.gamma", "mask_token"), _dinov2, "dino"),
    Library("dinov2", "", ("blocks.0.0.ls1.gamma", "mask_token"), _dinov2, "dino"),
    Library("timm", "", ("blocks.0.gamma_1",), _gains),
)


def _prefix(library: Library, leaves: Leaves) -> str | None:
    """What stands before the library's leaves in a file; None where they are not all there."""
    first, *others = (library.tower + leaf for leaf in library.leaves)
    marker = re.compile(rf"(^|.*[./]){re.escape(first)}$")
    prefixes = (found[1] for name in leaves if (found := marker.match(name)))
    return next((p for p in prefixes if all(p + leaf in leaves for leaf in others)), None)


def as_timm(leaves: Leaves, where: str, biased: bool) -> Converted | None:
    """The leaves by timm's names; None where they are of none of these libraries.

    `biased`: whether the trunk wanted has biases on queries and values alone, as one of DINOv3's.

    Raises UserError where a leaf that a library's files have is missing or of another shape.
    """
    for library in _LIBRARIES:
        if (before := _prefix(library, leaves)) is None:
            continue
        prefix, projection = before + library.tower, before + library.projection
        inside = {
            n.removeprefix(prefix): leaf for n, leaf in leaves.items() if n.startswith(prefix)
        }
        left = [name for name in leaves if not name.startswith(prefix) and name != projection]
        left += [prefix + name for name in inside if name.startswith("pooler.")]
        registers = any(name.endswith("register_tokens") for name in inside)
        try:
            converted = library.convert(inside)
            converted = converted if biased else _unbiased(converted)
            if projection in leaves:
                converted["head.weight"] = leaves[projection]
        except (KeyError, IndexError, ValueError) as e:
            raise UserError(
                f"{where} has leaves called as {library.name} calls them, but not all that it has "
                f"({e}); get the file again"
            ) from None
        form = "torch" if registers else library.form
        return Converted(converted, library.name, form, left)
    return None


def _renamed(leaves: Leaves, rules: Rules) -> Leaves:
    found = {}
    for name, leaf in leaves.items():
        for pattern, theirs in rules:
            name = re.sub(pattern, theirs, name)
        found[name] = leaf
    return found
