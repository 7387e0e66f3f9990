"""Hostile files of each format, made here, and sound ones to begin fuzzing from.

Each is a way to ask for more memory, time or stack than the file is worth, or to break a reader's
assumption. What asks for code to be run is in tests/weights/test_formats.py.
"""

import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import torch_files as tf
from PIL import Image

REBUILD = tf.name("torch._utils", "_rebuild_tensor_v2")
GOOD = tf.tensor(tf.storage("0", 4), (2, 2), (2, 1))
ARRAYS = {
    "conv.weight": np.arange(48, dtype=np.float32).reshape(4, 3, 2, 2),
    "bn.running_var": np.ones(4, np.float32),
}


def _get(place):
    return b"j" + struct.pack("<I", place)


def _put(place):
    return b"r" + struct.pack("<I", place)


# PyTorch.


def _pth(value, storages=None, compression=zipfile.ZIP_STORED, **entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that appear twice
        archive.writestr("a/data.pkl", tf.pickle(value))
        for name, data in {"0": bytes(16)}.items() if storages is None else storages.items():
            archive.writestr(f"a/data/{name}", data)
        for name, data in entries.items():
            archive.writestr(f"a/{name}", data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _of_kind(kind):
    parts = (tf.text("storage"), kind, tf.text("0"), tf.text("cpu"), tf.integer(4))
    return tf.mapping({"w": tf.tensor(tf.items(*parts) + b"Q", (2, 2), (2, 1))})


def _doubled(times):
    return b")" + b"".join(_put(i) + _get(i) + b"\x86" for i in range(times))


def _encrypted():
    data = bytearray(_pth(tf.mapping({"w": GOOD})))
    for at in (data.find(b"PK\x01\x02") + 8, data.find(b"PK\x03\x04") + 6):
        data[at] |= 1
    return bytes(data)


def _over_each_other():
    """Every entry of the directory is the first one."""
    data = bytearray(_pth(tf.mapping({"w": GOOD}), {str(i): bytes(16) for i in range(50)}))
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 42 : at + 46] = bytes(4)
        at = data.find(b"PK\x01\x02", at + 4)
    return bytes(data)


def _many_entries(count):
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *[0] * 6, 0, 0, 0, 1, *[0] * 4, 0, 0) + b"a"
    end = struct.pack(
        "<4s4HIIH", b"PK\x05\x06", 0, 0, count % 2**16, count % 2**16, 47 * count, 4, 0
    )
    return b"PK\x03\x04" + count * entry + end


def _nested_dicts(depth):
    key = tf.text("a")
    return tf.pickle(b"}" + (key + b"}") * depth + b"s" * depth)


def _shared(count):
    """A dict of `count` dicts that each hold one that holds as many numbers."""
    numbers = b"}(" + b"".join(tf.text(str(i)) + b"N" for i in range(count)) + b"u" + _put(0)
    dicts = (tf.text(str(i)) + b"}" + tf.text("a") + _get(0) + b"s" for i in range(count))
    return numbers + b"}(" + b"".join(dicts) + b"u"


def _modules(count):
    """Modules that share their parameters."""
    head = b"}(" + b"".join(tf.text(str(i)) + b"N" for i in range(count)) + b"u" + _put(0)
    state = b"}" + tf.text("_parameters") + _get(0) + b"s"
    modules = (tf.text(str(i)) + tf.name("a", "B") + b")\x81" + state + b"b" for i in range(count))
    return head + b"}(" + b"".join(modules) + b"u"


def _again(first, times):
    """A list with something and calls that take it up again."""
    return b"](" + first + times + b"e"


TORCH = {
    "nested pairs for a kind": lambda: _pth(_of_kind(_doubled(60))),
    "tuples a million deep for a kind": lambda: _pth(_of_kind(b")" + b"\x85" * 1_000_000)),
    "a class of nested pairs": lambda: _pth(_doubled(60) + b")\x81"),
    "a class 200,000 tuples deep": lambda: _pth(b")" + b"\x85" * 200_000 + b")\x81"),
    "three thousand views of a storage": lambda: _pth(
        tf.mapping(
            {str(i): tf.tensor(tf.storage("0", 1 << 21), (1 << 21,), (1,)) for i in range(3000)}
        ),
        {"0": bytes(8 << 20)},
    ),
    "8 MB of lists": lambda: _pth(b"]" * (8 << 20)),
    "8 MB of dicts": lambda: b"\x80\x02" + b"}" * (8 << 20),
    "a memo without end": lambda: _pth(b"N" + b"\x94" * (8 << 20)),
    "a byteorder of 64 MB": lambda: _pth(tf.mapping({"w": GOOD}), byteorder=bytes(64 << 20)),
    "strides of 2^62": lambda: _pth(
        tf.mapping({"w": tf.tensor(tf.storage("0", 4), (1, 2), (2**62, 2**62))})
    ),
    "a stride of 2^62 in one row": lambda: _pth(
        tf.mapping({"w": tf.tensor(tf.storage("0", 4), (1, 4), (2**62, 1))})
    ),
    "an empty tensor of 2^62 rows": lambda: _pth(
        tf.mapping({"w": tf.tensor(tf.storage("0", 4), (0, 2**62), (1, 1))})
    ),
    "encrypted": _encrypted,
    "entries over each other": _over_each_other,
    "a million entries": lambda: _many_entries(300_000),
    "a bomb for a storage": lambda: _pth(
        tf.mapping({"w": tf.tensor(tf.storage("0", 16 << 20), (16 << 20,), (1,))}),
        {"0": bytes(64 << 20)},
        zipfile.ZIP_DEFLATED,
    ),
    "keys with one hash": lambda: _pth(
        b"}(" + b"".join(tf.integer(i * (2**61 - 1)) + b"N" for i in range(1, 40_000)) + b"u"
    ),
    "a long shape used again": lambda: _pth(
        b"(" + b"K\x01" * 100_000 + b"t" + _put(0)
        + REBUILD + tf.items(tf.storage("0", 4), b"K\x00", _get(0), _get(0)) + b"R"
    ),
    "a long name used again": lambda: _pth(
        _again(tf.text("a" * (1 << 20)) + _put(0), (_get(0) + _get(0) + b"\x93)R") * 5000)
    ),
    "a long key used again": lambda: _pth(
        _again(tf.text("a" * (1 << 20)) + _put(0), (b"}" + _get(0) + GOOD + b"s") * 1000)
    ),
    "dicts 100,000 deep": lambda: _nested_dicts(100_000),
    "a dict in 10,000 dicts": lambda: _pth(_shared(10_000)),
    "parameters of 10,000 modules": lambda: _pth(_modules(10_000)),
}  # fmt: skip


# safetensors.


def _tensors(header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _one(dtype, shape=(16,), offsets=(0, 16)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


NONE = {"dtype": "U8", "shape": [], "data_offsets": [0, 0]}
SAFETENSORS = {
    **{
        kind: (lambda kind=kind: _tensors(_one(kind)))
        for kind in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "BOOL8", "", "F32 ")
    },
    "F4 of its size": lambda: _tensors(_one("F4", (32,))),
    "C64 of its size": lambda: _tensors(_one("C64", (2,))),
    "20 MB of spaces": lambda: _tensors(b"{" + b" " * (20 << 20) + b"}"),
    "lists 10 million deep": lambda: _tensors(b'{"w":' + b"[" * (10 << 20)),
    "200,000 empty arrays": lambda: _tensors(
        {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)},
        b"",
    ),
    "a million dimensions": lambda: _tensors(_one("U8", [1] * 1_000_000, (0, 1)), bytes(1)),
    "a size of 2^70": lambda: _tensors(_one("U8", (2**70,))),
    "an empty array of 2^62 rows": lambda: _tensors(_one("U8", (0, 2**62), (0, 0)), b""),
    "metadata of numbers": lambda: _tensors({"__metadata__": {"a": 1}, **_one("F32", (4,))}),
    "16 MB of metadata": lambda: _tensors({"__metadata__": {"arch": "a" * (15 << 20)}}, b""),
    "a name with NUL": lambda: _tensors({"\x00\n": NONE, **_one("F32", (5,))}),
    "offsets of text": lambda: _tensors(_one("F32", (4,), ("0", "16"))),
}


# NumPy.


def _npy(shape="(2, 2)", descr="'<f4'", data=bytes(16), version=b"\x01\x00", text=None):
    header = text or f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    width = "<H" if version == b"\x01\x00" else "<I"
    return b"\x93NUMPY" + version + struct.pack(width, len(header)) + header + data


def _npz(content, name="w.npy", compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _lying(size):
    """An entry whose directory says another size."""
    data = bytearray(_npz(_npy(data=bytes(16))))
    at = data.find(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", size)
    return bytes(data)


def _compressed(method):
    return lambda: _npz(_npy(), compression=method)


NPZ = {
    "a bomb": lambda: _npz(_npy("(64, 1048576)", "'|u1'", bytes(64 << 20))),
    "a bomb that says 16 bytes": lambda: _lying(16),
    "an entry that says 4 GB": lambda: _lying(2**32 - 2),
    "bzip2": _compressed(zipfile.ZIP_BZIP2),
    "LZMA": _compressed(zipfile.ZIP_LZMA),
    "300,000 entries": lambda: _many_entries(300_000),
    "objects": lambda: _npz(_npy("(1,)", "'|O'", b"\x80\x02]."), "a.npy"),
    "parentheses": lambda: _npz(_npy(text=b"(" * 9000)),
    "minus signs": lambda: _npz(_npy(text=b"-" * 9000 + b"1")),
    "brackets": lambda: _npz(_npy("[" * 4000 + "]" * 4000)),
    "a header of 60 kB": lambda: _npz(_npy(text=b"{" + b" " * 60_000 + b"}")),
    "a header of 4 GB": lambda: _npz(b"\x93NUMPY\x02\x00\xff\xff\xff\xff"),
    "a long number": lambda: _npz(_npy("(" + "9" * 9000 + ",)")),
    "a field a thousand times": lambda: _npz(_npy("(1,)", "'" + "f4," * 2000 + "f4'")),
    "a field of a billion": lambda: _npz(_npy("(1,)", "'(1000000000,)f4'")),
    "no bytes an item": lambda: _npz(_npy(f"({2**62},)", "'<U0'", b""), "__meta__.npy"),
    "an empty array of 2^62 rows": lambda: _npz(_npy(f"(0, {2**62})", data=b"")),
    "a hundred dimensions": lambda: _npz(_npy(f"({'1,' * 100})", data=bytes(4))),
    "a flag for a size": lambda: _npz(_npy("(True, 4)")),
    "fortran of text": lambda: _npz(
        _npy(text=b"{'descr': '<f4', 'fortran_order': 'yes', 'shape': (4,)}\n")
    ),
    "a description of 4 GB": lambda: _npz(_npy(f"({2**30},)", "'<U1'", b""), "__meta__.npy"),
}


# Keras.


def sound_h5(change=None, **options):
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w", **options) as root:
        root.attrs["layer_names"] = [b"conv"]
        layer = root.create_group("conv")
        layer.attrs["weight_names"] = [b"kernel:0"]
        layer["kernel:0"] = np.ones((3, 3, 2, 4), np.float32)
        if change:
            change(root, layer)
    return file.getvalue()


def _named(count, times):
    def change(root, layer):
        root.attrs["layer_names"] = np.array([b"conv"] * count)
        layer.attrs["weight_names"] = np.array([b"kernel:0"] * times)

    return lambda: sound_h5(change)


def _attribute(name, value):
    def change(root, layer):
        del layer.attrs["weight_names"]
        layer.attrs[name] = value

    return lambda: sound_h5(change)


def _huge_attribute(root, layer):
    import h5py

    del layer.attrs["weight_names"]
    space = h5py.h5s.create_simple((8000,))
    h5py.h5a.create(layer.id, b"weight_names", h5py.h5t.C_S1, space)


def _bomb(root, layer):
    del layer["kernel:0"]
    layer.create_dataset("kernel:0", data=np.zeros(16 << 20, np.float32), compression="gzip")


def _unwritten(root, layer):
    del layer["kernel:0"]
    layer.create_dataset("kernel:0", (2**50,), "f4", chunks=(2**20,))


def _one_chunk(root, layer):
    """A chunk of 3 GB that nobody wrote, for a few numbers."""
    del layer["kernel:0"]
    layer.create_dataset("kernel:0", (4,), "f4", chunks=(4,), maxshape=(None,), fletcher32=True)


def _looped(what):
    """The file with an address (of `what`'s place) that leads back to the place itself."""

    def make():
        data = bytearray(sound_h5())
        at = data.find(what)
        data[at + 24 : at + 32] = struct.pack("<Q", at)
        return bytes(data)

    return make


def _cyclic(root, layer):
    layer["again"] = root


def _many_groups(root, layer):
    for i in range(3000):
        layer.create_group(f"g{i}")


def _overwritten(start, byte):
    def make():
        data = bytearray(sound_h5())
        end = start + 64
        data[start:end] = bytes([byte]) * len(data[start:end])
        return bytes(data)

    return make


def _never_ending():
    """An object header whose continuation is the header itself, for ever."""

    def change(root, layer):
        for i in range(40):
            layer.attrs[f"a{i}"] = i

    data = bytearray(sound_h5(change))
    for at in range(0, len(data) - 24, 8):
        if data[at : at + 4] == b"\x10\x00\x10\x00":  # a continuation of 16 bytes
            data[at + 8 : at + 24] = struct.pack("<QQ", at, 24)
    return bytes(data)


H5 = {
    "an attribute that never ends": _never_ending,
    "six million names": _named(6000, 1000),
    "names of layers times names of weights": _named(3000, 3000),
    "an attribute of numbers": _attribute("weight_names", np.arange(7000)),
    "an attribute of nothing": _attribute("weight_names", np.zeros(0)),
    "an attribute never written": lambda: sound_h5(_huge_attribute),
    "a bomb": lambda: sound_h5(_bomb),
    "a petabyte never written": lambda: sound_h5(_unwritten),
    "chunks with sums": lambda: sound_h5(_one_chunk),
    "a group inside itself": lambda: sound_h5(_cyclic),
    "three thousand groups": lambda: sound_h5(_many_groups),
    **{f"a loop at {what.decode()}": _looped(what) for what in (b"TREE", b"HEAP", b"SNOD")},
    **{f"byte {b} from {s}": _overwritten(s, b) for s in (8, 96, 800, 2048) for b in (0, 255)},
}


def _keras(config=b"{}", weights=None, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", sound_h5() if weights is None else weights)
    return file.getvalue()


def _layers(layers):
    return json.dumps({"config": {"layers": layers}}).encode()


def _deep_config(depth):
    layer = {"class_name": "Conv2D", "config": {"name": "a"}}
    for _ in range(depth):
        layer = {"class_name": "Functional", "config": {"name": "a", "layers": [layer]}}
    return json.dumps(layer).encode()


KERAS = {
    "a config of 64 MB": lambda: _keras(b" " * (64 << 20)),
    "weights of 64 MB": lambda: _keras(weights=bytes(64 << 20)),
    "a config of lists": lambda: _keras(b"[" * (8 << 20)),
    "a config of small lists": lambda: _keras(b"[" + b"[]," * (1 << 20) + b"0]"),
    "layers in layers": lambda: _keras(_deep_config(300)),
    "a long class": lambda: _keras(
        _layers([{"class_name": "A" * (4 << 20), "config": {"name": "a"}}])
    ),
    "a class of lists": lambda: _keras(_layers([{"class_name": [[[]]], "config": {"name": {}}}])),
    "200,000 layers": lambda: _keras(
        _layers([{"class_name": "Conv2D", "config": {"name": "a"}}] * 100_000)
    ),
    "a layer without a name": lambda: _keras(_layers([{"class_name": "Conv2D", "config": {}}])),
    "a layer of text": lambda: _keras(_layers(["a"])),
    "a config of NaN": lambda: _keras(b"NaN"),
    "a number of 9,000 digits": lambda: _keras(b"9" * 9000),
    "no text": lambda: _keras(b"\xff\xfe"),
    "no weights": lambda: _keras(weights=b""),
    "weights of text": lambda: _keras(weights=b"hello"),
    "bzip2": lambda: _keras(compression=zipfile.ZIP_BZIP2),
    "LZMA": lambda: _keras(compression=zipfile.ZIP_LZMA),
    **{f"weights with {case}": (lambda case=case: _keras(weights=H5[case]())) for case in
       ("an attribute that never ends", "a loop at TREE", "byte 255 from 96", "a bomb")},
}  # fmt: skip


# Pictures.


def _png(width, height, rows=b"", bits=8, colour=2, chunks=b""):
    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def _saved(kind, size=(16, 16), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, 7 if mode in ("L", "P") else (1, 2, 3)).save(file, kind, **options)
    return file.getvalue()


def _resized(kind, at, format, size):
    """A sound picture whose header says another size."""

    def make():
        data = bytearray(_saved(kind))
        struct.pack_into(format, data, at, *size)
        return bytes(data)

    return make


def _frames(kind, count):
    """As many frames: of each the smallest that the format has."""

    def make():
        pictures = [Image.new("L", (8, 8), i % 2 * 255) for i in range(20)]
        file = io.BytesIO()
        pictures[0].save(file, kind, save_all=True, append_images=pictures[1:])
        data = file.getvalue()
        if kind != "GIF":
            return data
        at = data.find(b"!\xf9")  # the first frame, again and again
        frame = data[at : data.find(b"!\xf9", at + 1)]
        return data[:at] + frame * count + b";"

    return make


def _itxt(size):
    text = b"k\x00\x01\x00\x00\x00" + zlib.compress(bytes(size), 9)
    return (
        struct.pack(">I", len(text))
        + b"iTXt"
        + text
        + struct.pack(">I", zlib.crc32(b"iTXt" + text))
    )


PICTURES = {
    "a PNG of 2^31 a side": lambda: _png(2**31 - 1, 2**31 - 1),
    "a PNG of 200 million pixels": lambda: _png(20_000, 10_000, bytes(60_001 * 500)),
    "a PNG without pixels": lambda: _png(0, 0),
    "a PNG that ends": lambda: _png(10_000, 10_000, bytes(1000)),
    "a PNG with 64 MB of text": lambda: _png(4, 4, bytes(52), chunks=_itxt(64 << 20)),
    "a GIF of 65535 a side": _resized("GIF", 6, "<HH", (65535, 65535)),
    "a BMP of 2^30 a side": _resized("BMP", 18, "<ii", (2**30, 2**30)),
    "a BMP of -2^31 rows": _resized("BMP", 18, "<ii", (16, -(2**31))),
    "a JPEG of 65500 a side": lambda: _saved("JPEG").replace(
        struct.pack(">HH", 16, 16), struct.pack(">HH", 65500, 65500)
    ),
    "a WebP of 16383 a side": lambda: _saved("WEBP")[:26] + b"\xff\x3f\xff\x3f" + bytes(64),
    "a PPM of 10^9 a side": lambda: b"P6 1000000000 1000000000 255\n" + bytes(64),
    "a PPM with a long number": lambda: b"P6 " + b"9" * 5000 + b" 1 255\n",
    "a TIFF of 2^31 a side": lambda: _saved("TIFF").replace(
        struct.pack("<HHII", 256, 4, 1, 16), struct.pack("<HHII", 256, 4, 1, 2**31 - 1)
    ),
    "an ICO of nothing": lambda: b"\x00\x00\x01\x00\xff\xff" + bytes(64),
    "a TGA of 65535 a side": lambda: bytes([0, 0, 2, *[0] * 9]) + b"\xff\xff\xff\xff\x18\x00",
    "an EPS that runs for ever": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    ),
    "a GIF of 200,000 frames": _frames("GIF", 200_000),
    "a TIFF of frames": _frames("TIFF", 20),
    "a WebP of frames": _frames("WEBP", 20),
    "no picture": lambda: b"hello",
    "nothing": lambda: b"",
}  # fmt: skip


def _sound_pth():
    program, storages = tf.state_dict(ARRAYS)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
    return file.getvalue()


def _sound_safetensors():
    from safetensors.numpy import save

    return save(ARRAYS)


def _sound_npz():
    file = io.BytesIO()
    np.savez_compressed(file, **ARRAYS)
    return file.getvalue()


# Format -> (its ending, the hostile files, the sound ones to begin from).
FORMATS = {
    "pth": (".pth", TORCH, [_sound_pth]),
    "safetensors": (".safetensors", SAFETENSORS, [_sound_safetensors]),
    "npz": (".npz", NPZ, [_sound_npz]),
    "h5": (".h5", H5, [sound_h5]),
    "keras": (".keras", KERAS, [_keras]),
    "pictures": (
        ".png",
        PICTURES,
        [
            lambda kind=kind: _saved(kind)
            for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")
        ],
    ),
}
