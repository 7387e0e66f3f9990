"""A file that is written whole or not at all: beside its place, and renamed into it."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from siamese_jax.errors import naming

SAFE = "what was there before is untouched"
_DRAFT = ".part"


@contextlib.contextmanager
def written(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file to write, which takes the place of `path` when the block ends without an error.

    Args:
      path: its folder is made where needed; a link is followed, a device is written to directly.
      mode: "w" or "wb".
      **options: of `open`; text is UTF-8 unless they say otherwise.

    Raises:
      OSError: it names `path`, and what was there before is still there.
    """
    target = Path(os.path.realpath(path))
    if "b" not in mode:
        options = {"encoding": "utf-8", **options}
    with naming(path, SAFE):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            with open(target, mode, **options) as file:
                yield file
            return
        draft = target.with_name(f".{uuid.uuid4().hex[:12]}{_DRAFT}")
        try:
            with open(draft, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except OSError as error:
            if error.filename == str(draft):
                error.filename, error.filename2 = os.fspath(path), None
            raise
        finally:
            with contextlib.suppress(OSError):  # a disk that became read-only says so again
                draft.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Removes what killed processes left of `written` in a folder where nobody is writing."""
    for draft in folder.glob(f".*{_DRAFT}"):
        draft.unlink(missing_ok=True)
