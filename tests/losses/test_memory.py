"""The cross-batch memory against a plain list, and as a part of the losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_jax import losses
from siamese_jax.errors import UserError
from siamese_jax.losses import memory

SIZE, ROWS, DIM = 7, 5, 3
push = quick.jit(memory.push)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), max_size=8), st.booleans())
def test_it_holds_the_last_rows_pushed(masks, multi_hot):
    kept = memory.init(SIZE, DIM, (4,) if multi_hot else ())
    slots, written = [None] * SIZE, 0
    rng = np.random.default_rng(len(masks))
    for mask in masks:
        x = rng.normal(size=(ROWS, DIM)).astype(np.float32)
        labels = rng.random((ROWS, 4)) < 0.5 if multi_hot else rng.integers(0, 9, ROWS)
        kept = push(kept, x, labels.astype(bool if multi_hot else np.int32), np.array(mask))
        for row, label, keep in zip(x, labels, mask, strict=True):
            if keep:
                slots[written % SIZE] = (row.tolist(), np.asarray(label).tolist())
                written += 1
    assert kept.position == written % SIZE
    assert kept.mask.tolist() == [slot is not None for slot in slots]
    for i, slot in enumerate(slots):
        if slot is not None:
            assert (kept.embeddings[i].tolist(), kept.labels[i].tolist()) == slot


def test_of_more_rows_than_slots_the_last_stay():
    x = jnp.arange(10.0)[:, None]
    kept = memory.push(memory.init(4, 1), x, jnp.arange(10), jnp.arange(10) != 8)
    assert sorted(kept.embeddings[:, 0].tolist()) == [5.0, 6.0, 7.0, 9.0]
    # The slots are those that row after row would have taken.
    assert kept.labels.tolist() == [9, 5, 6, 7]
    assert kept.position == 1


def test_dtypes_and_shapes_stay(rng):
    """So that it can be the carry of a loop and a leaf of a checkpoint."""
    before = memory.init(SIZE, DIM)
    x = jnp.asarray(rng.normal(size=(ROWS, DIM)), jnp.bfloat16)
    after = push(before, x, jnp.arange(ROWS, dtype=jnp.int8), None)
    for a, b in zip(before, after, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert after.embeddings[:ROWS].tolist() == x.astype(jnp.float32).tolist()


def test_an_empty_memory_changes_no_loss_and_a_full_one_gets_no_gradient(rng):
    x = rng.normal(size=(6, DIM)).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 2, 2], np.int32)
    loss = losses.LOSSES["nt_xent"]()
    alone = losses.mean(loss, {}, x, labels)
    empty = memory.init(SIZE, DIM)

    @quick.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def against(x, kept_embeddings, kept):
        kept = memory.references(kept._replace(embeddings=kept_embeddings))
        return losses.mean(loss, {}, x, labels, references=kept)

    value, _ = against(x, empty.embeddings, empty)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    full = push(empty, x[:ROWS] + np.float32(0.1), labels[:ROWS], None)
    value, (gradient, none) = against(x, full.embeddings, full)
    assert abs(value - alone) > 0.1
    assert (np.asarray(gradient) != 0).any()
    assert (np.asarray(none) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 3), "size 0"), ((3, 0), "dim 0"), ((3, 3, (2, 2)), "label_shape")],
)
def test_a_wrong_size_is_one_clear_line(arguments, words):
    with pytest.raises(UserError, match=words):
        memory.init(*arguments)
