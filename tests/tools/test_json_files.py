"""Every JSON that is written is strict: of one query no interval is known, and that is null."""

import contextlib
import io
import json
import math

import jax
import numpy as np
import pytest
import tiny

from configs import common
from siamese_jax.__main__ import main
from siamese_jax.report.tables import text_table
from siamese_jax.storage import run_folder
from siamese_jax.storage.json_files import json_text, read_json, strict
from siamese_jax.train.experiment import train
from siamese_jax.train.metrics_log import read_curves

pytestmark = pytest.mark.usefixtures("small_trunk")
ROWS = ["path,label,split,is_query,is_gallery"]
ROWS += [f"class{c}/{i}.png,{c},train,," for c in range(4) for i in range(4)]
ROWS += [
    f"class{c}/{i}.png,{c},test,{not (c - 4 or i)},{bool(i)}" for c in (4, 5) for i in range(4)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_trunk):
    """A run, one of whose test images is asked, and what every tool writes of it."""
    root = tmp_path_factory.mktemp("json")
    tiny.make_folder(root / "shop", classes=6, images=4, noise=120)
    (root / "shop" / "one.csv").write_text("\n".join(ROWS) + "\n")
    config = common.base()
    config.data.update(source="csv", root=str(root / "shop" / "one.csv"))
    config.trunk.update(name="resnet18", weights="random", image_size=32, stage="stage4")
    config.head = common.linear_head(8, init="random")
    config.sampler.batch_size = 8
    config.train.update(steps=2, log_every=1, eval_every=2, checkpoint_every=2, rehearse=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            results = train(config, root / "run")
            use_all_tools(root)
        yield root, config, results


def use_all_tools(root):
    run, shop = root / "run", root / "shop"
    encoder = [f"--encoder={run}"]
    tools = [
        ["evaluate", *encoder, "--interval=0.9", f"--out={root}/a.json", f"--out={root}/a.csv"],
        ["evaluate", *encoder, "--mirror", f"--out={root}/b.json", "--verification"],
        ["diff", f"{root}/a.json", f"{root}/b.json", f"--out={root}/d.json"],
        ["rank", *encoder, f"--query={shop}/class0", f"--gallery={shop}/class1", "-k9",
         f"--out={root}/r.json", f"--out={root}/r.jsonl", f"--out={root}/r.csv"],
        ["embed", *encoder, f"--images={shop}/class0", f"--out={root}/e.npz"],
        ["fit", *encoder, f"--out={root}/fit", "--shrinkage=.2,.5", "--width=all"],
        ["whiten", *encoder, f"--out={root}/white"],
    ]  # fmt: skip
    for argv in tools:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(argv) == 0, argv


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def texts(root):
    """Each JSON in files under a folder: whole files, lines, and texts in NumPy's archives."""
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.suffix == ".npz":
            with np.load(path) as held:
                columns = [held[name] for name in held.files]
            yield from ((path, str(c)) for c in columns if c.dtype.kind == "U" and not c.ndim)
        elif path.suffix == ".jsonl":
            yield from ((path, line) for line in path.read_text().splitlines())
        elif path.read_bytes()[:1] in (b"{", b"["):
            yield path, path.read_text()


def test_every_json_is_strict(world):
    root, _, results = world
    assert math.isnan(results["test"]["gain, low"]["map@r"])
    read = {}
    for path, text in texts(root):
        read[path.relative_to(root).as_posix()] = json.loads(text, parse_constant=refuse)
    names = {
        "run/results.json",
        "run/run.json",
        "run/config.json",
        "run/metrics.jsonl",
        "a.json",
        "a.csv.run.json",
        "d.json",
        "r.json",
        "r.jsonl",
        "r.csv.run.json",
        "e.npz",
        "fit/fit.json",
        "fit/encoder.json",
        "white/encoder.json",
        "white/whitening.npz",
    }
    assert names <= set(read)
    assert sum(path.startswith("run/checkpoints") for path in read) > 2
    assert read["run/results.json"]["test"]["gain, low"]["map@r"] is None
    assert read["a.json"]["metrics"]["low"]["map@r"] is None
    assert read["d.json"]["metrics"]["map@r"]["low"] is None


def test_what_is_read_is_what_was_written(world, caplog):
    root, config, results = world
    found = run_folder.read(root / "run")
    np.testing.assert_equal(found.results["test"], json.loads(json.dumps(results["test"])))
    assert "is not as it was written" not in caplog.text
    again = train(config, root / "run")
    assert text_table(again) == text_table(results)
    assert "nan" in text_table(again)


def test_numbers_of_numpy_and_what_is_not_finite(tmp_path):
    held = {"a": np.float32(0.5), "b": np.int64(3), "c": [np.inf, -np.inf, np.nan], "d": tmp_path,
            3: (True, None)}  # fmt: skip
    read = json.loads(json_text(held), parse_constant=refuse)
    assert read == strict(held)
    assert read == {"a": 0.5, "b": 3, "c": [None] * 3, "d": str(tmp_path), "3": [True, None]}


def test_curves_with_null_and_files_of_before_with_nan(tmp_path):
    """Earlier files hold NaN, which Python reads."""
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": NaN}\n'
    )
    points = read_curves(log)["loss"]
    np.testing.assert_equal(points, [(1, 0.5), (2, math.nan), (3, math.nan)])
    old = {"low": math.nan}
    (tmp_path / "old.json").write_text(json.dumps(old))
    np.testing.assert_equal(read_json(tmp_path / "old.json"), old)
