"""Whole checkpoints of DINO, iBOT and DINOv2, as their training writes them."""

from functools import partial

import numpy as np
import pytest
import torch_files as tf

from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.trunks import positions, vit
from siamese_jax.trunks.table import HALF, IMAGENET, TRUNKS, Trunk
from siamese_jax.weights.namings import names, schemes
from siamese_jax.weights.port import flatten

PLAN = vit.Plan(patch=4, grid=3, width=6, depth=2, heads=2)
PLANS = {
    "vit_of_dino": PLAN,
    "vit_of_dinov2": PLAN._replace(gains=True),
    "vit_of_registers": PLAN._replace(gains=True, registers=2, class_position=False),
    "vit_deeper": PLAN._replace(depth=3),
    "vit_wider": PLAN._replace(width=8),
}
HEAD = {"mlp.0.weight": np.ones((4, 6), np.float32), "last_layer.weight_v": np.ones(3, np.float32)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, plan in PLANS.items():
        forms = positions.RULES if plan.registers == 0 else ("torch",)
        row = Trunk(partial(vit.ViT, plan), plan.widths, forms, 12, "none", HALF)
        monkeypatch.setitem(TRUNKS, name, row)


def backbone(trunk, seed):
    """Random leaves by the names that timm and facebookresearch share."""
    rng, state = np.random.default_rng(seed), {}
    shapes = flatten(weights.load(trunk, "random").variables)
    for path, theirs in names(trunk, "torch", schemes(trunk)["torch"]).items():
        shape = shapes[path].shape
        token = path.endswith(("cls", "registers", "positions"))
        shape = (1, *shape) if token else shape[::-1] if len(shape) != 4 else (6, 3, 4, 4)
        if path.endswith("patches/kernel"):
            shape = (shapes[path].shape[3], 3, 4, 4)
        state[theirs] = rng.normal(size=shape).astype(np.float32)
    return state


def below(prefix, *parts):
    return {f"{prefix}{name}": leaf for part in parts for name, leaf in part.items()}


def write(path, **entries):
    """A dict of state dicts, pickled as `torch.save` does."""
    storages = tf.Storages()
    value = {
        key: entry if isinstance(entry, int) else storages.add_all(entry)
        for key, entry in entries.items()
    }
    tf.write_zip(path, tf.pickle(tf.plain(value)), storages)
    return path


def checkpoint(path, student, teacher):
    """As DINO's main_dino.py saves it: the student in DistributedDataParallel."""
    return write(
        path,
        student=below("module.backbone.", student) | below("module.head.", HEAD),
        teacher=below("backbone.", teacher) | below("head.", HEAD),
        optimizer=below("state.0.", {"exp_avg": np.ones(3, np.float32)}),
        dino_loss={"center": np.ones(3, np.float32)},
        epoch=7,
    )


def taken(trunk, path, state, **options):
    """Whether the variables are those of the state by itself."""
    alone = write(path.parent / "alone.pth", model=state)
    expected = flatten(weights.load(trunk, alone).variables)
    found = weights.load(trunk, path, **options)
    for name, leaf in flatten(found.variables).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    return found


def test_dinos_teacher_is_taken(tmp_path, caplog):
    student, teacher = (backbone("vit_of_dino", seed) for seed in (0, 1))
    path = checkpoint(tmp_path / "checkpoint0100.pth", student, teacher)
    found = taken("vit_of_dino", path, teacher)
    assert (found.form, found.preprocessing) == ("dino", IMAGENET)
    (line,) = [r.getMessage() for r in caplog.records if "checkpoint0100" in r.getMessage()]
    assert "the backbone below 'teacher/backbone.' is taken, left out: student/backbone" in line
    for part in ("student/head", "teacher/head", "optimizer", "dino_loss"):
        assert part in line
    assert "pixels scaled as imagenet, as DINO is trained" in line
    assert "\n" not in line
    assert found.licence == "unknown: see where the file came from"
    asked = weights.load("vit_of_dino", path, form="torch", preprocessing="clip")
    assert (asked.form, asked.preprocessing.std[0]) == ("torch", pytest.approx(68.5, abs=0.1))


def test_the_same_leaves_by_themselves_are_taken_for_googles(tmp_path, caplog):
    """Nothing tells, so what else it may be is said; the form tells the pixels too."""
    path = write(tmp_path / "a.pth", model=backbone("vit_of_dino", 1))
    assert weights.load("vit_of_dino", path).preprocessing == HALF
    assert "as inception, as is usual (DINO's and MAE's are imagenet)" in caplog.text
    assert weights.load("vit_of_dino", path, form="dino").preprocessing == IMAGENET


def test_the_student_is_had_by_leaving_the_teacher_out(tmp_path):
    student, teacher = (backbone("vit_of_dino", seed) for seed in (0, 1))
    path = checkpoint(tmp_path / "a.pth", student, teacher)
    taken("vit_of_dino", path, student, ignore="^teacher/")


@pytest.mark.parametrize("large", ["vit_deeper", "vit_wider"])
def test_a_teacher_of_another_trunk_leaves_its_student(large, tmp_path, caplog):
    """As when DINOv2 and DINOv3 are distilled."""
    student, teacher = backbone("vit_of_dino", 0), backbone(large, 1)
    path = checkpoint(tmp_path / "a.pth", student, teacher)
    taken("vit_of_dino", path, student)
    assert "the backbone below 'student/module.backbone.' is taken" in caplog.text
    taken(large, path, teacher)
    with pytest.raises(UserError, match="does not fit resnet18"):
        weights.load("resnet18", path)


def test_ibots_token_for_hidden_patches_is_left_out(tmp_path, caplog):
    teacher = backbone("vit_of_dino", 1)
    hidden = {"masked_embed": np.ones((1, 6), np.float32)}
    path = checkpoint(tmp_path / "a.pth", teacher | hidden, teacher | hidden)
    taken("vit_of_dino", path, teacher)
    assert "left out: teacher/backbone.masked_embed" in caplog.text


@pytest.mark.parametrize("trunk", ["vit_of_dinov2", "vit_of_registers"])
@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2s_teacher_checkpoint(trunk, chunks, tmp_path, caplog):
    """Its blocks may lie in chunks, as FSDP wraps them; a token hides patches."""
    own = backbone(trunk, 1)
    theirs = own | {"mask_token": np.zeros((1, 6), np.float32)}
    if trunk == "vit_of_registers":
        theirs["register_tokens"] = theirs.pop("reg_token")
        place = np.zeros((1, 1, 6), np.float32)
        theirs["pos_embed"] = np.concatenate([place, theirs["pos_embed"]], 1)
    if chunks:
        theirs = {n.replace("blocks.0", "blocks.0.0").replace("blocks.1", "blocks.1.1"): leaf
                  for n, leaf in theirs.items()}  # fmt: skip
    heads = below("dino_head.", HEAD) | below("ibot_head.", HEAD)
    path = write(tmp_path / "a.pth", teacher=below("backbone.", theirs) | heads)
    found = taken(trunk, path, own)
    assert found.form == ("torch" if trunk == "vit_of_registers" else "dino")
    assert found.preprocessing == IMAGENET
    assert "the backbone below 'backbone.' is taken, left out: dino_head, ibot_head" in caplog.text
