"""What 1 million, 100 million and 1 billion images take: rates measured here, the rest arithmetic.

    python benchmarks/scaling.py [--trunk efficientnet_b0 --size 224 --axes 128] [--record]

Measured: images embedded a second (decoded from JPEG files of that size in the command's own way),
one image's bytes, and queries against a gallery of a million rows by `rank`, alone and 1,000
together. The rest is proportion: embedding and exact ranking are both linear in the images, and
each of M machines does one M-th (`--processes`, `rank_shards`). Training has a table of its own
(`collectives.py`): its steps do not depend on how many images there are.
"""

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import measuring
import numpy as np
import records
from PIL import Image

from siamese_jax.data.preprocess import read_image
from siamese_jax.encoder.load import load_encoder
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import rank

GALLERY, TOGETHER, K = 1_000_000, 1_000, 100
COLUMNS = [
    *("images", "pictures, GB", "embedding, machine hours", "vectors, GB"),
    *("one query, s", "1,000 queries, s", "k = 100 over 16 machines, kB a query"),
]


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median of some turns, after one that compiles."""
    run()
    return measuring.median(measuring.turns({"": run}, repeats)[""]).wall


def jpegs(size: int, count: int) -> list[bytes]:
    """Smooth random pictures a little larger than what is embedded."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        large = small.resize((size * 16 // 12 * 5 // 4, size * 5 // 4), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        large.save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunk", default="efficientnet_b0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--axes", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    records.add_option(parser)
    args = parser.parse_args()
    encoder: Any = load_encoder(args.trunk, weights="random", image_size=args.size)
    files = jpegs(args.size, 64)
    began = time.perf_counter()
    images = np.stack([read_image(Image.open(io.BytesIO(file)), args.size) for file in files])
    decoding = (time.perf_counter() - began) / len(files)
    embedding = seconds(lambda: encoder(images), args.repeats) / len(files) + decoding / 2
    rng = np.random.default_rng(0)
    gallery = Gallery(rng.normal(size=(GALLERY, args.axes)).astype(np.float32))
    queries = rng.normal(size=(TOGETHER, args.axes)).astype(np.float32)
    alone = seconds(lambda: rank(queries[:1], gallery, K), args.repeats)
    together = seconds(lambda: rank(queries, gallery, K), args.repeats)
    size = np.mean([len(file) for file in files])
    print(f"{1 / embedding:.0f} images/s, {size / 1e3:.0f} kB an image")
    print(f"of {GALLERY:,} x {args.axes}: {alone * 1e3:.0f} ms a query, 1,000 in {together:.2f} s")
    rows = []
    for count in (10**6, 10**8, 10**9):
        times, vectors = count / GALLERY, count * args.axes * 4 / 1e9
        row = [f"{count:,}", f"{count * size / 1e9:,.0f}", f"{count * embedding / 3600:,.1f}"]
        row += [f"{vectors:,.1f}", f"{alone * times:,.2f}", f"{together * times:,.1f}"]
        rows.append([*row, f"{16 * K * 8 / 1e3:.0f}"])
        print("  ".join(rows[-1]))
    if args.record:
        note = f"{args.trunk}, {args.size} px, {args.axes} axes; measured: {1 / embedding:.0f} "
        note += f"images/s; of a million rows {alone * 1e3:.0f} ms a query, {together * 1e3:.0f} "
        note += "ms for 1,000 together."
        records.save("scaling", COLUMNS, rows, [note, "Of one such machine; M machines: one M-th."])


if __name__ == "__main__":
    main()
