"""What the README and the configs tell people to type, typed: a plain install, no network.

Nothing in a command is replaced. They run in a copy of main.py and configs/ whose runs are short
and whose pictures are small, beside folders of the README's names, and find an emoji in twelve
drawn. The default config rehearses its runs; the others do in test_configs.py.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys

import offline
import pytest
import quick
import tiny
import warm

from siamese_jax.data.emoji import emoji_folder

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted(p for p in (tiny.ROOT / "configs").glob("*.py") if p.stem != "common")
CUT = "the network is cut"
ENDS = {  # of commands that need what is not here
    "cub": CUT,
    "cars": CUT,
    "sop": CUT,
    "inshop": "DIR/Eval/list_eval_partition.txt does not exist",
    "vgg_triplet": CUT,
    "compare_zoo": CUT,
    "dinov2_fit": CUT,
}
# Of the configs' own commands these are always typed, the others by `pytest -m long`.
USUAL = ("finetune", "inshop", "compare_zoo", "compare_trunks")
ALONE = "config.train.rehearse = False"
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m pip" | "-m pytest") printf '%s\\n' "$*" >> "$ASIDE"; exit;;
  "-W error") exec {python} "$@";;
esac
exec {warm} "$@"
"""

pytestmark = pytest.mark.slow


def indented(text):
    """Its indented blocks: what is to be typed, or what is printed."""
    blocks = re.findall(r"(?:^ {4}.*\n(?:^\s*\n(?=^ {4}))?)+", text, flags=re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]


def commands(block):
    """Its command lines, a backslash joining two."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("python ")]


TYPED = [line for block in indented(README) for line in commands(block)]
INLINE = re.findall(r"`(python -m siamese_jax compare --[^`]+)`", README)
SCRIPTS = [block for block in indented(README) if block.startswith("import ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    shutil.copy(tiny.ROOT / "main.py", root)
    for path in [*CONFIGS, tiny.ROOT / "configs" / "common.py"]:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'("image_size": |image_size = )\d+', r"\g<1>64", text)
        text = re.sub(r'("steps": |steps = |steps=)\d+', r"\g<1>4", text)
        text = re.sub(r'("batch_size": )(256|512)', r"\g<1>64", text)
        text = text.replace('stage = "auto"', 'stage = "stage6,stage7"')
        if path.stem not in ("common", "resnet_triplet"):
            text = text.replace("    return config\n", f"    {ALONE}\n    return config\n")
        if "\nGRID" in text:
            most = (1, 1, 1) if path.stem == "compare_losses" else (2, 1, 1)  # it has four folds
            text += f"\nGRID = {{a: dict([*GRID[a].items()][:n]) for a, n in zip(GRID, {most})}}\n"
        (root / "configs").mkdir(exist_ok=True)
        (root / "configs" / path.name).write_text(text, encoding="utf-8")
    for side in emoji_folder(root / "cache").iterdir():
        for i, picture in enumerate(sorted(side.iterdir())):
            picture.unlink() if i % 12 else None
    tiny.make_folder(root / "shop", classes=8, images=4)
    shutil.copytree(root / "shop" / "class2", root / "photos" / "class2")
    shutil.copytree(root / "shop" / "class5", root / "photos" / "class5")
    (root / "jpg").mkdir()
    for i in range(6):
        shutil.copy(root / "shop" / f"class{i}" / "0.png", root / "jpg" / f"all_{i}.png")
    names = [f"all_{i}" for i in range(6)]
    grades = {"bbx": [1.0, 2.0, 30.0, 31.0], "easy": [1, 2], "hard": [3], "junk": [0]}
    truth = {"imlist": names, "qimlist": names[:1], "gnd": [grades]}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    rows = [f"shop/class{c}/{i}.png,red;kind{c % 3}" for c in range(4) for i in range(2)]
    (root / "several.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    (root / "bin").mkdir()
    warmed = warm.python(offline.environment(root / "cache"))
    (root / "bin" / "python").write_text(PYTHON.format(python=sys.executable, warm=warmed))
    (root / "bin" / "python").chmod(0o755)
    return root


def typed(place, line):
    environment = offline.environment(place / "cache")
    environment["PATH"] = f"{place / 'bin'}:{environment['PATH']}"
    environment["XLA_FLAGS"] = quick.FLAGS
    return subprocess.run(
        ["bash", "-c", line],
        cwd=place,
        env=environment | {"ASIDE": str(place / "aside")},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.long  # each is what its config's own docstring says, and a run for each fold
def test_the_comparisons_of_the_readme(place):
    assert len(INLINE) == 2
    for line in INLINE:
        done = typed(place, line)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, line


def test_every_command_of_the_readme(place):
    """In its order; those of pip and pytest are CI's own."""
    assert len(TYPED) > 12
    for line in TYPED:
        done = typed(place, line)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, line
    for name in ("runs/emoji/report/index.html", "found.html", "classes.csv", "white.json"):
        assert (place / name).stat().st_size > 100, name
    aside = (place / "aside").read_text().splitlines()
    ci = (tiny.ROOT / ".ci" / "run").read_text()
    assert aside == ["-m pip install -e .[demo]", "-m pip install -e .[demo,test]", "-m pytest"]
    assert 'install --quiet --disable-pip-version-check -e ".[demo,test]"' in ci
    assert "python -m pytest" in ci
    # The start's table has the rows that the README shows.
    shown = next(block for block in indented(README) if block.startswith("test "))
    results = json.loads((place / "runs" / "emoji" / "results.json").read_text())
    assert list(results["test"]["after"]) == [row.split()[0] for row in shown.splitlines()[1:]]
    emoji = len([*emoji_folder(place / "cache").glob("query/*.png")])
    assert results["test"]["after"]["queries"] == round(emoji / 2) > 75


def test_the_python_of_the_readme(place):
    assert len(SCRIPTS) == 1
    (script,) = SCRIPTS
    (place / "example.py").write_text(script + "\nprint(found.indices.shape, len(photos.paths))\n")
    done = typed(place, "python -W error example.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "(8, 10) 8"


@pytest.mark.parametrize(
    "path",
    [p if p.stem in USUAL else pytest.param(p, marks=pytest.mark.long) for p in CONFIGS],
    ids=lambda path: path.stem,
)
def test_every_command_of_a_config(place, path):
    """Each config's docstring says how it is started; it gets as far as the network."""
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    lines = commands("\n".join(map(str.strip, docstring.replace("\\\n", " ").splitlines())))
    assert lines
    for line in lines:
        done = typed(place, line)
        errors = [e for e in done.stderr.splitlines() if e.startswith("error: ")]
        otherwise = "DIR does not exist" if "DIR" in line else None
        expected = ENDS.get(path.stem.removesuffix("_vit"), otherwise)
        if expected is None:
            assert done.returncode == 0, done.stderr[-3000:]
        else:  # TFDS's other downloads may still complain after the one line that is ours.
            assert (done.returncode, len(errors)) == (2, 1), done.stderr[-3000:]
            assert expected in errors[0]
            assert "No module named" not in done.stderr


def test_no_package_but_the_plain_install_can_be_imported(place):
    assert "pytest" in offline.refused()
    assert "jax" not in offline.refused()
    done = typed(place, "python -c 'import pytest'")
    assert "No module named 'pytest'" in done.stderr
    done = typed(place, "python -c 'import urllib.request as u; u.urlopen(\"http://a.invalid\")'")
    assert CUT in done.stderr
