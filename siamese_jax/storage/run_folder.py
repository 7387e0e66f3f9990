"""A run's folder: what is written there, and the one reader of it.

config.json     the config, whole
run.json        versions, device, trunk and weights really used, data fingerprint, warnings
metrics.jsonl   a line per logged step
events/         the same for TensorBoard
checkpoints/    see checkpoint.py
validation/     N.npz: the metric that chooses, of each validation query at step N
report/         index.html, and per_query_<split>.npz behind its numbers
trained_on.bin  keys of the contents of the images that were trained on, 16 bytes each
results.json    written last: a run that has it is finished
lock            held by the process that trains

run.json and results.json hold a digest of their own content, run.json that of config.json too.
Where one differs, a line says so: it was edited, or it is damaged.

One process a folder: a second one is refused. The lock is the system's (flock) and dies with its
process, however that ends. On a network's folder it holds between machines where the server keeps
locks (NFS 4, NFS 3 with lockd, SMB, Lustre with -o flock); mounted with `nolock` or `local_lock` it
holds on each machine by itself. Where there are no locks (Windows), a line says so.
"""

import contextlib
import logging
import os
import platform
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax

from siamese_jax import processes
from siamese_jax.errors import UserError, naming
from siamese_jax.storage.json_files import numbers, read_json, strict, write_json
from siamese_jax.storage.lock import lock
from siamese_jax.storage.tree import fingerprint
from siamese_jax.storage.writing import remove_drafts, written

log = logging.getLogger(__name__)
PACKAGES = ("siamese-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The fields of each file that its readers rely on.
FIELDS = {
    "config.json": ("distance", "trunk.name", "trunk.image_size", "head.layers", "data.fit"),
    "run.json": (
        *(f"trunk.{name}" for name in ("trunk", "form", "image_size", "preprocessing")),
        *(f"trunk.{name}" for name in ("source", "sha256", "licence", "fallback_for")),
        *("data.fingerprint", "data.source", "split", "versions", "warnings"),
    ),
    "results.json": ("checkpoint_step", "embedding_dim"),
}


class RunFolder(NamedTuple):
    """A run's folder, read and checked.

    Attributes:
      folder: the path.
      config: the content of config.json.
      facts: the content of run.json.
      results: the content of results.json; None where the run is not finished.
    """

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    results: dict[str, Any] | None

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that the results were measured on."""
        return None if self.results is None else self.results["checkpoint_step"]


def is_run(folder: Path) -> bool:
    """Whether the folder is a training run's: it holds a run.json."""
    return (folder / "run.json").is_file()


@processes.by_first
def read(folder: Path, *, finished: bool = False) -> RunFolder:
    """A run's files.

    Raises:
      UserError: a file is missing, is not JSON or lacks a field; results.json may be missing,
        unless a `finished` run is asked for.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, or is a file; give the folder of a run")
    found: dict[str, Any] = {}
    for name, fields in FIELDS.items():
        path = folder / name
        if path.is_file():
            found[name] = read_json(path)
            if lost := [field for field in fields if not _holds(found[name], field)]:
                raise UserError(f"{path} is damaged: it has no {lost[0]}; train in another folder")
        elif finished or name != "results.json":
            what = "a finished run" if finished else "a run"
            raise UserError(f"{folder} is not {what}: {name} is missing")
    _verify(folder, found)
    results = found.get("results.json")
    if results is not None:
        results = {name: numbers(v) if _is_measured(v) else v for name, v in results.items()}
    return RunFolder(folder, found["config.json"], found["run.json"], results)


def _is_measured(block: Any) -> bool:
    """Whether a block of results.json is a split's metrics."""
    return isinstance(block, Mapping) and isinstance(block.get("after"), Mapping)


BARE = "the bare trunk"  # what results.json calls it where no head is better


def _verify(folder: Path, found: Mapping[str, dict[str, Any]]) -> None:
    """Says which files are not as they were written, and takes the digests out of them."""
    stored = {name: content.pop("digest", None) for name, content in found.items()}
    stored["config.json"] = found["run.json"].get("config_digest")
    for name, content in found.items():  # Version 0.1.0 wrote none at all.
        if any(stored.values()) and stored[name] != _digest(content):
            said = "%s is not as it was written: it was edited, or it is damaged"
            log.warning(said, folder / name)
    found["run.json"].pop("config_digest", None)


def _digest(content: Mapping[str, Any]) -> str:
    return fingerprint(content={k: v for k, v in content.items() if k != "seconds"})


def write_start(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes run.json and config.json: from here on the folder is this run's.

    The facts first: a start that dies between them is told again, and is not forgotten.
    """
    write_checked(folder / "run.json", {**facts, "config_digest": _digest(strict(config))})
    write_json(folder / "config.json", config)


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """`write_json` with a digest of the content in it, of all but the seconds that it took."""
    content = strict(content)
    write_json(path, {**content, "digest": _digest(content)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """What `write_checked` wrote; None where it is not there or, with a warning, damaged."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content.pop("digest", None) in (None, _digest(content)):
            return content
    except (UserError, AttributeError, TypeError):  # no JSON, or no object
        pass
    log.warning("%s is damaged; it is made again", path)
    return None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Holds a folder for this process alone, and removes what killed ones left half written.

    Of several processes the first one holds it; the others get an empty one, removed in the end.

    Raises:
      UserError: another process has it, or it is a file; of several processes all raise it.
    """
    with contextlib.ExitStack() as stack:
        wrong = ""
        if processes.is_first():
            try:
                stack.enter_context(_claimed(folder))
            except UserError as error:
                if processes.count() == 1:
                    raise
                wrong = str(error)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        if wrong := processes.of_first(wrong):
            raise processes.of_all(wrong)
        yield folder


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """A folder that nothing was written to is left as it was, also where it was not there.

    Raises:
      UserError: another process has it, or it is a file.
    """
    path = folder / "lock"
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  (closed below)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is a file; choose another --workdir") from None
    with file:
        try:
            lock(file, wait=False)
            if not _lies_at(file, path):  # its holder has just given up, and removed it
                raise BlockingIOError
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, "
                "or choose another --workdir"
            ) from None
        with naming(path):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for place in (folder, folder / "report"):
            remove_drafts(place)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # gone by now, or others have come
                if os.listdir(folder) == [path.name]:
                    path.unlink()
                    for place in made:
                        place.rmdir()


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_trained_on(folder: Path, keys: Sequence[bytes]) -> None:
    """Notes the keys of the images that a run is fitted to."""
    with written(folder / "trained_on.bin", "wb") as file:
        file.write(b"".join(keys))


def trained_on(folder: Path) -> frozenset[bytes]:
    """These keys; none of a run that does not say."""
    path = folder / "trained_on.bin"
    data = path.read_bytes() if path.is_file() else b""
    return frozenset(data[i : i + 16] for i in range(0, len(data), 16))


def per_query_path(folder: Path, split: str) -> Path:
    """The file with the metrics of each query of a split."""
    return folder / "report" / f"per_query_{split}.npz"


def _holds(tree: Any, field: str) -> bool:
    for name in field.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


@processes.by_first
def begun(
    workdir: Path,
    config: Mapping[str, Any],
    may_differ: Collection[str] = (),
    earlier: Mapping[str, Any] | None = None,
) -> RunFolder | None:
    """The run that has checkpoints or results in a folder; None where there is none.

    Args:
      workdir: the folder.
      config: of the run that would go on there.
      may_differ: names of fields.
      earlier: values of fields that a run's config may lack, because they came later.

    Raises:
      UserError: it is a run of another config, but for fields that may differ, and the message
        names the fields; or as in `read`.
    """
    if any("\udc80" <= c <= "\udcff" for c in str(workdir.absolute())):
        raise UserError(f"{workdir}: checkpoints need a name in UTF-8; choose another --workdir")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; choose another --workdir")
    if not any((workdir / name).exists() for name in ("results.json", "checkpoints")):
        return None
    found = read(workdir)
    before = {**(earlier or {}), **_plainly(found.config)}
    now = _plainly(strict(config))
    changed = [
        f"{name} ({before.get(name)!r} there, {now.get(name)!r} now)"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in may_differ
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config: {'; '.join(changed[:5])}"
            f"{' and more' if len(changed) > 5 else ''}. Choose another --workdir; a new run that "
            f"begins with its parameters: --workdir={workdir} --fork=NEW"
        )
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all fields of a config."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plainly(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same as a mapping; version 0.1.0 wrote None as a text."""
    return {name: None if value == "None" else value for name, value in flat(tree)}


def environment() -> dict[str, Any]:
    """Versions and device, for run.json."""
    device = jax.devices()[0]
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
    }


def check_comparable(a: RunFolder, b: RunFolder) -> None:
    """UserError unless both runs were evaluated on the same images, split the same way.

    The data fingerprint covers each image's bytes, name, class, split and role.
    """
    one, other = a.facts, b.facts
    if one["data"]["fingerprint"] == other["data"]["fingerprint"]:
        return
    splits = [
        ", ".join(f"{name} {part['images']} images" for name, part in run["split"].items())
        for run in (one, other)
    ]
    raise UserError(
        f"{a.folder} and {b.folder} cannot be compared: they were evaluated on different data or "
        f"splits ({one['data']['source']}: {splits[0]}; {other['data']['source']}: {splits[1]}; "
        "fingerprints differ). Train both with the same data and data.split_seed"
    )
