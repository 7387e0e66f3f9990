"""`compare`: a grid of trunks x heads x losses x distances, trained and put in one table.

    python -m siamese_jax compare --config=configs/compare_trunks.py --workdir=runs/compare

Every cell is an ordinary run in a folder of its own: finished ones are not run again, a broken-off
one is resumed, and `diff` compares any two. Fields of all cells can be set as for main.py:
--config.train.steps=300. What is written: compare.md, compare.csv and index.html.

    python -m siamese_jax compare --config=configs/compare_losses.py --folds=4 --best-of=rate

--folds follows "A Metric Learning Reality Check" (Musgrave et al. 2020): the training classes are
dealt into folds, and each cell is trained once for each, with that fold as validation. The table
has the mean of the runs with its interval, and the metrics of their embeddings side by side; a line
below says of each row whether it is better than the bare trunk. A config without GRID is one row.
--best-of names an axis of tries: the one that is best on validation is in the table, and no other.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax import stopping, values
from siamese_jax.errors import UserError
from siamese_jax.tools import cli, compare_folds, compare_table
from siamese_jax.tools.compare_grid import FOLD, Cell, Published, cells, read_grid
from siamese_jax.tools.configs import override

if TYPE_CHECKING:
    from siamese_jax.encoder.combined import Part

IMAGES_PER_MEASURE = 64


def options() -> cli.Parser:
    """The tool's options; fields of the config come beside them."""
    parser = cli.Parser("compare", __doc__)
    parser.add_argument("--config", required=True, help="a file with get_config() and GRID")
    parser.add_argument("--workdir", type=Path, help="default: runs/<name of the config>")
    parser.add_argument(
        "--folds",
        type=cli.Value(values.whole(2, 9999)),
        help="train each cell once for each of so many folds of the training classes, with that "
        "fold as validation; all are measured on the same test classes",
    )
    parser.add_argument(
        "--best-of",
        type=cli.TEXT,
        metavar="AXIS",
        help="with --folds: of the names on this axis only the best on validation is in the table",
    )
    parser.add_argument("--list", action="store_true", help="print the cells, and run none")
    return parser


def main(argv: Sequence[str]) -> None:
    args, rest = options().parse_known_args(argv)

    base, grid, published = read_grid(args.config, alone=bool(args.folds))
    override(base, rest, "compare")
    if args.best_of is not None:
        compare_folds.check_tries(args.best_of, grid, args.folds)
    if args.folds:
        grid = compare_folds.with_folds(grid, args.folds)
    chosen = cells(base, grid)
    for cell in chosen:
        check_cell(cell)
    if args.list:
        print("\n".join(cell.name for cell in chosen))
        return

    from siamese_jax.storage.cache import enable_compilation_cache
    from siamese_jax.storage.run_folder import claimed

    enable_compilation_cache()
    title = Path(args.config.partition(":")[0]).stem
    workdir = args.workdir or Path("runs") / title
    with claimed(workdir):
        compare(chosen, workdir, title, list(grid), args.best_of, published)


def compare(
    chosen: Sequence[Cell],
    workdir: Path,
    title: str,
    axes: Sequence[str],
    best_of: str | None = None,
    published: Published | None = None,
) -> None:
    """Runs the cells of a grid, and writes their table."""
    outcomes, failures = run_all(chosen, workdir)
    if not outcomes:
        raise UserError(f"no cell could be run; the first said: {next(iter(failures.values()))}")
    speeds = measure_speeds(workdir, [cell for cell in chosen if cell.name in outcomes])
    rows = compare_table.table(chosen, outcomes, speeds, published)
    if best_of:
        rows = compare_folds.best_tries(rows, best_of, chosen)
    if FOLD in axes:
        by_name = {cell.name: cell for cell in chosen}
        for row in rows:
            stopping.check("all cells are trained")
            members = [by_name[run] for run in row["runs"]]
            row |= compare_folds.on_test(members, workdir, compare_table.METRICS)
    compare_table.write(workdir, title, rows, axes, failures)
    print((workdir / "compare.md").read_text(encoding="utf-8"))
    print(f"report: {workdir / 'index.html'}")
    left = f"; not run: {', '.join(failures)}" if failures else ""
    print(f"{len(outcomes)} of {len(chosen)} cells are done{left}")


def check_cell(cell: Cell) -> None:
    """UserError that names the cell and the field of it that is wrong: before any cell is run."""
    from siamese_jax.train.fields import check_config

    try:
        check_config(cell.config)
    except UserError as error:
        raise UserError(f"the cell {cell.name}: {error}") from None


def run_all(
    chosen: Sequence[Cell], workdir: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Trains every cell. A cell whose weights cannot be had does not stop the other ones.

    Returns:
      Cell name -> its results.json, and cell name -> why there are none.
    """
    from siamese_jax.train.experiment import train

    outcomes: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    asked: dict[str, str | None] = {}
    for i, cell in enumerate(chosen, start=1):
        stopping.check(f"{i - 1} of {len(chosen)} cells are done")
        print(f"[{i}/{len(chosen)}] {cell.name}", flush=True)
        try:
            check_weights(cell, workdir, asked)
            outcomes[cell.name] = train(cell.config, workdir / cell.name)
        except UserError as error:
            failures[cell.name] = str(error)
            print(f"  not run: {error}", flush=True)
    return outcomes, failures


def check_weights(cell: Cell, workdir: Path, asked: dict[str, str | None]) -> None:
    """UserError where a cell that has not begun cannot have its weights: before its data are read.

    A trunk's weights are fetched, or found missing, once: `asked` has what came of it.
    """
    from siamese_jax.storage import run_folder
    from siamese_jax.weights.load import fetch

    trunk = cell.config.trunk
    if trunk.offline_fallback or run_folder.is_run(workdir / cell.name):
        return
    key = f"{trunk.name} {trunk.weights} {cell.config.data.cache_dir}"
    if key not in asked:
        try:
            fetch(trunk.name, trunk.weights, cell.config.data.cache_dir)
            asked[key] = None
        except UserError as error:
            asked[key] = str(error)
    if why := asked[key]:
        raise UserError(why)


def measure_speeds(workdir: Path, finished: Sequence[Cell]) -> dict[str, float]:
    """Cell name -> images/s through trunk and head, decoding not counted.

    Cells that differ in neither trunk nor head share one measure. The measures are kept in
    speed.json, so that a resumed comparison does not mix them with those of another moment; where
    it is damaged they are taken again.
    """
    import jax

    from siamese_jax.encoder.load import load_encoder
    from siamese_jax.storage.run_folder import read_checked, write_checked

    path = workdir / "speed.json"
    device = jax.devices()[0].device_kind
    kept = read_checked(path) or {}
    measured: dict[str, float] = kept.get(device, {})
    speeds = {}
    for cell in finished:
        stopping.check("all cells are trained")
        encoder = None
        key = _speed_key(cell.config)
        if key not in measured:
            encoder = load_encoder(workdir / cell.name)
            measured[key] = images_per_second(encoder)
            write_checked(path, {**kept, device: measured})
        speeds[cell.name] = measured[key]
    return speeds


def _speed_key(config: Mapping[str, Any]) -> str:
    """What the time of an image depends on."""
    trunk = {k: config["trunk"][k] for k in ("name", "image_size", "stage", "pool", "dtype")}
    fallback = config["trunk"]["offline_fallback"]
    return f"{trunk | {'offline_fallback': fallback}} {tuple(config['head']['layers'])}"


def images_per_second(
    encoder: "Part", *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The median over `repeats` passes of random images, after one that compiles."""
    side = encoder.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES_PER_MEASURE, side, side, 3), np.uint8)
    encoder(images)
    seconds = []
    for _ in range(repeats):
        start = clock()
        encoder(images)
        seconds.append(clock() - start)
    return len(images) / statistics.median(seconds)
