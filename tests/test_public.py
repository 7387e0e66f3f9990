"""The public surface: every name is documented, and known to editors and type checkers."""

import ast
from importlib import metadata
from pathlib import Path

import pytest

import siamese_jax as sj

PACKAGE = Path(sj.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST = 60  # lines of a function, without its docstring
MOST = 6  # parameters that are not keyword-only
# Functions of today beyond these limits. This table only shrinks.
BEYOND: set[str] = set()


def functions(body, above=""):
    """(name, node) of all classes and functions, inner ones after their dot."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield above + node.name, node
        if hasattr(node, "body"):
            inside = f"{above}{node.name}." if hasattr(node, "name") else above
            yield from functions([*node.body, *getattr(node, "orelse", [])], inside)


def public(body, above=""):
    """The same of what may be used from outside: top level, and methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield above + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@pytest.mark.parametrize("file", FILES)
def test_public_names_have_docstrings(file):
    tree = ast.parse(FILES[file].read_text())
    assert ast.get_docstring(tree) or not tree.body
    # The help of a tool's main(argv) is the docstring of its file.
    bare = [name for name, node in public(tree.body) if not ast.get_docstring(node)]
    assert [name for name in bare if not (file.startswith("tools/") and name == "main")] == []


def test_functions_are_short_and_take_few_parameters():
    beyond = set()
    for file, path in FILES.items():
        for name, node in functions(ast.parse(path.read_text()).body):
            if not isinstance(node, ast.FunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            given = [a.arg for a in node.args.posonlyargs + node.args.args]
            if lines > LONGEST or len([a for a in given if a not in ("self", "cls")]) > MOST:
                beyond.add(f"{file} {name}")
    assert beyond == BEYOND


def test_editors_see_every_public_name():
    assert set(sj.__all__) <= set(dir(sj))
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    (typed,) = (node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING")
    names = [alias.asname or alias.name for line in typed.body for alias in line.names]
    assert sorted(names) == sorted({*sj.__all__} - {"__version__"})


def test_version_is_that_of_the_distribution():
    assert sj.__version__ == metadata.version("siamese-jax")


@pytest.mark.parametrize("name", sj.losses.LOSSES)
def test_a_loss_is_the_same_by_name_and_in_the_table(name):
    assert getattr(sj.losses, name) is sj.losses.LOSSES[name]
    assert name in sj.losses.__all__
