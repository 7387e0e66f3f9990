"""Files of weights: what is written comes back, and what is hostile or damaged is refused."""

import contextlib
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch_files as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siamese_jax.errors import UserError
from siamese_jax.weights import formats

WRITERS = {"zip": tf.write_zip, "old": tf.write_old}


def assert_refused(path, match=None, memory=64 << 20):
    """A UserError of one line that names the file, without taking memory for what it claims."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=match) as caught:
            formats.read(path)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# PyTorch.


@pytest.mark.parametrize("container", WRITERS)
def test_pth_comes_back(container, tmp_path, rng):
    arrays = tf.random_arrays(rng)
    WRITERS[container](tmp_path / "a.pth", *tf.state_dict(arrays))
    found = formats.read(tmp_path / "a.pth")
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


@pytest.mark.parametrize("container", WRITERS)
def test_pth_strided_shared_and_wrapped(container, tmp_path, rng):
    flat = rng.normal(size=24).astype(np.float32)
    where = tf.storage("0", 24)
    entries = {
        "turned": tf.tensor(where, (4, 3), (1, 4), offset=2),
        "row": tf.tensor(where, (6,), (1,), offset=18),
        "empty": tf.tensor(where, (0, 3), (3, 1)),
    }
    checkpoint = {"epoch": tf.integer(3), "state_dict": tf.mapping(entries)}
    program = tf.pickle(tf.mapping(checkpoint))
    WRITERS[container](tmp_path / "a.pth", program, {"0": flat.tobytes()})
    found = formats.read(tmp_path / "a.pth")
    np.testing.assert_array_equal(found["turned"], flat[2:14].reshape(3, 4).T)
    np.testing.assert_array_equal(found["row"], flat[18:])
    assert found["empty"].shape == (0, 3)


def test_pth_of_torch_itself(tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        "a": torch.randn(3, 4).t(),
        "b": torch.nn.Parameter(torch.randn(5)),
        "c": torch.tensor(7),
        "d": torch.randn(6).bfloat16(),
    }
    for old in (False, True):
        torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
        found = formats.read(tmp_path / "a.pth")
        for key, value in state.items():
            expected = value.detach().float().numpy()
            np.testing.assert_array_equal(found[key].astype(np.float32), expected)
    arrays = tf.random_arrays(np.random.default_rng(1))
    for write in WRITERS.values():  # and the fixtures are files that torch reads
        write(tmp_path / "b.pth", *tf.state_dict(arrays))
        for key, value in torch.load(tmp_path / "b.pth", weights_only=True).items():
            np.testing.assert_array_equal(value.numpy(), arrays[key])


MARKER = "hostile-was-here"
COMMAND = tf.items(tf.text(f"touch {MARKER}"))
GOOD = tf.tensor(tf.storage("0", 4), (2, 2), (2, 1))
REBUILD = tf.name("torch._utils", "_rebuild_tensor_v2")


def _one(value):
    return tf.pickle(tf.mapping({"w": value}))


HOSTILE_PICKLES = {
    "os.system": tf.pickle(tf.call(tf.name("os", "system"), COMMAND)),
    "posix.system as a value": _one(tf.call(tf.name("posix", "system"), COMMAND)),
    "builtins.eval": _one(tf.call(tf.name("builtins", "eval"), tf.items(tf.text("1+1")))),
    "nested reduce": _one(
        tf.call(REBUILD, tf.items(tf.call(tf.name("os", "system"), COMMAND), tf.integer(0)))
    ),
    "reduce of a reduce": _one(
        tf.call(tf.call(tf.name("builtins", "getattr"), tf.items(tf.text("os"))), COMMAND)
    ),
    "stack global": tf.pickle(tf.text("os") + tf.text("system") + b"\x93" + COMMAND + b"R"),
    "inst": tf.pickle(b"(" + tf.text(f"touch {MARKER}") + b"ios\nsystem\n"),
    "obj": tf.pickle(b"(" + tf.name("os", "system") + tf.text(f"touch {MARKER}") + b"o"),
    "newobj": tf.pickle(tf.name("subprocess", "Popen") + COMMAND + b"\x81"),
    "extension registry": tf.pickle(b"\x82\x01"),
    "state of an object": _one(GOOD + b"}b"),
    "state of a name": tf.pickle(tf.name("os", "environ") + b"}b"),
    "a bomb of lengths, text": tf.pickle(b"\x8d" + struct.pack("<Q", 2**40) + b"x"),
    "a bomb of lengths, bytes": tf.pickle(b"\x8e" + struct.pack("<Q", 2**50)),
    "a bomb of lengths, integer": tf.pickle(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "a memo of 4 billion": tf.pickle(b"Nr" + struct.pack("<I", 2**32 - 1)),
    "a memo never filled": tf.pickle(b"h\x07"),
    "an empty stack": tf.pickle(b"R"),
    "a tuple without a mark": tf.pickle(b"Nt"),
    "a hundred thousand marks": tf.pickle(b"(" * 100_000),
    "no stop": b"\x80\x02" + tf.mapping({"w": GOOD}),
    "no state dict": tf.pickle(b"N"),
    "an empty state dict": tf.pickle(tf.ORDERED_DICT),
    "a value that is no tensor": _one(tf.text("weights")),
    "a key that is no text": tf.pickle(b"}(" + tf.items() + GOOD + b"u"),
    "an odd number of items": tf.pickle(b"}(" + tf.text("w") + b"u"),
    "beyond its storage": _one(tf.tensor(tf.storage("0", 4), (5,), (1,))),
    "beyond by its offset": _one(tf.tensor(tf.storage("0", 4), (2, 2), (2, 1), offset=1)),
    "backwards": _one(tf.tensor(tf.storage("0", 4), (2, 2), (2, -1))),
    "expanded a trillion times": _one(tf.tensor(tf.storage("0", 4), (10**6, 10**6), (0, 0))),
    "a negative size": _one(tf.tensor(tf.storage("0", 4), (-1, 4), (1, 1))),
    "a storage of a terabyte": _one(tf.tensor(tf.storage("0", 2**38), (2**38,), (1,))),
    "a storage of another kind": _one(tf.tensor(tf.storage("0", 4, "QInt8Storage"), (4,), (1,))),
    "a storage described twice": tf.pickle(
        tf.mapping({"v": GOOD, "w": tf.tensor(tf.storage("0", 2, "DoubleStorage"), (2,), (1,))})
    ),
    "a storage outside the archive": _one(tf.tensor(tf.storage("../../etc", 4), (4,), (1,))),
    "shapes of two lengths": _one(tf.tensor(tf.storage("0", 4), (2, 2), (1,))),
    "a wrong call of the right name": _one(tf.call(REBUILD, tf.items())),
    "a tensor without a storage": _one(tf.call(REBUILD, tf.items(b"N", b"N", b"N", b"N"))),
    "an empty pickle": b"",
    "an escape that Python does not know": b"S'\\e'\n.",
}


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pth_is_refused(case, container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pth"
    WRITERS[container](path, HOSTILE_PICKLES[case], {"0": bytes(16)})
    assert_refused(path)
    assert not (tmp_path / MARKER).exists()


def test_the_refusal_names_what_was_called(tmp_path):
    tf.write_zip(tmp_path / "a.pth", HOSTILE_PICKLES["os.system"], {})
    assert_refused(tmp_path / "a.pth", match="os.system")


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.8, 0.95, 0.999])
def test_truncated_pth_is_refused(container, share, tmp_path, rng):
    path = tmp_path / "cut.pth"
    WRITERS[container](path, *tf.state_dict(tf.random_arrays(rng)))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(path)


def test_damaged_zips_are_refused(tmp_path, rng):
    program, storages = tf.state_dict(tf.random_arrays(rng))
    path = tmp_path / "a.pth"

    def write(**entries):
        with zipfile.ZipFile(path, "w") as archive:
            for entry, (data, compression) in entries.items():
                archive.writestr(entry, data, compression)

    stored, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    write(**{"a/data.pkl": (program, stored), "a/data/0": (storages["0"], stored)})
    assert_refused(path, match="a/data/1 is missing")
    write(**{"a/data.pkl": (b"\x80\x02" + bytes(200 << 20), deflated)})
    assert_refused(path, match="compressed", memory=512 << 20)
    write(**{"a/data.pkl": (program, stored), "b/data.pkl": (program, stored)})
    assert_refused(path, match=r"single data\.pkl")
    write(**{"a/data.pkl": (program, stored), "a/byteorder": (b"big", stored)})
    assert_refused(path, match="big-endian")
    tf.write_zip(path, program, storages)
    data = bytearray(path.read_bytes())
    at = data.find(storages["0"])
    data[at] ^= 1
    path.write_bytes(data)
    assert_refused(path, match="CRC")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.integers(0, 255), st.booleans())
def test_one_changed_byte_never_escapes(tmp_path_factory, at, value, zipped):
    """Whatever byte is changed, a file is read or refused; nothing else is raised."""
    path = tmp_path_factory.mktemp("fuzz") / "a.pth"
    write = WRITERS["zip" if zipped else "old"]
    write(path, *tf.state_dict(tf.random_arrays(np.random.default_rng(0))))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        formats.read(path)


# safetensors.


def _safetensors(header, data=bytes(16), length=None):
    import json

    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


HOSTILE_SAFETENSORS = {
    "empty": b"",
    "shorter than its length": b"\x10\x00",
    "a header of an exabyte": _safetensors(_entry(), length=2**60),
    "a header of 200 MB": _safetensors(_entry(), length=200 << 20),
    "a header past the end": _safetensors(_entry(), length=400),
    "no JSON": _safetensors(b"{w: 1}"),
    "a list": _safetensors(b"[]"),
    "not text": _safetensors(b"\xff\xfe{}"),
    "nested a million deep": _safetensors(b'{"w":' * 100_000),
    "an unknown type": _safetensors(_entry(dtype="PICKLE")),
    "a shape larger than the data": _safetensors(_entry(shape=(2**30, 2**30))),
    "a shape that overflows": _safetensors(_entry(shape=(2**62, 4))),
    "a negative shape": _safetensors(_entry(shape=(-2, -2))),
    "offsets past the end": _safetensors(_entry(shape=(2**20,), offsets=(0, 2**22))),
    "offsets turned round": _safetensors(_entry(offsets=(16, 0))),
    "two tensors on one place": _safetensors(
        _entry() | {"v": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    ),
    "bytes of no tensor": _safetensors(_entry(), data=bytes(64)),
    "data cut off": _safetensors(_entry(), data=bytes(8)),
}


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused(case, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE_SAFETENSORS[case])
    assert_refused(path)


def test_safetensors_come_back(tmp_path, rng):
    from safetensors.numpy import save_file

    arrays = tf.random_arrays(rng)
    save_file(arrays, tmp_path / "a.safetensors")
    found = formats.read(tmp_path / "a.safetensors")
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


# NumPy's npz.


def _npy(header, data=bytes(16), version=b"\x01\x00"):
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def _header(shape="(2, 2)", descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


HOSTILE_NPY = {
    "a pickle": _npy(_header("(1,)", "'|O'"), b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00true\x85R."),
    "an expression": _npy(f"__import__('os').system('touch {MARKER}')"),
    "an expression inside": _npy(_header(f"(__import__('os').system('touch {MARKER}'),)")),
    "a shape of an exabyte": _npy(_header("(1152921504606846976,)")),
    "a shape that overflows": _npy(_header("(4294967296, 4294967296, 4294967296)")),
    "a negative shape": _npy(_header("(-2, -2)")),
    "a shape of text": _npy(_header("'ab'")),
    "too little data": _npy(_header(), bytes(12)),
    "too much data": _npy(_header(), bytes(20)),
    "strings": _npy(_header("(2,)", "'<U2'")),
    "records": _npy(_header("(2,)", "[('a', '<f4'), ('b', '<f4')]")),
    "an unknown type": _npy(_header(descr="'nonsense'")),
    "an unknown version": _npy(_header(), version=b"\x09\x00"),
    "a header without keys": _npy("{}"),
    "a header cut off": _npy(_header())[:20],
    "no array": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("case", HOSTILE_NPY)
def test_hostile_npz_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", HOSTILE_NPY[case])
    assert_refused(path)
    assert not (tmp_path / MARKER).exists()


def test_npz_bombs_doubles_and_cuts_are_refused(tmp_path, rng):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", _npy(_header("(50, 1048576)"), bytes(200 << 20)))
    assert_refused(path, match="far more than")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", _npy(_header()))
        archive.writestr("w", _npy(_header()))
    assert_refused(path, match="twice")
    np.savez(path, **tf.random_arrays(rng))
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        assert_refused(path)


def test_npz_comes_back(tmp_path, rng):
    arrays = tf.random_arrays(rng) | {"turned": np.asfortranarray(rng.normal(size=(3, 5)))}
    formats.write_npz(tmp_path / "deep" / "a.npz", arrays, {"trunk": "none"})
    found = formats.read(tmp_path / "deep" / "a.npz")
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)
    assert not list((tmp_path / "deep").glob("*.part"))


# Keras's HDF5.


def _layer(file, layer="conv", variable="conv/kernel:0"):
    file.attrs["layer_names"] = [layer.encode()]
    group = file.create_group(layer)
    group.attrs["weight_names"] = [variable.encode()]
    return group


def _plain(file):
    _layer(file)["conv/kernel:0"] = np.ones((2, 2), np.float32)


def _keras3(file, kind="conv2d", layer="conv"):
    group = file.create_group(f"layers/{kind}/vars")
    if layer:
        group.attrs["name"] = layer
    group["0"] = np.ones((1, 1, 3, 4), np.float32)
    return group


def _external_storage(file):
    group = _layer(file).create_group("conv")
    group.create_dataset("kernel:0", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def _virtual(file):
    import h5py

    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "w", (4,))
    _layer(file).create_group("conv").create_virtual_dataset("kernel:0", layout)


def _link(link):
    def write(file):
        import h5py

        group = _layer(file).create_group("conv")
        kinds = {"soft": h5py.SoftLink("/conv"), "hard": file["conv"]}
        group["kernel:0"] = kinds.get(link, h5py.ExternalLink("other.h5", "/w"))

    return write


def _huge(file):
    group = _layer(file).create_group("conv")
    group.create_dataset("kernel:0", (2**40,), "f4", chunks=(1024,))


def _bomb(file):
    group = _layer(file).create_group("conv")
    zeros = np.zeros((50 << 20,), np.float32)
    group.create_dataset("kernel:0", data=zeros, compression="gzip", compression_opts=9)


def _typed(dtype, value):
    def write(file):
        _layer(file).create_dataset("conv/kernel:0", data=value, dtype=dtype)

    return write


def _deep(file):
    for _ in range(200):
        file = file.create_group("layers")


def _missing(file):
    _layer(file)


def _pointing_at_a_group(file):
    _layer(file).create_group("conv/kernel:0")


def _listing_another_layer(file):
    _plain(file)
    file.attrs["layer_names"] = [b"conv", b"elsewhere"]


def _names_of_numbers(file):
    _plain(file)
    file["conv"].attrs["weight_names"] = np.arange(3)


HOSTILE_H5 = {
    "a link to another file": _link("external"),
    "a soft link": _link("soft"),
    "a group inside itself": _link("hard"),
    "numbers in another file": _external_storage,
    "a view of another file": _virtual,
    "a terabyte never written": _huge,
    "a compressed bomb": _bomb,
    "text": _typed("S4", np.array([b"abcd"])),
    "records": _typed(None, np.zeros(2, [("a", "f4"), ("b", "f4")])),
    "groups without end": _deep,
    "a variable that is missing": _missing,
    "a group for a variable": _pointing_at_a_group,
    "a layer that is missing": _listing_another_layer,
    "numbers for names": _names_of_numbers,
    "a layer of an unknown kind": lambda file: _keras3(file, kind="lambda"),
}


@pytest.mark.parametrize("case", HOSTILE_H5)
def test_hostile_h5_is_refused(case, tmp_path):
    import h5py

    path = tmp_path / "hostile.h5"
    with h5py.File(path, "w") as file:
        HOSTILE_H5[case](file)
    assert_refused(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_truncated_h5_is_refused(share, tmp_path):
    import h5py

    path = tmp_path / "cut.h5"
    with h5py.File(path, "w") as file:
        _plain(file)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(path)


def test_h5_of_keras_1_and_long_lists_of_names(tmp_path, rng):
    """Files of 2016 call a kernel `layer_W_1:0`; lists above 64 kB are split into numbered ones."""
    import h5py

    kernel, bias = rng.normal(size=(3, 3, 3, 8)), rng.normal(size=8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names0"] = [b"block1_conv1"]
        file.attrs["layer_names1"] = [b"block1_pool"]
        file.create_group("block1_pool").attrs["weight_names"] = np.zeros(0)
        group = file.create_group("block1_conv1")
        group.attrs["weight_names"] = [b"block1_conv1_W_1:0", b"block1_conv1_b_1:0"]
        group["block1_conv1_W_1:0"], group["block1_conv1_b_1:0"] = kernel, bias
    found = formats.read(tmp_path / "a.h5")
    assert found.keys() == {"block1_conv1/kernel", "block1_conv1/bias"}
    np.testing.assert_array_equal(found["block1_conv1/kernel"], kernel)
    np.testing.assert_array_equal(found["block1_conv1/bias"], bias)


def test_h5_of_keras_3_without_names_keeps_the_places(tmp_path):
    """Keras 3.0 to 3.4 wrote no names; `weights.load` knows the order of a trunk's layers."""
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        _keras3(file, layer="")
    assert formats.read(tmp_path / "a.h5").keys() == {"layers/conv2d/kernel"}


# Any format.


def test_a_missing_file_and_an_unknown_extension(tmp_path):
    assert_refused(tmp_path / "none.h5", match="no weights file")
    (tmp_path / "weights.docx").write_bytes(b"x")
    assert_refused(tmp_path / "weights.docx", match="known extensions")


def test_a_header_may_have_any_length(tmp_path):
    """One of 128 bytes begins as a pickle does."""
    from safetensors.numpy import save

    arrays = tf.random_arrays(np.random.default_rng(0))
    lengths = set()
    for n in range(0, 400, 8):
        data = save(arrays, {"a": "b" * n})
        lengths.add(data[0])
        (tmp_path / "a").write_bytes(data)
        np.testing.assert_array_equal(
            formats.read(tmp_path / "a")["conv.weight"], arrays["conv.weight"]
        )
    assert 0x80 in lengths


# The process that reads HDF5 is trusted as little as a file.

PROCESSES = {
    "hangs": "while True: pass",
    "crashes": "import os; os.abort()",
    "says nothing": "",
    "has no names": "print('[')",
    "claims an exabyte": 'print(\'[["w", "<f4", [1152921504606846976], null]]\')',
    "has a negative shape": 'print(\'[["w", "<f4", [-4], null]]\')',
    "holds objects": 'print(\'[["w", "|O", [4], null]]\')',
    "points out of the file": 'print(\'[["w", "<f4", [4], 123456789]]\')',
    "sends too little": 'print(\'[["w", "<f4", [4], null]]\')',
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_reading_process_that(case, tmp_path, monkeypatch):
    import h5py

    from siamese_jax.weights import keras_file

    (tmp_path / "process.py").write_text(PROCESSES[case])
    monkeypatch.setattr(keras_file, "__file__", str(tmp_path / "process.py"))
    monkeypatch.setattr(keras_file, "_seconds", lambda limit: 0.2)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        _plain(file)
    assert_refused(tmp_path / "a.h5")


@pytest.mark.parametrize("meta", ["[" * 10**5, "[]", "{}", '"a"', "null"])
def test_a_description_that_is_none(meta, tmp_path):
    from siamese_jax import weights

    np.savez(tmp_path / "a.npz", **{formats.META: np.array(meta), "w": np.ones(3)})
    with pytest.raises(UserError, match="description") as caught:
        weights.load("vgg16", tmp_path / "a.npz")
    assert "\n" not in str(caught.value)
