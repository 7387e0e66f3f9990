"""What `fit` tried, as a table: all of it for a file, the best few to be read, and a sentence."""

from collections.abc import Iterable, Sequence
from typing import Any

from siamese_jax.metrics.bootstrap import compared, difference, interval
from siamese_jax.train.fit import BARE, Fitted, Row
from siamese_jax.train.fitting import METRIC, brief, untold

SHOWN = 5  # the best of the table, beside what is chosen and the bare trunk
COLUMNS = ("encoder", "stages", "what", "shrinkage", "width", "map@r", "low", "high")


def rows_of(made: Fitted) -> list[dict[str, Any]]:
    """The table of what was tried, the best first, with 95 % intervals over classes; of one
    candidate, which nothing is measured of, its name alone."""
    if not made.rows:
        return [_named(made.chosen) | {METRIC: None, "chosen": True}]
    alike = {id(scored) for scored in untold([row.scored for row in made.rows])}
    table = []
    for row in made.rows:
        _, values, classes = row.scored
        ends = interval(values, resamples=500, groups=classes)
        table.append(
            _named(row)
            | {
                METRIC: ends.mean,
                "low": ends.low,
                "high": ends.high,
                "not told apart from the best": id(row.scored) in alike,
                "chosen": row is made.chosen,
            }
        )
    return table


def _named(row: Row) -> dict[str, Any]:
    candidate = row.scored.candidate
    return {
        "encoder": row.source.name,
        "stages": ",".join(candidate.stages),
        "what": row.what,
        "shrinkage": candidate.shrinkage,
        "width": candidate.width or "all",
    }


def shown(made: Fitted, table: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """What is printed of a table: each set of stages once, and of these the best few.

    A fit to a set is there with the shrinkage that would be chosen for it. What is chosen, the best
    bare trunk and the chosen one's own are there at any rate.
    """

    def kind(row: Row) -> tuple[str, tuple[str, ...]]:
        return row.source.name, row.scored.candidate.stages

    def places(rows: Iterable[Row | None]) -> list[int]:
        wanted = {id(row) for row in rows}
        return [place for place, row in enumerate(made.rows) if id(row) in wanted]

    others = [row for row in made.sets if not made.chosen.fits or kind(row) != kind(made.chosen)]
    some = places([made.chosen, *others, *(row for row in made.rows if not row.fits)])[:SHOWN]
    columns = [name for name in COLUMNS if name != "stages" or table[0]["stages"]]
    lines: list[list[Any]] = [[*columns, ""]]
    for place in sorted({*some, *places([made.chosen, made.bare, _own_bare(made)])}):
        row = table[place]
        candidate = made.rows[place].scored.candidate
        brief_row = row | {
            "stages": brief(candidate.stages),
            "shrinkage": "-" if candidate.shrinkage is None else f"{candidate.shrinkage:g}",
        }
        lines.append([*(brief_row[name] for name in columns), "chosen" if row["chosen"] else ""])
    return lines


def _own_bare(made: Fitted) -> Row | None:
    """The best row of the chosen source's features as they are."""
    of = [r for r in made.rows if r.source.name == made.chosen.source.name and r.what == BARE]
    return of[0] if of else None


def named(row: Row) -> str:
    """What is not a fit, in words."""
    stages = ",".join(row.scored.candidate.stages)
    return " ".join(filter(None, [row.source.name, stages, f"({row.what})"]))


def verdict(made: Fitted) -> str:
    """A sentence of what the folds say of the chosen fit beside the bare trunk; and a line of why
    it is that fit."""
    assert made.bare is not None
    assert made.fitted is not None
    scored = made.fitted.scored
    told = difference(made.bare.scored.values, scored.values, groups=scored.classes)
    taken = (
        ""
        if made.chosen.fits
        else (f"\n{named(made.chosen)} is taken: its mean is not below that of LDA")
    )
    return (
        f"by folds, LDA is {compared(told)} {named(made.bare)}: {METRIC} {told.mean:+.4f}, "
        f"95 % interval {told.low:+.4f} to {told.high:+.4f} over classes"
        + (f"\nLDA of {'; '.join(made.why)}" if made.why else "")
        + taken
    )
