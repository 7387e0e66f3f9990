"""Where the experiments are that come with the package, and which file a --config means."""

import importlib.util
import sys
from pathlib import Path

from siamese_jax.errors import UserError


def shipped() -> Path:
    """The folder of the configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> str:
    """The file of a config: a path as it is, or the name of one that comes with the package.

    What a config imports from `configs` is found too, from any folder.

    Raises:
      UserError: a name that no config has.
    """
    if importlib.util.find_spec("configs") is None or not _is_path(name):
        _make_importable(shipped())
    if _is_path(name):
        return name
    names = sorted(path.stem for path in shipped().glob("*.py") if path.stem != "common")
    if name not in names:
        raise UserError(
            f"--config={name}: there is no such file, and no experiment of that name; there are "
            f"{', '.join(names)}"
        )
    return str(shipped() / f"{name}.py")


def _is_path(name: str) -> bool:
    return name.split(":")[0].endswith(".py") or "/" in name or Path(name).is_file()


def _make_importable(folder: Path) -> None:
    """`from configs import common` finds that folder, which need not be on the path."""
    spec = importlib.util.spec_from_loader("configs", loader=None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(folder)]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
