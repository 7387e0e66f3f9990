"""Which LDA: stages, shrinkage and width, chosen by folds over whole classes.

The classes of the images are dealt into folds. Of each fold, every candidate is fitted to the other
folds' classes and asked the fold's own images, of classes that it has not seen: retrieval as it is
measured after training. All candidates of one trunk come from one accumulated `Scatter`: a fold's
is subtracted from it, and a choice of stages is some of its rows and columns.
"""

import contextlib
import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from siamese_jax.data.labels import missing
from siamese_jax.data.records import Records
from siamese_jax.encoder import lda
from siamese_jax.encoder.pooling import pooled_parts, pooled_width
from siamese_jax.errors import UserError
from siamese_jax.metrics import bootstrap
from siamese_jax.metrics.evaluation import sides_of
from siamese_jax.search.engine.parallel import THREADS

log = logging.getLogger(__name__)
FOLDS = 4
SHRINKAGES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
MIDDLE = 0.5
DEPTHS = (1, 2, 4, 6)  # how many of the last stages are tried together
WIDEST = 10_240  # features of stages that are tried unasked, or that share one scatter
MOST = 1000  # queries of a fold
WORKERS = 4  # candidates that are fitted side by side
METRIC = "map@r"


class TooFew(UserError):
    """There are not enough classes to choose by."""


class Candidate(NamedTuple):
    """One LDA, or none.

    Attributes:
      stages: of the trunk, whose features are taken together.
      shrinkage: of `lda.closed_form`; None for the features as they are.
      width: axes to keep; None for all of them.
    """

    stages: tuple[str, ...]
    shrinkage: float | None
    width: int | None = None


Vectors = list[tuple[Candidate, np.ndarray]]  # float32 [m, d], of each
Task = Callable[[], Vectors]


class Scored(NamedTuple):
    """A candidate, and what it got on classes that it was not fitted to.

    Attributes:
      candidate: it.
      values: float64 [q], the metric of each query, in one order for all candidates.
      classes: int [q], theirs, which are drawn whole to tell two candidates apart; None draws the
        queries.
    """

    candidate: Candidate
    values: np.ndarray
    classes: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Over the queries that have an answer."""
        return float(np.nanmean(self.values))


def stage_sets(widths: Mapping[str, int], pool: str = "average") -> list[tuple[str, ...]]:
    """The choices among a trunk's stages: its last ones, taken together, the fewest first.

    Where the pooling is the average, then those of several once more with their maxima, and in
    cells of a grid, but for the last stage. The last stage comes last in every set.

    Args:
      widths: the channels of each stage, in their order.
      pool: one for all stages.

    Raises:
      UserError: a pooling for each of them, though their number is what is chosen.

    >>> stage_sets({"stem": 32, "stage1": 64, "top": 128})
    [('top',), ('stage1', 'top'), ('stage1:max', 'stage1', 'top'), ('stage1:grid2', 'top')]
    """
    if "," in pool:
        raise UserError(
            f"trunk.pool={pool!r} names one for each stage, and with trunk.stage=auto their number "
            "is still to be chosen: give one pooling, or name the stages"
        )
    usable = [stage for stage in widths if stage != "stem"]
    plain = list(dict.fromkeys(tuple(usable[-depth:]) for depth in DEPTHS))
    if pool != "average":
        return plain
    maxima = [(*(f"{stage}:max" for stage in some[:-1]), *some) for some in plain[1:]]
    grids = [(*(f"{stage}:grid2" for stage in some[:-1]), some[-1]) for some in plain[1:]]
    sizes = {some: _features(widths, some) for some in (*plain, *maxima, *grids)}
    for some in (some for some, size in sizes.items() if size > WIDEST):
        log.warning("stages %s are not tried: %d features, more than %d; name them to take them",
                    ",".join(some), sizes[some], WIDEST)  # fmt: skip
    return [some for some, size in sizes.items() if size <= WIDEST]


def _features(widths: Mapping[str, int], stages: Sequence[str]) -> int:
    """How many features stages have together, each averaged if it names no other pooling."""
    parts = pooled_parts(",".join(stages), "average")
    return sum(pooled_width(widths[stage], pool) for stage, pool in parts)


def all_parts(sets: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The parts that sets of stages have between them: all come out of one pass."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(sets)))


def held_folds(
    labels: np.ndarray, count: int, seed: int, *, tell: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each fold the images that are held out, and the labels that they are asked by.

    Whole classes are dealt. An image of several is held out with each of them, and asked by those
    of the fold alone: what is fitted to the others has seen neither the image nor the class.

    Args:
      labels: int [n], -1 for none, or bool [n, c].
      count: at most so many folds; less where a fold would not have two classes of two images, or
        would leave no two images of one class to fit to.
      seed: of the dealing.
      tell: whether to say so.

    Returns:
      bool [n] and labels like the given ones, of each fold.

    Raises:
      UserError: fewer than four classes of two images or more, or nothing left to fit to.
    """
    dealt = _dealt(*class_sizes(labels), count, seed)
    found = []
    for number in range(max(dealt.values()) + 1):
        own = _only(labels, [name for name, fold in dealt.items() if fold == number])
        found.append((~missing(own), own))
    kept = [(held, own) for held, own in found if (class_sizes(labels[~held])[1] > 1).any()]
    if not kept:
        raise TooFew("there is nothing to choose by: no fold of classes leaves images to fit to")
    if tell and len(found) < count:
        log.warning("%d folds, not %d: each needs two classes of two images", len(found), count)
    if tell and len(kept) < len(found):
        said = "%d of %d folds over the classes leave nothing to fit to, and are left out"
        log.warning(said, len(found) - len(kept), len(found))
    return kept


def class_sizes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that have images, int [c], and how many each has."""
    classes = np.nonzero(labels)[1] if labels.ndim == 2 else labels[~missing(labels)]
    return np.unique(classes, return_counts=True)


def _only(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """The same labels of some classes alone."""
    if labels.ndim == 2:
        return labels & np.isin(np.arange(labels.shape[1]), classes)
    return np.where(np.isin(labels, classes), labels, -1)


def _dealt(names: np.ndarray, sizes: np.ndarray, count: int, seed: int) -> dict[int, int]:
    """The fold of each class, of their numbers and how many images each has."""
    several = names[sizes > 1]
    if len(several) < 4:
        raise TooFew(
            f"there is nothing to choose by: {len(several)} classes have two images or more, and "
            "two folds need four of them, for among images of one class every answer is right"
            + (
                "; pictures of the same things, beside these as the folders query/ and gallery/, "
                "would give each class two"
                if not len(several)
                else ""
            )
        )
    rng = np.random.default_rng(seed)
    # Those that can be asked are dealt evenly, and then the others.
    order = [*rng.permutation(several), *rng.permutation(names[sizes == 1])]
    return dict(zip(order, itertools.cycle(range(min(count, len(several) // 2))), strict=False))


def score(
    rows: lda.Rows,
    records: Records,
    parts: Mapping[str, int],
    candidates: Sequence[Candidate],
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> list[Scored]:
    """Every candidate on every fold.

    Held at once, beside a fold's rows: four matrices float64 [d, d], two and the axes of each
    candidate at work (one at a time where d is above `lda.NARROW`), and a copy of its part of two
    where it takes some of the stages. Stages of more features than there are rows are scored in the
    span of these, by d = n.

    Args:
      rows: gives the features of some of the records by their places, real [m, sum of the parts].
      records: n of them, with labels.
      parts: the width of each stage's features, in the order of the columns.
      candidates: what to compare.
      folds: at most that many.
      seed: of the folds and of the queries that are asked, where a fold has very many.

    Raises:
      UserError: too few classes, or nothing to ask.
    """
    dealt = list(_asked(all_asked(records, np.ones(len(records), bool)), folds, seed))
    if not dealt:
        raise TooFew(
            f"{records.name}: there is nothing to choose by: no image has another of its class to "
            "find"
        )
    of = np.concatenate([one_class(asked.label[asked.is_query]) for _, asked in dealt])
    candidates = list(dict.fromkeys(candidates))
    found: dict[Candidate, list[np.ndarray]] = {candidate: [] for candidate in candidates}
    try:
        for space in _spaces(rows, len(records), parts, candidates):
            for candidate, values in _scored(space, records, dealt):
                found[candidate].append(values)
    except lda.Copies:
        raise TooFew(
            f"{records.name}: there is nothing to choose by: without the classes of one fold, all "
            "images of a class are copies of one another"
        ) from None
    return [Scored(candidate, np.concatenate(values), of) for candidate, values in found.items()]


def all_asked(records: Records, some: np.ndarray) -> Records:
    """The same, with some images asked where none of them is marked so, and searched likewise.

    Images to train on need no mark; they are asked when they are held out.

    Args:
      records: n of them.
      some: bool [n].
    """
    marks = {"is_query": records.is_query, "is_gallery": records.is_gallery}
    more = {name: mark | some for name, mark in marks.items() if not mark[some].any()}
    return replace(records, **more)


def one_class(labels: np.ndarray) -> np.ndarray:
    """The class of each image, int [n], the first where it has several: labels [n] or [n, k]."""
    return labels.argmax(axis=1) if labels.ndim == 2 else labels


def _asked(records: Records, folds: int, seed: int) -> Iterator[tuple[np.ndarray, Records]]:
    """Of each fold that has an answer for a query: bool [n], its images, and their records."""
    for held, labels in held_folds(records.label, folds, seed):
        asked = _thinned(replace(records, label=labels).select(held), seed)
        try:
            _measure(np.zeros((len(asked), 1), np.float32), asked)
        except UserError:
            continue
        yield held, asked


class Space(NamedTuple):
    """What some candidates are fitted in.

    Attributes:
      rows: places int [m] -> real [m, e].
      columns: int [c], those of each choice of stages.
      sizes: how many features each has; more than columns, where rows are taken into their span.
      candidates: of these stages.
    """

    rows: lda.Rows
    columns: Mapping[tuple[str, ...], np.ndarray]
    sizes: Mapping[tuple[str, ...], int]
    candidates: Sequence[Candidate]


def _spaces(
    rows: lda.Rows, count: int, parts: Mapping[str, int], candidates: Sequence[Candidate]
) -> Iterator[Space]:
    """The features of sets of stages together; of one with more than rows, the rows' span."""
    places = _columns(parts)
    sets = dict.fromkeys(candidate.stages for candidate in candidates)
    columns = {stages: np.concatenate([places[stage] for stage in stages]) for stages in sets}
    sizes = {stages: len(some) for stages, some in columns.items()}
    wide = [stages for stages in sets if sizes[stages] > count]
    for used, some in _together({s: c for s, c in columns.items() if s not in wide}):
        of = rows if len(used) == sum(parts.values()) else _taking(used, rows)
        own = {stages: np.searchsorted(used, columns[stages]) for stages in some}
        yield Space(of, own, sizes, [c for c in candidates if c.stages in own])
    for stages in wide:
        span = lda.in_span(_taking(columns[stages], rows), count)
        own = {stages: np.arange(count)}
        yield Space(span.__getitem__, own, sizes, [c for c in candidates if c.stages == stages])


def _together(
    columns: Mapping[tuple[str, ...], np.ndarray],
) -> Iterator[tuple[np.ndarray, list[tuple[str, ...]]]]:
    """Sets of stages whose columns are at most `WIDEST` together, in order, and these columns."""
    used, group = np.array([], int), list[tuple[str, ...]]()
    for stages, own in columns.items():
        more = np.union1d(used, own)
        if group and len(more) > WIDEST:
            yield used, group
            more, group = np.unique(own), []
        used, group = more, [*group, stages]
    if group:
        yield used, group


def _taking(columns: np.ndarray, rows: lda.Rows) -> lda.Rows:
    return lambda places: rows(places)[:, columns]


def _scored(
    space: Space, records: Records, dealt: Sequence[tuple[np.ndarray, Records]]
) -> Iterator[tuple[Candidate, np.ndarray]]:
    """What every candidate gets of each fold's queries, fold by fold."""
    fits = any(candidate.shrinkage is not None for candidate in space.candidates)
    one = fits and records.label.ndim == 1
    whole = lda.scatter(space.rows, records.label) if one else None
    with _side_by_side(max(len(chosen) for chosen in space.columns.values())) as run:
        for held, asked in dealt:
            rest = _rest(whole, space.rows, records.label, held) if fits else None
            x = space.rows(np.flatnonzero(held))
            tasks = [
                functools.partial(_embedded, rest, x, space, alike)
                for alike in _alike(space.candidates)
            ]
            for candidate, vectors in itertools.chain.from_iterable(run(tasks)):
                yield candidate, _measure(vectors, asked)
            del rest, x, tasks, vectors  # or the next fold's would lie beside them


@contextlib.contextmanager
def _side_by_side(width: int) -> Iterator[Callable[[Sequence[Task]], Iterable[Vectors]]]:
    """Runs tasks and gives what they return, in their order.

    Matrices [width, width] that are small are worked on by several threads, each a task: the
    threads of one operation wait for one another too often. Of large ones there is one task at a
    time, for their memory.
    """
    workers = min(THREADS, WORKERS) if width <= lda.NARROW else 1
    if workers == 1:
        yield lambda tasks: (task() for task in tasks)
        return
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:

        def run(tasks: Sequence[Task]) -> Iterator[Vectors]:
            begun = deque[Future[Vectors]]()
            for task in tasks:  # one ahead, so that what waits to be taken stays little
                begun.append(pool.submit(task))
                if len(begun) > workers:
                    yield begun.popleft().result()
            yield from (future.result() for future in begun)

        yield run


def _measure(vectors: np.ndarray, asked: Records) -> np.ndarray:
    return sides_of(vectors, asked, "cosine").measure((1,), (METRIC,)).values[METRIC]


def best(scored: Sequence[Scored]) -> Scored:
    """The one with the largest mean; of equals the first."""
    return max(scored, key=lambda one: one.mean)


def untold(scored: Sequence[Scored]) -> list[Scored]:
    """Those that these queries do not tell from the best, in their order."""
    top = best(scored)
    return [s for s in scored if s is top or not told(s, top)]


def told(one: Scored, other: Scored) -> bool:
    """Whether the queries tell that the other is better: its gain's 95 % interval is above 0."""
    return bootstrap.difference(one.values, other.values, groups=one.classes).low > 0


def best_if_told(scored: Sequence[Scored]) -> Scored:
    """The best, where it is told from the first; or else the first, which is the simplest."""
    top = best(scored)
    return top if told(scored[0], top) else scored[0]


def brief(stages: Sequence[str]) -> str:
    """A set of stages in few words.

    >>> brief(("stage6", "top")), brief(("stage4", "stage5", "stage6", "top"))
    ('stage6,top', 'stage4,...,top (4)')
    """
    some = [stages[0], "...", stages[-1]] if len(stages) > 3 else stages
    return ",".join(some) + (f" ({len(stages)})" if len(stages) > 3 else "")


def why_stages(scored: Sequence[Scored]) -> str:
    """What `best_if_told` goes by, of fits to several sets of stages; nothing of one."""
    first, top = scored[0], best(scored)
    simple, wide = (brief(one.candidate.stages) for one in (first, top))
    if len(scored) == 1:
        return ""
    if top is first:
        return f"{simple}, the best of {len(scored)} sets of stages"
    gain = bootstrap.difference(first.values, top.values, groups=first.classes)
    size = f"({METRIC} {gain.mean:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f})"
    if gain.low > 0:
        return f"{wide}, better than {simple} alone {size}"
    return f"{simple} alone, as {wide} is not told apart from it {size}"


def moderate(scored: Sequence[Scored]) -> Scored:
    """Of fitted ones that are not told from the best, that of the shrinkage nearest to `MIDDLE`.

    Folds fit to fewer images than there are, and their best shrinkage may lie at an end by chance.
    """

    return min(untold(scored), key=lambda one: (round(abs(_share(one) - MIDDLE), 6), -one.mean))


def _share(one: Scored) -> float:
    assert one.candidate.shrinkage is not None
    return one.candidate.shrinkage


def why_shrinkage(scored: Sequence[Scored]) -> str:
    """What `moderate` goes by, of several shrinkages; nothing of one."""
    if len(scored) == 1:
        return ""
    alike = [f"{share:g}" for share in dict.fromkeys(_share(one) for one in untold(scored))]
    chosen = _share(moderate(scored))
    if len(alike) == 1:
        return f"shrinkage {chosen:g}, better than all other shrinkages"
    near, other = f"the nearest to {MIDDLE}", f"{2 * MIDDLE - chosen:g}"
    if other in alike and chosen != MIDDLE:
        means = {f"{_share(one):g}": one.mean for one in scored}
        better = ", and better" if means[f"{chosen:g}"] > means[other] else ""
        near = f"as near to {MIDDLE} as {other}{better},"
    return f"shrinkage {chosen:g}, {near} of {', '.join(alike)}, which are not told apart"


def _columns(parts: Mapping[str, int]) -> dict[str, np.ndarray]:
    ends = np.cumsum([*parts.values()])
    return {
        name: np.arange(end - width, end)
        for (name, width), end in zip(parts.items(), ends.tolist(), strict=True)
    }


def _rest(
    whole: lda.Scatter | None, rows: lda.Rows, labels: np.ndarray, held: np.ndarray
) -> lda.Scatter:
    """Of all rows but those of a fold; by subtraction where the folds' classes are apart."""

    def of(chosen: np.ndarray, origin: np.ndarray | None) -> lda.Scatter:
        places = np.flatnonzero(chosen)
        return lda.scatter(lambda some: rows(places[some]), labels[chosen], origin=origin)

    return whole.without(of(held, whole.origin)) if whole else of(~held, None)


def _thinned(records: Records, seed: int) -> Records:
    """The same with at most `MOST` queries."""
    asked = np.flatnonzero(records.is_query)
    if len(asked) <= MOST:
        return records
    chosen = np.zeros(len(records), bool)
    chosen[np.random.default_rng(seed).choice(asked, MOST, replace=False)] = True
    return replace(records, is_query=chosen)


def _alike(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Those that differ in width alone, together."""
    kind = lambda c: (c.stages, -1.0 if c.shrinkage is None else c.shrinkage)  # noqa: E731
    return [list(same) for _, same in itertools.groupby(sorted(candidates, key=kind), kind)]


def _embedded(
    rest: lda.Scatter | None, x: np.ndarray, space: Space, alike: Sequence[Candidate]
) -> list[tuple[Candidate, np.ndarray]]:
    """The rows x [m, e] as some candidates that differ in width embed them, fitted to the rest."""
    stages, shrinkage, _ = alike[0]
    chosen, size = space.columns[stages], space.sizes[stages]
    if shrinkage is None or rest is None:
        return [(alike[0], x[:, chosen].astype(np.float32))]
    widest = max((c.width for c in alike if c.width is not None), default=0)
    if widest > size:
        said = f"keeps 1 to {size} axes of {'+'.join(stages) or 'this encoder'}"
        raise UserError(f"LDA {said}, not {widest}")
    fit = rest.at(chosen)
    lower = lda.factor(fit, shrinkage, size)
    vectors: dict[bool, np.ndarray] = {}  # by whether all axes are kept
    if any(c.width is None for c in alike):
        vectors[True] = _mapped(functools.partial(lda.whitened, lower), x, chosen, fit.mean)
    if widest:  # the axes of a narrow one are the first of a wide one's
        most = min(widest, len(chosen))
        axes = lda.leading(lda.mean_and_covariance(fit)[1], lower, most)
        vectors[False] = _mapped(lambda rows: rows @ axes.T, x, chosen, fit.mean)
    return [(c, vectors[c.width is None][:, : c.width]) for c in alike]


def _mapped(
    apply: Callable[[np.ndarray], np.ndarray], x: np.ndarray, chosen: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """Some columns of x, less their mean, through a map: float32, block by block."""
    parts = [
        apply(x[start : start + lda.BLOCK][:, chosen] - mean).astype(np.float32)
        for start in range(0, len(x), lda.BLOCK)
    ]
    return np.concatenate(parts)
