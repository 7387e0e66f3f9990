"""Ctrl-C, SIGTERM and SIGHUP: loops look whether one came, and stop where nothing is lost.

    the first     `check` raises `Stopped`, at the next place that the work goes on from
    the second    the process ends at once, as by the first inside `cut_off`

Nothing is thrown into native code at a random point. Handlers are set by the command line alone,
in `heeding`: elsewhere `check` finds nothing, and signals do what the caller has made of them.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

_came: list[int] = []  # the first signal, once there is one
_holds: list[None] = []  # one for each `held` that is open
_loose: list[str] = []  # of each `cut_off` that is open, what is kept
_former: dict[int, Any] = {}  # the handlers from before, inside `heeding`


class Stopped(KeyboardInterrupt):
    """Work that ended because of a signal, at a place that it goes on from.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int, kept: str) -> None:
        super().__init__(kept)
        self.number = number


def came() -> int:
    """The number of the signal that has asked to stop; 0 where none has."""
    return _came[0] if _came else 0


def asked() -> bool:
    """Whether a signal has asked to stop."""
    return bool(_came)


def ask(number: int) -> None:
    """As if this signal had come; of several processes one has had it."""
    _note(number)


def check(kept: str) -> None:
    """Raises `Stopped` where a signal has asked for it; `kept` says what is done and stays."""
    if _came and not _holds:
        raise Stopped(_came[0], kept)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What runs inside is finished first: no `check` raises."""
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()


@contextlib.contextmanager
def cut_off(kept: str) -> Iterator[None]:
    """For others' code, which does not look and may end anywhere, such as a download of minutes.

    The first signal ends the process, with the line that `heeding` was given; `kept` as in `check`.
    """
    _loose.append(kept)  # before the look: the listener looks the other way round
    try:
        check(kept)
        yield
    finally:
        _loose.pop()
    check(kept)


def line(number: int, kept: str) -> str:
    """What a process says that a signal has stopped."""
    return f"stopped by {signal.Signals(number).name}: {kept}"


@contextlib.contextmanager
def heeding(line: Callable[[int, str], str] = line) -> Iterator[None]:
    """The signals are for `check` to find; signals that are ignored (nohup) stay so.

    `line` of a signal and of what is kept is said where `cut_off` ends the process.
    The second one is seen by a thread of its own, because Python's handlers wait for native code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python's handlers are the main thread's.
        return
    _came.clear()
    inside, outside = socket.socketpair()
    outside.setblocking(False)
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]
    listener = threading.Thread(target=_listen, args=(inside, terminals, line), daemon=True)
    listener.start()
    former_fd = signal.set_wakeup_fd(outside.fileno(), warn_on_full_buffer=False)
    _former.update({number: signal.getsignal(number) for number in SIGNALS})
    for number, handler in _former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _note)
    try:
        yield
    finally:
        _restore(former_fd)
        outside.close()
        listener.join()
        inside.close()
        _came.clear()


def _restore(former_fd: int = -1) -> None:
    if _former:
        signal.set_wakeup_fd(former_fd)
    for number, handler in _former.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _former.clear()


if hasattr(os, "register_at_fork"):  # a child's signals are its own
    os.register_at_fork(after_in_child=_restore)


def _note(number: int, frame: object = None) -> None:
    if not _came:
        _came.append(number)


def _listen(signals: socket.socket, terminals: list[int], line: Callable[[int, str], str]) -> None:
    """Reads the number of each signal as it comes."""
    heard = False
    for number in iter(lambda: int.from_bytes(signals.recv(1)), 0):
        if number not in SIGNALS:
            continue
        for fd in terminals:
            if not os.isatty(fd):  # It has hung up, and writing to it would be an error.
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        if heard:
            _end("stopped at once; the same command goes on from what was saved before", number)
        heard = True
        _note(number)
        if _loose and not _holds:
            _end(line(number, _loose[-1]), number)
        _say(
            f"{signal.Signals(number).name}: stopping as soon as nothing is lost by it; a second "
            "one stops at once"
        )


def _end(text: str, number: int) -> None:
    """Ends the process; what its other threads still write, such as a bar, does not come after."""
    alone = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _say(text, alone)
    os._exit(128 + number)


def _say(text: str, fd: int = 2) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, f"\n{text}\n".encode())
