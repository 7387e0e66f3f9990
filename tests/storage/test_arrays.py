"""Files of arrays: what is read was written, or one line says that it was not."""

import numpy as np
import pytest

from siamese_jax.errors import UserError
from siamese_jax.storage.arrays import read_arrays


def test_any_damage_is_refused_or_without_effect(tmp_path, rng):
    path = tmp_path / "a.npz"
    arrays = {"x": rng.normal(size=(5, 3)), "names": np.array(["a", "bc"])}
    np.savez(path, **arrays)
    data, refused = path.read_bytes(), 0
    assert [*read_arrays(path, "test", ("x",), ("x",))] == ["x"]
    with pytest.raises(UserError, match=r"a\.npz is no test, or is damaged \(it has no y\)"):
        read_arrays(path, "test", ("x", "y"))
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "b.npz", "test")
    for at in range(0, len(data), 9):
        flipped = data[:at] + bytes([data[at] ^ (1 << rng.integers(8))]) + data[at + 1 :]
        for damaged in (flipped, data[:at]):
            path.write_bytes(damaged)
            try:
                found = read_arrays(path, "test", arrays)
            except UserError as error:
                refused += "\n" not in str(error)
                continue
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array)
    assert refused > len(data) / 12
