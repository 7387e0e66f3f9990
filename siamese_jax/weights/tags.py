"""What a tag tells of published weights: how pixels are scaled, the side of images, the licence.

A tag stands behind the name of a trunk: `sat493m` in `vit_large_patch16_dinov3.sat493m`, as timm
names weights, and in `dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth`, as facebookresearch does. The
tables serve the sources that are fetched and the files that lie here; they are held against timm's
own list by a test. What no row has is as usual for the trunk.
"""

import re
from typing import Any

from siamese_jax.trunks.table import CLIP, HALF, IMAGENET, SATELLITE, UNIT, Preprocessing

# The start of a trunk's name, words that a tag has (each from its first letter), and what they
# tell; the first row that fits counts.
Rows = tuple[tuple[str, str, Any], ...]
_END = r"(?![a-z0-9])"
_PIXELS: Rows = (
    ("tf_(efficientnet_lite|mobilenetv3)", "", HALF),
    ("", f"(?:ap|adv|ra4){_END}", HALF),  # TensorFlow's AdvProp, and some of timm's own
    ("", "miil", UNIT),
    ("vit_large_patch14_clip_", "laion2b", HALF),  # the one CLIP of LAION's that was trained so
    ("vit_large_patch16_dinov3", "sat493m", SATELLITE),
    ("vit_base_patch16_224", "bamboo", CLIP),
    ("vit_", "dino|mae|moco", IMAGENET),  # Meta's; Google trained on pixels from -1 to 1
    ("convnext", "clip", CLIP),
)
_SIZES: Rows = (
    ("resnet", "a3_in1k", 160),
    ("resnet", "tv2_in1k", 176),
    ("resnet50", "a1h_in1k", 176),
    ("efficientnet_b1", "ft_in1k", 224),
    ("efficientnet_b2", "ra_in1k", 256),
    ("efficientnet_b3", "ra2_in1k", 288),
    ("efficientnet_b4", "ra2_in1k", 320),
    ("tf_efficientnet_lite3", "", 300),
    ("tf_efficientnet_lite4", "", 380),
    ("convnext", f"384{_END}", 384),
    ("convnext", f"320{_END}", 320),
    ("convnext", "clip|eupe", 256),
)
# All that is not Apache-2.0.
_LICENCES: Rows = (
    ("", "mae|metaclip|fcmae", "CC-BY-NC-4.0"),
    ("", "dfn2b", "Apple-ASCL"),
    ("", "laion400m", "MIT"),
    ("", "eupe", "FAIR-Noncommercial"),
    ("", "dinov3", "DINOv3-License"),
    ("vit_.*_dinov3", "", "DINOv3-License"),
)


def pixels(trunk: str, tag: str) -> Preprocessing | None:
    """How weights with that tag scale pixels, where it is not as usual for the trunk.

    >>> pixels("convnext_base", "clip_laion2b_augreg") == CLIP, pixels("convnext_base", "fb_in1k")
    (True, None)
    """
    found: Preprocessing | None = _first(_PIXELS, trunk, tag)
    return found


def size(trunk: str, tag: str) -> int | None:
    """The side in pixels of the images that they were trained on, where it is not as usual."""
    found: int | None = _first(_SIZES, trunk, tag)
    return found


def licence(trunk: str, tag: str) -> str | None:
    """The licence that the source states, where it is not Apache-2.0."""
    found: str | None = _first(_LICENCES, trunk, tag)
    return found


def _first(rows: Rows, trunk: str, tag: str) -> Any:
    text = tag.lower().replace("-", "_")
    return next(
        (
            told
            for start, words, told in rows
            if re.match(start, trunk) and re.search(f"(?<![a-z0-9])(?:{words})", text)
        ),
        None,
    )
