"""The cache's folder, folders in it that exist whole or not at all, and XLA's compiled programs."""

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


def enable_compilation_cache() -> Path | None:
    """Makes JAX keep and find its compiled programs, so that only the first run compiles them.

    Call it before the first computation.
    They live in the folder `xla` of the cache (`$SIAMESE_JAX_CACHE` or ~/.cache/siamese_jax).
    JAX's own setting, the environment variable JAX_COMPILATION_CACHE_DIR, goes before ours, and an
    empty one turns the cache off.

    Returns:
      The folder in use, or None where the cache is off or its folder cannot be written: a run does
      not fail for it.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        chosen = os.environ["JAX_COMPILATION_CACHE_DIR"]
        return Path(chosen) if chosen else None
    folder = cache_root() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Programs that compile in a blink are not worth a file; JAX's default leaves out too many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder
