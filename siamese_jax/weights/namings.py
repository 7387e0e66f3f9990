"""What other libraries call the layers of our trunks.

Each naming is a function from our layer's path to their (convolution, norm) names.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from siamese_jax.trunks import table

# Our layer's path, e.g. "stage2/block1/conv1" -> their names of its convolution and its norm.
Naming = Callable[[str], tuple[str, str]]


def shapes(trunk: str, form: str) -> dict[str, tuple[int, ...]]:
    """Every leaf of a trunk's variables, such as "params/stem/conv/kernel", with its shape.

    Of its forms, only those of a ResNet have other leaves: Keras's has biases.
    """
    return _shapes(trunk, form if trunk.startswith("resnet") else table.find(trunk).forms[0])


@cache
def _shapes(trunk: str, form: str) -> dict[str, tuple[int, ...]]:
    row = table.find(trunk)
    module, image = row.build(form=form), jnp.zeros((1, row.image_size, row.image_size, 3))
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), image))
    return {"/".join(path): leaf.shape for path, leaf in walk(tree)}


def same_size(leaf: str, size: int, wanted: tuple[int, ...]) -> bool:
    """Whether a leaf of that many numbers can be ours. Positions may be of another square grid.

    >>> [same_size(f"params/stem/{leaf}", 577 * 4, (197, 4)) for leaf in ("positions", "cls")]
    [True, False]
    """
    if not leaf.endswith("/positions"):
        return size == math.prod(wanted)
    places, rest = divmod(size, wanted[1])
    before = wanted[0] - math.isqrt(wanted[0]) ** 2
    return not rest and places > before and math.isqrt(places - before) ** 2 == places - before


def walk(tree: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of a nested mapping: (path of keys, leaf)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from walk(value, *above, key)
        else:
            yield (*above, key), value


def _keras_resnet(path: str) -> tuple[str, str]:
    if path == "stem/conv":
        return "conv1_conv", "conv1_bn"
    stage, block, conv = _numbers(path.replace("shortcut", "conv0"))
    base = f"conv{stage + 1}_block{block}_{conv}"
    return f"{base}_conv", f"{base}_bn"


def _torch_resnet(path: str) -> tuple[str, str]:
    if path == "stem/conv":
        return "conv1", "bn1"
    stage, block, *conv = _numbers(path)
    base = f"layer{stage}.{block - 1}"
    if not conv:
        return f"{base}.downsample.0", f"{base}.downsample.1"
    return f"{base}.conv{conv[0]}", f"{base}.bn{conv[0]}"


def _sequential_resnet(path: str) -> tuple[str, str]:
    """A torch ResNet whose children were put in a Sequential: 0 conv1, 1 bn1, 4 to 7 its stages."""
    conv, norm = _torch_resnet(path)
    if path == "stem/conv":
        return "0", "1"
    at = str(_numbers(path)[0] + 3)
    return at + conv.removeprefix("layer")[1:], at + norm.removeprefix("layer")[1:]


def _keras_vgg(path: str) -> tuple[str, str]:
    stage, conv = _numbers(path)
    return f"block{stage}_conv{conv}", ""


def _torch_vgg(depths: tuple[int, ...], normalised: bool, path: str) -> tuple[str, str]:
    stage, conv = _numbers(path)
    step = 3 if normalised else 2  # convolution, (norm,) relu; a pooling ends the stage
    at = sum(step * depth + 1 for depth in depths[: stage - 1]) + step * (conv - 1)
    return f"features.{at}", f"features.{at + 1}"


_KERAS_MB = {
    "expand": ("expand_conv", "expand_bn"),
    "depthwise": ("dwconv", "bn"),
    "se_reduce": ("se_reduce", ""),
    "se_expand": ("se_expand", ""),
    "project": ("project_conv", "project_bn"),
}


def _keras_efficientnet(path: str) -> tuple[str, str]:
    if (part := path.split("/")[0]) in ("stem", "top"):
        return f"{part}_conv", f"{part}_bn"
    stage, block = _numbers(path)
    conv, norm = _KERAS_MB[path.split("/")[-1]]
    base = f"block{stage}{chr(ord('a') + block - 1)}_"
    return base + conv, base + norm


def _torchvision_efficientnet(path: str) -> tuple[str, str]:
    ends = {"stem/conv": "features.0", "top/conv": "features.8"}
    if path in ends:
        return f"{ends[path]}.0", f"{ends[path]}.1"
    stage, block = _numbers(path)
    layer = path.split("/")[-1]
    at = ("expand", "depthwise", "se", "project").index(layer[:2] if "se_" in layer else layer)
    base = f"features.{stage}.{block - 1}.block.{at - (stage == 1)}"
    if layer.startswith("se_"):
        return f"{base}.fc{1 if layer == 'se_reduce' else 2}", ""
    return f"{base}.0", f"{base}.1"


_TIMM_MB = {
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "se_reduce": ("se.conv_reduce", ""),
    "se_expand": ("se.conv_expand", ""),
    "project": ("conv_pwl", "bn3"),
}
# timm's first stage has no expansion, so its layers are named as a depthwise-separable block's.
_TIMM_FIRST = {**_TIMM_MB, "depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}


def _timm_efficientnet(path: str) -> tuple[str, str]:
    ends = {"stem/conv": ("conv_stem", "bn1"), "top/conv": ("conv_head", "bn2")}
    if path in ends:
        return ends[path]
    stage, block = _numbers(path)
    conv, norm = (_TIMM_FIRST if stage == 1 else _TIMM_MB)[path.split("/")[-1]]
    base = f"blocks.{stage - 1}.{block - 1}."
    return base + conv, base + norm


_LUKEMELAS_MB = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "se_reduce": ("_se_reduce", ""),
    "se_expand": ("_se_expand", ""),
    "project": ("_project_conv", "_bn2"),
}


def _lukemelas_efficientnet(depths: tuple[int, ...], path: str) -> tuple[str, str]:
    ends = {"stem/conv": ("_conv_stem", "_bn0"), "top/conv": ("_conv_head", "_bn1")}
    if path in ends:
        return ends[path]
    stage, block = _numbers(path)
    conv, norm = _LUKEMELAS_MB[path.split("/")[-1]]
    base = f"_blocks.{sum(depths[: stage - 1]) + block - 1}."
    return base + conv, base + norm


def _timm_mobilenetv3(path: str) -> tuple[str, str]:
    stage, *inner = path.split("/")
    if stage == "top":
        return "conv_head", ""
    if stage != "stem" and len(inner) == 1:  # the convolution after the blocks
        base = f"blocks.{_numbers(stage)[0] - 1}.0."
        return f"{base}conv", f"{base}bn1"
    return _timm_efficientnet(path)


Stages = tuple[table.mobilenetv3.StagePlan, ...]


def _place(stages: Stages, path: str) -> int:
    """How many blocks come before the layer's."""
    stage, *block = _numbers(path)[:2]
    return sum(len(s.ratios) for s in stages[: stage - 1]) + (block[0] - 1 if block else 0)


def _torchvision_mobilenetv3(stages: Stages, path: str) -> tuple[str, str]:
    stage, *inner = path.split("/")
    if stage == "top":
        return "classifier.0", ""
    base = f"features.{0 if stage == 'stem' else _place(stages, path) + 1}"
    if len(inner) == 1:
        return f"{base}.0", f"{base}.1"
    number, layer = _numbers(stage)[0], inner[-1]
    steps = ["expand"] * (number > 1) + ["depthwise"] + ["se"] * stages[number - 1].squeeze
    steps.append("project")
    base += f".block.{steps.index(layer[:2] if layer.startswith('se_') else layer)}"
    if layer.startswith("se_"):
        return f"{base}.fc{1 if layer == 'se_reduce' else 2}", ""
    return f"{base}.0", f"{base}.1"


_KERAS_EXCITE = {"se_reduce": "squeeze_excite/conv", "se_expand": "squeeze_excite/conv_1"}


def _keras_mobilenetv3(stages: Stages, published: bool, path: str) -> tuple[str, str]:
    """As Keras 3 calls them, or Keras 2, which wrote the `published` files."""
    stage, *inner = path.split("/")
    if len(inner) == 1:
        name = {"stem": "conv", "top": "conv_2"}.get(stage, "conv_1")
    else:
        at, layer = _place(stages, path), inner[-1]
        name = f"expanded_conv{f'_{at}' if at else ''}/{_KERAS_EXCITE.get(layer, layer)}"
    if published:
        name = re.sub("(^|/)conv", r"\1Conv", name)
        return name, f"{name}/BatchNorm"
    name = name.replace("/", "_")
    return name, f"{name}_bn"


# Of a ViT: by our layer, without the block's number; its own leaves' endings are TORCH_LEAVES'.
_TIMM_VIT = {
    "stem": ("", "norm_pre"),
    "stem/patches": ("patch_embed.proj", ""),
    "top": ("", "norm"),
    "attention": ("attn_pool", "attn_pool.norm"),
    "block": ("blocks.{}", ""),
    "feature": ("", ""),
    "feature/fc1": ("feature.0", "feature.1"),
    "feature/fc2": ("feature.2", "feature.3"),
    "block/qkv": ("blocks.{}.attn.qkv", ""),
    "block/proj": ("blocks.{}.attn.proj", ""),
}


def _timm_vit(path: str) -> tuple[str, str]:
    stage, _, layer = path.partition("/")
    at = _numbers(stage)[0] - 1 if stage.startswith("block") else 0
    base = stage.rstrip("0123456789")
    within = layer.replace("fc", "mlp.fc")
    plain = f"{_TIMM_VIT[base][0]}.{within}" if within else ""
    conv, norm = _TIMM_VIT.get(f"{base}/{layer}" if layer else base, (plain, ""))
    return conv.format(at), norm


_TIMM_CONVNEXT = {
    "": "",
    "depthwise": ".conv_dw",
    "norm1": ".norm",
    "fc1": ".mlp.fc1",
    "fc2": ".mlp.fc2",
    "response": ".mlp.grn",
}


def _timm_convnext(path: str) -> tuple[str, str]:
    stage, _, layer = path.partition("/")
    if stage in ("stem", "top"):
        return {"patches": "stem.0", "norm1": "stem.1" if stage == "stem" else "head.norm"}[
            layer
        ], ""
    base = f"stages.{_numbers(stage)[0] - 1}"
    if not layer.startswith("block"):
        return f"{base}.downsample.{0 if layer == 'norm1' else 1}", ""
    block, _, layer = layer.partition("/")
    name = _TIMM_CONVNEXT.get(layer, f".{layer}")
    return f"{base}.blocks.{_numbers(block)[0] - 1}{name}", ""


# The order of a block's layers in Keras; it lists a ResNet's by their depth.
_KERAS_ORDER = (
    *("expand", "depthwise", "se_reduce", "se_expand", "project"),
    *("conv1", "conv2", "shortcut", "conv3"),
)


@lru_cache(maxsize=8)
def _keras_places(trunk: str) -> dict[str, tuple[str, str]]:
    """By our layer's path: `layers/conv2d_7`, as files of Keras 3 without names count layers."""
    stages, counts = table.find(trunk).stages, Counter[str]()

    def order(layer: str) -> tuple[int, ...]:
        stage, *block, last = layer.split("/")
        return stages.index(stage), *_numbers(layer)[1:2], _KERAS_ORDER.index(last) if block else 0

    def place(kind: str) -> str:
        counts[kind] += 1
        return f"layers/{kind}_{counts[kind] - 1}" if counts[kind] > 1 else f"layers/{kind}"

    kernels = (name for name in shapes(trunk, "keras") if name.endswith("/kernel"))
    layers = sorted((name.split("/", 1)[1].removesuffix("/kernel") for name in kernels), key=order)
    return {
        layer: (
            place("depthwise_conv2d" if layer.endswith("depthwise") else "conv2d"),
            "" if "/se_" in layer else place("batch_normalization"),
        )
        for layer in layers
    }


def _numbers(path: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path)]


class Scheme(NamedTuple):
    """A library's names for one trunk; `form` is the one its weights are made for."""

    naming: Naming
    form: str
    keras: bool
    classifier: str
    ignored: str  # a regex of leaves that a trunk has no use for


def vit_plan(trunk: str) -> table.vit.Plan | None:
    """That of a Vision Transformer, whose files come in more forms than names can tell."""
    build: Any = table.find(trunk).build
    return build.args[0] if build.func is table.vit.ViT else None


def schemes(trunk: str) -> dict[str, Scheme]:
    """The namings in which weights of that trunk are found."""
    build = table.find(trunk).build
    keras_ignored = (
        r"(predictions|fc\d|probs)/|(layers/)?normalization(_\d+)?/(mean|variance|count)$|rescaling|"
        r"layers/(dense|seed_generator)(_\d+)?/|(?i:logits)/"
    )
    torch_ignored = r"(fc|classifier|head|pre_logits|_fc)\."

    def keras(
        naming: Naming, classifier: str = "predictions", place: str = "layers/dense"
    ) -> dict[str, Scheme]:
        ignored = f"{keras_ignored}|{place}/"
        order = Scheme(lambda path: _keras_places(trunk)[path], "keras", True, place, ignored)
        named = Scheme(naming, "keras", True, classifier, keras_ignored)
        return {"keras": named, "keras, by order": order}

    def torch(naming: Naming, classifier: str, form: str = "torch") -> Scheme:
        return Scheme(naming, form, False, classifier, torch_ignored)

    if vit_plan(trunk):
        return {"torch": torch(_timm_vit, "head")}
    if trunk.startswith("convnext"):
        return {"torch": torch(_timm_convnext, "head.fc")}
    if trunk.startswith("resnet"):
        named = {
            "torch": torch(_torch_resnet, "fc"),
            "torch, in sequence": torch(_sequential_resnet, ""),
        }
        both = "keras" in table.find(trunk).forms
        return named | keras(_keras_resnet) if both else named
    if trunk.startswith("vgg"):
        depths, normalised = build.args  # type: ignore[attr-defined]
        plain = torch(partial(_torch_vgg, depths, normalised), "")
        return {"torch": plain} if normalised else {**keras(_keras_vgg), "torch": plain}
    if trunk.startswith("mobilenetv3"):
        stages = table.mobilenetv3.plan(*build.args)  # type: ignore[attr-defined]
        # The classifier is one more convolution, after a block's two or four.
        last = 2 + sum(len(s.ratios) * (4 if s.squeeze else 2) for s in stages)
        names = partial(_keras_mobilenetv3, stages, False)
        old = partial(_keras_mobilenetv3, stages, True)
        torchvision = partial(_torchvision_mobilenetv3, stages)
        return {
            **keras(names, "logits", f"layers/conv2d_{last}"),
            "keras, published": keras(old, "Logits")["keras"],
            "torchvision": torch(torchvision, "classifier.3", "torchvision"),
            "timm": torch(_timm_mobilenetv3, "classifier"),
        }
    depths = tuple(stage.depth for stage in table.efficientnet.plan(*build.args))  # type: ignore
    lukemelas = partial(_lukemelas_efficientnet, depths)
    return {
        **keras(_keras_efficientnet),
        "torchvision": torch(_torchvision_efficientnet, "classifier.1"),
        "timm": torch(_timm_efficientnet, "classifier"),
        "lukemelas": torch(lukemelas, "_fc", form="keras"),
    }


KERAS_LEAVES = {
    "kernel": "/kernel",
    "bias": "/bias",
    "norm/scale": "/gamma",
    "norm/bias": "/beta",
    "norm/mean": "/moving_mean",
    "norm/var": "/moving_variance",
}
TORCH_LEAVES = {
    "kernel": ".weight",
    "bias": ".bias",
    "norm/scale": ".weight",
    "norm/bias": ".bias",
    "norm/mean": ".running_mean",
    "norm/var": ".running_var",
    "scale": ".weight",
    "gain": ".gamma",
    "gain1": ".ls1.gamma",
    "gain2": ".ls2.gamma",
    "q_bias": ".attn.q_bias",
    "v_bias": ".attn.v_bias",
    "cls": "cls_token",
    "registers": "reg_token",
    "positions": "pos_embed",
    "latent": ".latent",
}


def names(trunk: str, form: str, scheme: Scheme) -> dict[str, str]:
    """Our leaf -> their leaf, for a whole trunk."""
    suffixes = KERAS_LEAVES if scheme.keras else TORCH_LEAVES
    found = {}
    for ours in shapes(trunk, form):
        _, path = ours.split("/", 1)
        layer, leaf = re.fullmatch(r"(.*?)/((?:norm/)?\w+)", path).groups()  # type: ignore
        conv, norm = scheme.naming(layer)
        found[ours] = (norm if leaf.startswith("norm/") else conv) + suffixes[leaf]
    return found
