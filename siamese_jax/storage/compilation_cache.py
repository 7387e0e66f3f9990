"""XLA's compiled programs kept on disk, so that only the first run ever pays for compiling."""

import os
from pathlib import Path

from siamese_jax.storage.cache import cache_root


def enable_compilation_cache() -> Path | None:
    """Makes JAX keep and find its compiled programs; call it before the first computation.

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
