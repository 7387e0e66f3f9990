"""The closed form against a loop in float64, scikit-learn, and what it must not depend on."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from siamese_jax.encoder import lda
from siamese_jax.errors import UserError


def taken(x):
    """The rows as the closed form asks for them; never all of them at once."""

    def rows(places):
        assert len(places) <= 16
        return x[places]

    return rows


def loop(x, members, shrinkage):
    """m, C and S_a, row by row; `members` are the places of each class."""
    n, d = x.shape
    mean = sum(x) / n
    spread = sum(np.outer(row - mean, row - mean) for row in x) / n
    total, freedom = np.zeros((d, d)), 0
    for places in members:
        if len(places) > 1:
            centre = sum(x[i] for i in places) / len(places)
            for i in places:
                total += np.outer(x[i] - centre, x[i] - centre)
            freedom += len(places) - 1
    shared = total / freedom
    level = np.trace(shared) / d
    return mean, spread, (1 - shrinkage) * shared + shrinkage * level * np.eye(d)


def members_of(labels):
    if labels.ndim == 2:
        return [np.flatnonzero(column) for column in labels.T]
    return [np.flatnonzero(labels == c) for c in np.unique(labels[labels >= 0])]


def angle(a, b):
    """The largest principal angle between the row spaces of two matrices."""
    a, b = (np.linalg.qr(m.T)[0] for m in (a, b))
    return np.arccos(np.clip(np.linalg.svd(a.T @ b)[1].min(), -1, 1))


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return rng.normal(size=(90, 7)) @ rng.normal(size=(7, 7)) + 30 * rng.normal(size=7)


@pytest.fixture(autouse=True, params=[lda.NARROW, 0], ids=["at once", "in place"])
def way(request, monkeypatch):
    """Both ways to take a matrix apart: that of small ones, and that of large ones."""
    monkeypatch.setattr(lda, "NARROW", request.param)


def labellings():
    rng = np.random.default_rng(1)
    single = rng.integers(-1, 12, 90)  # some unknown
    single[:5] = np.arange(20, 25)  # some alone
    single[40:80] = 3  # one with more rows than a block
    return {"one label": single, "several": rng.random((90, 6)) < 0.3}


@pytest.mark.parametrize("kind", ["one label", "several"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_the_closed_form_is_the_loops(x, kind, shrinkage):
    labels = labellings()[kind]
    mean, spread, shared = loop(x, members_of(labels), shrinkage)
    found = lda.scatter(taken(x), labels, block=16)
    centre, projection = lda.closed_form(found, shrinkage=shrinkage, width=4)
    np.testing.assert_allclose(centre, mean, rtol=1e-12)
    # The symmetric root of the formula, and its PCA.
    values, vectors = np.linalg.eigh(shared)
    root = vectors / np.sqrt(values) @ vectors.T
    axes = np.linalg.eigh(root @ spread @ root)[1][:, ::-1][:, :4]
    expected, made = (x - mean) @ root @ axes, (x - centre) @ projection.T
    np.testing.assert_allclose(made @ made.T, expected @ expected.T, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(projection @ shared @ projection.T, np.eye(4), atol=1e-9)


def test_few_axes_are_the_first_of_all(x):
    matrix = np.cov(x.T)
    values, vectors = np.linalg.eigh(matrix)
    for width in (2, 7, None):
        found, axes = lda.eigen(matrix.copy(), width)
        np.testing.assert_allclose(found, values[::-1][:width], rtol=1e-9)
        np.testing.assert_allclose(np.abs(axes), np.abs(vectors[:, ::-1][:, :width]), atol=1e-9)
        assert (axes.max(axis=0) == np.abs(axes).max(axis=0)).all()


def test_it_spans_what_scikit_learn_finds(x):
    labels = np.arange(90) % 5
    found = lda.scatter(taken(x), labels, block=16)
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage=None).fit(x, labels)
    _, projection = lda.closed_form(found, shrinkage=0.0, width=4)
    assert angle(projection, theirs.scalings_[:, :4].T) < 1e-6
    # Theirs shrinks the total covariance as well: the same pencil, with that.
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.4).fit(x, labels)
    _, spread, lower = lda.moments(found, 0.4)
    spread = 0.6 * spread + 0.4 * np.trace(spread) / 7 * np.eye(7)
    assert angle(lda.leading(spread, lower, 4), theirs.scalings_[:, :4].T) < 1e-6


def test_a_part_is_taken_out_by_subtraction(x):
    labels = labellings()["one label"]
    whole = lda.scatter(taken(x), labels, block=16)
    part = np.flatnonzero(labels % 3 == 1)
    held = lda.scatter(lambda p: x[part[p]], labels[part], origin=whole.origin, block=16)
    rest = np.setdiff1d(np.arange(90), part)
    expected = lda.scatter(lambda p: x[rest[p]], labels[rest], origin=whole.origin, block=16)
    for one, other in zip(whole.without(held), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-8)
    columns = np.array([0, 2, 5])
    some = lda.scatter(taken(x[:, columns]), labels, origin=whole.origin[columns], block=16)
    for one, other in zip(whole.at(columns), some, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-8)


def test_far_from_the_origin_and_with_a_shrinkage_of_one_it_is_the_pca(x):
    labels = np.arange(90) % 9
    near, far = (lda.scatter(taken(x + shift), labels, block=16) for shift in (0.0, 1e6))
    axes = [lda.closed_form(found, shrinkage=1.0, width=3)[1] for found in (near, far)]
    np.testing.assert_allclose(axes[0], axes[1], rtol=1e-5, atol=1e-6)
    pca = np.linalg.eigh(np.cov(x.T))[1][:, ::-1][:, :3].T
    assert angle(axes[0], pca) < 1e-6


def test_what_cannot_be_fitted(x):
    found = lda.scatter(taken(x), np.arange(90), block=16)
    with pytest.raises(UserError, match="all are single"):
        lda.closed_form(found, shrinkage=0.5, width=2)
    copies = lda.scatter(taken(np.repeat(x[:3], 30, axis=0)), np.arange(90) // 30, block=16)
    with pytest.raises(UserError, match="all are copies"):
        lda.closed_form(copies, shrinkage=0.5, width=2)
    # All rows are one, but for what rounding leaves.
    one = np.repeat(x[:1] + 3, 90, axis=0).astype(np.float32)
    one *= (1 + 1e-7 * np.random.default_rng(5).normal(size=one.shape)).astype(np.float32)
    rounded = lda.scatter(taken(one), np.arange(90) // 30, block=16)
    with pytest.raises(lda.Copies, match="all are copies"):
        lda.factor(rounded, 0.5)
    good = lda.scatter(taken(x), np.arange(90) % 9, block=16)
    with pytest.raises(UserError, match="1 to 7 axes"):
        lda.closed_form(good, shrinkage=0.5, width=8)
    with pytest.raises(UserError, match=r"0\.\.1"):
        lda.closed_form(good, shrinkage=1.5, width=2)


@pytest.mark.parametrize("width", [3, 20, 25, 40])
@pytest.mark.parametrize("shrinkage", [0.02, 0.3, 1.0])
def test_of_fewer_rows_than_columns_it_is_the_same_within_their_span(width, shrinkage):
    """Beside the symmetric root of the formula, of rows that were fitted and of others."""
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(25, 40)) * np.linspace(0.2, 3, 40) + 5, np.arange(25) % 7 - 1
    mean, spread, shared = loop(x, members_of(labels), shrinkage)
    found, projection = lda.fitted(taken(x), labels, shrinkage=shrinkage, width=width, block=16)
    np.testing.assert_allclose(found, mean, rtol=1e-12)
    assert projection.shape == (width, 40)
    np.testing.assert_allclose(projection @ shared @ projection.T, np.eye(width), atol=1e-9)
    values, vectors = np.linalg.eigh(shared)
    root = vectors / np.sqrt(values) @ vectors.T
    inside = root @ np.linalg.eigh(root @ spread @ root)[1][:, ::-1][:, : min(width, 24)]
    others = rng.normal(size=(9, 40))
    for rows, expected, made in (
        (x - mean, inside, projection[:24]),
        (others, inside, projection[:24]),
        (others, root, projection if width == 40 else None),  # all axes: nothing is lost
    ):
        if made is not None:
            a, b = rows @ expected, rows @ made.T
            np.testing.assert_allclose(b @ b.T, a @ a.T, rtol=1e-7, atol=1e-7)


def test_coordinates_in_the_span_of_rows_that_depend_on_one_another(rng):
    """A copy, and a sum of two: the products stay, and the span has two dimensions less."""
    x = rng.normal(size=(20, 50)).astype(np.float32)
    x[7], x[9] = x[3], x[1] + x[2]
    found = lda.in_span(x.__getitem__, 20)
    np.testing.assert_allclose(found @ found.T, x.astype(float) @ x.T.astype(float), atol=1e-12)
    assert (np.abs(found).max(axis=0) > 0).sum() == 18 == np.linalg.matrix_rank(found)
