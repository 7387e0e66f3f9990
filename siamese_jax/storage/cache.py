"""The cache folder, and folders that exist whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """Where downloaded and rendered things are kept.

    `$SIAMESE_JAX_CACHE` if set, else `$XDG_CACHE_HOME/siamese_jax`, else `~/.cache/siamese_jax`.
    """
    if own := os.environ.get("SIAMESE_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siamese_jax"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, first filling it with `build(temporary folder)` if it does not exist.

    The temporary folder is renamed into place when it is complete, so an interrupted build leaves
    nothing that could pass for a whole one, and of several processes that build the same folder
    one wins and the others use its result.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(draft)
        draft.chmod(0o755)  # mkdtemp makes private folders; a cache may be shared
        try:
            draft.rename(folder)
        except OSError:  # another process was faster: a folder is never renamed onto a full one
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
