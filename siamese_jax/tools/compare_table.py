"""The table of a comparison, as Markdown, CSV and a page with accuracy against speed."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siamese_jax.report.page import escape, number, page, section
from siamese_jax.report.page import table as html_table
from siamese_jax.report.plots import pareto_plot
from siamese_jax.storage.writing import written
from siamese_jax.tools import compare_folds
from siamese_jax.tools.compare_grid import FOLD, SEED, Cell, Published

METRICS = ("recall@1", "map@r")
# The heading of each column that is not an axis, and how it is written.
COLUMNS = {
    "tries": "tries",
    "validation": "validation",
    "recall@1 before": "recall@1 before",
    "recall@1": "recall@1",
    "recall@1 sd": "sd",
    "recall@1 low": "low",
    "recall@1 high": "high",
    "map@r before": "map@r before",
    "map@r": "map@r",
    "map@r low": "low",
    "map@r high": "high",
    "concatenated recall@1": "concatenated recall@1",
    "concatenated map@r": "concatenated map@r",
    "steps": "steps",
    "published": "published",
    "parameters": "parameters",
    "images/s": "images/s",
    "width": "width",
}
Row = dict[str, Any]


def table(
    cells: Sequence[Cell],
    outcomes: Mapping[str, Mapping[str, Any]],
    speeds: Mapping[str, float],
    published: Published | None = None,
) -> list[Row]:
    """One row a combination of the axes, seeds and folds averaged, the best recall@1 first.

    A combination of folds has a row where all of them were run.

    Args:
      cells: of the grid.
      outcomes: cell name -> results.json, of those that were run.
      speeds: cell name -> images/s.
      published: recall@1 of bare trunks elsewhere, by the names on the axes.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in cells:
        axes = tuple((k, v) for k, v in cell.choice.items() if k not in (SEED, FOLD))
        groups.setdefault(axes, []).append(cell)
    rows = []
    for axes, group in groups.items():
        members = [cell for cell in group if cell.name in outcomes]
        if not members or (len(members) < len(group) and FOLD in group[0].choice):
            continue
        results = [outcomes[cell.name] for cell in members]
        tested = [r["test"] for r in results]
        recalls = [test["after"]["recall@1"] for test in tested]
        row = {
            **dict(axes),
            **{m: statistics.mean(test["after"][m] for test in tested) for m in METRICS},
            **{f"{m} before": statistics.mean(t["before"][m] for t in tested) for m in METRICS},
            "recall@1 sd": statistics.stdev(recalls) if len(recalls) > 1 else math.nan,
            "published": (published or {}).get(tuple(name for _, name in axes), math.nan),
            "parameters": sum(results[0]["parameters"].values()),
            "images/s": statistics.mean(speeds[cell.name] for cell in members),
            "width": results[0]["embedding_dim"],
            "trunk used": results[0]["trunk"]["trunk"],
            "fallback": bool(results[0]["trunk"]["fallback_for"]),
            "runs": [cell.name for cell in members],
        }
        if FOLD in members[0].choice:
            row |= compare_folds.of_folds(members, results, METRICS)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["recall@1"])


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """The columns that say something: no deviation where there is one seed."""
    told = {
        k for row in rows for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))
    }
    return {k: v for k, v in COLUMNS.items() if k in told}


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "-"
    if name == "parameters":
        return f"{value / 1e6:.2f} M"
    if name == "images/s":
        return f"{value:.1f}"
    return number(value)


def _by_reason(failures: Mapping[str, str]) -> list[tuple[str, str]]:
    """Cells that failed for the same reason, named by the first of them; and the reason."""
    groups: dict[str, list[str]] = {}
    for name, why in failures.items():
        groups.setdefault(why, []).append(name)
    more = {why: f" and {len(names) - 1} more" for why, names in groups.items() if names[1:]}
    return [(names[0] + more.get(why, ""), why) for why, names in groups.items()]


def notes(
    rows: Sequence[Row], names: Sequence[str], title: str, failures: Mapping[str, str]
) -> list[str]:
    """What is said below the table: which rows are better than before, and what was not run."""
    said = [f"{_called(row, names, title)}: {row['verdict']}" for row in rows if "verdict" in row]
    said += compare_folds.empty_intervals(rows, METRICS)
    return said + [f"Not run: {cells}: {why}" for cells, why in _by_reason(failures)]


def _called(row: Row, names: Sequence[str], title: str) -> str:
    return " ".join(row[axis] for axis in names) or title


def write(
    workdir: Path, title: str, rows: Sequence[Row], axes: Sequence[str], failures: Mapping[str, str]
) -> None:
    """compare.md, compare.csv and index.html in the comparison's folder.

    Args:
      workdir: the folder.
      title: of the page.
      rows: of `table`.
      axes: the grid's axes in order.
      failures: cell name -> why it was not run.
    """
    names = [axis for axis in axes if axis not in (SEED, FOLD)]
    columns = _columns(rows)
    heading = [*names, *columns.values()]
    texts = [[*(r[a] for a in names), *(_cell(c, r[c]) for c in columns)] for r in rows]
    said = notes(rows, names, title, failures)

    lines = ["| " + " | ".join(heading) + " |"]
    lines.append("|" + " --- |" * len(names) + " ---: |" * len(columns))
    lines += ["| " + " | ".join(row) + " |" for row in texts]
    lines += [f"\n{one}" for one in said]
    with written(workdir / "compare.md") as file:
        file.write("\n".join(lines) + "\n")

    with written(workdir / "compare.csv", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *columns, "trunk used", "runs"])
        for row in rows:
            values = [row[key] for key in (*names, *columns, "trunk used")]
            writer.writerow([*values, " ".join(row["runs"])])

    linked = []
    for row, own in zip(rows, texts, strict=True):
        links = [
            f'<a href="{escape(run)}/report/index.html">{i}</a>'
            for i, run in enumerate(row["runs"])
        ]
        linked.append([*(escape(text) for text in own), " ".join(links)])
    grid = html_table([*map(escape, heading), "reports"], linked, numbers_from=len(names))
    text = _page(title, rows, names, grid, said)
    with written(workdir / "index.html") as file:
        file.write(text)


def _page(
    title: str, rows: Sequence[Row], names: Sequence[str], grid: str, said: Sequence[str]
) -> str:
    """The page of a table `grid`, with what is `said` below it."""
    warnings = [one for one in said if one.startswith("Not run")]
    warnings += [
        f"{row['runs'][0]}: the trunk is {row['trunk used']}, which is not the one asked for"
        for row in rows
        if row["fallback"]
    ]
    plot = pareto_plot(
        "Accuracy against speed",
        [(row["images/s"], row["recall@1"]) for row in rows],
        [_called(row, names, title) for row in rows],
        [row[names[0]] if names else title for row in rows],
        x="images/s",
        y="recall@1",
    )
    told = "".join(f"<p>{escape(one)}</p>" for one in said if one not in warnings)
    body = [
        plot,
        section("Table", f'<div class="card">{grid}</div>{told}'),
        '<p class="soft">recall@1 and map@r on the test split after training, low and high: the '
        "95 % interval over runs of other folds, concatenated: of all folds' embeddings side by "
        "side, before: of the trunk's pooled features, published: recall@1 of those elsewhere, as "
        "the config has it; images/s through trunk and head on the machine that ran the "
        "comparison, reading of files not counted; parameters of both.</p>",
    ]
    return page(title, body, subtitle=f"{len(rows)} combinations", warnings=warnings)
