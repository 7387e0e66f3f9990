"""`siamese-jax train`: from a wheel, without the checkout, with the configs that travel in it."""

import contextlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import tiny
import warm

from siamese_jax.__main__ import TOOLS, main
from siamese_jax.errors import UserError
from siamese_jax.tools.configs import find_config, shipped

PROJECT = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())


def test_every_folder_is_in_the_wheel():
    folders = {
        ".".join(path.parent.relative_to(tiny.ROOT).parts)
        for path in (tiny.ROOT / "siamese_jax").rglob("__init__.py")
    }
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == folders | {"siamese_jax.configs"}


def test_a_config_is_a_name_or_a_file(tmp_path, monkeypatch):
    assert Path(find_config("resnet_triplet")) == shipped() / "resnet_triplet.py"
    assert find_config("configs/mine.py") == "configs/mine.py"
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("cub")).is_file()
    with pytest.raises(UserError, match=r"no experiment of that name; there are .*resnet_triplet"):
        find_config("resnet_triplets")


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_help(tool, capsys):
    with contextlib.suppress(SystemExit):  # argparse ends so
        assert main([tool, "--help"]) == 0
    assert f"siamese-jax {tool}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content, and nothing of the checkout."""
    built = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "siamese_jax", "configs"):
        (source / name).symlink_to(tiny.ROOT / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(built), str(source)],
        check=True,
    )
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "site")
    return built / "site"


@pytest.mark.slow
def test_the_wheel_trains_without_the_checkout(installed, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [warm.python(), "-m", "siamese_jax", *arguments],
            cwd=tmp_path,
            env=tiny.environment(tmp_path / "cache") | {"PYTHONPATH": os.fspath(installed)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert (installed / "siamese_jax" / "py.typed").is_file()
    assert "siamese-jax = siamese_jax.__main__:process" in "".join(
        path.read_text() for path in installed.glob("*.dist-info/entry_points.txt")
    )
    wrong = run("train", "--config=nonsense")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --config=nonsense: there is no such file")
    assert len(wrong.stderr.splitlines()) == 1
    folder = tiny.make_folder(tmp_path / "shop")
    done = run(
        "train",
        "--config=resnet_triplet",
        *tiny.TINY,
        f"--config.data.root={folder}",
        "--config.train.steps=2",
        "--workdir=run",
    )
    assert done.returncode == 0, done.stderr
    assert "recall@1" in done.stdout
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    listed = run("compare", "--config=compare_trunks", "--list")
    assert listed.returncode == 0, listed.stderr
    assert "lite0" in listed.stdout
