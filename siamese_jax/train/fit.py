"""An encoder for someone's pictures, without a gradient: chosen by folds, then fitted to all."""

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.data.records import Records, content_keys, fingerprint, told_copies
from siamese_jax.encoder import folder, lda
from siamese_jax.encoder.combined import Part, whitened
from siamese_jax.encoder.embedding import embedded_rows
from siamese_jax.encoder.whitening import Whitening
from siamese_jax.train import fitting
from siamese_jax.train.fitting import Candidate, Scored

log = logging.getLogger(__name__)
WIDTHS = (128, 256, 512, 1024)
# What a row of the table is: a fit, or features that nothing is fitted to.
LDA, BARE, ROOTS, AS_IT_IS = "LDA", "bare trunk", "signed roots", "as it is"


class Source(NamedTuple):
    """Where candidates come from: features of a trunk at one image size, or an encoder.

    Attributes:
      name: in the table.
      load: stages, one or several -> the encoder of their features.
      stages: the sets of stages to try.
      what: its features, where nothing is fitted to them: `BARE`, `ROOTS` or `AS_IT_IS`.
      fits: whether anything is fitted to them.
    """

    name: str
    load: Callable[[tuple[str, ...]], Part]
    stages: Sequence[tuple[str, ...]]
    what: str = AS_IT_IS
    fits: bool = True


class Grid(NamedTuple):
    """What is tried of each source.

    Attributes:
      shrinkages: see `lda.closed_form`.
      widths: None takes all axes; where none are given, several are tried on the best with all,
        as far as there are images to tell so many axes by (`lda.few`).
      folds, seed: of `fitting.score`.
    """

    shrinkages: Sequence[float] = fitting.SHRINKAGES
    widths: Sequence[int | None] = ()
    folds: int = fitting.FOLDS
    seed: int = 0


class Row(NamedTuple):
    """A row of the table: a source, and what a candidate of it got."""

    source: Source
    scored: Scored

    @property
    def fits(self) -> bool:
        """Whether it is a fit, and not features as they are."""
        return self.scored.candidate.shrinkage is not None

    @property
    def what(self) -> str:
        """`LDA`, or what the features are."""
        return LDA if self.fits else self.source.what


class Fitted(NamedTuple):
    """What was fitted.

    Attributes:
      encoder: the winner, refitted on all images; as it is, where no fit was better.
      rows: all candidates, the best first; of a single candidate none is scored.
      chosen: the winner's row, which is not scored where it is the only candidate.
      bare: the best row of the trunks' features as they are, without their roots, or of the encoder
        that is there; None where none is scored.
      fitted: the chosen row of the fits, the winner's or not; None where none is scored.
      sets: of each set of stages the row whose shrinkage would be chosen.
      why: a sentence for each choice among fits.
    """

    encoder: Part
    rows: list[Row]
    chosen: Row
    bare: Row | None = None
    fitted: Row | None = None
    sets: Sequence[Row] = ()
    why: Sequence[str] = ()


def fit(
    sources: Sequence[Source],
    records: Records,
    out: str | os.PathLike[str] | None = None,
    *,
    grid: Grid | None = None,
    **options: Any,
) -> Fitted:
    """Scores all candidates by folds over the classes, and fits the best one to all images.

    Args:
      sources: trunks and image sizes.
      records: with labels.
      out: a folder for `load_encoder`; None saves nothing.
      grid: of shrinkages and widths.
      **options: of `siamese_jax.encoder.embedding.embed_records`.

    Raises:
      UserError: too few classes to choose by, or to fit to.
    """
    grid = grid or Grid()
    options["keys"] = options.get("keys") or content_keys(records)
    for line in told_copies(records, options["keys"]):
        log.warning("%s", line)
    tried = [(source, _candidates(source, grid)) for source in sources]
    if sum(len(candidates) for _, candidates in tried) == 1 and grid.widths:
        ((source, (only,)),) = [one for one in tried if one[1]]
        alone = Row(source, Scored(only, np.zeros(0)))
        return Fitted(_refit(alone, records, out, options), [], alone)
    fitting.held_folds(records.label, grid.folds, grid.seed, tell=True)  # before the work
    rows = []
    for source, candidates in tried:
        plain = [Candidate(stages, None) for stages in source.stages]
        rows += _scored(source, [*plain, *candidates], records, grid, options)
    # The bare trunk, unless folds tell that several stages, or roots, are better.
    unfitted = sorted((row for row in rows if not row.fits), key=lambda row: row.source.fits)
    bare = _of([row for row in unfitted if not row.source.fits] or unfitted, fitting.best)
    others = [row for row in unfitted if row is not bare]
    plain_row = _of([bare, *others], fitting.best_if_told)
    top, sets, why = _top(rows)
    if not grid.widths:
        top, found, more = _narrowed(top, plain_row, records, grid, options)
        rows, why = [*rows, *found], [*why, *more]
    rows.sort(key=lambda row: -row.scored.mean)
    if plain_row.scored.mean < top.scored.mean:
        return Fitted(_refit(top, records, out, options), rows, top, bare, top, sets, why)
    encoder = plain_row.source.load(plain_row.scored.candidate.stages)
    if out is not None:
        folder.save(out, encoder, None)
    return Fitted(encoder, rows, plain_row, bare, top, sets, why)


def _candidates(source: Source, grid: Grid) -> list[Candidate]:
    made = itertools.product(source.stages, grid.shrinkages, grid.widths or (None,))
    return [Candidate(*each) for each in made] if source.fits else []


def _top(rows: Sequence[Row]) -> tuple[Row, list[Row], list[str]]:
    """The best source of what is fitted, with stages and a shrinkage as training chooses them; and
    the row that stands for each set of stages.

    Several stages are taken where folds tell them from the first ones, and of the shrinkages that
    they do not tell from the best the moderate one. Both are told in a sentence.
    """
    fitted = [row for row in rows if row.fits]
    of: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in fitted:
        of.setdefault((row.source.name, row.scored.candidate.stages), []).append(row)
    moderate = {kind: _of(alike, fitting.moderate) for kind, alike in of.items()}
    own: dict[str, list[Row]] = {}
    for (name, _), row in moderate.items():
        own.setdefault(name, []).append(row)
    top = _of([_of(some, fitting.best_if_told) for some in own.values()], fitting.best)
    alike = of[top.source.name, top.scored.candidate.stages]
    why = [
        fitting.why_stages([row.scored for row in own[top.source.name]]),
        fitting.why_shrinkage([row.scored for row in alike]),
    ]
    return top, [*moderate.values()], [one for one in why if one]


def _narrowed(
    top: Row, plain: Row, records: Records, grid: Grid, options: Mapping[str, Any]
) -> tuple[Row, list[Row], list[str]]:
    """The narrowest of a row and narrower ones, of those not told from the best; and their rows.

    One that is no better than the features as they are is taken only where none is, and one that
    folds do not tell from them only where they tell none.
    """
    full = sum(_parts(top.source, top.scored.candidate.stages).values())
    images = _readable(top, records, options)
    narrower = [w for w in WIDTHS if w < full and not lda.few(images, w, full)]
    if not narrower:
        few = min(WIDTHS) < full
        said = f", as {images} images are too few to tell which to leave out" if few else ""
        return top, [], [f"all {full} axes{said}"]
    more = [top.scored.candidate._replace(width=width) for width in narrower]
    found = _scored(top.source, more, records, grid, options)
    least = min(top.scored.mean, plain.scored.mean + 1e-9)
    better = fitting.told(plain.scored, top.scored)
    enough = [
        row
        for row in (*found, top)
        if row.scored.mean >= least and (not better or fitting.told(plain.scored, row.scored))
    ]
    row = _of(enough, lambda scored: fitting.untold(scored)[0])
    kept = row.scored.candidate.width
    if kept is None:
        return row, found, [f"all {full} axes, as fewer are worse"]
    return row, found, [f"{kept} axes, the fewest that are not told apart from the best"]


def _readable(row: Row, records: Records, options: Mapping[str, Any]) -> int:
    """How many of the images can be read."""
    encoder = row.source.load(row.scored.candidate.stages)
    return len(embedded_rows(encoder, records, **options)[1])


def _of(rows: Sequence[Row], choose: Callable[[Sequence[Scored]], Scored]) -> Row:
    """The row that a choice among their scores takes."""
    chosen = choose([row.scored for row in rows])
    return next(row for row in rows if row.scored is chosen)


def _parts(source: Source, stages: tuple[str, ...]) -> dict[str, int]:
    """The width of each part; of an encoder that is there, its own under the name ""."""
    encoder = source.load(stages)
    if stages == ("",):
        return {"": encoder.embedding_dim}
    return encoder.model.columns  # type: ignore[union-attr]


def _scored(
    source: Source,
    candidates: Sequence[Candidate],
    records: Records,
    grid: Grid,
    options: Mapping[str, Any],
) -> list[Row]:
    stages = fitting.all_parts(source.stages)
    rows, kept = embedded_rows(source.load(stages), records, **options)
    scored = fitting.score(
        rows,
        kept,
        _parts(source, stages),
        candidates,
        folds=grid.folds,
        seed=grid.seed,
    )
    return [Row(source, one) for one in scored]


def _refit(
    chosen: Row,
    records: Records,
    out: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> Part:
    _, shrinkage, width = chosen.scored.candidate
    encoder = chosen.source.load(chosen.scored.candidate.stages)
    rows, kept = embedded_rows(encoder, records, **options)
    assert shrinkage is not None
    width = width or encoder.embedding_dim
    if lda.few(len(kept), width, encoder.embedding_dim):
        log.warning(
            "%d axes are kept of %d, and %d images are too few to tell which: others will lose "
            "what these do not show; take all axes, or at most %d",
            width, encoder.embedding_dim, len(kept), len(kept) // lda.IMAGES_AN_AXIS,
        )  # fmt: skip
    mean, projection = lda.fitted(rows, kept.label, shrinkage=shrinkage, width=width)
    about = {
        "method": "lda",
        "dim": width,
        "shrinkage": shrinkage,
        "images": len(kept),
        "data": fingerprint(records, options["keys"]),
        "encoder": encoder.fingerprint,
    }
    there = np.isin(records.id, kept.id)
    keys = frozenset(key for key, good in zip(options["keys"], there, strict=True) if good)
    whitening = Whitening(mean, projection, about, keys)
    if out is not None:
        folder.save(out, encoder, whitening)
    return whitened(encoder, whitening)
