"""python -m siamese_jax weights list | fetch NAME | convert FILE | verify FILE

weights list                               every source, and which are on this machine
weights trunks                             every trunk: pixels, width, parameters, stages, licence
weights fetch resnet50                     its default source; or resnet50=timm:resnet50.a1_in1k
weights convert my.h5 --trunk=resnet50 --out=resnet50.npz
weights verify my.h5 [--trunk=resnet50]    read it whole; say which trunk and form it fits
"""

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from siamese_jax.errors import UserError
from siamese_jax.report.tables import aligned
from siamese_jax.tools import cli
from siamese_jax.trunks.parameters import PARAMETERS
from siamese_jax.trunks.table import TRUNKS, find
from siamese_jax.weights import formats
from siamese_jax.weights.download import (
    Unavailable,
    cache_folder,
    located,
    obtain,
    obtain_described,
)
from siamese_jax.weights.fit import Mismatch, first
from siamese_jax.weights.load import SOURCES, TrunkWeights, load, save
from siamese_jax.weights.port import candidates, flatten, nearest
from siamese_jax.weights.sources import find_source, unlisted

log = logging.getLogger(__name__)
NEAR = 0.5  # of a trunk's leaves, from where on a file is said to be nearly one of it


def list_sources(trunk: str | None = None, cache_dir: str | None = None) -> list[str]:
    """A line for every source: here or not, trunk, name, form, size, hash, licence, address."""
    lines = []
    if trunk is not None:
        find(trunk)
    shown = {key: source for key, source in SOURCES.items() if trunk in (None, key[0])}
    first, second = (max(len(key[i]) for key in shown) for i in (0, 1))
    for (owner, name), source in shown.items():
        here = "here" if located(source, cache_dir) else "-"
        default = "*" if name == find(owner).default_weights else " "
        lines.append(
            f"{here:5}{default} {owner:{first}} {name:{second}} {source.form:6} "
            f"{source.image_size:4} {source.licence:14} {source.digest[:15]:16} {source.address}"
        )
    return lines


TRUNKS_PAGE = """# Trunks

Made by `siamese-jax weights trunks --markdown`. Names are timm's, or Keras's where timm has none.

- The feature is the last stage, averaged over the picture. Of a Vision Transformer it is what
  timm's `forward_head(pre_logits=True)` gives: the class token (`cls`), the mean of the patches
  (`top`), SigLIP's attention pooling, or Unicom's two layers on all patches side by side. Of CLIP
  it is the one before the projection to the texts' space. `--stage=proj` is the projected one, 512
  wide for base and 768 for large, in files that have the projection: those fine-tuned on a
  classification have none.
- `--stage=mean` of a Vision Transformer with a class token is the norm of the patches' mean, where
  `top` is the mean of their norms: the feature of timm's fine-tunes with `fc_norm`
  (global_pool=avg), and what such a file gives by default.
- `--stage=NAME` takes another stage, `--stage=stage4,stage6,top` several of one pass, and
  `--stage=block11:cls` the class token of a block; `--pool=max` pools in another way.
- A Vision Transformer takes image sizes that its patch divides; others are refused, with the two
  nearest. But `vit_so400m_patch14_siglip_384` takes its own 384 pixels, and as in timm does not see
  the last 6. Position embeddings are resized as their source does it: by timm's antialiased bicubic
  rule, with DINO's offset, or by angles (DINOv3).
- A file of weights is read by its names: Keras, timm, torchvision, DINO and DINOv2 (also their
  checkpoints of training), OpenAI's CLIP and open_clip (`visual.`), transformers (`vision_model.`;
  ViT, DINOv2 and DINOv3), Unicom. `weights verify FILE` says what it fits. Pixels are scaled as
  config.json, preprocessor_config.json or open_clip_config.json beside it say, else as its name
  does, else as is usual; `--preprocessing` says otherwise.
- A name of torch.hub, open_clip or the Hub (`dino_vits16`, `ViT-B/16`, `facebook/dinov2-small`) as
  the trunk is answered with the names here.
- Parameters are the numbers that are trained, without a classifier or CLIP's projection, in the
  torch form (Keras's ResNets have a bias for each convolution besides).
- The licence is that of the default weights, as their source states it. `weights list` has all.

"""


def trunk_rows() -> list[list[str]]:
    """A row for each trunk, after that of the names of the columns."""
    rows = [["trunk", "pixels", "width", "parameters", "stages", "default weights", "licence",
             "sources"]]  # fmt: skip
    for name, trunk in TRUNKS.items():
        sources = [source for owner, source in SOURCES if owner == name]
        default = find_source(name, "imagenet")
        stages = trunk.stages
        shown = ", ".join(stages if len(stages) < 9 else (*stages[:2], "...", *stages[-2:]))
        shown += ", (proj)" if trunk.projection else ""
        rows.append([name, str(trunk.image_size), str(trunk.width), f"{PARAMETERS[name]:,}", shown,
                     trunk.default_weights, default.licence, str(len(sources))])  # fmt: skip
    return rows


def trunks_page() -> str:
    """docs/trunks.md."""
    head, *rows = [[f"`{row[0]}`" if i else row[0], *row[1:]] for i, row in enumerate(trunk_rows())]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return TRUNKS_PAGE + "\n".join(lines)


def fetch(name: str, cache_dir: str | None = None) -> Path:
    """Download TRUNK or TRUNK=SOURCE, check it, and port it once, so that it will load offline."""
    trunk, _, source = name.partition("=")
    hub = unlisted(trunk, source)
    row = None if hub else find_source(trunk, source or "imagenet")
    try:
        path = obtain(row, cache_dir) if row else obtain_described(str(hub), cache_dir)
    except Unavailable as e:
        raise UserError(
            f"{name} can't be fetched: {e}; on a machine that reaches it, fetch it and copy "
            f"{cache_folder(cache_dir)}, or use a local file"
        ) from None
    load(trunk, source or "imagenet", cache_dir=cache_dir)
    return path


def convert(file: str, trunk: str, out: str, **reading: Any) -> TrunkWeights:
    """Port any readable file (or a run's folder) into our `.npz`; `reading` is `load`'s."""
    if Path(out).suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz")
    cli.check_place(out)
    weights = load(trunk, file if "/" in file else f"./{file}", **reading)
    save(out, weights)
    return weights


def verify(file: str, trunk: str | None = None, **reading: Any) -> TrunkWeights:
    """Read a file whole and port it; without a trunk, the one that its names and shapes fit."""
    if trunk is None:
        log.info("%s is held against all trunks that are not larger; --trunk=NAME is quicker", file)
    leaves = {} if trunk else formats.read(file)
    problems = []
    for candidate in [trunk] if trunk else _candidates(leaves, file):
        try:
            return load(candidate, file if "/" in file else f"./{file}", **reading)
        except UserError as e:
            problems.append(e)
    if problems:
        raise problems[0]
    leaves = {name: leaf for name, leaf in leaves.items() if name != formats.META}
    near, share = nearest(leaves, file)
    if share < NEAR:
        called = first(list(leaves))
        raise UserError(f"{file} fits none of {len(TRUNKS)} trunks; its leaves are called {called}")
    raise UserError(
        f"{file} fits none of {len(TRUNKS)} trunks; the nearest is {near}, of whose leaves it has "
        f"{share:.1%}: weights verify {shlex.quote(file)} --trunk={near} names the others"
    )


def _candidates(leaves: formats.Leaves, file: str) -> list[str]:
    """The trunks whose leaves are all in the file, the largest first."""
    if formats.META in leaves:
        return [trunk for trunk in TRUNKS if f'"{trunk}"' in str(leaves[formats.META])]
    return candidates(leaves, file)


def _summary(weights: TrunkWeights) -> str:
    leaves = flatten(weights.variables)
    count = sum(leaf.size for name, leaf in leaves.items() if name.startswith("params/"))
    head = "with" if weights.classifier else "without"
    alike = "".join(f"; {note}" for note in weights.notes if "would fit as well" in note)
    return (
        f"{weights.trunk}, {weights.form} form: {len(leaves)} leaves, {count:,} parameters, "
        f"{head} a linear classifier; licence {weights.licence}; sha256 {weights.sha256}"
        f"{alike}"
    )


class _Command(argparse.ArgumentParser):
    """A command's own arguments; a mistake is one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def options() -> cli.Parser:
    """The tool's commands, and the options of each."""
    parser = cli.Parser("weights", __doc__ or "")
    # Sub-parsers are made by the class of their parent, which here takes a name and a description.
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Command
    )
    command = commands.add_parser
    listing = command("list", help="every source")
    listing.add_argument("--trunk", help="only those of this one")
    trunks = command("trunks", help="every trunk")
    trunks.add_argument("--markdown", action="store_true", help="print docs/trunks.md")
    fetching = command("fetch", help="download a source")
    fetching.add_argument("name", help="TRUNK or TRUNK=SOURCE")
    for part in (listing, fetching):
        part.add_argument("--cache-dir", help="instead of ~/.cache/siamese_jax")
    converting = command("convert", help="port a file into .npz")
    converting.add_argument("file", help="of weights, or a run's folder")
    converting.add_argument("--trunk", required=True, help="whose they are")
    converting.add_argument("--out", required=True, help="the .npz to write")
    verifying = command("verify", help="read a file whole")
    verifying.add_argument("file", help="of weights")
    verifying.add_argument("--trunk", help="default: the one that fits")
    verifying.add_argument(
        "--all", action="store_true", help="print every name that is missing (-) or unknown (+)"
    )
    for part in (converting, verifying):
        cli.add_reading(part)
    return parser


def main(argv: Sequence[str]) -> None:
    """The command line; raises UserError for the user's mistakes."""
    args = options().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # no need to wake a GPU for reading files
    if args.command == "list":
        print("\n".join(list_sources(args.trunk, args.cache_dir)))
    elif args.command == "trunks":
        print(trunks_page() if args.markdown else aligned(trunk_rows()))
    elif args.command == "fetch":
        print(fetch(args.name, args.cache_dir))
    elif args.command == "convert":
        made = convert(args.file, args.trunk, args.out, **cli.reading(args))
        print(_summary(made), "->", args.out)
    else:
        try:
            found = verify(args.file, args.trunk, **cli.reading(args))
        except Mismatch as e:
            print("\n".join(e.lines if args.all else []), end="\n" if args.all else "")
            raise
        print(f"{args.file} is sound: {_summary(found)}")
