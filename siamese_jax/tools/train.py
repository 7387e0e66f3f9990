"""`train`: one experiment from a config: train (or resume), evaluate, report.

    siamese-jax train --config=resnet_triplet --workdir=runs/emoji --config.seed=1

--config is a file, or the name of one of the experiments that come with the package. --workdir is
the run's folder, made or resumed; by default runs/<config>-<hash of it>. A run's folder alone will
do: it holds its config. Every field can be set: --config.train.steps=300; `siamese-jax config`
lists them. `python main.py` is the same, in a checkout.

    siamese-jax train --workdir=runs/emoji --fork=runs/next --config.optim.learning_rate=1e-4
        begins a new run with the parameters of the old one
    siamese-jax train --workdir=runs/next --config.train.steps=700
        goes on to more steps, where optim.schedule has been "constant" from the start
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from siamese_jax.errors import UserError
from siamese_jax.processes import by_first
from siamese_jax.tools import cli
from siamese_jax.tools.configs import override, read_config, run_config


def options() -> cli.Parser:
    """The tool's options; fields of the config come beside them."""
    parser = cli.Parser("train", __doc__)
    parser.add_argument("--config", help="the experiment: a file, or a name")
    parser.add_argument("--workdir", type=Path, help="the run's folder, made or resumed")
    parser.add_argument(
        "--fork",
        type=Path,
        metavar="NEW",
        help="a new run's folder: it begins with the parameters of --workdir, at step 0",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    args, rest = options().parse_known_args(argv)
    from siamese_jax.storage.run_folder import is_run

    if args.fork and not args.workdir:
        raise UserError(f"--fork={args.fork} needs --workdir, the run that it begins with")
    if args.fork and args.fork.resolve() == args.workdir.resolve():
        raise UserError(f"--fork={args.fork} is the run itself: name a new folder")
    if args.config is not None:
        config, file, _ = read_config(args.config)
    elif args.workdir and by_first(is_run)(args.workdir):
        config, file = run_config(args.workdir), args.workdir
    else:
        raise UserError("give an experiment: --config=configs/resnet_triplet.py")
    override(config, rest)

    from siamese_jax.train.fields import check_config

    check_config(config)

    from siamese_jax.report.tables import text_table
    from siamese_jax.storage.cache import enable_compilation_cache
    from siamese_jax.train.experiment import train

    enable_compilation_cache()
    workdir = args.fork or args.workdir or default_workdir(file, config.to_dict())
    results = train(config, workdir, fork=args.workdir if args.fork else None)
    print(text_table(results))
    if "verdict" in results:  # version 0.1.0 gave none
        print("\n".join([*results["verdict"].values(), f"saved: {results['saved']}"]))
    print(f"report: {workdir / 'report' / 'index.html'}")


def default_workdir(config_file: Path, config: object) -> Path:
    """runs/<name of the config>-<8 digits that change with any of its fields>."""
    text = json.dumps(config, sort_keys=True, default=str)
    digits = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return Path("runs") / f"{config_file.stem}-{digits}"
