"""A `python` that has the heavy packages imported: what a process of its own does, 6 s sooner.

A server imports JAX, TensorFlow and the like once, and nothing of ours. Each command is a fork of
it, with the caller's arguments, folder, environment and open files: a process of its own for all
that a test sees. `python()` is an executable file that takes a script, -m or -c. What a fork cannot
show (warnings as errors at import, which packages are imported, a kill at any moment of the start)
is tested with `sys.executable`.
"""

import atexit
import contextlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

HEAVY = (
    "numpy", "scipy.linalg", "PIL.Image", "h5py", "jax", "jax.numpy", "flax.linen", "optax",
    "orbax.checkpoint", "ml_collections.config_flags", "tensorflow", "tensorflow_datasets",
)  # fmt: skip


_servers: dict[str, str] = {}


def python(environment: Mapping[str, str] | None = None) -> str:
    """The path of a warm Python: one for each PYTHONPATH, which is what a start runs by itself.

    All other variables a command has from its caller.
    """
    environment = environment or os.environ
    path = environment.get("PYTHONPATH", "")
    if path not in _servers:
        _servers[path] = _start({**environment, "JAX_PLATFORMS": "cpu"})
    return _servers[path]


def _start(environment: dict[str, str]) -> str:
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    # It ends when this process does, however that comes: its standard input is then closed.
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--serve", str(folder / "socket")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(server.kill)
    made = folder / "python"
    command = shlex.join([sys.executable, "-I", "-S", __file__, str(folder / "socket")])
    made.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    made.chmod(0o755)
    return str(made)


# The command -----------------------------------------------------------------------------------


def ask(path: str, argv: list[str]) -> int:
    """Has the server run a command, hands it the signals, and gives its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    for _ in range(600):  # the first one comes before the server has imported all
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(path)
            break
        time.sleep(0.1)
    # A fork has no command line of its own to begin again with: `siamese_jax.train.huge_pages`.
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", **os.environ}
    text = json.dumps({"argv": argv, "cwd": os.getcwd(), "env": environment}).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "little")], [0, 1, 2])
    connection.sendall(text)
    pid = int.from_bytes(_read(connection, 8), "little")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int.from_bytes(_read(connection, 8), "little")
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def _read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise SystemExit("the warm Python is gone")
        found += part
    return found


# The server ------------------------------------------------------------------------------------


def serve(path: str) -> None:
    """Imports, then forks for every connection, until its standard input is closed."""
    import importlib
    import select

    for name in HEAVY:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        ready = select.select([listener, 0], [], [])[0]
        if 0 in ready:
            os._exit(0)
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _watch(connection)
        connection.close()


def _watch(connection: socket.socket) -> None:
    """A fork that forks the command, and tells its process and then its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, fds = socket.recv_fds(connection, 8, 3)[:2]
    asked = json.loads(_read(connection, int.from_bytes(size, "little")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        _run(**asked)
    for fd in fds:
        os.close(fd)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(pid.to_bytes(8, "little"))
        connection.sendall(os.waitpid(pid, 0)[1].to_bytes(8, "little"))
    os._exit(0)


def _run(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    """Becomes the command."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)  # noqa: SIM115
    import warnings

    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # Python's own defaults
    import jax  # which has read the server's environment, not this one

    folder = env.get("JAX_COMPILATION_CACHE_DIR") or None
    least = float(env.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 1))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    first = "" if argv[0] in ("-m", "-c") else str(Path(argv[0]).resolve().parent)
    own = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [first or cwd, *filter(None, own), *sys.path[1:]]
    code = 1
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def _end(code: int) -> None:
    import threading

    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    raise SystemExit(ask(sys.argv[1], sys.argv[2:]))
