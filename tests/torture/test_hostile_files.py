"""Hostile files are read or refused: in one line, in time, in memory, and never by a crash."""

import subprocess
import sys

import pytest

from benchmarks import fuzz
from torture import hostile_files
from torture.reader import Reader, complaint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it asks by select")


@pytest.fixture(scope="module")
def reader():
    made = Reader()
    yield made
    made.close()


@pytest.mark.parametrize("format", hostile_files.FORMATS)
def test_hostile_files_are_refused(format, reader, tmp_path):
    suffix, hostile, sound = hostile_files.FORMATS[format]
    assert len(hostile) >= 20
    path = tmp_path / f"file{suffix}"
    wrong = []
    for case, make in hostile.items():
        path.write_bytes(make())
        if fault := complaint(reader.ask(path), path.stat().st_size):
            wrong.append(f"{case}: {fault}")
    assert not wrong
    for make in sound:
        path.write_bytes(make())
        assert reader.ask(path).said == ""


@pytest.mark.parametrize("format", hostile_files.FORMATS)
def test_changed_files_are_read_or_refused(format, reader, tmp_path):
    tried, faults = fuzz.fuzz(format, 1.5, tmp_path, reader)
    assert tried
    assert not faults


def test_the_long_form_starts_by_itself():
    done = subprocess.run([sys.executable, fuzz.__file__, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_must_not_be_is_seen():
    """That the tests above can fail."""
    from torture.reader import Answer

    assert complaint(Answer("refused"), 10) == ""
    for answer in (
        Answer(fault="it crashed"),
        Answer("two\nlines"),
        Answer(seconds=30),
        Answer(grew=1 << 30),
    ):
        assert complaint(answer, 10)
