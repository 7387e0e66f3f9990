"""The one reader of a run's folder: what it gives, and damage that every tool says in one line."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import tiny
from ml_collections import ConfigDict

from siamese_jax import weights
from siamese_jax.__main__ import main
from siamese_jax.encoder.load import load_encoder
from siamese_jax.errors import UserError
from siamese_jax.storage import run_folder
from siamese_jax.storage.vectors import VectorStore
from siamese_jax.train.beginning import extended

CONTENT = {
    "config.json": {
        "distance": "cosine",
        "trunk": {"name": "resnet18", "image_size": 32},
        "head": {"layers": [8]},
        "data": {"fit": "squash"},
    },
    "run.json": {
        "trunk": dict.fromkeys(
            ("form", "image_size", "preprocessing", "source", "sha256", "licence", "fallback_for")
        )
        | {"trunk": "resnet18"},
        "data": {"fingerprint": "f", "source": "folder"},
        "split": {},
        "versions": {},
        "warnings": [],
    },
    "results.json": {"checkpoint_step": 7, "embedding_dim": 8},
}
READERS = {
    "load_encoder": lambda folder: load_encoder(folder),
    "weights.load": lambda folder: weights.load("resnet18", folder),
    "train": lambda folder: run_folder.begun(folder, CONTENT["config.json"]),
    "diff": lambda folder: main(["diff", str(folder), str(folder)]),
    "evaluate": lambda folder: main(["evaluate", f"--encoder={folder}"]),
}
DAMAGE = {
    "missing": None,
    "cut short": '{"trunk": {"tr',
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "empty": "",
    "without a field": "{}",
    "of another kind": json.dumps({"trunk": 3, "checkpoint_step": 7}),
}


@pytest.fixture
def folder(tmp_path):
    for name, value in CONTENT.items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


def message(reader, folder, capsys):
    """What a reader says; the command line's readers print it and return 2."""
    try:
        assert READERS[reader](folder) == 2
    except UserError as error:
        return str(error)
    return capsys.readouterr().err


def test_a_run_is_its_three_files(folder):
    found = run_folder.read(folder)
    assert list(CONTENT.values()) == [found.config, found.facts, found.results]
    assert (found.folder, found.step) == (folder, 7)
    (folder / "results.json").unlink()
    found = run_folder.read(folder)
    assert (found.results, found.step) == (None, None)
    with pytest.raises(UserError, match=r"not a finished run: results\.json is missing"):
        run_folder.read(folder, finished=True)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_one_line_that_names_the_file(reader, name, damage, folder, capsys):
    content = DAMAGE[damage]
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if damage == "missing" and name == "results.json" and reader != "diff":
        return  # An unfinished run is no damage.
    said = message(reader, folder, capsys)
    assert len(said.strip().splitlines()) == 1
    assert str(folder) in said
    if not (reader == "weights.load" and name == "run.json" and damage == "missing"):
        assert name in said


def test_a_run_of_another_config_is_told_apart(folder):
    assert run_folder.begun(folder / "new", {}) is None
    assert run_folder.begun(folder, CONTENT["config.json"]).step == 7
    with pytest.raises(UserError, match=r"another config: distance \('cosine' there, 'dot' now\)"):
        run_folder.begun(folder, CONTENT["config.json"] | {"distance": "dot"})


def test_what_was_edited_or_damaged_is_said(tmp_path, caplog):
    """A digit that changed leaves a file readable; only its digest tells."""
    results = CONTENT["results.json"] | {"test": {"after": {"recall@1": 0.25}}, "seconds": 3}
    run_folder.write_start(tmp_path, CONTENT["config.json"], CONTENT["run.json"])
    run_folder.write_checked(tmp_path / "results.json", results)
    found = run_folder.read(tmp_path)
    assert [found.config, found.facts, found.results] == [
        *({**CONTENT, "results.json": results}).values()
    ]
    assert not caplog.text
    for name, before, after in (
        ("config.json", '"cosine"', '"dot"'),
        ("run.json", '"form"', '"from"'),
        ("results.json", "0.25", "0.35"),
    ):
        text = (tmp_path / name).read_text()
        assert before in text
        (tmp_path / name).write_text(text.replace(before, after))
        caplog.clear()
        if name == "run.json":  # a field is lost
            with pytest.raises(UserError, match=r"run\.json is damaged: it has no trunk\.form"):
                run_folder.read(tmp_path)
        else:
            run_folder.read(tmp_path)
            assert [r.getMessage() for r in caplog.records] == [
                f"{tmp_path / name} is not as it was written: it was edited, or it is damaged"
            ]
        (tmp_path / name).write_text(text)
    for name, digest in (("run.json", "digest"), ("run.json", "config_digest")):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(f'"{digest}"', f'"{digest[:-1]}u"'))
        caplog.clear()
        run_folder.read(tmp_path)
        assert "is not as it was written" in caplog.text
        (tmp_path / name).write_text(text)


@pytest.mark.parametrize("number", [1, 2])
def test_an_extension_whose_start_dies_is_told_once(number, tmp_path, monkeypatch):
    options = {"optim": {"schedule": "constant"}}
    then, now = (CONTENT["config.json"] | options | {"train": {"steps": n}} for n in (4, 8))
    run_folder.write_start(tmp_path, then, CONTENT["run.json"])
    calls, replace = [], os.replace

    def dies(*names):
        calls.append(names)
        if len(calls) == number:
            raise KeyboardInterrupt
        replace(*names)

    found = extended(run_folder.read(tmp_path), ConfigDict(now))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            run_folder.write_start(tmp_path, now, found.facts)
    found = extended(run_folder.read(tmp_path), ConfigDict(now))
    assert found.facts["extended"] == [{"from": 4, "to": 8}]


@pytest.mark.parametrize("text", ["", "[]", "null", '{"cpu": 3', '{"cpu": 3, "digest": "f"}'])
def test_a_damaged_file_that_can_be_made_again_is_said(text, tmp_path, caplog):
    path = tmp_path / "speed.json"
    assert run_folder.read_checked(path) is None
    run_folder.write_checked(path, {"cpu": 3})
    assert run_folder.read_checked(path) == {"cpu": 3}
    assert not caplog.text
    path.write_text(text)
    assert run_folder.read_checked(path) is None
    assert "speed.json is damaged; it is made again" in caplog.text


def test_a_folder_is_one_process_s_until_it_dies(tmp_path):
    folder = tmp_path / "new" / "run"
    context = multiprocessing.get_context("spawn")
    ready, wait = context.Event(), context.Event()
    other = context.Process(target=tiny.hold_run, args=(folder, ready, wait))
    other.start()
    assert ready.wait(60)
    in_use = pytest.raises(UserError, match=rf"in use by process {other.pid} on .*: wait for it")
    with in_use, run_folder.claimed(folder):
        pass
    (folder / ".0123456789ab.part").write_text("half")
    other.kill()
    other.join()
    in_use = pytest.raises(UserError, match=f"in use by process {os.getpid()}")
    with run_folder.claimed(folder), in_use, run_folder.claimed(folder):
        pass
    assert not [*folder.iterdir()]  # nothing was written; the folder was there before
    with pytest.raises(KeyError), run_folder.claimed(tmp_path / "another" / "run"):
        raise KeyError
    assert not (tmp_path / "another").exists()


def test_where_there_are_no_locks_that_is_said_once(tmp_path, caplog, monkeypatch):
    """As on Windows, where everything is imported as well."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    code = "import sys; sys.modules['fcntl'] = None; import siamese_jax.storage.vectors"
    code += ", siamese_jax.storage.run_folder, siamese_jax.weights.download"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tiny.ROOT)
    for _ in range(2):
        with run_folder.claimed(tmp_path / "run"):
            pass
        VectorStore(tmp_path / "cache", (1,))
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" has no locks")[0] for line in said] == [
        str(tmp_path / "run"), str(tmp_path / "cache"),
    ]  # fmt: skip
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is a file"), run_folder.claimed(place):
            pass
