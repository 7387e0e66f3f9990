"""One experiment from a config: train (or resume), evaluate, report.

The file is short because there is nothing to decide here: the config says what to do, and
`siamese_jax.train` reads top to bottom. Tools on finished runs: `python -m siamese_jax`.

    python main.py --config=configs/resnet_triplet.py --workdir=runs/emoji --config.seed=1
"""

import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path

# TensorFlow only reads images here; its start-up messages would bury ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from siamese_jax.errors import UserError, print_anything
from siamese_jax.storage.compilation_cache import enable_compilation_cache

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder, made or resumed. Default: runs/<config>-<hash of it>."
)


def default_workdir(config_file: str, config: object) -> Path:
    """runs/<name of the config>-<8 digits that change with any of its fields>."""
    text = json.dumps(config, sort_keys=True, default=str)
    digits = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return Path("runs") / f"{Path(config_file).stem}-{digits}"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown arguments {' '.join(argv[1:])}; see --help")
    if CONFIG.value is None:
        raise UserError("give an experiment: --config=configs/resnet_triplet.py")
    from siamese_jax.report.tables import text_table
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


def parse(argv: list[str]) -> list[str]:
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
    """This package's messages as lines of text; of the libraries', only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    ours = logging.getLogger("siamese_jax")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def run() -> None:
    print_anything()
    log_plainly()
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
