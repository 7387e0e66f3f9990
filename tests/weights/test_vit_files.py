"""Vision Transformers in other libraries' files: the same variables as from timm's own names.

The state dicts are written here as the libraries' modules nest, from one set of values.
"""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import small_trunk
import torch_files as tf
from safetensors.numpy import save_file

import siamese_jax as sj
from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.tools import weights as tool
from siamese_jax.trunks import positions, vit
from siamese_jax.trunks.parameters import PARAMETERS
from siamese_jax.trunks.table import HALF, IMAGENET, TRUNKS, Trunk
from siamese_jax.weights.namings import names, schemes
from siamese_jax.weights.port import flatten

PLAN = vit.Plan(patch=4, grid=3, width=6, depth=2, heads=2)
PLANS = {
    "clip": PLAN._replace(pre_norm=True),
    "siglip": PLAN._replace(class_token=False, attention_pool=True),
    "dinov2": PLAN._replace(gains=True),
    "dinov3": PLAN._replace(width=8, gains=True, registers=2, turned=True),
    "plus": PLAN._replace(width=8, gains=True, registers=2, turned=True, biased=True, gated=True),
    "registers": PLAN._replace(gains=True, registers=2, class_position=False),
}


@pytest.fixture
def renamed():
    """For a test that gives a trunk of the table another form."""
    small_trunk.forget()
    yield
    small_trunk.forget()


@pytest.fixture
def small(monkeypatch):
    for name, plan in PLANS.items():
        space = 5 if name == "clip" else 0
        build = partial(vit.ViT, plan)
        row = Trunk(build, plan.widths, positions.RULES, 12, "none", IMAGENET, space)
        monkeypatch.setitem(TRUNKS, f"file_{name}", row)


def load(trunk, path, state):
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in state.items()}, path)
    return weights.load(trunk, path)


def ours(trunk, rng):
    """Random variables of a trunk, by path."""
    found = flatten(weights.load(trunk, "random").variables)
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in found.items()}


def layer(values, path):
    """{"weight", "bias"} of one of our layers, as torch keeps them."""
    leaves = {name.removeprefix(f"params/{path}/"): v for name, v in values.items()}
    weight = leaves["kernel"] if "kernel" in leaves else leaves["scale"]
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[weight.ndim]
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    return {"weight": weight.transpose(order)} | bias


def only(values, path):
    return {n: v for n, v in values.items() if n.rpartition("/")[0] == f"params/{path}"}


def put(state, name, values, path):
    for leaf, value in layer(only(values, path), path).items():
        state[f"{name}.{leaf}"] = value


def openai(values, prefix="visual."):
    state = {
        f"{prefix}class_embedding": values["params/stem/cls"][0],
        f"{prefix}positional_embedding": values["params/stem/positions"],
        f"{prefix}proj": np.arange(30, dtype=np.float32).reshape(6, 5),
        "transformer.resblocks.0.ln_1.weight": np.ones(4, np.float32),
        "logit_scale": np.ones((), np.float32),
        "positional_embedding": np.ones((7, 4), np.float32),
    }
    put(state, f"{prefix}conv1", values, "stem/patches")
    put(state, f"{prefix}ln_pre", values, "stem/norm")
    put(state, f"{prefix}ln_post", values, "top/norm")
    for i in range(PLAN.depth):
        base, block = f"{prefix}transformer.resblocks.{i}", f"block{i + 1}"
        put(state, f"{base}.ln_1", values, f"{block}/norm1")
        put(state, f"{base}.ln_2", values, f"{block}/norm2")
        put(state, f"{base}.attn.out_proj", values, f"{block}/proj")
        put(state, f"{base}.mlp.c_fc", values, f"{block}/fc1")
        put(state, f"{base}.mlp.c_proj", values, f"{block}/fc2")
        for leaf, value in layer(only(values, f"{block}/qkv"), f"{block}/qkv").items():
            state[f"{base}.attn.in_proj_{leaf}"] = value
    return state


def transformers(values, prefix="vision_model."):
    state = {
        f"{prefix}embeddings.position_embedding.weight": values["params/stem/positions"],
        f"{prefix}embeddings.position_ids": np.arange(9)[None],
        "text_model.final_layer_norm.weight": np.ones(4, np.float32),
        "logit_scale": np.ones((), np.float32),
    }
    put(state, f"{prefix}embeddings.patch_embedding", values, "stem/patches")
    if "params/stem/cls" in values:
        state[f"{prefix}embeddings.class_embedding"] = values["params/stem/cls"][0]
        put(state, f"{prefix}pre_layrnorm", values, "stem/norm")
    put(state, f"{prefix}post_layernorm", values, "top/norm")
    for i in range(PLAN.depth):
        base, block = f"{prefix}encoder.layers.{i}", f"block{i + 1}"
        put(state, f"{base}.layer_norm1", values, f"{block}/norm1")
        put(state, f"{base}.layer_norm2", values, f"{block}/norm2")
        put(state, f"{base}.self_attn.out_proj", values, f"{block}/proj")
        put(state, f"{base}.mlp.fc1", values, f"{block}/fc1")
        put(state, f"{base}.mlp.fc2", values, f"{block}/fc2")
        for leaf, value in layer(only(values, f"{block}/qkv"), f"{block}/qkv").items():
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                state[f"{base}.self_attn.{part}_proj.{leaf}"] = third
    if "params/attention/latent" in values:
        head = f"{prefix}head"
        state[f"{head}.probe"] = values["params/attention/latent"][None]
        q, kv = (layer(only(values, f"attention/{n}"), f"attention/{n}") for n in ("q", "kv"))
        for leaf in ("weight", "bias"):
            state[f"{head}.attention.in_proj_{leaf}"] = np.concatenate([q[leaf], kv[leaf]])
        put(state, f"{head}.attention.out_proj", values, "attention/proj")
        put(state, f"{head}.layernorm", values, "attention/norm")
        put(state, f"{head}.mlp.fc1", values, "attention/fc1")
        put(state, f"{head}.mlp.fc2", values, "attention/fc2")
    return state


def same(found, values):
    assert flatten(found.variables).keys() == values.keys()
    for name, leaf in flatten(found.variables).items():
        np.testing.assert_array_equal(leaf, values[name], err_msg=name)


@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
def test_openais_clip(prefix, small, tmp_path, rng, caplog):
    values = ours("file_clip", rng)
    found = load("file_clip", tmp_path / "a.safetensors", openai(values, prefix))
    same(found, values)
    np.testing.assert_array_equal(found.classifier["kernel"], np.arange(30).reshape(6, 5))
    assert "left out: logit_scale, positional_embedding, transformer.resblocks" in caplog.text


TOWERS = {"openai": (openai, "visual."), "transformers": (transformers, "vision_model.")}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("library", TOWERS)
def test_clips_tower_alone(library, prefix, small, tmp_path, rng):
    """As `model.visual.state_dict()` of open_clip, or `vision_model` of transformers, is saved."""
    values, (write, tower) = ours("file_clip", rng), TOWERS[library]
    whole = write(values, tower).items()
    state = {prefix + n.removeprefix(tower): leaf for n, leaf in whole if n.startswith(tower)}
    found = load("file_clip", tmp_path / "a.safetensors", state)
    same(found, values)
    assert (found.classifier is not None) == (library == "openai")


@pytest.mark.parametrize("trunk", ["file_clip", "file_siglip"])
def test_towers_of_transformers(trunk, small, tmp_path, rng, caplog):
    values = ours(trunk, rng)
    same(load(trunk, tmp_path / "a.safetensors", transformers(values)), values)
    assert "left out: logit_scale, text_model" in caplog.text


W = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
SPACES = {  # W's name and layout in a library's file: transposed but for OpenAI's
    "openai": lambda values: openai(values) | {"visual.proj": W},
    "transformers": lambda values: transformers(values) | {"visual_projection.weight": W.T},
    "wrapped": lambda values: (
        transformers(values, "clip.vision_model.") | {"clip.visual_projection.weight": W.T}
    ),
    "open_clip": lambda values: {
        **{f"visual.trunk.{name}": leaf for name, leaf in timm("file_clip", values).items()},
        "visual.head.proj.weight": W.T,
    },
    "timm": lambda values: (
        timm("file_clip", values) | {"head.weight": W.T, "head.bias": np.zeros(5, np.float32)}
    ),
    "timm, no bias": lambda values: timm("file_clip", values) | {"head.weight": W.T},
}


@pytest.mark.parametrize("library", SPACES)
def test_clips_embedding(library, small, tmp_path, rng):
    """The class token behind the last norm, times W; unless asked for, nothing knows of it."""
    values = ours("file_clip", rng)
    found = load("file_clip", tmp_path / "a.safetensors", SPACES[library](values))
    same(found, values)
    again = tmp_path / "a.npz"
    weights.save(again, found)
    images = rng.integers(0, 256, (3, 12, 12, 3), np.uint8)
    before = sj.load_encoder("file_clip", tmp_path / "a.safetensors")(images)
    for path in (tmp_path / "a.safetensors", again):
        encoder = sj.load_encoder("file_clip", path, stage="proj")
        assert (encoder.embedding_dim, encoder.params["trunk"]["proj"]["kernel"].shape) == (
            5,
            W.shape,
        )
        expected = before.astype(float) @ W.astype(float)
        np.testing.assert_allclose(encoder(images), expected, rtol=0, atol=1e-5)
    both = sj.load_encoder("file_clip", again, stage="cls,proj")(images)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(both, np.hstack([unit(before), unit(expected)]), rtol=0, atol=1e-5)


def test_where_there_is_no_projection_that_is_one_line(small, tmp_path, rng):
    """None, one of another width, and a classifier: it has biases."""
    values = ours("file_clip", rng)
    bias = np.ones(5, np.float32)
    for more in ({}, {"head.weight": W.T[:4]}, {"head.weight": W.T, "head.bias": bias}):
        path = tmp_path / f"{len(more)}.safetensors"
        load("file_clip", path, timm("file_clip", values) | more)
        with pytest.raises(UserError, match=r"have no projection.*6 -> 5 without biases") as e:
            sj.load_encoder("file_clip", path, stage="proj")
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="file_siglip has no stage 'proj'; choose from stem"):
        sj.load_encoder("file_siglip", "random", stage="proj")


def test_a_random_clip_has_a_projection(small, rng):
    images = rng.integers(0, 256, (3, 12, 12, 3), np.uint8)
    found = sj.load_encoder("file_clip", "random", stage="proj")(images)
    assert found.shape == (3, 5)
    assert found.std(0).min() > 0


def test_clips_spaces_are_as_wide_as_published():
    """OpenAI's and LAION's: 512 of base, 768 of large."""
    spaces = {n: row.projection for n, row in TRUNKS.items() if "_clip_" in n}
    assert {n.split("_")[1]: s for n, s in spaces.items()} == {"base": 512, "large": 768}
    others = {row.projection for n, row in TRUNKS.items() if "_clip_" not in n}
    assert others == {0}


def timm(trunk, values):
    """By timm's names, as `tests/trunks/test_vit.py` proves them."""
    state = {}
    for path, theirs in names(trunk, "torch", schemes(trunk)["torch"]).items():
        leaf = values[path]
        token = path.endswith(("cls", "registers", "positions", "latent"))
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        state[theirs] = leaf[None] if token else leaf.transpose(order)
    return state


def test_timms_tower_within_open_clip(small, tmp_path, rng, caplog):
    values = ours("file_siglip", rng)
    state = {f"visual.trunk.{name}": leaf for name, leaf in timm("file_siglip", values).items()}
    state |= {"text.transformer.w": np.ones(2, np.float32), "logit_bias": np.ones((), np.float32)}
    same(load("file_siglip", tmp_path / "a.safetensors", state), values)
    assert "left out: logit_bias, text.transformer.w" in caplog.text


MASK = {"mask_token": np.zeros((1, 6), np.float32)}


def test_facebooks_dinov2(small, tmp_path, rng):
    """The same names as timm's and a mask token."""
    values = ours("file_dinov2", rng)
    state = timm("file_dinov2", values) | MASK
    found = load("file_dinov2", tmp_path / "a.safetensors", state)
    assert found.form == "dino"
    same(found, values)


def test_facebooks_registers(small, tmp_path, rng):
    """Its class token has a position, and the sum of both is ours."""
    values = ours("file_registers", rng)
    state = timm("file_registers", values) | MASK
    place = rng.normal(size=(1, 1, 6)).astype(np.float32)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - place
    state["pos_embed"] = np.concatenate([place, state["pos_embed"]], 1)
    found = load("file_registers", tmp_path / "a.safetensors", state)
    assert found.form == "torch"
    values["params/stem/cls"] = (state["cls_token"] + place)[0]
    same(found, values)


def test_facebooks_dinov3(small, tmp_path, rng):
    """Its biases are 0 but for the masked ones, and its periods are bfloat16."""
    values = ours("file_dinov3", rng)
    state = timm("file_dinov3", values)
    state["storage_tokens"] = state.pop("reg_token")
    state |= {"mask_token": np.zeros((1, 8), np.float32), "rope_embed.periods": np.ones(1)}
    bias = np.repeat(np.float32([0, 5, 0]), 8)
    for i in range(PLAN.depth):
        state[f"blocks.{i}.attn.qkv.bias"] = bias
        state[f"blocks.{i}.attn.qkv.bias_mask"] = np.full(24, np.nan, np.float32)
    found = load("file_dinov3", tmp_path / "a.safetensors", state)
    assert found.form == "dino"
    same(found, values)
    state["blocks.1.attn.qkv.bias"] = bias[::-1] + 1
    with pytest.raises(UserError, match="a bias of queries or values that is not 0"):
        load("file_dinov3", tmp_path / "b.safetensors", state)


@pytest.mark.parametrize("library", ["facebookresearch", "timm"])
def test_dinov3_with_gates_and_biases(library, small, tmp_path, rng):
    """timm has the biases apart, facebookresearch in one with that of keys; its layers are w1.."""
    values = ours("file_plus", rng)
    state = timm("file_plus", values)
    if library == "timm":
        state = {re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", n): v for n, v in state.items()}
    else:
        state["storage_tokens"] = state.pop("reg_token")
        for i in range(PLAN.depth):
            q, v = (state.pop(f"blocks.{i}.attn.{part}_bias") for part in "qv")
            state[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([q, q + v, v])
        for theirs, fc in (("w1", "fc1_g"), ("w2", "fc1_x"), ("w3", "fc2")):
            state = {n.replace(f".{fc}.", f".{theirs}."): v for n, v in state.items()}
    found = load("file_plus", tmp_path / "a.safetensors", state)
    assert found.form == ("torch" if library == "timm" else "dino")
    same(found, values)


@pytest.mark.usefixtures("renamed")
def test_both_of_clips_activations_are_named(small, monkeypatch, tmp_path, rng, capsys):
    """Nothing in the leaves tells GELU from QuickGELU: a tag, such as openai, does."""
    gelu, quick = "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"
    for name in [name for name in TRUNKS if not name.startswith("file_")]:
        monkeypatch.delitem(TRUNKS, name)
    values, row = ours("file_clip", rng), TRUNKS["file_clip"]
    larger = PLANS["clip"]._replace(grid=5)
    build = partial(vit.ViT, PLANS["clip"]._replace(act="quick_gelu"))
    monkeypatch.setitem(TRUNKS, "vit_base_patch32_clip_384", replace(
        row, build=partial(vit.ViT, larger), image_size=20))  # fmt: skip
    monkeypatch.setitem(TRUNKS, gelu, row)
    monkeypatch.setitem(TRUNKS, quick, replace(row, build=build))
    monkeypatch.delitem(TRUNKS, "file_clip")
    for name in TRUNKS:  # these are smaller than what they are called
        monkeypatch.setitem(PARAMETERS, name, 0)
    for file, trunk, other in (("a.safetensors", gelu, quick), (f"{gelu}.openai.pth", quick, gelu)):
        state = {name: np.ascontiguousarray(leaf) for name, leaf in openai(values).items()}
        save_file(state, tmp_path / file)
        tool.main(["verify", str(tmp_path / file)])
        said = capsys.readouterr().out
        assert f"is sound: {trunk}, torch form" in said
        assert f"{other} would fit as well" in said
        assert ("by its name" in said and "tells them apart" in said) == (trunk == quick)


@pytest.mark.parametrize("token", ["dist_token", "deit.embeddings.distillation_token"])
def test_a_distilled_deit_is_told(token, plain, tmp_path, rng):
    """By timm's name of its second token, and by transformers'."""
    values = ours("file_plain", rng)
    state = (
        timm("file_plain", values) if token == "dist_token" else transformers_vit(values, "deit.")
    )
    state[token] = np.ones((1, 1, 6), np.float32)
    with pytest.raises(UserError, match="is of a distilled DeiT") as caught:
        load("file_plain", tmp_path / "a.safetensors", state)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_one_list(small, tmp_path, rng, caplog):
    """The text tower and the entries of a checkpoint that are no weights."""
    storages = tf.Storages()
    entries = {"state_dict": storages.add_all(openai(ours("file_clip", rng)))}
    entries |= {"optimizer": storages.add_all({"exp_avg": np.ones(3, np.float32)})}
    tf.write_zip(tmp_path / "a.pth", tf.pickle(tf.plain(entries)), storages)
    weights.load("file_clip", tmp_path / "a.pth")
    (said,) = [r.getMessage() for r in caplog.records if "a.pth" in r.getMessage()]
    assert said.count("left out:") == 1
    assert "logit_scale" in said


def test_a_tower_that_lacks_leaves_is_one_line(small, tmp_path, rng):
    state = transformers(ours("file_clip", rng))
    for name in ("self_attn.k_proj.weight", "mlp.fc1.weight"):
        cut = {key: leaf for key, leaf in state.items() if not key.endswith(f"0.{name}")}
        with pytest.raises(UserError, match=r"transformers calls them|1 leaves are missing") as e:
            load("file_clip", tmp_path / "a.safetensors", cut)
        assert "\n" not in str(e.value)


def put_layer(state, name, values, block):
    """What transformers' layers of ViT and DINOv2 have in common."""
    for leaf, value in layer(only(values, f"{block}/qkv"), f"{block}/qkv").items():
        for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            state[f"{name}.attention.attention.{part}.{leaf}"] = third
    put(state, f"{name}.attention.output.dense", values, f"{block}/proj")


def embeddings(values, prefix):
    state = {
        f"{prefix}embeddings.cls_token": values["params/stem/cls"][None],
        f"{prefix}embeddings.position_embeddings": values["params/stem/positions"][None],
    }
    put(state, f"{prefix}embeddings.patch_embeddings.projection", values, "stem/patches")
    put(state, f"{prefix}layernorm", values, "top/norm")
    return state


def transformers_vit(values, prefix):
    """As `convert_dino_to_pytorch.py` of transformers' ViT names them."""
    state = embeddings(values, prefix)
    for i in range(PLAN.depth):
        name, block = f"{prefix}encoder.layer.{i}", f"block{i + 1}"
        put_layer(state, name, values, block)
        for theirs, ours in (
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense", "fc1"),
            ("output.dense", "fc2"),
        ):
            put(state, f"{name}.{theirs}", values, f"{block}/{ours}")
    return state


def transformers_dinov2(values, prefix):
    """As `convert_dinov2_with_registers_to_hf.py` names them."""
    state = embeddings(values, prefix)
    state[f"{prefix}embeddings.mask_token"] = MASK["mask_token"]
    for i in range(PLAN.depth):
        name, block = f"{prefix}encoder.layer.{i}", f"block{i + 1}"
        put_layer(state, name, values, block)
        for ours in ("norm1", "norm2"):
            put(state, f"{name}.{ours}", values, f"{block}/{ours}")
        for ours in ("fc1", "fc2"):
            put(state, f"{name}.mlp.{ours}", values, f"{block}/{ours}")
        for n in (1, 2):
            state[f"{name}.layer_scale{n}.lambda1"] = values[f"params/{block}/gain{n}"]
    return state


@pytest.fixture
def plain(monkeypatch, small):
    row = Trunk(partial(vit.ViT, PLAN), PLAN.widths, positions.RULES, 12, "none", HALF)
    monkeypatch.setitem(TRUNKS, "file_plain", row)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_transformers_vit(prefix, plain, tmp_path, rng, caplog):
    """ViTModel, which has a pooler, and ViTForImageClassification."""
    values = ours("file_plain", rng)
    state = transformers_vit(values, prefix)
    outside = "classifier.weight" if prefix else "pooler.dense.weight"
    state[outside] = np.ones((6, 6), np.float32)
    found = load("file_plain", tmp_path / "a.safetensors", state)
    assert (found.form, found.preprocessing) == ("torch", HALF)
    assert f"left out: {outside}" in caplog.text
    same(found, values)
    same(load("file_plain", tmp_path / "b.safetensors", timm("file_plain", values)), values)


def test_a_dino_of_transformers_is_told_by_its_repositorys_name(plain, tmp_path, rng):
    values = ours("file_plain", rng)
    folder = tmp_path / "models--facebook--dino-vits16" / "snapshots" / "0"
    folder.mkdir(parents=True)
    found = load("file_plain", folder / "model.safetensors", transformers_vit(values, ""))
    assert (found.form, found.preprocessing) == ("dino", IMAGENET)
    same(found, values)


@pytest.mark.parametrize("library", ["transformers", "openai", "timm"])
def test_the_trunk_of_a_file_of_any_library_is_found(library, plain, monkeypatch, tmp_path, rng):
    for name in [name for name in TRUNKS if not name.startswith("file_")]:
        monkeypatch.delitem(TRUNKS, name)  # which would take their time
    trunk = {"transformers": "file_plain", "openai": "file_clip", "timm": "file_plain"}[library]
    values = ours(trunk, rng)
    state = {
        "transformers": lambda: transformers_vit(values, ""),
        "openai": lambda: openai(values),
        "timm": lambda: timm(trunk, values),
    }[library]()
    path = tmp_path / "a.safetensors"
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in state.items()}, path)
    found = tool.verify(str(path))
    assert found.trunk == trunk
    same(found, values)
    cut = {name: np.ascontiguousarray(leaf) for name, leaf in [*state.items()][:-1]}
    save_file(cut, path)
    said = rf"fits none of \d+ trunks; the nearest is {trunk}, of whose leaves it has 9\d\.\d%: "
    with pytest.raises(UserError, match=said):
        tool.verify(str(path))
    save_file({"other.weight": np.ones(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"fits none of \d+ trunks; its leaves are called other\.w"):
        tool.verify(str(path))


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_transformers_dinov2(prefix, small, tmp_path, rng):
    values = ours("file_dinov2", rng)
    state = transformers_dinov2(values, prefix)
    found = load("file_dinov2", tmp_path / "a.safetensors", state)
    assert found.form == "dino"
    same(found, values)


@pytest.mark.parametrize("prefix", ["", "dinov2_with_registers."])
def test_transformers_dinov2_with_registers(prefix, small, tmp_path, rng):
    """Its class token has a position, and the sum of both is ours."""
    values = ours("file_registers", rng)
    state = transformers_dinov2(values, prefix)
    place = rng.normal(size=(1, 1, 6)).astype(np.float32)
    token, places = (f"{prefix}embeddings.{n}" for n in ("cls_token", "position_embeddings"))
    state[f"{prefix}embeddings.register_tokens"] = values["params/stem/registers"][None]
    state[token] = state[token] - place
    state[places] = np.concatenate([place, state[places]], 1)
    found = load("file_registers", tmp_path / "a.safetensors", state)
    assert found.form == "torch"
    values["params/stem/cls"] = (state[token] + place)[0]
    same(found, values)


@pytest.mark.parametrize("trunk", ["file_plus", "file_biased"])
@pytest.mark.parametrize("inner", ["", "model."])
def test_transformers_dinov3(trunk, inner, small, monkeypatch, tmp_path, rng):
    """As `modeling_dinov3_vit.py` names its modules; periods are in float32 there, as in timm."""
    plan = PLANS["plus"]._replace(gated=False)
    row = Trunk(partial(vit.ViT, plan), plan.widths, positions.RULES, 12, "none", IMAGENET)
    monkeypatch.setitem(TRUNKS, "file_biased", row)
    values = ours(trunk, rng)
    state = {
        "embeddings.cls_token": values["params/stem/cls"][None],
        "embeddings.register_tokens": values["params/stem/registers"][None],
        "embeddings.mask_token": np.zeros((1, 1, 8), np.float32),
    }
    put(state, "embeddings.patch_embeddings", values, "stem/patches")
    put(state, "norm", values, "top/norm")
    gated = (("gate_proj", "fc1_g"), ("up_proj", "fc1_x"), ("down_proj", "fc2"))
    mlp = gated if trunk == "file_plus" else (("up_proj", "fc1"), ("down_proj", "fc2"))
    for i in range(plan.depth):
        name, block = f"{inner}layer.{i}", f"block{i + 1}"
        joined = layer(only(values, f"{block}/qkv"), f"{block}/qkv")["weight"]
        for part, third in zip("qkv", np.split(joined, 3), strict=True):
            state[f"{name}.attention.{part}_proj.weight"] = third
        for part in "qv":
            state[f"{name}.attention.{part}_proj.bias"] = values[f"params/{block}/{part}_bias"]
        put(state, f"{name}.attention.o_proj", values, f"{block}/proj")
        for n in (1, 2):
            put(state, f"{name}.norm{n}", values, f"{block}/norm{n}")
            state[f"{name}.layer_scale{n}.lambda1"] = values[f"params/{block}/gain{n}"]
        for theirs, mine in mlp:
            put(state, f"{name}.mlp.{theirs}", values, f"{block}/{mine}")
    found = load(trunk, tmp_path / "a.safetensors", state)
    assert found.form == "torch"
    same(found, values)
