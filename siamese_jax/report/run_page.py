"""A run as one page: what was gained, from what it came, how it went, and what it finds.

The page is a single file without any outside resource, so it opens from a disk, an archive or a
mail, in light and in dark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siamese_jax.report.page import escape, facts, page, section
from siamese_jax.report.plots import line_chart
from siamese_jax.report.tables import is_metrics, metrics_table
from siamese_jax.report.tiles import SELECTION, Example, Tile, choose_examples, explorer
from siamese_jax.storage.writing import written

__all__ = ["Example", "Tile", "choose_examples", "write_report"]

Curves = Mapping[str, Sequence[tuple[int, float]]]


def _plots(curves: Curves) -> str:
    """Small multiples, one a measure with its sets as lines: the loss and what is mostly asked
    for in sight, the other ones folded."""
    charts: dict[str, dict[str, Sequence[tuple[int, float]]]] = {}
    for name, points in curves.items():
        group, _, measure = name.rpartition("/")
        charts.setdefault(measure, {})[group or "train"] = points
    order = sorted(charts, key=lambda measure: measure != "loss")
    first = [m for m in order if m in ("loss", "map@r") or m.startswith("recall@")]
    rest = [m for m in order if m not in first]

    def drawn(measures: Sequence[str]) -> str:
        return f'<div class="plots">{"".join(line_chart(m, charts[m]) for m in measures)}</div>'

    if not first or not rest:
        return drawn(order)
    more = f"<summary>{len(rest)} more curves</summary>{drawn(rest)}"
    return f'{drawn(first)}<details class="more">{more}</details>'


def _provenance(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What the numbers came from; the whole config is folded, the rest is open."""
    known = {**{k: v for k, v in results.items() if not is_metrics(v)}, **run}
    config = known.pop("config", None)
    plain = {k: v for k, v in known.items() if not isinstance(v, Mapping)}
    trees = {name: value for name, value in known.items() if isinstance(value, Mapping)}
    cards = {"run": plain, **trees} if plain else trees
    body = "".join(
        f'<div class="card"><h3>{escape(name)}</h3>{facts(tree)}</div>'
        for name, tree in cards.items()
    )
    folded = (
        f'<p></p><details class="card"><summary>config</summary>{facts(config)}</details>'
        if isinstance(config, Mapping)
        else ""
    )
    return f'<div class="columns">{body}</div>{folded}'


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Mapping[str, Any],
    run: Mapping[str, Any],
    curves: Curves,
    examples: Sequence[Example],
    warnings: Sequence[str] = (),
    note: str = SELECTION,
) -> None:
    """Writes the page of a run; its folder is made where needed.

    Args:
      path: of the HTML file.
      title: the page's heading.
      results: as in results.json: `{"test": {"before": {"recall@1": ...}, "after": {...}}, ...}`,
        or one column, `{"test": {"recall@1": ...}}`; blocks without metrics join the provenance.
      run: as in run.json: versions, trunk, weights and their sha256, data fingerprint, split,
        seed, config. Shown whole.
      curves: as `read_curves` gives them.
      examples: the queries to show, as `choose_examples` chose them.
      warnings: shown at the top, loudly.
      note: how the examples were chosen.
    """
    parts = [
        section(f"Retrieval on {name}", f'<div class="card">{metrics_table(block)}</div>')
        for name, block in results.items()
        if is_metrics(block)
    ]
    if curves:
        parts.append(section("Training", _plots(curves)))
    if examples:
        nearest = max(len(example.neighbours) for example in examples)
        heading = f"{len(examples)} queries and their {nearest} nearest"
        parts.append(section(heading, explorer(examples, note)))
    if run or results:
        parts.append(section("Where these numbers come from", _provenance(run, results)))
    with written(path, errors="backslashreplace") as file:
        file.write(page(title, parts, warnings=warnings))
