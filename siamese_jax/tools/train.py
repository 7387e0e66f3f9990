"""`train`: one experiment from a config: train (or resume), evaluate, report.

    siamese-jax train --config=resnet_triplet --workdir=runs/emoji --config.seed=1

--config is a file, or the name of one of the experiments that come with the package. --workdir is
the run's folder, made or resumed; by default runs/<config>-<hash of it>. Every field of the config
can be set: --config.train.steps=300. `python main.py` is the same, in a checkout.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from siamese_jax.errors import UserError
from siamese_jax.tools.configs import find_config

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file, or a name.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, made or resumed.")


def main(argv: Sequence[str]) -> None:
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return
    log_plainly()
    rest = parse(["train", *(_found(argument) for argument in argv)])
    if len(rest) > 1:
        raise UserError(f"unknown arguments {' '.join(rest[1:])}; see train --help")
    if CONFIG.value is None:
        raise UserError("give an experiment: --config=configs/resnet_triplet.py")
    from siamese_jax.report.tables import text_table
    from siamese_jax.storage.cache import enable_compilation_cache
    from siamese_jax.train.experiment import train

    enable_compilation_cache()
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    try:
        config = CONFIG.value.copy_and_resolve_references()
    except OSError:
        raise UserError(f"--config={config_file}: there is no such file") from None
    workdir = Path(WORKDIR.value or default_workdir(config_file, config.to_dict()))
    results = train(config, workdir)
    print(text_table(results))
    print(f"report: {workdir / 'report' / 'index.html'}")


def default_workdir(config_file: str, config: object) -> Path:
    """runs/<name of the config>-<8 digits that change with any of its fields>."""
    text = json.dumps(config, sort_keys=True, default=str)
    digits = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return Path("runs") / f"{Path(config_file).stem}-{digits}"


def _found(argument: str) -> str:
    name, given, value = argument.partition("=")
    return f"{name}={find_config(value)}" if given and name == "--config" else argument


def parse(argv: Sequence[str]) -> list[str]:
    """Flags as absl reads them; a mistake in one is the user's."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        field, *near = re.findall(r"\w+", str(error).replace("\\n", " "))
        guilty = [arg for arg in argv if arg.startswith("--config.") and f".{field}" in arg]
        hint = f"; did you mean {near[3]}?" if near[:3] == ["Did", "you", "mean"] else ""
        if named := re.match(r"--config\.(loss|miner|sampler)\.", (guilty or [""])[0]):
            section = named[1]
            hint += f"; other options come with the section: --config.{section}=\"{{'name': ...}}\""
        raise UserError(f"{(guilty or [field])[0]}: the config has no such field{hint}") from None
    except (flags.Error, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None


def log_plainly() -> None:
    """What this package says, by the handler of all tools; of the libraries, only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("siamese_jax").setLevel(logging.INFO)
