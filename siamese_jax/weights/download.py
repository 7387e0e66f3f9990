"""Downloads that can be resumed, are checked, and appear whole or not at all."""

import contextlib
import hashlib
import importlib.util
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from siamese_jax import stopping
from siamese_jax.errors import REMEDIES, UserError, naming
from siamese_jax.storage.lock import lock
from siamese_jax.weights.sources import Source

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_TIMEOUT = 20.0  # seconds without a byte
_ATTEMPTS = 4


class Unavailable(UserError):
    """The weights are not on this machine and could not be fetched."""


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """`folder`, else $SIAMESE_JAX_CACHE, else ~/.cache/siamese_jax; weights lie in `weights/`."""
    base = folder or os.environ.get("SIAMESE_JAX_CACHE") or Path.home() / ".cache" / "siamese_jax"
    return Path(base).expanduser() / "weights"


def obtain(source: Source, cache_dir: str | os.PathLike | None = None) -> Path:
    """The path of the source's file on this machine, fetched and checked if it has to be.

    Raises Unavailable if it is neither here nor reachable, UserError if its hash is another.
    """
    if source.package[0]:
        return _packaged(source)
    if source.hub:
        return _checked(_hub_file(source.hub, "model.safetensors", cache_folder(cache_dir)))
    return fetch(source.url, cache_folder(cache_dir) / Path(source.url).name, source.digest)


def obtain_described(hub: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """model.safetensors of a Hub repository, fetched with its config.json beside it.

    Raises Unavailable if it is neither here nor reachable.
    """
    folder = cache_folder(cache_dir)
    _hub_file(hub, "config.json", folder)
    return _checked(_hub_file(hub, "model.safetensors", folder))


def located(source: Source, cache_dir: str | os.PathLike | None = None) -> Path | None:
    """Where the source's file lies on this machine, if it does. Touches no network."""
    folder = cache_folder(cache_dir)
    if source.package[0]:
        spec = importlib.util.find_spec(source.package[0])
        places = (spec and spec.submodule_search_locations) or []
        found = [path for place in places if (path := Path(place) / source.package[1]).is_file()]
    elif source.hub:
        repository = folder / "hub" / f"models--{source.hub.replace('/', '--')}"
        # Each is a link, which stays behind when a damaged file is deleted.
        links = repository.glob("snapshots/*/model.safetensors")
        found = [path for path in links if path.is_file()]
    else:
        found = [path for path in [folder / Path(source.url).name] if path.is_file()]
    return found[0] if found else None


def _packaged(source: Source) -> Path:
    """The file inside an installed package, which is found but never imported."""
    package, inside = source.package
    spec = importlib.util.find_spec(package)
    name = package.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"the package {name} is not installed; run: pip install {name}")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file():
        raise Unavailable(f"the package {name} has no {inside}; run: pip install --force {name}")
    check(path, source.digest)
    return path


def _hub_file(hub: str, file: str, folder: Path) -> Path:
    """A file of a Hub repository, from $HF_ENDPOINT if that names a mirror.

    A file that was fetched before is taken without asking.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise Unavailable(
            f"{hub} lies on the Hugging Face Hub; run: pip install huggingface_hub"
        ) from None
    wanted, kept = (hub, file), folder / "hub"
    found = huggingface_hub.try_to_load_from_cache(*wanted, cache_dir=kept)
    if not isinstance(found, str):
        _log.warning("fetching %s of %s from the Hub to %s", file, hub, kept)
        mirror = os.environ.get("HF_ENDPOINT") or None
        try:
            # Asked first, because this fails at once where the download tries for half a minute.
            with stopping.cut_off("the part that was downloaded is kept"):
                huggingface_hub.get_hf_file_metadata(
                    huggingface_hub.hf_hub_url(*wanted, endpoint=mirror)
                )
                found = huggingface_hub.hf_hub_download(*wanted, cache_dir=kept, endpoint=mirror)
        except Exception as e:  # its many kinds of trouble all mean: not to be had
            raise Unavailable(f"{hub} was not fetched from the Hub: {_line(e)}") from None
    return Path(found)


def _checked(path: Path) -> Path:
    """A large file of the Hub's, which names it by its sha256."""
    announced = path.resolve()
    if len(announced.name) == 64:
        _check_or_delete(announced, "sha256:" + announced.name)
    else:
        _log.warning("%s came without a sha256, so it was not checked", path)
    return path


def check(path: Path, digest: str) -> None:
    """UserError if the file's hash does not start with the published digits ("sha256:f37072fd")."""
    kind, _, digits = digest.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not found.startswith(digits):
        raise UserError(
            f"{path} has the {kind} {found}, not the published {digits}; "
            "delete it and fetch it again"
        )


def _check_or_delete(path: Path, digest: str) -> None:
    """`check` of a download; a wrong one is deleted, so that the next attempt starts anew."""
    if not digest:
        _log.warning("%s has no published hash, so it was not checked", path.name)
        return
    try:
        check(path, digest)
    except UserError as e:
        path.unlink()
        message = str(e).replace("delete it and fetch", "it was deleted; fetch")
        raise UserError(message) from None


def fetch(url: str, target: Path, digest: str) -> Path:
    """Download `url` to `target` unless it is there. A part that was left behind is continued."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with _locked(target):
        if target.is_file():  # another process was faster
            return target
        _log.warning("downloading %s to %s", url, target)
        for attempt in range(_ATTEMPTS):
            try:
                _transfer(url, part)
                break
            except OSError as e:  # a URLError is one
                if e.errno in REMEDIES:  # of the file, not of the network
                    raise
                permanent = isinstance(e, urllib.error.HTTPError) and e.code in (401, 403, 404, 410)
                if permanent or attempt == _ATTEMPTS - 1 or not _promising(e):
                    raise Unavailable(f"{url} was not downloaded: {_line(e)}") from None
                time.sleep(0.2 * 4**attempt)
        _check_or_delete(part, digest)
        os.replace(part, target)
    return target


def _promising(error: OSError) -> bool:
    """Whether trying again can help: not where the name or the route is missing."""
    reason = getattr(error, "reason", error)
    return not isinstance(reason, ConnectionRefusedError | socket.gaierror)


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to `part`; OSError if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "siamese-jax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # the part is complete, or longer than the file: the hash decides
            return
        raise
    with response:
        continued = response.status == 206
        length = int(response.headers.get("Content-Length") or -1)
        start = have if continued else 0
        with naming(part), part.open("ab" if continued else "wb") as file:
            got = _copy(response, file)
    if length >= 0 and got != length:
        raise ConnectionError(f"it ended after {start + got:,} of {start + length:,} bytes")


def _copy(response: object, file: object) -> int:
    got = 0
    while chunk := response.read(_CHUNK):  # type: ignore[attr-defined]
        file.write(chunk)  # type: ignore[attr-defined]
        got += len(chunk)
        stopping.check("the part that was downloaded is kept")
    return got


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time writes the part of a target."""
    with target.with_name(target.name + ".lock").open("w") as file:
        lock(file)
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
