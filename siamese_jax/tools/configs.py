"""Which file a --config means, what it holds, and how the command line changes its fields."""

import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from siamese_jax.errors import UserError
from siamese_jax.values import literal, shown

log = logging.getLogger(__name__)


def shipped() -> Path:
    """The folder of the configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> str:
    """The file of a config: a path as it is, or the name of one that comes with the package.

    What a config imports from `configs` is found too, from any folder.

    Raises:
      UserError: a name that no config has.
    """
    if importlib.util.find_spec("configs") is None or not _is_path(name):
        _make_importable(shipped())
    if _is_path(name):
        return name
    names = sorted(path.stem for path in shipped().glob("*.py") if path.stem != "common")
    if name not in names:
        raise UserError(
            f"--config={name}: there is no such file, and no experiment of that name; there are "
            f"{', '.join(names)}"
        )
    path, own = shipped() / f"{name}.py", Path("configs") / f"{name}.py"
    other = own.is_file() and not own.samefile(path)
    if other:
        log.info("%s is read, not %s: for that, --config=%s", path, own, own)
    return str(path)


def _is_path(name: str) -> bool:
    return name.split(":")[0].endswith(".py") or "/" in name or Path(name).is_file()


def _make_importable(folder: Path) -> None:
    """`from configs import common` finds that folder, which need not be on the path."""
    spec = importlib.util.spec_from_loader("configs", loader=None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(folder)]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)


def read_config(name: str) -> tuple[ConfigDict, Path, ModuleType]:
    """A config, its file, and the module that this is; after a colon stands get_config's argument.

    Raises:
      UserError: no such file, or one without a config.
    """
    place, colon, argument = find_config(name).partition(":")
    path = Path(place)
    if not path.is_file():
        raise UserError(f"--config={name}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name}: the name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
        if isinstance(config, ConfigDict):
            return ConfigDict(config.copy_and_resolve_references()), path, module
    except (Exception, SystemExit) as error:  # whatever that file does wrong
        raise UserError(f"--config={name}: {_where(error, path)}") from None
    raise UserError(f"--config={name}: get_config() gives no ConfigDict")


def base_config() -> ConfigDict:
    """What every config begins with: `configs/common.py` as it came with the package."""
    return _common().base()


def _common() -> ModuleType:
    _make_importable(shipped())
    return importlib.import_module("configs.common")


def run_config(folder: Path) -> ConfigDict:
    """The config of a run, with the defaults of fields that it was trained without."""
    from siamese_jax.storage import run_folder
    from siamese_jax.train import fields

    config, stored = base_config(), run_folder.read(folder).config
    for section in fields.SECTIONS.keys() & stored.keys():
        set_field(config, section, stored[section])
    for name, value in fields.flat(stored):
        value = tuple(value) if isinstance(value, list) else value
        if name.split(".")[0] not in fields.SECTIONS:
            set_field(config, name, value)
    return config


def _where(error: BaseException, path: Path) -> str:
    """What went wrong in a config, and in which line of it."""
    frames = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (frames or [None])[-1]
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}{f' (line {line})' if line else ''}"


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    """config.a.b = value for "a.b"; a mapping, or the name of a head, replaces the section.

    >>> config = ConfigDict({"optim": {"learning_rate": 0.1}, "loss": {"name": "triplet"}})
    >>> set_field(config, "optim.learning_rate", 1)
    >>> set_field(config, "loss", {"name": "nt_xent", "temperature": 0.1})
    >>> config.optim.learning_rate, config.loss.to_dict()
    (1.0, {'name': 'nt_xent', 'temperature': 0.1})
    """
    *parents, last = field.split(".")
    section = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or last not in section:
        raise UserError(f"the config has no field {field}")
    if isinstance(section[last], ConfigDict) and not isinstance(value, Mapping | ConfigDict):
        value = _named(field, value)
    if isinstance(value, Mapping | ConfigDict):
        plain = value.to_dict() if isinstance(value, ConfigDict) else dict(value)
        del section[last]
        section[last] = ConfigDict(plain)
        return
    try:
        section[last] = value
    except TypeError:
        kind = type(section[last]).__name__
        raise UserError(
            f"{field}={shown(value)}: the config has one of type {kind} there"
        ) from None


def override(config: ConfigDict, arguments: Sequence[str], tool: str = "train") -> None:
    """Applies `--config.a.b=value` arguments: sections first, then names, then their options.

    Raises:
      UserError: another argument, a field that the config does not have, or a value that it may
        not have.

    >>> config = ConfigDict({"train": {"steps": 600}, "loss": {"name": "triplet"}})
    >>> override(config, ["--config.train.steps=5", "--config.loss.margin", "0.5"])
    >>> config.train.steps, config.loss.margin
    (5, 0.5)
    """
    from siamese_jax import values
    from siamese_jax.train import fields

    holders = {name.partition(".")[0] for name in fields.FIELDS if "." in name}
    for name in holders.intersection(config):
        if not isinstance(config[name], ConfigDict):
            raise UserError(f"{name}={shown(config[name])}: must be a section of fields")
    given = list(_given(arguments, tool))
    sections = [name for name, _ in given if name in holders]
    order = sorted(given, key=lambda one: (one[0] not in sections, not one[0].endswith(".name")))
    for name, text in order:
        if name in sections:
            set_field(config, name, _section(text))
            continue
        kind = fields.find(name, config).kind
        if text is None and kind.says != values.flag().says:
            raise UserError(f"--config.{name} needs a value: {kind.says}")
        section, _, last = name.rpartition(".")
        holder = config.get(section) if section else config
        if holder is None:
            raise UserError(f"--config.{name}: the config has no section {section}")
        with holder.ignore_type():
            holder[last] = True if text is None else values.parse(f"--config.{name}", text, kind)


def _given(arguments: Sequence[str], tool: str) -> Iterator[tuple[str, str | None]]:
    """The fields that are named, and their texts; None for one that stands without a value."""
    rest = [*arguments]
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        if not name.startswith("--config."):
            raise UserError(f"unknown argument {argument}; see `siamese-jax {tool} --help`")
        if not equals and rest and not rest[0].startswith("--"):
            text, equals = rest.pop(0), "="
        yield name.removeprefix("--config."), text if equals else None


def _section(text: str | None) -> Any:
    """The mapping that a text is; else the text, which may be a name."""
    try:
        value = literal(text or "")
    except ValueError:
        return text
    named = isinstance(value, dict) and all(
        isinstance(key, str) and key.isidentifier() for key in value
    )
    return value if named else text


def heads() -> dict[str, ConfigDict]:
    """The heads by their names in `configs/common.py`."""
    return {name: made() for name, made in _common().HEADS.items()}


def _named(section: str, name: Any) -> ConfigDict:
    """A section that goes by a name."""
    known = heads() if section == "head" else {}
    if name in [*known]:  # a name that is a list has no hash
        return known[name]
    names = f", or by name: {', '.join(known)}" if known else ""
    raise UserError(
        f"{section}={shown(name)}: a section is given whole, as \"{{'name': ..., ...}}\"{names}; "
        f"one field of it is --config.{section}.FIELD=VALUE"
    )
