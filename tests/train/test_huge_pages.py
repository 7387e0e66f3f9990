"""The process that begins once more with huge pages of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from siamese_jax.train import huge_pages

ON_DEMAND = "always [madvise] never\n"


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "enabled"
    file.write_text(ON_DEMAND)
    monkeypatch.setattr(huge_pages, "SWITCH", file)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    return file


def test_asks_where_the_system_gives_on_demand(switch: Path) -> None:
    found = huge_pages.environment()
    assert found == {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_does_nothing_elsewhere(switch: Path, setting: str | None) -> None:
    switch.write_text(setting) if setting else switch.unlink()
    assert huge_pages.environment() is None


@pytest.mark.parametrize("found", [(), (2, 34)])
def test_needs_a_c_library_that_can(
    switch: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[int, ...]
) -> None:
    monkeypatch.setattr(huge_pages, "_glibc", lambda: found)
    assert huge_pages.environment() is None


def test_a_choice_of_the_users_is_left(switch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert huge_pages.environment() is None
    assert huge_pages.line() is None
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    found = huge_pages.environment()
    assert found
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


PROGRAM = """
import os, sys
from pathlib import Path
from siamese_jax.train import huge_pages
huge_pages.SWITCH = Path(sys.argv[1])
huge_pages._glibc = lambda: (2, 36)
print("begun", flush=True)
huge_pages.begin_again()
print(sys.argv[2:], sys.flags.dont_write_bytecode, huge_pages.line())
"""


def test_begins_again_once_with_the_same_command(switch: Path) -> None:
    command = [sys.executable, "-B", "-c", PROGRAM, str(switch), "a b", "--c=d"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    line = "large arrays are in huge pages of memory (GLIBC_TUNABLES=glibc.malloc.hugetlb=1)"
    assert ended.stdout.splitlines() == ["begun", "begun", f"['a b', '--c=d'] 1 {line}"]
