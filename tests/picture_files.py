"""Writers of picture files by the letter of their formats: kinds that Pillow cannot write."""

import struct
import zlib

import numpy as np

TURNS = {  # EXIF orientation -> how an upright picture [h, w, ...] is stored
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),  # stored so that a quarter turn clockwise puts it upright
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def packed(rows, bits, order):
    """Bytes of samples [h, n]: each row of `bits` a sample begins a byte."""
    if bits % 8 == 0:
        return rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    bit = (rows[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(bit.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def packbits(data):
    blocks = [data[i : i + 128] for i in range(0, len(data), 128)]
    return b"".join(bytes([len(block) - 1]) + block for block in blocks)


def predicted(rows, samples):
    """Differences of neighbours, as TIFF's predictor 2 stores them: rows [h, w * samples]."""
    before = np.zeros_like(rows)
    before[:, samples:] = rows[:, :-samples]
    return rows - before


def tiff(x, *, order="<", bits=8, photometric=1, compression=1, planar=1, tile=None, **more):
    """A TIFF of samples [h, w, n], by its specification (version 6).

    Args: `order` "<" or ">"; `compression` 1 (none), 8 (deflate) or 32773 (packbits); `planar` 2
    for separate planes; `tile` its width and height; `more` t318 and so on: values of other tags.
    """
    h, w, n = x.shape
    tags = {256: [w], 257: [h], 258: [bits] * n, 259: [compression], 262: [photometric], 277: [n]}
    tags |= {284: [planar], 339: [{"u": 1, "i": 2, "f": 3}[x.dtype.kind]] * n}
    tags |= {int(name[1:]): list(values) for name, values in more.items()}
    planes = [x] if planar == 1 else np.split(x, n, axis=2)
    if tile:
        tags |= {322: [tile[0]], 323: [tile[1]]}
        fill = [(0, -h % tile[1]), (0, -w % tile[0]), (0, 0)]
        planes = [np.pad(plane, fill) for plane in planes]
        where = [(i, j) for i in range(0, h, tile[1]) for j in range(0, w, tile[0])]
        blocks = [p[i : i + tile[1], j : j + tile[0]] for p in planes for i, j in where]
    else:
        tags[278] = [5]
        blocks = [p[i : i + 5] for p in planes for i in range(0, h, 5)]
    pieces = []
    for block in blocks:
        rows = block.reshape(len(block), -1)
        if tags.get(317) == [2]:
            rows = predicted(rows, block.shape[2])
        if compression == 32773:
            data = b"".join(packbits(packed(row[None], bits, order)) for row in rows)
        else:
            data = packed(rows, bits, order)
            data = zlib.compress(data, 1) if compression == 8 else data
        if tags.get(266) == [2]:  # the order of the bits in a byte
            data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little")
            data = data.tobytes()
        pieces.append(data)
    starts = 8 + np.cumsum([0] + [len(piece) for piece in pieces])
    tags |= {324: starts[:-1]} if tile else {273: starts[:-1]}
    tags |= {325 if tile else 279: [len(piece) for piece in pieces]}
    at = int(starts[-1]) + int(starts[-1]) % 2
    later = at + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, value in sorted(tags.items()):
        wide = tag in (256, 257, 273, 279, 324, 325)
        data = struct.pack(f"{order}{len(value)}{'I' if wide else 'H'}", *value)
        field = data.ljust(4, b"\0")
        if len(data) > 4:
            field = struct.pack(order + "I", later + len(values))
            values += data + b"\0" * (len(data) % 2)
        entries += struct.pack(order + "HHI", tag, 4 if wide else 3, len(value)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    body = (head + b"".join(pieces)).ljust(at, b"\0")
    return body + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + values


def png(x, *, bits, colour, before=(), after=()):
    """A PNG of samples [h, w, n] of a colour type, with chunks before and after its pixels."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    h, w, _ = x.shape
    rows = x.reshape(h, -1).astype(np.uint16 if bits == 16 else np.uint8)
    lines = b"".join(b"\0" + packed(row[None], bits, ">") for row in rows)
    header = (b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0))
    parts = (header, *before, (b"IDAT", zlib.compress(lines)), *after, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def orientation_note(orientation, order="<"):
    """The EXIF data that says how a picture is stored."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return head + struct.pack(order + "H", 1) + entry + b"\0\0\0\0"


def gif(pixels, palette, size, place):
    """A GIF of one frame, palette indices [h, w] below 128, at `place` of a picture of `size`."""
    codes = [128, *[c for v in pixels.ravel().tolist() for c in (v, 128)][:-1], 129]
    data = bytes(codes)  # a clear code after each pixel keeps the codes at 8 bits
    blocks = b"".join(
        bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255)
    )
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0xF6, 0, 0)
    frame = b"," + struct.pack("<HHHHB", *place, *pixels.shape[::-1], 0)
    return head + palette.astype(np.uint8).tobytes() + frame + b"\x07" + blocks + b"\0;"
