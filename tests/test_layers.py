"""The rooms of the package: their order, no circles, and what only some of them may import.

Read from the source with `ast`, imports inside functions and for type checkers included.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "siamese_jax"
# A file imports from its own room and from those before it. Files at the top are rooms themselves.
ROOMS = (
    "errors",
    "stopping",
    "processes",
    "values",
    "distances",
    "search.engine",
    "storage",
    "data",
    "losses",
    "trunks",
    "weights",
    "encoder",
    "search",
    "metrics",
    "report",
    "train",
    "tools",
    "__main__",
)
# `import siamese_jax` and `import siamese_jax.train.step` need neither of these.
ONLY_IN = {
    "tensorflow": ("siamese_jax.data.", "siamese_jax.train.metrics_log"),
    "tensorflow_datasets": ("siamese_jax.data.",),
    "ml_collections": ("siamese_jax.train.", "siamese_jax.tools."),
}
NOT_IN = {"ml_collections": ("siamese_jax.train.step", "siamese_jax.train.optim")}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of everything that a file imports; the name is "" for a whole module."""
    found = []
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in modules() else (str(node.module), alias.name))
    return tuple(found)


def inside(module: str) -> list[str]:
    return sorted({name for name, _ in imports(module) if name in modules()} - {module})


def room(module: str) -> str:
    """The room that a module is in; the package's own __init__ is above all of them."""
    path = module.removeprefix("siamese_jax").lstrip(".")
    return max((r for r in ROOMS if f"{path}.".startswith(f"{r}.")), key=len, default="")


def test_every_file_is_in_a_room():
    assert [m for m in modules() if not room(m)] == ["siamese_jax"]
    assert not {r for r in ROOMS if not any(room(m) == r for m in modules())}


def test_a_room_imports_only_from_those_above_it():
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        if module != "siamese_jax"
        for other in inside(module)
        # The package's own __init__ names everything lazily; nothing inside may lean on it.
        if other == "siamese_jax" or ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not wrong


def test_no_circles():
    """A depth-first walk; packages' __init__ files count as files."""
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*path, module))
        if module not in state:
            state[module] = "open"
            for other in inside(module):
                visit(other, (*path, module))
            state[module] = "done"

    for module in modules():
        visit(module, ())


def test_no_private_name_crosses_files():
    wrong = [
        f"{module} imports {name} of {other}"
        for module in modules()
        for other, name in imports(module)
        if other.startswith("siamese_jax") and name.startswith("_") and not name.endswith("__")
    ]
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_rooms(library):
    users = {m for m in modules() if any(o.split(".")[0] == library for o, _ in imports(m))}
    assert users
    assert not {m for m in users if not m.startswith(ONLY_IN[library])}
    assert not {m for m in users if m.startswith(NOT_IN.get(library, ("-",)))}
