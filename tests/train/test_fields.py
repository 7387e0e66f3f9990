"""The table of config fields: whole, true of the shipped configs, and what checks a config."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import tiny

import siamese_jax as sj
from configs import common
from siamese_jax import values
from siamese_jax.__main__ import TOOLS, main
from siamese_jax.errors import UserError
from siamese_jax.metrics.retrieval import of_ranking
from siamese_jax.search import rerank
from siamese_jax.tools.compare_grid import cells
from siamese_jax.tools.configs import override
from siamese_jax.train.experiment import train
from siamese_jax.train.fields import FIELDS, SECTIONS, check_config, find, flat, options_of

CONFIGS = sorted(path.stem for path in (tiny.ROOT / "configs").glob("*.py"))
GIVEN = {"labels", "seed", "domain", "super_labels"}  # what training gives a sampler


def test_every_field_of_the_base_config_is_in_the_table():
    names = {name for name, _ in flat(common.base().to_dict())}
    assert names - FIELDS.keys() == {"sampler.batch_size", "sampler.per_class"}
    assert not FIELDS.keys() - names


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "common"])
def test_every_field_of_the_shipped_configs_is_in_the_table(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    check_config(config)
    for field, value in flat(config.to_dict()):
        assert find(field, config).kind.holds(value)
    for cell in cells(config, getattr(module, "GRID", {})):
        check_config(cell.config)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_options_of_a_section_are_those_of_its_functions(section):
    for name, function in SECTIONS[section][0].items():
        known = inspect.signature(function).parameters
        options = options_of(section, name)
        assert known.keys() - GIVEN == options.keys(), name
        for option, row in options.items():
            if known[option].default is not inspect.Parameter.empty:
                assert row.kind.holds(known[option].default), (name, option)


def test_numbers_on_a_command_line_have_a_range():
    """No option is read by a bare int or float."""
    from siamese_jax.tools.config import tool_options

    for module, _ in TOOLS.values():
        for _, (name, _, must, _) in tool_options(importlib.import_module(module).options(), ""):
            assert must
            assert name
        text = Path(importlib.import_module(module).__file__).read_text()
        assert "type=int" not in text
        assert "type=float" not in text


def test_the_page_is_what_the_tool_prints(capsys):
    assert main(["config", "--markdown"]) == 0
    page = (tiny.ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "siamese-jax config --markdown > docs/config.md"
    for field in FIELDS:
        assert f"\n| {field} | " in page


def test_config_prints_meaning_range_and_default(capsys):
    assert main(["config", "train.steps"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "train.steps = 600"
    assert shown[2].strip() == "a whole number from 1 to 1,000,000,000"
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert "loss.margin (triplet) = 0.2" in printed
    assert "head.layers (linear) = (512,)" in printed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.steps", 2.0),
        ("train.steps", True),
        ("train.steps", np.int64(-3)),
        ("optim.learning_rate", float("nan")),
        ("head.layers", (16.0,)),
        ("eval.ks", ()),
        ("loss.margin", float("inf")),
        ("trunk.freeze", "stem"),
        ("cache.enabled", 1),
    ],
)
def test_a_config_in_python_is_checked_before_any_work(field, value, tmp_path):
    config = common.base()
    config.loss = {"name": "triplet", "margin": 0.2}
    section, name = field.split(".")
    with config.ignore_type():
        config[section][name] = value
    with pytest.raises(UserError, match=f"^{field}=.*: must be") as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_field_that_is_unknown_or_missing_is_named():
    config = common.base()
    config.train.step = 5
    with pytest.raises(UserError, match=r"train\.step: .* did you mean train\.steps\?"):
        check_config(config)
    config = common.base()
    del config.optim.clip_norm
    with pytest.raises(UserError, match=r"lacks the field optim\.clip_norm"):
        check_config(config)


def test_a_head_by_its_name_leaves_nothing_of_the_one_before():
    """On a command line, whatever the order, and in a grid."""

    def head(*arguments):
        config = importlib.import_module("configs.resnet_triplet").get_config()
        override(config, arguments)
        check_config(config)
        return config.head.to_dict()

    assert head("--config.head=dense3") == common.head().to_dict()
    assert head("--config.head", "linear") == common.linear_head().to_dict()
    narrow = common.linear_head(256, init="pca").to_dict()
    fields = ["--config.head.layers=256", "--config.head.init=pca", "--config.head.unit=False"]
    assert head("--config.head=linear", *fields) == head(*fields, "--config.head=linear") == narrow
    grid = {"head": {name: {"head": name} for name in ("linear", "dense3")}}
    made = [cell.config.head.to_dict() for cell in cells(common.base(), grid)]
    assert made == [common.linear_head().to_dict(), common.head().to_dict()]


def test_functions_are_checked_by_the_same_ranges(rng):
    x = rng.normal(size=(6, 3))
    labels = np.arange(6) % 2
    for call, words in (
        (lambda: rerank.fit_whitening(x, shrinkage=float("inf")), "shrinkage=inf: must be"),
        (lambda: rerank.concatenate([x, x], weights=[1e308, 1e308]), "weights=.*to 1e\\+06"),
        (lambda: sj.rank(x, x, k=10**9), "k=1000000000: the gallery has 6 rows"),
        (lambda: rerank.k_reciprocal(x, x, k=10**9), "k=1000000000: the gallery has 6 rows"),
        (lambda: rerank.diffuse(x, x, k=10**9), "k=1000000000: the gallery has 6 rows"),
        (lambda: sj.evaluate(x, labels, memory_limit=2**20), "memory_limit=1048576 is less than 2"),
        (lambda: sj.losses.LOSSES["triplet"](margin=float("nan")), "triplet: margin=nan: must be"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert sj.evaluate(x, labels, ks=[10**9])["recall@1000000000"] == 1
    whole = of_ranking(sj.rank(x, x, 6), labels, labels, ks=[10**9])
    assert whole.means()["recall@1000000000"] == 1


def test_values_read_from_text():
    ks = values.several(values.whole(1), 1)
    assert ks.read("1,5") == ks.read("(1, 5)") == ks.read("[1,5]") == (1, 5)
    assert values.several(values.text()).read("(stem|top)") == ("(stem|top)",)
    assert values.optional(values.text()).read("None") is None
    assert values.flag().read("true") is values.flag().read("True") is True
    either = values.either(values.choice("equal"), values.several(values.number(0), 1))
    assert either.read("equal") == "equal"
    assert either.read("1,2") == (1.0, 2.0)
