"""The pages that are kept by hand: what can be checked about them; CI; the tables of results."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from siamese_jax.__main__ import TOOLS

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "tables.py"


def tables(*arguments):
    command = [sys.executable, str(TABLES), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_record(folder, date="2026-01-02", **changes):
    record = {
        "name": "speed",
        "date": date,
        "machine": "2 cores",
        "commit": "abc1234",
        "command": "python benchmarks/speed.py",
        "columns": ["shape", "ratio"],
        "rows": [["1 x 2", "1.50"], ["a | b", 3]],
        "notes": ["Medians."],
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{date}-speed.json").write_text(json.dumps(record | changes), encoding="utf-8")


def test_the_tables_of_results_are_those_of_the_records():
    done = tables("--check")
    assert done.returncode == 0, done.stderr


def test_a_table_is_made_from_the_newest_record(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "records"
    page.write_text("Before.\n<!-- table: speed -->\n9.99\n<!-- end -->\nAfter.\n")
    write_record(folder)
    write_record(folder, date="2025-12-31", rows=[["1 x 2", "0.10"]])
    options = f"--page={page}", f"--records={folder}"
    assert tables("--check", *options).returncode == 1
    assert "9.99" in page.read_text()  # a check writes nothing
    assert tables("--write", *options).returncode == 0
    assert tables("--check", *options).returncode == 0
    assert page.read_text() == (
        "Before.\n<!-- table: speed -->\n"
        "| shape | ratio |\n| --- | --- |\n| 1 x 2 | 1.50 |\n| a \\| b | 3 |\n\n"
        "- Measured 2026-01-02. Machine: 2 cores.\n"
        "- Commit: abc1234. Command: `python benchmarks/speed.py`.\n"
        "- Medians.\n<!-- end -->\nAfter.\n"
    )


def test_a_table_of_a_gpu_waits_for_its_first_record(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "records"
    page.write_text("<!-- table: gpu_rank -->\n<!-- end -->\n")
    folder.mkdir()
    options = f"--page={page}", f"--records={folder}"
    assert tables("--write", *options).returncode == 0
    assert "No record has been taken yet" in page.read_text()
    write_record(folder, name="gpu_rank")
    assert tables("--check", *options).returncode == 1
    assert tables("--write", *options).returncode == 0
    assert "No record" not in page.read_text()
    assert "| 1 x 2 | 1.50 |" in page.read_text()
    page.write_text("No place for it.\n")
    assert "gpu_rank" in tables("--write", *options).stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "other"}, "other"),
        ({"rows": [["1 x 2"]]}, "a cell for each column"),
        ({"date": "2026-01-03"}, "must begin with its date"),
        ({"host": "lab7"}, "has the fields"),
    ],
)
def test_a_record_that_is_wrong_is_one_line(tmp_path, changes, says):
    page, folder = tmp_path / "page.md", tmp_path / "records"
    page.write_text("<!-- table: speed -->\n<!-- end -->\n")
    write_record(folder)
    path = next(folder.glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")
    done = tables("--write", f"--page={page}", f"--records={folder}")
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_ci_runs_the_script_on_every_python_that_is_promised():
    (job,) = workflow()["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={job['strategy']['matrix']['python'][0]}"
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_what_ci_and_pre_commit_fetch_is_pinned():
    (job,) = workflow()["jobs"].values()
    fetched = [step["uses"].split("@")[1] for step in job["steps"] if "uses" in step]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    fetched += [repository["rev"] for repository in hooks["repos"]]
    assert len(fetched) == 3
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", version) for version in fetched)
    assert [hook["id"] for hook in hooks["repos"][0]["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_readme_is_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    assert (ROOT / "docs" / "retrieval.png").stat().st_size < 120_000


def test_the_readme_lists_every_config_and_tool():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert not [name for name in (*configs, *TOOLS) if f"`{name}`" not in text]
