"""Vision Transformers as others than timm name and cut their leaves, brought to timm's names.

openai: the state dicts of OpenAI's CLIP and of open_clip, below "visual.".
open_clip: those of its models whose tower is timm's own, below "visual.trunk.".
transformers: CLIP's and SigLIP's vision tower of Hugging Face's library, below "vision_model.".
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
    for name in [name for name in found if re.search(r"\.q_proj\.\w+$", name)]:
        parts = [found.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        found[name.replace(".q_proj.", ".qkv.")] = np.concatenate(parts)
    for end in ("weight", "bias"):
        if (joined := found.pop(f"attn_pool.qkv.{end}", None)) is not None:
            cut = len(joined) // 3
            found |= {f"attn_pool.q.{end}": joined[:cut], f"attn_pool.kv.{end}": joined[cut:]}
    return found


def _dinov2(leaves: Leaves) -> Leaves:
    """t + p_0 is one token, where registers stand between the class token t and the patches."""
    found = {name: leaf for name, leaf in leaves.items() if name != "mask_token"}
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


class Library(NamedTuple):
    """A library's tower in a file: its prefix, a leaf that it has alone, and the way to timm's;
    `projection` is CLIP's, [out, in], where it stands outside the tower."""

    name: str
    tower: str
    leaf: str
    convert: Callable[[Leaves], Leaves]
    projection: str = ""


_LIBRARIES = (
    Library("openai", "visual.", "class_embedding", _openai),
    Library("open_clip", "visual.trunk.", "pos_embed", dict, "visual.head.proj.weight"),
    Library(
        "transformers",
        "vision_model.",
        "embeddings.patch_embedding.weight",
        _transformers,
        "visual_projection.weight",
    ),
    Library("dinov3", "", "storage_tokens", _dinov3),
    Library("dinov2", "", "mask_token", _dinov2),
    Library("timm", "", "blocks.0.gamma_1", _gains),
)


def as_timm(leaves: Leaves, where: str, biased: bool) -> Converted | None:
    """The leaves by timm's names; None where they are of none of these libraries.

    `biased`: whether the trunk wanted has biases on queries and values alone, as one of DINOv3's.

    Raises UserError where a leaf that a library's files have is missing or of another shape.
    """
    for library in _LIBRARIES:
        marker = re.compile(rf"(^|.*[./]){re.escape(library.tower + library.leaf)}$")
        prefix = next((found[1] for name in leaves if (found := marker.match(name))), None)
        if prefix is None:
            continue
        projection = prefix + library.projection
        prefix += library.tower
        inside = {
            n.removeprefix(prefix): leaf for n, leaf in leaves.items() if n.startswith(prefix)
        }
        if library.name == "dinov2" and "blocks.0.ls1.gamma" not in inside:  # MAE masks too
            continue
        dino = library.name in ("dinov2", "dinov3") and "register_tokens" not in inside
        left = [name for name in leaves if not name.startswith(prefix) and name != projection]
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
        return Converted(converted, library.name, "dino" if dino else "torch", left)
    return None


def _renamed(leaves: Leaves, rules: Rules) -> Leaves:
    found = {}
    for name, leaf in leaves.items():
        for pattern, theirs in rules:
            name = re.sub(pattern, theirs, name)
        found[name] = leaf
    return found
