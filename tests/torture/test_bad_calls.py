"""Bad calls of every tool: each one is refused in one line that says what is wrong, and code 2.

Tools are called in this process. {name} in a call is a path of the world below.
"""

import io
import json
import os

import numpy as np
import pytest
import tiny

from siamese_jax.__main__ import main

TRAIN = "train --config=resnet_triplet --config.data.source=folder --config.data.root={shop} "
TRUNK = "--encoder=resnet18 --weights=random --image-size=32 "
RANK = f"rank {TRUNK}--query={{shop}} "
EVALUATE = f"evaluate {TRUNK}--query={{shop}} "
EMBED = f"embed {TRUNK}--images={{shop}} "
WHITEN = f"whiten {TRUNK}--images={{shop}} --out={{new}} "

# A config field or a section -> what it may not be.
FIELDS = {
    "seed": ("-1", "1.5", "4294967296", "x"),
    "distance": ("manhattan", ""),
    "data.source": ("",),
    "data.split": ("half",),
    "data.split_seed": ("-2",),
    "data.test_fraction": ("1", "-0.1", "nan"),
    "data.validation_fraction": ("1.5", "inf"),
    "data.fold": ("0/4", "5/4", "1/1", "1", "-1/4", "1/4/4", "1/10000"),
    "data.fit": ("stretch",),
    "data.strict": ("maybe", "1"),
    "augment.crop_scale": ("(0.5,)", "(0,1)", "0.2,nan", "0.7", "(0.9,0.1)"),
    "augment.crop_ratio": ("-1,1", "(1,inf)", "(2,1)", "(1,1" + "0" * 400 + ")"),
    "augment.flip": ("2",),
    "augment.brightness": ("2", "-1"),
    "augment.hue": ("0.6",),
    "augment.erase": ("nan",),
    "trunk.name": ("resnet51",),
    "trunk.offline_fallback": ("none",),
    "trunk.form": ("jax",),
    "trunk.image_size": ("-5", "0", "100000", "32.5"),
    "trunk.pool": ("mean",),
    "trunk.dtype": ("float16",),
    "trunk.freeze": ("(1,)",),
    "trunk.batch_norm": ("on",),
    "head.layers": (
        "(16.0,)",
        "(0,)",
        "(-4,)",
        "x",
        "(10**9,)",
        "(" + "1+" * 9999 + "1,)",
    ),
    "head.init": ("zeros",),
    "head.activation": ("selu",),
    "head.dropout": ("1.0", "-0.5", "nan"),
    "head.norm": ("group",),
    "cache.views": ("-1", "1000000"),
    "cache.limit": ("20pounds", "-1", "1e9", ""),
    "cache.dtype": ("float16",),
    "memory.size": ("-1", "1e9"),
    "loss.name": ("triplets", ""),
    "loss.margin": ("nan", "inf", "x"),
    "loss.mining": ("hardest",),
    "miner.name": ("hardest",),
    "sampler.name": ("class",),
    "sampler.batch_size": ("0", "-8", "1000000000"),
    "sampler.per_class": ("0", "2.0"),
    "sampler.class_weight": ("heavy", "1,nan"),
    "optim.name": ("adam",),
    "optim.learning_rate": ("-1", "nan", "inf", "fast"),
    "optim.schedule": ("step",),
    "optim.warmup_steps": ("-5", "0.1"),
    "optim.weight_decay": ("-1",),
    "optim.clip_norm": ("-1", "nan"),
    "optim.loss_lr_scale": ("-2",),
    "train.steps": ("-1", "0", "6e2", "10**9"),
    "train.log_every": ("0",),
    "train.eval_every": ("-1",),
    "train.checkpoint_every": ("-1", "0"),
    "train.max_to_keep": ("0",),
    "eval.ks": ("()", "(0,)", "1,-5", "1.5"),
    "eval.batch_size": ("0", "-3"),
}
LOSSES = {
    "{'name': 'arcface', 'margin_degrees': 200.0}": "loss.margin_degrees=200.0: must be a finite",
    "{'name': 'arcface', 'scale': 0.0}": "loss.scale=0.0: must be a finite number above 0",
    "{'name': 'nt_xent', 'temperature': -1}": "loss.temperature=-1: must be a finite number",
    "{'name': 'nt_xent', 'temprature': 1.0}": "no such option; did you mean temperature?",
    "{'name': 'soft_triple', 'centers': 0}": "loss.centers=0: must be a whole number from 1",
    "{'name': 'fast_ap', 'bins': 2.5}": "loss.bins=2.5: must be a whole number",
    "{'name': 'multi_similarity', 'alpha': float}": "a section is given whole",
    "{'margin': 0.2}": "the config lacks the field loss.name",
    "triplet": "a section is given whole",
    "{'name': 'triplet', 'a.b': 1}": "a section is given whole",
    "{[1]: 2}": "a section is given whole",
    "-" * 20_000 + "1": "a section is given whole",
    "{'name': ['triplet']}": "loss.name=['triplet']: must be one of",
    "{'name': 'circle', 'margin': 1" + "0" * 400 + "}": "must be a finite number",
    "[1, 2]": "a section is given whole",
}
# An option of a tool -> the call before it, what it may not be, and what the message says.
OPTIONS = [
    (RANK, "-k", ("0", "-1", "1.5", "x", "99999999999"), "must be a whole number from 1"),
    (RANK, "--show", ("0",), "must be a whole number from 1"),
    (RANK, "--ks", ("", "0", "1,x", "5,-1"), "must be 1 or more values"),
    (RANK, "--batch-size", ("0", "-1", "1e3"), "from 1 to 65,536"),
    (RANK, "--scales", ("0", "-1", "nan", "1,inf", "1000"), "above 0 to 16"),
    (RANK, "--fuse-weights", ("1e308,1e308", "-1,2", "nan,1"), "from 0 to 1e+06"),
    (RANK, "--fuse-weights", ("1,2",), "2 numbers for 1 encoders"),
    (RANK, "--distance", ("l7", ""), "must be one of euclidean"),
    (RANK, "--pool", ("mean",), "must be one of average"),
    (RANK, "--ignore", ("[", "*"), "must be a regular expression"),
    (RANK, "--form", ("jax",), "invalid choice"),
    (RANK, "--stage", ("",), "not empty"),
    (RANK, "--stage", ("stage9",), "stage9"),
    (RANK, "--layout", ("deep",), "invalid choice"),
    (RANK, "--split", ("half",), "invalid choice"),
    (RANK, "--split", ("test",), "no images in the split 'test'"),
    (RANK, "--labels", ("all",), "invalid choice"),
    (RANK, "--expand", ("0", "two"), "must be a whole number from 1"),
    (RANK, "--augment", ("-3",), "must be a whole number from 1"),
    (RANK, "--alpha", ("-1", "nan", "inf"), "must be a finite number from 0"),
    (RANK, "--rerank", ("best",), "is none of k_reciprocal"),
    (RANK, "--rerank", ("k_reciprocal:k3=1",), "has no option 'k3'"),
    (RANK, "--rerank", ("k_reciprocal:k1=0", "diffusion:graph_k=-1"), "whole number from 1"),
    (RANK, "--rerank", ("k_reciprocal:weight=2", "k_reciprocal:weight"), "from 0 to 1"),
    (RANK, "--rerank", ("diffusion:alpha=1",), "from 0 below 1"),
    (RANK, "--rerank", ("diffusion:gamma=nan",), "above 0"),
    (RANK, "--fuse", ("ranks",), "fuses several encoders"),
    (RANK, "--fuse", ("sums",), "is none of scores, ranks"),
    (RANK, "--fuse", ("ranks:c=-1",), "must be a finite number from 0"),
    (RANK, "--out", ("{new}.xlsx",), "--out={new}.xlsx: the name must end in one of .csv"),
    (RANK, "--out", ("{folder}",), "must end in one of"),
    (RANK, "--out", ("{new}.csv/",), "is a folder; name a file"),
    (RANK, "--out", ("{picture}/deep/x.csv",), "{picture} is a file; choose another place"),
    (EVALUATE, "--per-class", ("{picture}/x.csv",), "--per-class={picture}/x.csv: {picture} is a"),
    (WHITEN, "--out", ("{picture}/x", "{picture}"), "is a file"),
    (RANK, "--gallery", ("{none}",), "does not exist"),
    (RANK, "--gallery", ("",), "argument --gallery: is empty"),
    (EVALUATE, "--per-query", ("",), "argument --per-query: is empty"),
    (EVALUATE, "--landmarks", ("",), "argument --landmarks: is empty"),
    (TRAIN, "--workdir", ("",), "argument --workdir: is empty"),
    (EMBED, "--cache-dir", ("",), "argument --cache-dir: is empty"),
    (RANK, "--offline-fallback", ("resnet51",), "no trunk is called 'resnet51'"),
    (RANK, "--preprocessing", ("bgr", "1/0", "0.5,0.5/1"), "choose from imagenet"),
    (RANK, "--nonsense", ("1",), "unrecognized arguments: --nonsense=1"),
    (
        EVALUATE,
        "--per-class",
        ("{new}.txt",),
        "--per-class={new}.txt: the name must end in one of .csv",
    ),
    (EVALUATE, "--per-query", ("{new}",), "--per-query={new}: the name must end in one of .csv"),
    (EVALUATE, "--metrics", ("f1", "recall@0", "recall@x", ","), ""),
    (EVALUATE, "--interval", ("95", "0", "1", "nan"), "above 0 below 1"),
    (EVALUATE, "--worst", ("-1",), "must be a whole number from 1"),
    (EVALUATE, "--fmr", ("2", "-0.1", "nan"), "from 0 to 1"),
    (EVALUATE, "--clustering", ("0", "-2", "x"), "must be a whole number from 1"),
    (EVALUATE, "--resample", ("rows",), "invalid choice"),
    (EVALUATE, "--landmarks", ("{none}",), "give --gallery=DIR"),
    (EMBED, "--out", ("{new}.txt",), "--out={new}.txt: the name must end in one of .npz"),
    (WHITEN, "--shrinkage", ("inf", "nan", "-1"), "a finite number from 0 to 1"),
    (WHITEN, "--dim", ("0", "1.5"), "a whole number from 1"),
    (WHITEN, "--dim", ("100000",), "--dim=100000: must be a whole number from 1 to 512"),
    (WHITEN, "--method", ("zca",), "invalid choice"),
    ("diff {run} {run} ", "--confidence", ("0", "1", "95", "nan"), "above 0 below 1"),
    ("diff {run} {run} ", "--split", ("all",), "invalid choice"),
]
CALLS = [
    ("frobnicate", "there is no tool 'frobnicate'"),
    ("train weights list", "is a tool of its own: python -m siamese_jax weights list"),
    ("train", "give an experiment"),
    ("train --config=resnet_triplets", "no experiment of that name"),
    ("train --config={none}.py", "there is no such file"),
    ("train --config={folder}/", "there is no such file"),
    ("train --config={bad_config}", "NameError: name 'nonsense' is not defined (line 3)"),
    ("train --config={no_syntax}", "SyntaxError"),
    ("train --config={no_config}", "AttributeError"),
    ("train --config={ends}", "SystemExit"),
    ("train --config={no_value}", "RequiredValueError"),
    ("train --config={no_section} --config.loss.margin=1", "loss='triplet': must be a section"),
    ("train --config={huge}", "train.steps=<int>: must be a whole number from 1"),
    (["train", "--config=a\nb"], "--config=a\\nb: there is no such file"),
    (TRAIN + "--config.train.steps.x=5", "train.steps.x: the config has no such field"),
    ([*TRAIN.split(), "--config.sampler={{'name':'pairs'}}"], "needs sampler.batch_size"),
    (
        TRAIN + "--config.train.step=5",
        "train.step: the config has no such field; did you mean train.steps?",
    ),
    (
        TRAIN + "--config.trian.steps=5",
        "trian.steps: the config has no such field; did you mean train.steps?",
    ),
    (TRAIN + "--config.train=5", "a section is given whole"),
    (TRAIN + "--config.train.steps", "--config.train.steps needs a value"),
    (TRAIN + "--config.train={{'steps':5}}", "the config lacks the field train.log_every"),
    (TRAIN + "--config.loss.temperature=1", "triplet has no such option"),
    (TRAIN + "--confg.train.steps=5", "unknown argument --confg.train.steps=5"),
    (TRAIN + "extra", "unknown argument extra"),
    (TRAIN + "--workdir={picture}", "is a file; choose another --workdir"),
    (TRAIN + "--workdir={no_utf8}", "checkpoints need a name in UTF-8"),
    (TRAIN + "--fork={new}", "needs --workdir"),
    (TRAIN + "--config.data.root={none}", "does not exist"),
    (TRAIN + "--config.data.root={empty}", "has neither images nor folders"),
    (
        TRAIN + "--config.data.test_fraction=0.6 --config.data.validation_fraction=0.6",
        "must be below 1",
    ),
    (TRAIN + "--config.data.source=csv --config.data.root={none}", "{none}"),
    (TRAIN + "--config.data.source=nowhere", "unknown data source 'nowhere'"),
    (TRAIN + "--config.data.separator=;", "has no option 'separator'"),
    (TRAIN + "--config.trunk.weights={none}.npz", "there is no weights file"),
    (TRAIN + "--config.trunk.weights={picture}", "{picture}"),
    (
        TRAIN + "--config.trunk.name=resnet18 --config.trunk.weights={other_weights}",
        "does not fit resnet18",
    ),
    (
        TRAIN
        + "--config.trunk.name=resnet18 --config.trunk.weights=random --config.trunk.freeze=conv9",
        "matches no parameter",
    ),
    (
        TRAIN
        + "--config.trunk.name=resnet18 --config.trunk.weights=random --config.trunk.freeze=[",
        "is malformed",
    ),
    ("compare", "the following arguments are required: --config"),
    ("compare --config={none}.py", "there is no such file"),
    ("compare --config=resnet_triplet", "is no grid"),
    ("compare --config={bad_grid}", "names of text that holds a letter or digit"),
    ("compare --config={empty_axis}", "one name or more on each axis"),
    ("compare --config={bad_cell}", "the cell x: the config has no field train.step"),
    ("compare --config=compare_losses --config.train.steps=-1", "must be a whole number"),
    ("compare --config=compare_losses --config.train.step=1", "did you mean train.steps?"),
    ("compare --config=compare_losses --steps=1", "unknown argument --steps=1"),
    ("compare --config=compare_losses --folds=1", "a whole number from 2 to"),
    ("compare --config=compare_losses --best-of=rate", "--best-of=rate needs --folds"),
    ("compare --config=compare_losses --folds=4 --best-of=rte", "no such axis; did you mean rate?"),
    ("compare --config=compare_losses --folds=4 --best-of=seed", "choose one of loss, rate"),
    ("compare --config={folded} --folds=4", "an axis 'fold' of its own"),
    ("compare --config={bad_head} --list", "the cell x: head='dense4': a section is given whole"),
    (TRAIN + "--config.data.fold=1/9", "data.fold=1/9: 1 training classes have two images or more"),
    (TRAIN + "--config.head=dense4", "or by name: dense3, linear"),
    (TRAIN + "--config.head", "or by name: dense3, linear"),
    ("rank --query={shop}", "give --encoder"),
    ("rank --encoder={picture} --query={shop}", "{picture} is a file; give the folder of a run"),
    ("rank --encoder={none} --query={shop}", "does not exist"),
    ("rank --encoder={empty} --query={shop}", "is not a run"),
    ("rank --encoder=resnet51 --query={shop}", "no trunk is called 'resnet51'"),
    ("rank --encoder=resnet18 --weights={picture} --query={shop}", "{picture}"),
    ("rank --encoder=resnet18 --weights={other_weights} --query={shop}", "does not fit resnet18"),
    ("rank --encoder=resnet18 --image-size=100000 --query={shop}", "from 1 to 4,096"),
    ("rank --encoder={run} --query={shop}", "{run}"),
    (f"rank {TRUNK}", "--query"),
    (f"rank {TRUNK}--query={{empty}}", "has neither images nor folders"),
    (f"rank {TRUNK}--query={{prose}}", "images do not exist"),
    (f"rank {TRUNK}--query={{binary}}", "neither a picture"),
    (f"rank {TRUNK}--query={{shop}}/*.gif", "matches 0 files"),
    (f"rank {TRUNK}--query={{bad_csv}}", "has no column 'path'"),
    (f"rank {TRUNK}--query={{bad_npz}}", "is no file of embeddings"),
    ("rank --query={vectors} --gallery={other_vectors}", "holds embeddings of another encoder"),
    ("rank --query={vectors} --mirror", "--mirror is of an encoder"),
    ("rank --query=- --gallery=-", "--encoder"),
    (f"rank {TRUNK}--query=- --gallery=-", "can be read once"),
    ("evaluate", "--encoder"),
    (f"evaluate {TRUNK}--query={{flat}}", "no labels"),
    (f"evaluate {TRUNK}--query={{shop}} --landmarks={{none}} --gallery={{shop}}", "{none}"),
    ("embed --encoder=resnet18", "required: --images"),
    (f"embed {TRUNK}--images={{shop}}", "give a file to write"),
    (f"embed {TRUNK}--images={{vectors}} --out={{new}}.npz", "holds embeddings already"),
    ("whiten --encoder=resnet18", "give --out=DIR"),
    (f"whiten {TRUNK}--encoder=resnet34 --out={{new}}", "give --encoder once"),
    (f"whiten {TRUNK}--images={{vectors}} --out={{new}}", "holds embeddings"),
    (f"whiten {TRUNK}--images={{flat}} --method=learned --out={{new}}", "no labels"),
    ("diff {run}", "required: B"),
    ("diff {none} {shop}", "{none}"),
    ("diff {empty} {empty}", "is not a finished run"),
    ("diff {run} {run}", "{run}"),
    ("diff {picture} {picture}", "is not beside it"),
    ("diff {no_facts} {no_facts}", "does not say what it was measured on"),
    ("diff {a_list} {a_list}", "a_list.json"),
    ("diff {no_columns} {no_columns}", "no_columns.json.per_query.npz does not say its gallery"),
    ("weights", "required: COMMAND"),
    ("weights sell", "invalid choice"),
    ("weights list --trunk=resnet51", "no trunk is called 'resnet51'"),
    ("weights fetch resnet51", "no trunk is called 'resnet51'"),
    ("weights fetch resnet18=none", "has no weights called 'none'"),
    ("weights convert {none} --trunk=resnet18 --out={new}.npz", "there is no weights file"),
    ("weights convert {other_weights} --trunk=resnet18 --out={new}.txt", "must end in .npz"),
    ("weights verify {none}", "{none}"),
    ("weights verify {picture}", "{picture}"),
    ("weights verify {empty}", "{empty}"),
    ("weights verify {other_weights} --trunk=resnet18", "does not fit resnet18"),
    ("config nonsense", "no field begins with 'nonsense'"),
    ("config --html", "unrecognized arguments: --html"),
]


_BASE = "def get_config():\n    config = common.base()\n"
_LOOSE = f"{_BASE}    with config.unlocked(), config.ignore_type():\n        "
_GIVE = "\n    return config\n"
# Configs and grids that are not what they must be.
CONFIGS = {
    "ends": "raise SystemExit(0)",
    "no_value": f"from ml_collections import config_dict\n{_LOOSE}"
    f"config.seed = config_dict.required_placeholder(int){_GIVE}",
    "no_section": f"{_LOOSE}config.loss = 'triplet'{_GIVE}",
    "huge": f"{_BASE}    config.train.steps = 10**5000{_GIVE}",
    "bad_grid": f"{_BASE}{_GIVE}GRID = {{'seed': {{0: {{'seed': 0}}}}}}",
    "empty_axis": f"{_BASE}{_GIVE}GRID = {{'seed': {{}}}}",
    "folded": f"{_BASE}{_GIVE}GRID = {{'fold': {{'x': {{}}}}}}",
    "bad_head": f"{_BASE}{_GIVE}GRID = {{'a': {{'x': {{'head': 'dense4'}}}}}}",
    "bad_cell": f"{_BASE}{_GIVE}GRID = {{'a': {{'x': {{'train.step': 1}}}}}}",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders and files, good and bad, by their names."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_folder(root / "shop", 3, 2)
    tiny.make_folder(root / "flat", 1, 2)
    for name in ("empty", "folder", "run"):
        (root / name).mkdir()
    (root / "flat" / "class0" / "0.png").rename(root / "flat" / "0.png")
    (root / "flat" / "class0" / "1.png").rename(root / "flat" / "1.png")
    (root / "flat" / "class0").rmdir()
    (root / "folder" / "x").touch()
    facts = {"encoder": {"fingerprint": "a" * 32}, "distance": "cosine"}
    columns = {"vectors": np.eye(2, 4, dtype=np.float32), "paths": np.array(["a", "b"])}
    columns |= {"labels": np.array(["x", "y"]), "keys": np.zeros((2, 16), np.uint8)}
    np.savez(root / "vectors.npz", **columns, provenance=np.array(json.dumps(facts)))
    facts["encoder"]["fingerprint"] = "b" * 32
    np.savez(root / "other_vectors.npz", **columns, provenance=np.array(json.dumps(facts)))
    np.savez(root / "other_weights.npz", kernel=np.ones((2, 2), np.float32))
    texts = {
        "run/run.json": "{}",
        "run/config.json": "{",
        "bad_config.py": "\ndef get_config():\n    return nonsense\n",
        "no_syntax.py": "def get_config(:\n",
        "no_config.py": "x = 1\n",
        "prose.txt": "What is here\nis no list.\n",
        "bad.csv": "name,label\na,b\n",
        "bad.npz": "no zip",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    told = {"no_facts": {}, "a_list": [], "no_columns": {"provenance": {"split": None}}}
    for name, content in told.items():
        (root / f"{name}.json").write_text(json.dumps(content))
        np.savez(root / f"{name}.json.per_query.npz", query=np.zeros(1))
    for name, body in CONFIGS.items():
        (root / f"{name}.py").write_text(f"from configs import common\n{body}")
    (root / "binary.bin").write_bytes(b"\0\1\2")
    places = {
        name: root / name for name in ("shop", "flat", "empty", "folder", "run", "none", "new")
    }
    files = ("vectors.npz", "other_vectors.npz", "other_weights.npz", "prose.txt", "binary.bin")
    files += ("bad_config.py", "no_syntax.py", "no_config.py")
    places |= {name.split(".")[0]: root / name for name in files}
    places |= {name: root / f"{name}.py" for name in CONFIGS}
    places |= {name: root / f"{name}.json" for name in told}
    places |= {"bad_csv": root / "bad.csv", "bad_npz": root / "bad.npz"}
    places["no_utf8"] = os.fsdecode(os.fsencode(root) + b"/\xff")
    places["picture"] = root / "shop" / "class0" / "0.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        patch.setattr("sys.stdin", io.StringIO())
        yield places


def every():
    """(call, what its line says) of all tables."""
    for field, values in FIELDS.items():
        for value in values:
            yield f"{TRAIN}--config.{field}={value}", f"{field}={value}: must be"
    for section, words in LOSSES.items():
        yield [*TRAIN.split(), f"--config.loss={section}"], words
    for before, option, values, words in OPTIONS:
        for value in values:
            yield [*before.split(), f"{option}={value}"], words
    yield from CALLS


@pytest.mark.parametrize(("call", "words"), list(every()), ids=str)
def test_a_bad_call_is_one_line(call, words, world, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parts = call.split() if isinstance(call, str) else call
    plain = isinstance(call, list) and "--config.loss=" in call[-1]
    argv = [p if plain and p is parts[-1] else p.format(**world) for p in parts]
    before = sorted(os.listdir(world["shop"].parent))
    assert main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert said[-1] == lines[0]
    assert len(lines[0]) < 700, lines[0]
    expected = words if plain else words.format(**world)
    if expected.endswith(": must be"):  # of a field: the value as it was read
        name = expected.split("=")[0]
        assert f"{name}=" in lines[0], lines[0]
        assert ": must be " in lines[0], lines[0]
    else:
        assert expected in lines[0], lines[0]
    assert [n for n in sorted(os.listdir(world["shop"].parent)) if n not in before] in (
        [],
        ["cache"],
    )
    assert not os.listdir(tmp_path)
