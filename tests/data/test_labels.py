"""Labels and ids: equal where Python says so, missing where there is none, in every measure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import siamese_jax as sj
from siamese_jax.data.labels import Codebook, as_ids, is_missing, label_codes
from siamese_jax.errors import UserError
from siamese_jax.losses import miners
from siamese_jax.metrics import bootstrap, by_class, clustering, retrieval, verification
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import range_search, rank


class Ambiguous:
    """Stands for pandas' NA, which is neither equal nor different, nor true."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None


NOTHING = [None, np.nan, float("nan"), np.datetime64("NaT"), "", np.ma.masked, Ambiguous(), ()]

numbers = st.integers(-3, 3) | st.sampled_from(
    [n + d for n in (2**24, 2**53, 2**63, 2**64, -(2**63)) for d in (-1, 0, 1)]
)
texts = st.text(alphabet="ab\0 1é", max_size=3)


def held_as(values, draw):
    """The values as a list, as objects, or in any dtype of NumPy's that holds them exactly."""
    ways = [values, np.fromiter(values, object, len(values))]
    for dtype in (np.int8, np.int64, np.uint64, np.str_, np.bytes_):
        try:
            array = np.array(values, dtype)
        except (OverflowError, UnicodeEncodeError, ValueError):
            continue
        same = [type(a) is type(b) for a, b in zip(array.tolist(), values, strict=True)]
        if array.tolist() == values and all(same):
            ways.append(array)
    return draw(st.sampled_from(ways))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from([numbers, texts, texts.map(str.encode)]))
def test_ids_are_equal_where_python_says_so(data, kind):
    own = data.draw(st.lists(kind, min_size=1, max_size=6))
    ids = data.draw(st.lists(kind | st.sampled_from(own), min_size=1, max_size=8))
    equal = np.array([[a == b for b in ids] for a in own])
    own_held, ids_held = held_as(own, data.draw), held_as(ids, data.draw)

    book = Codebook(as_ids(ids_held, len(ids)))
    np.testing.assert_array_equal(
        book.of(as_ids(own_held, len(own)))[:, None] == book.own[None, :], equal
    )
    # The same everywhere: all rows are equal, so each query finds what is not itself, in order.
    x, y = np.ones((len(own), 2), np.float32), np.ones((len(ids), 2), np.float32)
    options = {"query_ids": own_held, "gallery_ids": ids_held}
    expected = [np.flatnonzero(~row).tolist() for row in equal]
    found = [
        rank(x, y, len(ids), **options).indices,
        rank(x, Gallery(y, ids_held), len(ids), query_ids=own_held).indices,
        sj.rerank.k_reciprocal(x, y, len(ids), k1=1, k2=1, **options).indices,
    ]
    for indices in found:
        assert [row[row >= 0].tolist() for row in indices] == expected
    near = range_search(x, y, 1.0, **options)
    assert np.diff(near.limits).tolist() == [len(row) for row in expected]
    relevant = retrieval.per_query(x, [7] * len(own), y, [7] * len(ids), **options).relevant
    assert relevant.tolist() == [len(row) for row in expected]


@pytest.mark.parametrize("first", [[1, 2], ["1", "2"], [b"1", b"2"]])
@pytest.mark.parametrize("second", [[1, 2], ["1", "2"], [b"1", b"2"]])
def test_ids_of_two_kinds_are_refused_everywhere(first, second):
    x = np.eye(2, dtype=np.float32)
    options = {"query_ids": first, "gallery_ids": second}
    ways = [
        lambda: rank(x, x, 1, **options),
        lambda: range_search(x, x, 9.0, **options),
        lambda: rank(x, Gallery(x, second), 1, query_ids=first),
        lambda: sj.rerank.k_reciprocal(x, x, 1, k1=1, k2=1, **options),
        lambda: sj.rerank.expand_queries(x, x, 1, **options),
        lambda: sj.rerank.diffuse(x, x, 1, **options),
        lambda: retrieval.per_query(x, [1, 1], x, [1, 1], **options),
        lambda: retrieval.of_ranking([[1], [0]], [1, 1], [1, 1], ks=[1], **options),
        lambda: verification.all_pairs(x, [1, 1], x, [1, 2], **options),
    ]
    for way in ways:
        if type(first[0]) is type(second[0]):
            way()
        else:
            with pytest.raises(UserError, match="do not match"):
                way()


@pytest.mark.parametrize("ids", [[0.5, 1], [True, False], [None, "a"], [1, "a"], ["a", b"a"]])
def test_what_is_no_id_is_refused(ids):
    x = np.eye(2, dtype=np.float32)
    for held in (ids, np.fromiter(ids, object, 2)):
        with pytest.raises(UserError, match=r"ids (hold|mix)"):
            rank(x, x, 1, query_ids=held, gallery_ids=[1, 2])
        with pytest.raises(UserError, match=r"ids (hold|mix)"):
            Gallery(x, held)


def test_a_gallery_grows_and_shrinks_by_ids_of_any_width():
    big = 2**63
    gallery = Gallery(np.eye(4, dtype=np.float32)[:2], np.array([-1, 5]))
    gallery.add(np.eye(4, dtype=np.float32)[2:], np.array([big, big + 1], np.uint64))
    assert gallery.ids.tolist() == [-1, 5, big, big + 1]
    own = np.array([big + 1], np.uint64)
    assert rank(np.ones((1, 4)), gallery, 4, query_ids=own).indices.tolist() == [[0, 1, 2, -1]]
    assert gallery.remove(np.array([big], np.uint64)) == 1
    assert gallery.remove(-1) == 1
    assert rank(np.ones((1, 4)), gallery, 4).indices.tolist() == [[1, 3, -1, -1]]
    with pytest.raises(UserError, match=f"id {big} is not in the gallery"):
        gallery.remove([big])


def test_rows_of_one_id_are_views_of_one_item(tmp_path):
    gallery = Gallery([[0.0], [1.0]], ["a", "b"])
    gallery.add([[2.0]], ["a"])
    assert rank([[0.0]], gallery, 3, query_ids=["a"]).indices.tolist() == [[1, -1, -1]]
    assert gallery.remove("a") == 2
    assert len(gallery) == 1
    numbered = Gallery([[0.0], [1.0]], [2, 3])
    with pytest.raises(UserError, match="row number 2 is the id of another row"):
        numbered.add([[5.0]])
    with pytest.raises(UserError, match="NUL"):
        Gallery([[0.0], [1.0]], ["a", "a\0"]).save(tmp_path / "gallery")


@pytest.mark.parametrize("nothing", NOTHING, ids=lambda v: type(v).__name__)
def test_a_missing_label_matches_nothing(nothing):
    none = isinstance(nothing, tuple)  # of several labels
    assert none or is_missing(nothing)
    labels = ["cat", nothing, "cat", nothing, "dog"]
    for held in (labels, np.fromiter(labels, object, 5)):
        found = retrieval.per_query(np.eye(5), held, metrics=["recall@1"])
        assert found.relevant.tolist() == [1, 0, 1, 0, 0]
        assert np.isnan(found.values["recall@1"]).tolist() == [False, True, False, True, True]
        across = retrieval.per_query(np.eye(5), held, np.eye(5), held, metrics=["map"])
        assert across.relevant.tolist() == [2, 0, 2, 0, 1]
        listed = retrieval.of_ranking([[j] for j in (2, 3, 0, 1, 0)], held, ks=[1])
        assert listed.relevant.tolist() == [1, 0, 1, 0, 0]
        if not none:
            rows = by_class.by_class(found, held)
            assert [(row.label, row.queries, row.lone) for row in rows] == [
                ("cat", 2, 0), ("dog", 0, 1),
            ]  # fmt: skip


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, -1, 3, -1]),
        np.array([3, np.nan, 3, np.nan]),
        np.ma.array([3, 3, 3, 3], mask=[0, 1, 0, 1]),
        np.array([3, None, 3, None], object),
        [3.0, None, 3, np.nan],
        np.array(["a", "", "a", ""]),
        np.array([[1], [0], [1], [0]], bool),
        [("a", "b"), (), {"b"}, []],
        ["a", (), ("a", "b"), None],
    ],
)
def test_every_form_of_missing_is_the_same_in_every_measure(rng, labels):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    found = retrieval.per_query(x, labels)
    assert found.relevant.tolist() == [1, 0, 1, 0]
    # Verification: one genuine pair (seen from both ends), all others are impostors'.
    pairs = verification.all_pairs(x, labels)
    assert (pairs.genuine.sum(), pairs.impostor.sum()) == (2, 10)
    assert sum(row.queries for row in by_class.by_class(found, labels)) in (2, 3)


def test_clusters_groups_and_batches_leave_out_what_has_no_label(rng):
    x = np.concatenate([np.eye(2), np.eye(2) + 0.01, 100 * rng.normal(size=(3, 2))])
    found = clustering.clustering(x, ["a", "b", "a", "b", None, "", np.nan], restarts=3)
    assert [found["nmi"], found["ami"]] == pytest.approx([1, 1])
    assert clustering.nmi(["a", "b", None], [1, 2, 1]) == pytest.approx(1)
    # Two groups of two, and two queries without one: four are drawn from.
    values, groups = [0, 0, 1, 1, 0, 1], ["a", "a", "b", "b", None, None]
    alone = bootstrap.interval(values, groups=["a", "a", "b", "b", "c", "d"])
    assert bootstrap.interval(values, groups=groups) == alone
    white = sj.rerank.fit_whitening(x, [1, 2, 1, 2, *range(3, 6)])
    some = sj.rerank.fit_whitening(x, ["a", "b", "a", "b", None, "", np.nan])
    np.testing.assert_array_equal(white.projection, some.projection)
    related = miners.relevant(np.array([1, -1, 1, -1]), np.array([1, -1]))
    np.testing.assert_array_equal(related, [[True, False], [False] * 2] * 2)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from([numbers.filter(lambda n: n != -1), texts.filter(len)]),
    several=st.booleans(),
)
def test_labels_are_shared_where_python_says_so(data, kind, several):
    label = st.frozensets(kind, max_size=3) if several else st.none() | kind
    first = data.draw(st.lists(label, min_size=1, max_size=6))
    second = data.draw(st.lists(label | st.sampled_from(first), min_size=1, max_size=6))

    def held(value):
        return value if isinstance(value, frozenset) else frozenset({value} - {None})

    equal = [[bool(held(a) & held(b)) for b in second] for a in first]
    found = retrieval.per_query(np.ones((len(first), 1)), first, np.ones((len(second), 1)), second)
    assert found.relevant.tolist() == [sum(row) for row in equal]
    vocabulary, _ = label_codes(first, second)
    assert vocabulary == sorted(frozenset().union(*map(held, first + second)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0, 2.0], "whole numbers or strings"),
        ([1.5, None], "whole numbers or strings"),
        (np.array([2.0**60, np.nan]), "whole numbers or strings"),
        ([1, "a"], "mix whole numbers and strings"),
        ([b"a", b"b"], "whole numbers or strings"),
        (np.array(["2020", "2021"], "datetime64[ns]"), "whole numbers or strings"),
        ("ab", "have shape"),
        ({1, 2}, "have shape"),
        ([[1, 0], [0, 1]], "must be bool"),
    ],
)
def test_what_is_no_label_is_refused(labels, message):
    with pytest.raises(UserError, match=message) as error:
        retrieval.per_query(np.eye(2), labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((["a", "b"], ["c", "d"]), "the 2 labels of the queries .* 'a'.* 'c'.* none in common"),
        ((["", ""], ["c", "d"]), "none of the 2 queries has a label"),
        ((["a", "b"], [None, None]), "none of the 2 gallery items has a label"),
        ((["a", "b"],), "no two of the 2 items share a label"),
        (([1, 2], ["a", "b"]), "whole numbers and gallery labels are strings: they never match"),
    ],
)
def test_evaluate_says_why_no_query_has_an_answer(sides, message):
    labels = [part for side in sides for part in (np.eye(2), side)]
    with pytest.raises(UserError, match=message):
        sj.evaluate(*labels)
    with pytest.raises(UserError, match="the gallery is empty"):
        sj.evaluate(np.eye(2), [1, 2], np.zeros((0, 2)), np.zeros(0, int))
