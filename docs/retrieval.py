"""Draws docs/retrieval.png from what `rank` wrote: queries drawn at random, and what they found.

python main.py --config=configs/resnet_triplet.py --workdir=runs/emoji
python -m siamese_jax rank --encoder=runs/emoji -k 8 --out=found.json
python docs/retrieval.py found.json
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

QUERIES, SEED = 6, 0
SIDE, GAP, TOP = 72, 12, 30  # of a picture, between two, above the first row; pixels
RIGHT, WRONG, INK = "#1a7f37", "#d0d7de", "#57606a"


def picture(path: str) -> Image.Image:
    with Image.open(path) as image:
        fitted = ImageOps.contain(image.convert("RGBA"), (SIDE, SIDE))
    tile = Image.new("RGBA", (SIDE, SIDE), "white")
    tile.alpha_composite(fitted, ((SIDE - fitted.width) // 2, (SIDE - fitted.height) // 2))
    return tile.convert("RGB")


def draw(rows: list[dict]) -> Image.Image:
    """A row a query: its picture, then its neighbours, the right one in a green frame."""
    step, depth = SIDE + 2 * GAP, len(rows[0]["neighbours"])
    left = step + GAP  # where the neighbours begin
    page = Image.new("RGB", (left + depth * step, TOP + len(rows) * step), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    pen.text((GAP, 8), "query", INK, font)
    pen.text((left + GAP, 8), "nearest in the gallery, from left to right", INK, font)
    pen.line([(step + GAP // 2, TOP), (step + GAP // 2, page.height - GAP)], WRONG, 2)
    for i, row in enumerate(rows):
        y = TOP + i * step + GAP
        page.paste(picture(row["query"]), (GAP, y))
        for n in row["neighbours"]:
            x = left + (n["rank"] - 1) * step + GAP
            page.paste(picture(n["path"]), (x, y))
            box = (x - 7, y - 7, x + SIDE + 6, y + SIDE + 6)
            pen.rounded_rectangle(box, 8, None, *((RIGHT, 4) if n["correct"] else (WRONG, 1)))
    return page


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["queries"]
    page = draw(random.Random(SEED).sample(found, QUERIES))
    page.quantize(256, dither=Image.Dither.NONE).save(
        Path(__file__).with_name("retrieval.png"), optimize=True
    )
