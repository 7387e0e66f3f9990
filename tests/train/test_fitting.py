"""The choice by folds where an image has several classes: no class is asked that was fitted to."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from siamese_jax.data.records import make_records
from siamese_jax.encoder import lda
from siamese_jax.errors import UserError
from siamese_jax.train import fitting
from siamese_jax.train.fitting import Candidate


@pytest.fixture(scope="module")
def several():
    """Records of 70 images with one to three of 12 classes, and rows float64 [70, 9]."""
    rng = np.random.default_rng(4)
    label = np.zeros((70, 12), bool)
    for row in label:
        row[rng.choice(12, rng.integers(1, 4), replace=False)] = True
    records = make_records([f"{i}.png" for i in range(70)], ["any"] * 70, root="")
    records = replace(records, label=label)
    return records, records.label @ rng.normal(size=(12, 9)) + rng.normal(size=(70, 9))


def test_a_fold_shares_no_class_with_what_is_fitted(several):
    records, _ = several
    folds = fitting.held_folds(records.label, 4, 1)
    assert len(folds) == 4
    own = [labels.any(axis=0) for _, labels in folds]
    assert (np.sum(own, axis=0) == 1).all()  # each class in one fold
    for (held, labels), mine in zip(folds, own, strict=True):
        assert not records.label[~held][:, mine].any()
        np.testing.assert_array_equal(held, records.label[:, mine].any(axis=1))
        np.testing.assert_array_equal(labels, records.label & mine)


@pytest.mark.parametrize("narrow", [lda.NARROW, 0], ids=["side by side", "one at a time"])
def test_the_scores_are_those_of_a_fit_to_the_others(several, narrow, monkeypatch):
    """Each fold anew: the closed form of the rows left, and map@r as a loop."""
    monkeypatch.setattr(lda, "NARROW", narrow)
    records, x = several
    candidates = [
        Candidate(("a", "b"), 0.3, 2),
        Candidate(("a", "b"), 0.3),
        Candidate(("b",), None),
        Candidate(("a", "b"), 0.3, 4),
    ]
    scored = fitting.score(lambda p: x[p], records, {"a": 6, "b": 3}, candidates, folds=4, seed=1)
    for candidate, values, _ in scored:
        hits = []
        for held, labels in fitting.held_folds(records.label, 4, 1):
            z = x[held][:, 6:]
            if candidate.shrinkage is not None:
                rest = x[~held]
                found = lda.scatter(lambda p, rest=rest: rest[p], records.label[~held])
                mean, projection = lda.closed_form(found, shrinkage=0.3, width=candidate.width or 9)
                z = (x[held] - mean) @ projection.T
            z = z / np.linalg.norm(z, axis=1, keepdims=True)
            match = labels[held].astype(int) @ labels[held].T > 0
            np.fill_diagonal(match, False)
            for i, row in enumerate(z @ z.T - 9 * np.eye(len(z))):
                many = match[i].sum()
                right = match[i][np.argsort(-row)[:many]]
                precision = np.cumsum(right) / (1 + np.arange(many))
                hits.append((precision * right).sum() / many if many else np.nan)
        np.testing.assert_allclose(values, hits, atol=1e-6)


def test_training_images_that_nobody_asks_are_asked_when_held_out(several):
    """A CSV may mark queries and gallery among test images alone."""
    records, x = several
    none = np.zeros(len(records), bool)
    unmarked = replace(records, is_query=none, is_gallery=none)
    candidates = [Candidate(("a",), 0.3), Candidate(("a",), None)]
    every, same = (
        fitting.score(lambda p: x[p], some, {"a": 9}, candidates, seed=1)
        for some in (records, unmarked)
    )
    for one, other in zip(every, same, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
    # Marks that are there count.
    marked = replace(records, is_query=np.arange(len(records)) % 2 == 0)
    (some,) = fitting.score(lambda p: x[p], marked, {"a": 9}, candidates[:1], seed=1)
    assert len(some.values) < len(every[0].values)


def test_folds_that_leave_nothing_are_said(caplog):
    """A class of all images is in one fold; alone with another, nothing is left in any."""
    labels = np.random.default_rng(0).random((40, 6)) < 0.3
    labels[:, 0] = True
    with caplog.at_level(logging.WARNING):
        assert len(fitting.held_folds(labels, 3, 0, tell=True)) == 2
    assert "1 of 3 folds" in caplog.text
    with pytest.raises(UserError, match="no fold of classes leaves"):
        fitting.held_folds(np.ones((40, 4), bool), 2, 0)


def test_of_shrinkages_that_are_not_told_apart_the_moderate_one():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    gains = {0.1: 0.001, 0.4: 0.0, 0.6: 0.0005, 0.9: -0.4}
    noise = {a: rng.normal(0, 0.1, 400) for a in gains}
    scored = [
        fitting.Scored(Candidate(("top",), a), base + gain + noise[a] - noise[a].mean())
        for a, gain in gains.items()
    ]
    assert fitting.best(scored).candidate.shrinkage == 0.1
    assert [s.candidate.shrinkage for s in fitting.untold(scored)] == [0.1, 0.4, 0.6]
    assert fitting.moderate(scored).candidate.shrinkage == 0.6  # as near as 0.4, and better
    clear = [s._replace(values=s.values + (s.candidate.shrinkage == 0.1)) for s in scored]
    assert fitting.moderate(clear).candidate.shrinkage == 0.1
    near = "as near to 0.5 as 0.4, and better,"
    said = f"shrinkage 0.6, {near} of 0.1, 0.4, 0.6, which are not told apart"
    assert fitting.why_shrinkage(scored) == said
    few = [scored[0], scored[1]]
    said = "shrinkage 0.4, the nearest to 0.5 of 0.1, 0.4, which are not told apart"
    assert fitting.why_shrinkage(few) == said
    assert fitting.why_shrinkage(clear) == "shrinkage 0.1, better than all other shrinkages"
    assert fitting.why_shrinkage(clear[:1]) == ""


def test_several_stages_are_taken_where_they_are_told_from_the_first_and_why_is_said(rng):
    base = rng.random(400)

    def scored(*gains):
        """Sets of one, two and three stages, by how much they are better than the first."""
        names = [("c",), ("b", "c"), ("a", "b", "c")]
        noise = [0 * base, *rng.normal(0, 0.1, (2, 400))]
        return [
            fitting.Scored(Candidate(name, 0.5), base + gain + n - n.mean())
            for name, gain, n in zip(names, gains, noise, strict=False)
        ]

    told, untold, first = scored(0, 0.05, 0.1), scored(0, 0.001, 0.002), scored(0, -0.1, -0.1)
    assert fitting.best_if_told(told).candidate.stages == ("a", "b", "c")
    assert fitting.why_stages(told).startswith("a,b,c, better than c alone (map@r +0.1000, 95 %")
    assert fitting.best_if_told(untold).candidate.stages == ("c",)
    said = "c alone, as a,b,c is not told apart from it (map@r +0.0020"
    assert fitting.why_stages(untold).startswith(said)
    assert fitting.best_if_told(first).candidate.stages == ("c",)
    assert fitting.why_stages(first) == "c, the best of 3 sets of stages"
    assert fitting.why_stages(first[:1]) == ""


def test_a_pooling_for_each_stage_needs_stages():
    with pytest.raises(UserError, match=r"trunk\.stage=auto their number is still to be chosen"):
        fitting.stage_sets({"stage1": 8, "top": 16}, "average,max")


def test_sets_of_stages_that_are_too_wide_are_named_and_not_tried(caplog):
    widths = {"stem": 9000, "stage1": 1000, "stage2": 3000, "top": 1000}
    sets = fitting.stage_sets(widths)
    assert sets == [
        ("top",),
        ("stage2", "top"),
        ("stage1", "stage2", "top"),
        ("stage2:max", "stage2", "top"),
        ("stage1:max", "stage2:max", "stage1", "stage2", "top"),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "stages stage2:grid2,top are not tried: 13000 features, more than 10240; name them to take "
        "them",
        "stages stage1:grid2,stage2:grid2,top are not tried: 17000 features, more than 10240; name "
        "them to take them",
    ]
    assert fitting.stage_sets(widths, "max") == sets[:3]
    assert fitting.all_parts(sets[:4]) == ("top", "stage2", "stage1", "stage2:max")


def test_sets_that_are_wide_together_are_scored_apart(several, monkeypatch):
    """And each as if it were alone."""
    records, x = several
    parts = {"a": 4, "b": 3, "c": 2}
    names = [("a",), ("a", "b"), ("c",), ("b", "c")]
    candidates = [Candidate(stages, share) for stages in names for share in (None, 0.4)]
    whole = fitting.score(x.__getitem__, records, parts, candidates)
    monkeypatch.setattr(fitting, "WIDEST", 7)
    apart = fitting.score(x.__getitem__, records, parts, candidates)
    assert [one.candidate for one in apart] == candidates
    for one, other in zip(whole, apart, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-6)
    monkeypatch.setattr(fitting, "WIDEST", 1)  # one that is wider stands alone
    for one in fitting.score(x.__getitem__, records, parts, candidates):
        same = next(w for w in whole if w.candidate == one.candidate)
        np.testing.assert_allclose(one.values, same.values, atol=1e-6)


def test_fewer_images_than_features_are_scored_in_their_span(several):
    """As a fit to the others scores, with several stages of which some are wider than 70 rows."""
    records, x = several
    rng = np.random.default_rng(3)
    x = (x @ rng.normal(size=(9, 110)) + rng.normal(size=(70, 110))).astype(np.float32)
    first = replace(records, label=records.label.argmax(axis=1))
    candidates = [
        Candidate(("a", "b"), 0.3, 12),
        Candidate(("a", "b"), 0.6),
        Candidate(("a", "b"), None),
        Candidate(("b",), 0.3),
        Candidate(("b",), 0.3, 5),
    ]
    for many in (records, first):
        scored = fitting.score(lambda p: x[p], many, {"a": 90, "b": 20}, candidates, seed=1)
        assert [one.candidate for one in scored] == candidates
        for candidate, values, _ in scored:
            found = []
            for held, labels in fitting.held_folds(many.label, 4, 1):
                z = x[:, 0 if "a" in candidate.stages else 90 :].astype(np.float64)
                if candidate.shrinkage is not None:
                    total = lda.scatter(lambda p, z=z, held=held: z[~held][p], many.label[~held])
                    how = {"shrinkage": candidate.shrinkage, "width": candidate.width or z.shape[1]}
                    mean, projection = lda.closed_form(total, **how)
                    z = (z - mean) @ projection.T
                asked = replace(many, label=labels).select(held)
                found.append(fitting._measure(z[held].astype(np.float32), asked))
            np.testing.assert_allclose(values, np.concatenate(found), atol=1e-6)
