"""Records of measurements: dated JSON under benchmarks/records/, from which the tables are made.

    python benchmarks/rank.py --record       # or another that compares

A record is {"name", "date", "machine", "commit", "command", "columns", "rows", "notes"}. A machine
is described by kind ("2 cores, AMD EPYC, AVX-512"), never by name; a commit is that of the code
that was measured. What nobody wrote down at the time is "not recorded".
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("records")
FIELDS = ("name", "date", "machine", "commit", "command", "columns", "rows", "notes")
# What a processor is asked for, by its flag in /proc/cpuinfo.
FLAGS = {"avx512f": "AVX-512", "avx512_bf16": "bfloat16", "amx_tile": "AMX"}

Record = dict[str, Any]


def read(folder: Path = FOLDER) -> dict[str, Record]:
    """The newest record of each name; ValueError for a file that is none."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if tuple(record) != FIELDS:
            raise ValueError(f"{path.name}: a record has the fields {', '.join(FIELDS)}")
        if not path.name.startswith(f"{datetime.date.fromisoformat(record['date'])}-"):
            raise ValueError(f"{path.name}: the name must begin with its date, {record['date']}")
        if any(len(row) != len(record["columns"]) for row in record["rows"]):
            raise ValueError(f"{path.name}: a row needs a cell for each column")
        found[record["name"]] = record
    return found


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", action="store_true", help="keep the table in records/")


def save(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()
) -> Path:
    """Writes the record of a benchmark that just ran; its file."""
    record: Record = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "commit": commit(),
        "command": command(sys.argv),
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "notes": list(notes),
    }
    kind = re.sub(r"[^a-z0-9]+", "-", record["machine"].lower())
    path = FOLDER / f"{record['date']}-{name.replace('_', '-')}-{kind}.json"
    path.write_text(text(record), encoding="utf-8")
    print(f"wrote {path.relative_to(FOLDER.parents[1])}; now: python benchmarks/tables.py --write")
    return path


def text(record: Record) -> str:
    """A record as JSON, a line for each row and note."""

    def dump(value: Any) -> str:
        line = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, list) or len(line) < 80:
            return line
        return "[\n    " + ",\n    ".join(dump(item) for item in value) + "\n  ]"

    return "{\n" + ",\n".join(f"  {dump(k)}: {dump(record[k])}" for k in FIELDS) + "\n}\n"


def machine() -> str:
    """This machine by kind: cores, processor, what it can do, accelerator."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = platform.processor() or platform.machine(), set()
    if (info := Path("/proc/cpuinfo")).exists():
        facts = dict(re.findall(r"^(model name|flags)\s*: (.*)$", info.read_text(), re.M))
        model = re.sub(r"\((R|TM)\)| CPU| @.*", "", facts.get("model name", model)).strip()
        flags = set(facts.get("flags", "").split())
    able = [word for flag, word in FLAGS.items() if flag in flags]
    device = jax.devices()[0]
    accelerator = [device.device_kind] if device.platform != "cpu" else []
    return ", ".join([f"{cores} cores", model, *able, *accelerator])


def commit() -> str:
    """The short hash of the checkout, and whether its files were changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not recorded"


def command(argv: Sequence[str]) -> str:
    """The command line without `--record`, and without the folders of this machine.

    >>> command(["/x/benchmarks/rerank.py", "--encoder=/home/me/run", "--record", "--classes", "9"])
    'python benchmarks/rerank.py --encoder=run --classes 9'
    """
    kept = [re.sub(r"(^|=)/\S*/", r"\1", word) for word in argv[1:] if word != "--record"]
    return " ".join(["python", f"benchmarks/{Path(argv[0]).name}", *kept])
