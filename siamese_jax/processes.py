"""One program of several processes: how it starts, and what its processes tell one another.

All run the same lines on the same numbers. The first one, of index 0, has the run's folder: what is
read there it tells the others (`by_first`), and what the others write goes to a folder that is
thrown away. What one process knows by itself, such as the rows of its share of the images, all are
told by `told_by_all`. Both are collectives: every process comes to them, in the same order.
"""

import contextlib
import ctypes
import functools
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from siamese_jax.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
WAIT = 120  # seconds for the coordinator, and for all processes, at the start
SILENT = 60  # seconds after which a process, or its machine, that says nothing counts as lost
OF_ALL = "all processes raise it"
PIECE = 2**26  # bytes that are told at a time


class Place(NamedTuple):
    """What a process has to know to find the others.

    Attributes:
      coordinator: HOST:PORT, where the first process listens; "" where JAX finds it out.
      process, processes: this one's number, and how many there are; None where JAX finds it out.
    """

    coordinator: str = ""
    process: int | None = None
    processes: int | None = None


# The start and the end ----------------------------------------------------------------------


def options(argv: Sequence[str]) -> tuple[Place | None, list[str]]:
    """What a command line says of processes, and the rest of it.

    UserError where only some of the three options are there.

    >>> options(["embed", "--coordinator=a:1", "--process-id=0", "--processes=2", "--out=x.npz"])
    (Place(coordinator='a:1', process=0, processes=2), ['embed', '--out=x.npz'])
    """
    names = ("--coordinator", "--process-id", "--processes", "--distributed")
    given, rest, words = dict[str, str](), list[str](), iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in names:
            given[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if not given:
        return None, rest
    if (how := given.pop("--distributed", None)) is not None:
        if how != "auto" or given:
            raise UserError(
                f"--distributed={how}: it is auto, without {', '.join(names[:3])}, where SLURM, "
                "Open MPI, Kubernetes or a TPU pod tells them"
            )
        return Place(), rest
    if missing := [name for name in names[:3] if name not in given]:
        raise UserError(f"{' and '.join(given)} without {' and '.join(missing)}: give all three")
    coordinator, count = given["--coordinator"], _number(given, "--processes", 1, 100_000)
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"--coordinator={coordinator}: give HOST:PORT of the first process")
    return Place(coordinator, _number(given, "--process-id", 0, count - 1), count), rest


def _number(given: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = given[name]
    if not (text.isdigit() and least <= int(text) <= most):
        raise UserError(f"{name}={text}: give a whole number from {least} to {most}")
    return int(text)


def begin(place: Place) -> None:
    """Joins the other processes; before JAX's first computation.

    Raises:
      UserError: the coordinator is not there within WAIT seconds, or JAX finds no cluster.
    """
    if place.coordinator and place.process:
        _reach(place.coordinator)
    import jax

    given: dict[str, Any] = {"initialization_timeout": WAIT, "heartbeat_timeout_seconds": SILENT}
    given["shutdown_timeout_seconds"] = 86_400  # the first may still write what it found
    if place.coordinator:
        given |= {"coordinator_address": place.coordinator, "num_processes": place.processes}
        given |= {"process_id": place.process, "cluster_detection_method": "deactivate"}
    # Signals are ours: a step is finished and saved first (`siamese_jax.stopping`).
    jax.config.update("jax_enable_preemption_service", False)
    _when_aborted(f"error: some of the processes did not come in {WAIT} s: start them as well")
    try:
        jax.distributed.initialize(**given)
        with _quiet():
            told_by_all(None)  # where they find one another
    except (ValueError, RuntimeError) as error:
        what = f"of {place.coordinator}" if place.coordinator else "of --distributed=auto"
        raise UserError(
            f"the processes {what} did not come together ({' '.join(str(error).split())[:200]}): "
            "start all of them, with one --coordinator, one --processes and each its --process-id"
        ) from None
    _when_aborted(
        f"error: process 0 of {count()}, or its machine, was lost: start all processes again with "
        "the same commands; they go on from what is saved"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a library writes to standard output, which is the tool's."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
        ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _reach(coordinator: str) -> None:
    """Waits for the first process; JAX's own line on one that never comes is many lines."""
    host, _, port = coordinator.rpartition(":")
    end, why = time.monotonic() + WAIT, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            why = str(error)
            time.sleep(0.2)
    raise UserError(
        f"--coordinator={coordinator} was not reached in {WAIT} s ({why}): start the process with "
        "--process-id=0 there, and see that the port is open"
    )


def _when_aborted(line: str) -> None:
    """JAX's runtime aborts a process whose coordinator is gone; its last line is to be ours."""
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def last(_: int) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(1)

    _handlers.append(handler_type(last))  # as long as the process lives
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handlers[-1])


_handlers: list[Any] = []


def lost(error: BaseException) -> str | None:
    """One line, where an error is that of another process which is gone; else None."""
    told = ("Gloo", "NCCL", "oordination service", "heartbeat", "Connection closed by peer")
    if count() == 1 or not any(word in str(error) for word in told):
        return None
    line = " ".join(str(error).split())[:120]
    return (
        f"another of the {count()} processes stopped or was lost ({line}): see its last line, and "
        "start all of them again with the same commands; they go on from what is saved"
    )


def end(code: int) -> None:
    """Leaves the others: together with them where all end, else at once, so that they notice."""
    if count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if code and not _ending:
        os._exit(code)
    sys.modules["jax"].distributed.shutdown()


_ending: list[None] = []


def all_end(error: BaseException | None = None) -> None:
    """Notes that all processes have come to the same end, and wait for one another there.

    Of an error: where it is one that all have.
    """
    if error is None or OF_ALL in getattr(error, "__notes__", ()):
        _ending.append(None)


# Who is here --------------------------------------------------------------------------------


def count() -> int:
    """How many processes there are."""
    jax = sys.modules.get("jax")
    return jax.process_count() if jax and jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0 on."""
    return sys.modules["jax"].process_index() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that has the run's folder, and speaks."""
    return index() == 0


# What they tell one another -----------------------------------------------------------------


def told_by_all(value: R) -> list[R]:
    """What each process gives here, in the order of their indices: anything that pickles."""
    if count() == 1:
        return [value]
    return [pickle.loads(data) for data in _exchange(pickle.dumps(value))]


def by_first(call: Callable[P, R]) -> Callable[P, R]:
    """The function, called in the first process alone; all get what it gives, or its UserError.

    Inside of such a call others are plain calls.
    """

    @functools.wraps(call)
    def told(*args: P.args, **options: P.kwargs) -> R:
        if count() == 1 or _inside:
            return call(*args, **options)
        found: tuple[Any, str] = None, ""
        if is_first():
            with _alone():
                try:
                    found = call(*args, **options), ""
                except UserError as error:
                    found = None, str(error)
        value, wrong = told_by_all(found)[0]
        if wrong:
            raise of_all(wrong)
        return value

    return told


def of_all(line: str) -> UserError:
    """An error that all processes raise: where it leaves the program they end together."""
    error = UserError(line)
    error.add_note(OF_ALL)
    return error


def of_first(value: R) -> R:
    """What the first process gives here, in all of them."""
    return by_first(lambda: value)()


_inside: list[None] = []


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    _inside.append(None)
    try:
        yield
    finally:
        _inside.pop()


def agree(what: str, values: Mapping[str, Any]) -> None:
    """UserError, in all of them, where a process has other values than the first.

    Args:
      what: the values are of.
      values: by name.
    """
    each = told_by_all({name: repr(value) for name, value in values.items()})
    for number, other in enumerate(each[1:], 1):
        names = sorted(n for n in each[0].keys() | other.keys() if each[0].get(n) != other.get(n))
        if names:
            differ = [
                f"{name} ({each[0].get(name)} in process 0, {other.get(name)} in process {number})"
                for name in names[:5]
            ]
            raise of_all(
                f"process {number} has another {what} than process 0: {'; '.join(differ)}; give "
                "all of them the same"
            )


def joined(rows: np.ndarray) -> np.ndarray:
    """The rows [n, ...] of all processes, one after the other; n may differ."""
    if count() == 1:
        return rows
    each = told_by_all((rows.shape, rows.dtype, rows.tobytes()))
    return np.concatenate([np.frombuffer(d, t).reshape(shape) for shape, t, d in each])


def _exchange(data: bytes) -> list[bytes]:
    """What each process gives, by way of the devices."""
    from jax.experimental import multihost_utils

    gather = multihost_utils.process_allgather
    sizes = gather(np.frombuffer(len(data).to_bytes(8, "little"), np.uint8))
    lengths = [int.from_bytes(size.tobytes(), "little") for size in np.asarray(sizes)]
    found, longest = [bytearray() for _ in lengths], max(lengths)
    for at in range(0, longest, PIECE):
        # Few sizes, as each is a program of its own.
        room = min(PIECE, max(1024, 1 << (longest - at - 1).bit_length()))
        piece = np.zeros(room, np.uint8)
        own = np.frombuffer(data[at : at + room], np.uint8)
        piece[: len(own)] = own
        for whole, row in zip(found, np.asarray(gather(piece)), strict=True):
            whole += row.tobytes()
    return [bytes(whole[:length]) for whole, length in zip(found, lengths, strict=True)]
