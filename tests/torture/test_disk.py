"""A small run, killed at eight points, and each of its files cut, flipped and removed in turn."""

import shutil
import signal

import killed
import outcome
import pytest
import tiny

from siamese_jax.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("torture")
    tiny.make_folder(place / "shop", noise=160)
    return place


def train(place, name, point=None):
    """The exit code of a start of the run of this name, and what it said."""
    arguments = [*tiny.TINY, f"--config.data.root={place / 'shop'}", f"--workdir={place / name}"]
    said = place / f"{name}.txt"
    process = killed.start(arguments, place / f"{name}-cache", place / "xla", said, point)
    process.join(300)
    return process.exitcode, said.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(place):
    code, said = train(place, "whole")
    assert code == 0, said
    return place / "whole"


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_same(place, finished):
    for name, point in killed.POINTS.items():
        code, said = train(place, "cut", point)
        assert code == -signal.SIGKILL, f"{name}: {said}"
        assert not (place / "cut" / "results.json").exists()
    code, said = train(place, "cut")
    assert code == 0, said
    assert "Traceback" not in said
    expected, found = (outcome.whole(folder) for folder in (finished, place / "cut"))
    assert len(expected["points"]) == len(set(expected["points"])) > 24
    assert found == expected
    assert not [*(place / "cut").rglob("*.part")]


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "removed": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_each_file_damaged_is_refused_said_or_without_effect(damage, finished, caplog):
    """No tool takes other values from a damaged run without a word."""
    expected = outcome.of_tools(finished)
    files = [p for p in sorted(finished.rglob("*")) if p.is_file() and p.stat().st_size]
    effects, refused = 0, []
    for path in files:
        name = path.relative_to(finished).as_posix()
        if name.startswith(("events/", "report/", "lock", "checkpoints/8/")):  # no tool reads them
            continue
        data = path.read_bytes()
        change = DAMAGE[damage]
        caplog.clear()
        try:
            path.unlink() if change is None else path.write_bytes(change(data))
            found = outcome.of_tools(finished)
            assert found == expected or caplog.text, path
            effects += found != expected
        except UserError as error:
            effects += 1
            refused.append(str(error))
        finally:
            path.write_bytes(data)
    assert all(str(finished) in said and "\n" not in said for said in refused)
    assert effects >= 5
    assert outcome.of_tools(finished) == expected


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoints/12", "checkpoints/frozen", "metrics.jsonl"])
def test_a_finished_run_with_damage_ends_as_it_was(what, place, finished):
    """Its checkpoint read back, a run is finished; or it goes on until it is, or says no."""
    name = f"damaged-{what.replace('/', '-')}"
    shutil.copytree(finished, place / name)
    shutil.copytree(place / "whole-cache", place / f"{name}-cache")
    damaged = place / name / what
    files = [damaged] if damaged.is_file() else [p for p in damaged.rglob("*") if p.is_file()]
    for path in files:
        path.write_bytes(DAMAGE["flipped"](path.read_bytes()))
    code, said = train(place, name)
    assert "Traceback" not in said
    if what == "checkpoints/frozen":
        assert code == 2
        assert "none of the checkpoints" in said.splitlines()[-1]
        return
    assert code == 0, said
    if what == "metrics.jsonl":  # of a finished run nobody reads it
        assert "is finished" in said
        (place / name / "results.json").unlink()
        code, said = train(place, name)
        assert code == 0, said
        assert "was shortened, removed or changed" in said
        return
    assert "was finished, but its checkpoint cannot be read" in said
    assert outcome.whole(place / name) == outcome.whole(finished)
