"""Every config runs: two steps on generated images, with a small random trunk for its own.

Those of the emoji are run with their own trunk and pictures by test_readme.py, which leaves out the
rehearsals.
"""

import importlib
import math
from pathlib import Path

import jax
import pytest
import tiny

from siamese_jax.tools.compare_grid import cells, read_grid
from siamese_jax.train.experiment import train
from siamese_jax.train.fields import check_config
from siamese_jax.trunks.table import TRUNKS

CONFIGS = sorted(path.stem for path in (tiny.ROOT / "configs").glob("*.py"))
pytestmark = pytest.mark.usefixtures("small_trunk")
FRAGMENTS = ("common",)
# Another trunk alone, or a grid of runs.
ALIKE = ("compare_losses", "compare_trunks", "efficientnet_triplet", "resnet_triplet")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all configs, so that equal steps are compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("data") / "shop", classes=8, images=3)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in (*FRAGMENTS, *ALIKE)])
def test_config(name, folder, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config.trunk.name in TRUNKS
    config.trunk.update(name="resnet18", weights="random", image_size=32)
    config.trunk.update(stage=None, pool="average")  # which go with a trunk
    config.data.update(source="folder", root=str(folder), cache_dir=str(tmp_path / "cache"))
    config.head.layers = (16,)
    config.cache.views = 1
    if name.endswith("_vit"):  # training a whole trunk is what the others of the data set do
        config.trunk.freeze = (".*",)
        config.sampler = {"name": "classes", "per_class": 2}  # the folder has no super-classes
    config.sampler.batch_size = 12
    config.eval.batch_size = 8
    if config.data.fold:
        config.data.fold = "1/2"  # the folder has four classes to train on
    config.train.update(steps=2, log_every=1, eval_every=2, checkpoint_every=2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = train(config, tmp_path / "run")
    assert all(0 <= v <= 1 for k, v in results["test"]["after"].items() if "recall" in k)
    assert all(math.isfinite(v) for v in results["test"]["after"].values())
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_the_zoo_has_the_published_scores_and_the_folders_that_are_there(tmp_path):
    (tmp_path / "inshop").mkdir()
    config, grid, published = read_grid(f"{tiny.ROOT}/configs/compare_zoo.py:{tmp_path}")
    rows = {cell.name: cell for cell in cells(config, grid)}
    assert {tuple(cell.choice.values()) for cell in rows.values()} == published.keys()
    roots = {cell.config.data.source: cell.config.data.root for cell in rows.values()}
    assert roots == {"sop": None, "inshop": str(tmp_path / "inshop"), "cub": None, "cars": None}
    scores = [published[name, "Unicom ViT-L14 336"] for name in roots]
    assert scores == [0.745, 0.810, 0.875, 0.924]
    trunk = rows["sop-Unicom_ViT_L14_336"].config.trunk
    assert (trunk.image_size, trunk.stage) == (336, None)
    trunk = rows["cars-CLIP_ViT_L14"].config.trunk
    assert (trunk.image_size, trunk.stage, TRUNKS[trunk.name].projection) == (224, "proj", 768)
    for cell in rows.values():
        check_config(cell.config)


def test_a_config_says_how_it_is_started():
    for name in CONFIGS:
        text = (Path(tiny.ROOT) / "configs" / f"{name}.py").read_text()
        assert name in FRAGMENTS or f"--config=configs/{name}.py" in text, name
