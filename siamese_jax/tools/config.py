"""`config`: every field of a config, and every option of a loss, a miner, a sampler and a tool.

siamese-jax config
siamese-jax config optim           the fields whose names begin so
siamese-jax config --markdown      docs/config.md, with the options of all tools
"""

import argparse
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pkgutil import iter_modules

from siamese_jax.errors import UserError
from siamese_jax.tools import cli
from siamese_jax.tools.configs import base_config, heads

Row = tuple[str, str, str, str]
HEADER: Row = ("name", "default", "must be", "meaning")
# Where the tools are: each has its options.
TOOLS = ([str(Path(__file__).parent)], f"{__name__.rpartition('.')[0]}.")
INTRODUCTION = """# Every option

Made by `siamese-jax config --markdown`: the same tables are what a config and a command line are
checked by, before any work.

## The fields of a config

The defaults are those of `configs/common.py`. In a shell: `--config.train.steps=300`."""


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("config", __doc__)
    parser.add_argument("start", nargs="?", help="print only the names that begin so")
    parser.add_argument("--markdown", action="store_true", help="print docs/config.md")
    return parser


def main(argv: Sequence[str]) -> None:
    args = options().parse_args(argv)
    if args.markdown:
        print("\n".join(page()))
        return
    rows = [
        row for row in [*fields(), *head_fields(), *named()] if row[0].startswith(args.start or "")
    ]
    if not rows:
        raise UserError(f"no field begins with {args.start!r}; see `siamese-jax config`")
    for name, default, must, meaning in rows:
        print(f"{name} = {default}\n    {meaning}\n    {must}")


def fields() -> Iterator[Row]:
    """A row for each field."""
    from siamese_jax.train.fields import FIELDS, flat

    defaults = dict(flat(base_config().to_dict()))
    for name, option in FIELDS.items():
        yield name, repr(defaults[name]), option.kind.says, option.meaning


def head_fields() -> Iterator[Row]:
    """A row for each field in which a head by name is not the default."""
    from siamese_jax.train.fields import FIELDS

    default = base_config().head
    for called, head in heads().items():
        for name, value in head.items():
            if value != default[name]:
                option = FIELDS[f"head.{name}"]
                yield f"head.{name} ({called})", repr(value), option.kind.says, option.meaning


def named(section: str | None = None) -> Iterator[Row]:
    """A row for each option of each loss, miner and sampler."""
    from siamese_jax.train.fields import SECTIONS, options_of

    for one in [section] if section else SECTIONS:
        for called, function in SECTIONS[one][0].items():
            known = inspect.signature(function).parameters
            for name, option in options_of(one, called).items():
                default = known[name].default
                given = "none: give it" if default is inspect.Parameter.empty else repr(default)
                yield f"{one}.{name} ({called})", given, option.kind.says, option.meaning


def tool_options(parser: argparse.ArgumentParser, tool: str) -> Iterator[tuple[str, Row]]:
    """A row for each option of a tool and of its commands, and whose it is."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from tool_options(command, f"{tool} {name}")
        elif action.dest != "help":
            names = "/".join(action.option_strings) or str(action.metavar or action.dest)
            yield tool, (names, cli.default_of(action), must_be(action), action.help or "")


def must_be(action: argparse.Action) -> str:
    """What the values of an option must be."""
    if isinstance(action.type, cli.Value):
        return action.type.kind.says
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    return "nothing: it stands alone" if action.nargs == 0 else "text"


def page() -> Iterator[str]:
    """The lines of docs/config.md."""
    yield INTRODUCTION
    yield from table(fields())
    yield "\n## The heads by name\n"
    yield (
        f"`--config.head=NAME` sets the whole head, and leaves nothing of the one before: "
        f"{', '.join(heads())}.\n`--config.head=linear --config.head.layers=256` changes one field "
        "of it. The first has the defaults above; the\nothers differ in"
    )
    yield from table(head_fields())
    for section, title in (("loss", "losses"), ("miner", "miners"), ("sampler", "samplers")):
        yield f"\n## The options of {title}\n"
        yield f"Beside `{section}.name`, which says whose they are."
        yield from table(named(section))
    yield "\n## The options of the tools\n"
    yield "`train` and `compare` take every field of a config too."
    users: dict[Row, list[str]] = {}
    modules = (importlib.import_module(found.name) for found in iter_modules(*TOOLS))
    for parser in (module.options() for module in modules if hasattr(module, "options")):
        for user, row in tool_options(parser, parser.prog.split()[-1]):
            users.setdefault(row, []).append(user)
    yield from table((f"{row[0]} ({', '.join(own)})", *row[1:]) for row, own in users.items())


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Rows in Markdown."""
    yield ""
    for row in (HEADER, ("---", "---", "---", "---"), *rows):
        cells = (" ".join(cell.replace("%%", "%").replace("|", "\\|").split()) for cell in row)
        yield f"| {' | '.join(cells)} |"
