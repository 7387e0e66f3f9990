"""The entries of a zip that nobody vouches for, and their bytes.

Python's `zipfile` believes what an archive says of itself. Here the directory is read once, and
refused where it has too many entries, a name twice, or entries that are encrypted, that lie over
each other or outside of the file. No entry takes more memory than its reader allows.
"""

import itertools
import struct
import zlib
from typing import Any, NamedTuple

MAX_ENTRIES = 100_000
_STORED, _DEFLATED = 0, 8
_END, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_END_64, _PLACE_64 = b"PK\x06\x06", b"PK\x06\x07"
_FULL = 2**32 - 1  # the number is in the part that zip64 adds


class Entry(NamedTuple):
    """`size` bytes, stored in the `packed` that begin `start` bytes into the file."""

    start: int
    stored: bool
    crc: int
    packed: int
    size: int


def entries(data: Any) -> dict[str, Entry]:
    """The entries of a zip, which is bytes or a memory map, by name; ValueError for a bad one."""
    first, end, count = _directory(data)
    if count > MAX_ENTRIES:
        raise ValueError(f"it has {count:,} entries, more than any file of weights")
    found: dict[str, Entry] = {}
    places = [(first, end)]  # where the list and each entry begin and end
    at = first
    while at < end and len(found) <= count:
        name, place, entry, at = _entry(data, at, end)
        if name in found:
            raise ValueError(f"its entry {name[:80]!r} appears twice")
        found[name] = entry
        places.append((place, entry.start + entry.packed))
    if len(found) != count:
        raise ValueError("it has another number of entries than it says")
    if any(stop > start for (_, stop), (start, _) in itertools.pairwise(sorted(places))):
        raise ValueError("its entries lie over each other")
    return found


def read(data: Any, name: str, entry: Entry, limit: int) -> bytes:
    """An entry's bytes; ValueError if they are more than `limit`, or damaged."""
    if entry.size > limit:
        raise ValueError(f"{name[:80]!r} has {entry.size:,} bytes, more than the {limit:,} it can")
    content = data[entry.start : entry.start + entry.packed]
    if not entry.stored:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)
    if len(content) != entry.size:
        raise ValueError(f"{name[:80]!r} has another length than announced")
    if zlib.crc32(content) != entry.crc:
        raise ValueError(f"{name[:80]!r} is damaged (bad CRC-32)")
    return content


def _directory(data: Any) -> tuple[int, int, int]:
    """Where the list of entries begins and ends, and how many it has."""
    tail = max(0, len(data) - 22 - 2**16)  # 22 bytes, then a comment
    at = tail + data[tail:].rfind(_END)
    if at < tail:
        raise ValueError("it has no list of entries: the zip is cut off")
    count, size, start, comment = struct.unpack_from("<10xHIIH", data, at)
    if at + 22 + comment > len(data):
        raise ValueError("the zip is cut off")
    if at >= 20 and data[at - 20 : at - 16] == _PLACE_64:
        (place,) = struct.unpack_from("<8xQ", data, at - 20)
        if data[place : place + 4] != _END_64:
            raise ValueError("its list of entries is damaged")
        count, size, start = struct.unpack_from("<32xQQQ", data, place)
    if start + size > at:
        raise ValueError("its list of entries lies outside of the file")
    return start, start + size, count


def _entry(data: Any, at: int, end: int) -> tuple[str, int, Entry, int]:
    """A name, where its entry begins, the entry, and where the list goes on."""
    if data[at : at + 4] != _ENTRY or at + 46 > end:
        raise ValueError("its list of entries is damaged")
    flags, method, crc, packed, size, named, extra, comment, place = struct.unpack_from(
        "<8xHH4xIIIHHH8xI", data, at
    )
    name = data[at + 46 : at + 46 + named].decode("utf-8" if flags & 0x800 else "cp437")
    if flags & 1:
        raise ValueError(f"its entry {name[:80]!r} is encrypted")
    if method not in (_STORED, _DEFLATED):
        raise ValueError(f"its entry {name[:80]!r} is compressed in a way that is not read here")
    more = _zip64(data[at + 46 + named : at + 46 + named + extra])
    size, packed, place = (
        next(more, number) if number == _FULL else number for number in (size, packed, place)
    )
    if data[place : place + 4] != _LOCAL:
        raise ValueError(f"its entry {name[:80]!r} is not where it should be")
    start = place + 30 + sum(struct.unpack_from("<26xHH", data, place))
    entry = Entry(start, method == _STORED, crc, packed, size)
    return name, place, entry, at + 46 + named + extra + comment


def _zip64(extra: bytes) -> Any:
    """The numbers of 8 bytes that stand in for those of 4."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            content = extra[at + 4 : at + 4 + size]
            return iter(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8]))
        at += 4 + size
    return iter(())
