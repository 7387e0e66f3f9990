"""The tables of docs/results.md, made from the records: no figure in that file is typed.

python benchmarks/tables.py --write      # fills <!-- table: NAME --> ... <!-- end -->
python benchmarks/tables.py --check      # fails where the file is not what --write makes
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import records

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
# Tables that may still wait for their first record, which `gpu.py --record` makes.
AWAITED = {f"gpu_{part}" for part in ("matrix", "encode", "train", "triplets", "rank")}
NONE = "No record has been taken yet: `python benchmarks/gpu.py --record`, where there is a GPU.\n"
REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(record: records.Record) -> str:
    """A record as Markdown: the table, how it was measured, the notes."""
    rows = [record["columns"], ["---"] * len(record["columns"]), *record["rows"]]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines += ["", f"- Measured {record['date']}. Machine: {record['machine']}."]
    lines += [f"- Commit: {record['commit']}. Command: {quoted(record['command'])}."]
    return "\n".join([*lines, *(f"- {note}" for note in record["notes"])]) + "\n"


def quoted(command: str) -> str:
    return command if command == "not recorded" else f"`{command}`"


def filled(page: str, found: dict[str, records.Record]) -> str:
    """The page with every region made anew; ValueError for a region or a record left alone."""
    names = {name for _, name, _ in REGION.findall(page)}
    if alone := (names ^ set(found)) - (names & AWAITED):
        listed = ", ".join(sorted(alone))
        raise ValueError(f"a table without a record, or a record without a table: {listed}")
    made = {name: table(found[name]) if name in found else NONE for name in names}
    return REGION.sub(lambda m: m[1] + made[m[2]] + m[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--write", action="store_true", help="fill the tables")
    todo.add_argument("--check", action="store_true", help="exit 1 where --write would change them")
    parser.add_argument("--page", type=Path, default=RESULTS, help="%(default)s")
    parser.add_argument("--records", type=Path, default=records.FOLDER, help="%(default)s")
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    try:
        made = filled(page, records.read(args.records))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.check and made != page:
        print("error: the tables are not those of the records: run with --write", file=sys.stderr)
        return 1
    if args.write:
        args.page.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
