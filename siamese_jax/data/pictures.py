"""Which files under a folder are pictures: at any depth, in any format that Pillow can decode.

- A suffix that Pillow registers for a format it can decode is trusted, in upper or lower case:
  such a file is not opened, so that 200,000 pictures cost a listing. A file with another suffix, or
  none, is a picture if it begins with the signature of such a format and Pillow opens it.
- Hidden are names that begin with a dot, and the folders that systems make (`SYSTEM_FOLDERS`).
- Linked folders are followed, but not back to a folder that holds the link.
- The order is that of the names' bytes: it depends neither on the file system nor on the locale.

What is left out is counted, and said in a line a kind.
"""

import functools
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from siamese_jax.errors import UserError

SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
)
_KINDS = 5  # of suffixes that a line lists

_REASONS = {
    "other": "files are no pictures that Pillow can open, and are left out",
    "hidden": "pictures are hidden (by a dot, or in a system's folder), and are left out",
    "loop": "links lead back to a folder that holds them, and are not followed",
    "nowhere": "links lead nowhere",
    "closed": "folders cannot be opened, and are left out",
}


@dataclass(frozen=True)
class Tree:
    """The pictures under a folder.

    Attributes:
      root: the folder.
      pictures: paths relative to it, in the order of their names.
      folders: all that are not hidden, relative to the root, with or without pictures.
      real: picture -> its path without links.
      notes: what was left out, a line a kind.
    """

    root: str
    pictures: list[str]
    folders: list[str]
    real: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def loose(self) -> list[str]:
        """The pictures that lie in the folder itself."""
        return [path for path in self.pictures if os.sep not in path]

    @functools.cached_property
    def inside(self) -> dict[str, list[str]]:
        """The folders directly under the root that hold pictures -> these, relative to each."""
        found: dict[str, list[str]] = defaultdict(list)
        for path in self.pictures:
            top, slash, rest = path.partition(os.sep)
            if slash:
                found[top].append(rest)
        return dict(found)

    def under(self, top: str) -> "Tree":
        """The part under one of its folders; its notes stay with the whole."""
        start = top + os.sep
        folders = [f.removeprefix(start) for f in self.folders if f.startswith(start)]
        real = {path: self.real[start + path] for path in self.inside.get(top, ())}
        return Tree(os.path.join(self.root, top), [*real], folders, real)


@dataclass
class _Walk:
    real: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def scan(root: str | os.PathLike[str]) -> Tree:
    """Lists a folder's pictures.

    Raises:
      UserError: there is no such folder, or it cannot be opened.
    """
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise UserError(f"the image folder {root} {what}; check the path")
    root, walk = os.fspath(root), _Walk()
    # A folder still to be read, the real paths of those that led to it, and whether one is hidden.
    ahead: list[tuple[str, tuple[str, ...], bool]] = [("", (os.path.realpath(root),), False)]
    while ahead:
        folder, above, hidden = ahead.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            if not folder:
                raise UserError(f"the image folder {root} cannot be opened ({error})") from error
            walk.left["closed"].append(folder)
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            unseen = hidden or is_hidden(entry.name)
            kind = _kind(entry)
            if kind == "folder":
                real = _real(entry, above[-1])
                if entry.is_symlink() and any(_holds(real, one) for one in above):
                    walk.left["loop"].append(name)
                    continue
                ahead.append((name, (*above, real), unseen))
                if not unseen:
                    walk.folders.append(name)
            elif kind != "file":
                walk.left["nowhere" if kind == "nowhere" else "other"].append(name)
            elif unseen:
                # Not what only looks like one: macOS leaves ._photo.jpg beside photo.jpg.
                if has_suffix(entry.name) and opens(entry.path):
                    walk.left["hidden"].append(name)
            elif has_suffix(entry.name) or opens(entry.path):
                walk.real[name] = _real(entry, above[-1])
            else:
                walk.left["other"].append(name)
    pictures = in_order(walk.real)
    notes = tuple(_note(root, why, walk.left[why]) for why in _REASONS if walk.left[why])
    return Tree(root, pictures, in_order(walk.folders), walk.real, notes)


def is_hidden(name: str) -> bool:
    """Whether a name is passed over: it begins with a dot, or is a system's own folder."""
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def in_order(paths: Iterable[str]) -> list[str]:
    """Sorted by the bytes of the first folder's name, then by those of the rest."""
    return sorted(paths, key=lambda path: os.fsencode(path).partition(os.fsencode(os.sep))[::2])


def left_out(root: str, names: Collection[str]) -> str:
    """The line that says which files are no pictures."""
    return _note(root, "other", names)


def _note(root: str, why: str, names: Collection[str]) -> str:
    first = in_order(names)[0]
    kinds = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)
    ranked = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    listed = [f"{n} {suffix}" for suffix, n in ranked[:_KINDS]] if why == "other" else []
    more = ["..."] if listed and len(ranked) > _KINDS else []
    told = ", ".join([*listed, *more])
    return f"{root}: {len(names)} {_REASONS[why]} ({told}{told and '; '}the first is {first!r})"


def _kind(entry: os.DirEntry[str]) -> str:
    """folder, file, nowhere (a link) or special (a pipe, a socket): none of the last is opened."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        return "nowhere"
    return "nowhere" if entry.is_symlink() else "special"


def _real(entry: os.DirEntry[str], folder: str) -> str:
    """The path without links; `folder` is that of the folder it lies in."""
    return os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(folder, entry.name)


def _holds(folder: str, path: str) -> bool:
    return os.path.commonpath((folder, path)) == folder


def locate(
    names: Sequence[str],
    base: str,
    what: str,
    *,
    lines: Sequence[int] | None = None,
    fixed: bool = False,
    there: Callable[[str], bool] = os.path.isfile,
    some: bool = False,
) -> tuple[list[str], list[str]]:
    """Listed paths as they can be opened, and what is to be said about that.

    Args:
      names: relative ones start from `base`, or from the current folder where all are there and not
        all in `base`.
      base: a folder.
      what: the list, for messages.
      lines: the number of each.
      fixed: they start from `base` alone.
      there: what each must be.
      some: those that are not there are left out, and that is said.

    Raises:
      UserError: some are not there; with `some`, all.
    """
    base = "" if base == os.curdir else base
    bases = [base] if fixed or not base else [base, ""]
    absent: list[list[int]] = []
    for start in bases:
        paths = [os.path.join(start, name) for name in names]
        absent.append([i for i, path in enumerate(paths) if not there(path)])
        if not absent[-1]:
            note = f"{what}: paths start from the current folder: not all are there from {base}"
            return paths, [note] if start != base else []
    lost, start = min(zip(absent, bases, strict=True), key=lambda one: len(one[0]))
    line = f" (line {lines[lost[0]]})" if lines else ""
    said = (
        f"{what}: {len(lost)} of {len(names)} images do not exist, the first is "
        f"{os.path.join(start, names[lost[0]])}{line}"
    )
    if not some or len(lost) == len(names):
        raise UserError(f"{said}; paths start from {start or os.curdir}")
    gone = {*lost}
    found = [os.path.join(start, name) for i, name in enumerate(names) if i not in gone]
    return found, [f"{said}; they are left out"]


# What Pillow can open ------------------------------------------------------------------------


def has_suffix(name: str) -> bool:
    """Whether the name ends as a picture's."""
    return os.path.splitext(name)[1].lower() in _suffixes()


def opens(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a picture by its content."""
    from PIL import Image

    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if not any(Image.OPEN[name][1](start) for name in _signed()):  # type: ignore[misc]
            return False
        with warnings.catch_warnings(), Image.open(path, formats=_signed()):
            return True
    except Exception as error:  # what is not that format after all fails in many ways
        bomb = Image.DecompressionBombError, Image.DecompressionBombWarning
        return isinstance(error, bomb)  # a picture, of a size to be refused when it is read


def is_picture(path: str) -> bool:
    """Whether a file is a picture, by its suffix or else by its content."""
    return has_suffix(path) or opens(path)


@functools.cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    decoded = set(_decoded())
    return frozenset(s for s, name in Image.registered_extensions().items() if name in decoded)


@functools.cache
def _signed() -> tuple[str, ...]:
    """The formats that begin with a signature; the others would take any file for a picture."""
    from PIL import Image

    return tuple(name for name in _decoded() if Image.OPEN[name][1] is not None)


def _decoded() -> Iterator[str]:
    """The formats that Pillow opens and decodes; some it can only tell (HDF5, MPEG, ...)."""
    from PIL import Image, ImageFile

    Image.init()
    for name, (factory, _) in Image.OPEN.items():
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        if not stub and name != "MPEG":
            yield name
