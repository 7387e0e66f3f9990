"""A tiny run of a small trunk in a process of its own, that is killed where it is told: SIGKILL, at
the n-th call of a function. Processes come from a fork server that has imported everything."""

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

Process = multiprocessing.process.BaseProcess
Point = tuple[str, str, int, str]  # module, function, which call, what its arguments must name

POINTS: dict[str, Point] = {
    "a block's vectors are written, not its keys": ("storage.vectors", "VectorStore._write", 2, ""),
    "a block of the augmented view": ("storage.vectors", "VectorStore._write", 11, ""),
    "the frozen leaves are written, no checkpoint is": ("storage.checkpoint", "digest", 3, ""),
    "between two steps": ("train.metrics_log", "MetricsLog.write", 3, ""),
    "a checkpoint is being written": ("storage.checkpoint", "Checkpoints.save", 2, ""),
    "the log is being shortened": ("storage.writing", "os.replace", 1, "metrics.jsonl"),
    "the evaluation": ("train.loop", "evaluate_state", 1, ""),
    "the results are being renamed": ("storage.writing", "os.replace", 1, "results.json"),
}


def start(
    arguments: Sequence[str], cache: Path, compiled: Path, said: Path, point: Point | None = None
) -> Process:
    """`siamese-jax train` with these arguments; what it says goes into a file.

    Args:
      arguments: of the command line.
      cache: of features.
      compiled: where compiled programs are kept.
      said: the file.
      point: where it is to be killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["siamese_jax.train.experiment", "siamese_jax.tools.train", "pytest"]
    )
    environment = {"SIAMESE_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    process = context.Process(target=_train, args=(arguments, environment, said, point))
    process.start()
    return process


def _train(
    arguments: Sequence[str], environment: dict[str, str], said: Path, point: Point | None
) -> None:
    os.environ.update(environment)
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    import jax

    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    import small_trunk

    from siamese_jax.__main__ import main

    sys.argv = ["train", "--config=resnet_triplet", *arguments]  # absl looks there
    if point:
        _kill_at(*point)
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    with nowhere, contextlib.redirect_stdout(nowhere), small_trunk.installed():
        code = main(sys.argv)
    sys.exit(code)


def _kill_at(module: str, function: str, nth: int, named: str) -> None:
    *path, name = function.split(".")
    holder = functools.reduce(getattr, path, importlib.import_module(f"siamese_jax.{module}"))
    whole, calls = getattr(holder, name), [0]

    def counted(*args, **kwargs):
        calls[0] += named in str(args) if named else 1
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(holder, name, counted)
