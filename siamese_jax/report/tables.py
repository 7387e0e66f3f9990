"""The table of a run's metrics: every stage's value and the gain, for the page and the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from siamese_jax.report.page import escape, is_number, number

_NAMES = ("map", "mrr", "r_precision", "auc", "nmi", "map@r")


def _columns(block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The columns of a table of metrics: before and after, or the one that there is."""
    nested = {name: column for name, column in block.items() if isinstance(column, Mapping)}
    return nested if nested else {"value": block}


def _names(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(n for c in columns.values() for n, v in c.items() if is_number(v)))


def is_metrics(block: object) -> bool:
    """Whether a block of results.json holds retrieval metrics, in one column or several."""
    if not isinstance(block, Mapping):
        return False
    names = {str(name) for column in _columns(block).values() for name in column}
    return any("@" in name or name in _NAMES for name in names)


def _bars(values: Mapping[str, float]) -> str:
    """The values on one track from 0 to 1, the longer one below the shorter one."""
    if not values or not all(0 <= value <= 1 for value in values.values()):
        return ""
    longest_first = sorted(values.items(), key=lambda bar: -bar[1])
    drawn = "".join(f'<i class="{n}" style="width:{100 * v:.2f}%"></i>' for n, v in longest_first)
    return f'<div class="track">{drawn}</div>'


def _row(name: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    values = {stage: column.get(name) for stage, column in columns.items()}
    # Whole numbers are counts, of queries or images: a gain or a bar would say nothing.
    measures = {s: float(v) for s, v in values.items() if isinstance(v, float) and math.isfinite(v)}
    cells = [f"<td>{escape(name)}</td>"]
    cells += [
        f'<td class="number">{number(v) if is_number(v) else "–"}</td>' for v in values.values()
    ]
    bars = dict(list(measures.items())[-1:])
    if "before" in columns and "after" in columns:
        bars = {stage: v for stage, v in measures.items() if stage in ("before", "after")}
        gain = measures["after"] - measures["before"] if len(bars) == 2 else 0.0
        style = "up" if gain > 0 else "down" if gain < 0 else ""
        cells.append(
            f'<td class="number gain {style}">{f"{gain:+.4f}" if len(bars) == 2 else ""}</td>'
        )
    return f'<tr>{"".join(cells)}<td class="bar">{_bars(bars)}</td></tr>'


def metrics_table(block: Mapping[str, Any]) -> str:
    """One row a metric. `block` is {"before": {...}, "after": {...}}, or one column of metrics."""
    columns = _columns(block)
    numbers = [*columns, *(["gain"] if "before" in columns and "after" in columns else [])]
    heading = "".join(f'<th class="number">{escape(text)}</th>' for text in numbers)
    rows = "".join(_row(name, columns) for name in _names(columns))
    return (
        f'<table class="wide"><thead><tr><th>metric</th>{heading}<th></th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of values as columns of text, the first one to the left, the others to the right.

    >>> print(aligned([("metric", "value"), ("recall@1", 0.5)]))
    metric     value
    recall@1  0.5000
    """
    cells = [[number(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]).rstrip()

    return "\n".join(line(row) for row in cells)


def text_table(results: Mapping[str, Any]) -> str:
    """Every block of metrics in results.json as text, each stage a column, and the gain.

    >>> print(text_table({"test": {"before": {"recall@1": 0.25}, "after": {"recall@1": 0.5}}}))
    test      before   after     gain
    recall@1  0.2500  0.5000  +0.2500
    """
    tables = []
    for title, block in results.items():
        if not is_metrics(block):
            continue
        columns = _columns(block)
        pair = "before" in columns and "after" in columns
        rows = [(title, *columns, *(["gain"] if pair else []))]
        for name in _names(columns):
            values = {stage: column.get(name, "") for stage, column in columns.items()}
            gain = []
            if pair:
                before, after = values["before"], values["after"]
                both = isinstance(before, float) and isinstance(after, float)
                gain = [f"{after - before:+.4f}" if both else ""]
            rows.append((name, *values.values(), *gain))
        tables.append(aligned(rows))
    return "\n\n".join(tables)
