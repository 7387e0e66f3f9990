"""The report: one honest file. What it shows is read back from its markup with a real parser."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from siamese_jax.errors import UserError
from siamese_jax.report.plots import line_chart, pareto_front, pareto_plot, smooth, thin, ticks
from siamese_jax.report.run_page import Example, Tile, choose_examples, write_report
from siamese_jax.report.tiles import thumbnail
from siamese_jax.train.metrics_log import read_curves

RESULTS = {
    "test": {
        "before": {"recall@1": 0.25, "map@r": 0.5, "queries": 40},
        "after": {"recall@1": 0.75, "map@r": 0.375, "queries": 40},
    },
    "trunk": {"name": "efficientnet_lite0", "sha256": "ab" * 32},
}


class _Parser(html.parser.HTMLParser):
    """Collects tags with their attributes and all text; checks that tags nest."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    parser = _Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def decode(uri):
    head, data = uri.split(",", 1)
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.fixture
def images(tmp_path, rng):
    paths = []
    for i in range(4):
        pixels = rng.integers(0, 256, (50, 200, 3), np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def make_page(tmp_path, images, **changes):
    found = [Tile(images[1], "cat", 0.125, True), Tile(images[2], "<dog>", 0.5, False)]
    lost = [Tile(images[2], "dog", 0.25, False), Tile(images[3], "dog", 0.375, False)]
    options = {
        "title": "A & B",
        "results": RESULTS,
        "run": {"seed": 7, "config": {"loss": {"margin": 0.2}}, "versions": {"jax": "0.11"}},
        "curves": {"loss": [(0, 1.0), (10, 0.5)], "test/recall@1": [(10, 0.75)]},
        "examples": [
            Example(Tile(images[0], "cat"), found),
            Example(Tile(images[0], "fox"), lost),
        ],
        **changes,
    }
    path = tmp_path / "report" / "index.html"
    write_report(path, **options)
    return parse(path)


def test_page_loads_nothing_from_outside(tmp_path, images):
    page = make_page(tmp_path, images)
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:image/") for address in addresses)
    assert {"link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    text = (tmp_path / "report" / "index.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text


def test_summary_shows_values_and_gains(tmp_path, images):
    text = make_page(tmp_path, images).text
    start = text.index("recall@1")
    assert text[start : start + 4] == ["recall@1", "0.2500", "0.7500", "+0.5000"]
    assert "-0.1250" in text
    queries = text.index("queries")
    assert text[queries : queries + 3] == ["queries", "40", "40"]  # a count has no gain


def test_warnings_and_provenance_are_shown_in_full(tmp_path, images):
    page = make_page(tmp_path, images, warnings=["fell back to <lite0>"])
    assert any("fell back to <lite0>" in text for text in page.text)
    assert ("p", {"class": "warning", "role": "alert"}) in page.tags
    for fact in ("ab" * 32, "loss.margin", "0.2000", "jax", "0.11"):
        assert fact in page.text
    calm = make_page(tmp_path, images)
    assert not any(attrs.get("class") == "warning" for _, attrs in calm.tags)


def test_neighbours_carry_frame_label_distance_and_rank(tmp_path, images):
    page = make_page(tmp_path, images)
    frames = [attrs.get("class") for tag, attrs in page.tags if tag == "li"]
    assert frames == ["right", "wrong", "wrong", "wrong"]
    rows = [attrs["class"] for tag, attrs in page.tags if tag == "article"]
    assert rows == ["card query-row", "card query-row first-wrong none-right"]
    for text in ("1 ✓", "2 ✗", "cat", "<dog>", "0.1250", "0.5000"):
        assert text in page.text
    assert "nearest one wrong: 1" in page.text
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 6
    assert decode(pictures[0]["src"]).shape == (24, 96, 3)


def test_neighbours_without_labels_are_neither_right_nor_wrong(tmp_path, images):
    example = Example(Tile(images[0], "?"), [Tile(images[1], "?", 0.5)])
    page = make_page(tmp_path, images, examples=[example])
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "li"] == [""]
    assert not any("✓" in text or "✗" in text for text in page.text)


def test_missing_image_does_not_stop_the_page(tmp_path, images):
    example = Example(Tile(str(tmp_path / "gone.png"), "cat"), [Tile(images[1], "cat", 0.5, True)])
    page = make_page(tmp_path, images, examples=[example])
    assert "no image" in page.text


def test_thumbnail_is_upright_and_on_white(tmp_path):
    turned = np.zeros((40, 80, 3), np.uint8)
    turned[:, :40] = [255, 0, 0]  # left half; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    shown = decode(thumbnail(str(tmp_path / "turned.jpg")))
    assert shown.shape == (80, 40, 3)
    assert shown[10, 20, 0] > 200
    assert shown[70, 20, 0] < 50

    clear = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert decode(thumbnail(str(tmp_path / "clear.png"))).min() > 250

    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert decode(thumbnail(str(tmp_path / "palette.png"))).min() > 250

    deep = np.full((8, 8), 128 * 257, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_allclose(decode(thumbnail(str(tmp_path / "deep.png"))), 128, atol=2)

    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "numbers.tif")
    np.testing.assert_allclose(decode(thumbnail(str(tmp_path / "numbers.tif"))), 128, atol=2)

    (tmp_path / "text.jpg").write_text("no picture")
    assert thumbnail(str(tmp_path / "text.jpg")) is None


def test_curves_of_a_resumed_and_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 2, "loss": 3.0},
        {"step": 1, "loss": 4.0, "note": "text", "flag": True},
        {"step": 2, "loss": 2.5},
        {"step": 2, "test/recall@1": 0.5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert read_curves(path) == {"loss": [(1, 4.0), (2, 2.5)], "test/recall@1": [(2, 0.5)]}
    path.write_text('{"loss": 1}\n{"step": 1, "loss": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        read_curves(path)


@given(
    q=st.integers(1, 200),
    n=st.integers(1, 50),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_examples_have_the_share_of_failures_of_the_whole(q, n, share, seed):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 1000, (q, 3))
    indices[rng.random(q) < 0.1] = -1
    correct = rng.random((q, 3)) > share
    rows = choose_examples(indices, correct, n, seed)
    usable = indices[:, 0] >= 0
    assert len(rows) == min(n, usable.sum())
    assert len(set(rows)) == len(rows)
    assert (np.sort(rows) == rows).all()
    assert usable[rows].all()
    if len(rows):
        wrong = (~correct[rows, 0]).sum()
        assert abs(wrong - len(rows) * (~correct[usable, 0]).mean()) <= 0.5 + 1e-9
    np.testing.assert_array_equal(rows, choose_examples(indices, correct, n, seed))


def test_examples_change_with_the_seed_and_every_query_can_be_drawn():
    indices, correct = np.zeros((30, 1), int), np.arange(30)[:, None] % 3 > 0
    drawn = [tuple(choose_examples(indices, correct, 6, seed)) for seed in range(100)]
    assert len(set(drawn)) > 90
    assert {row for rows in drawn for row in rows} == set(range(30))


def test_smooth_is_the_weighted_mean_of_the_past():
    points = [(i, y) for i, y in enumerate([1.0, 5.0, -2.0, 0.5])]
    for t, (_, value) in enumerate(smooth(points, 0.8)):
        weights = 0.8 ** np.arange(t, -1, -1.0)
        want = np.average([y for _, y in points[: t + 1]], weights=weights)
        assert value == pytest.approx(want, abs=1e-10)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_inside_and_evenly_spaced(low, width):
    high = low + width
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 12
    slack = 1e-6 * max(abs(low), width)
    assert marks[0] >= low - slack
    assert marks[-1] <= high + slack
    np.testing.assert_allclose(np.diff(marks), np.diff(marks)[0], rtol=1e-2, atol=slack)


def test_thin_keeps_both_ends():
    points = [(i, float(i)) for i in range(1001)]
    kept = thin(points, 100)
    assert len(kept) == 100
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert thin(points[:5], 100) == points[:5]


def test_line_chart_places_higher_values_higher_and_skips_nan():
    chart = line_chart("loss", {"train": [(0, 1.0), (1, float("nan")), (2, 3.0)]})
    parser = _Parser()
    parser.feed(chart)
    dots = [attrs for tag, attrs in parser.tags if tag == "circle"]
    assert len(dots) == 2
    assert float(dots[0]["cy"]) > float(dots[1]["cy"])
    assert float(dots[0]["cx"]) < float(dots[1]["cx"])
    assert "no finite value" in line_chart("loss", {"train": [(0, float("inf"))]})


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20))
def test_pareto_front_is_what_no_point_beats(points):
    array = np.array(points)
    front = pareto_front(points)
    for i, point in enumerate(array):
        as_good, better = (array >= point).all(1), (array > point).any(1)
        assert (i in front) == (not (as_good & better).any())


def test_pareto_plot_names_the_front():
    drawn = pareto_plot(
        "t", [(10.0, 0.9), (100.0, 0.5), (5.0, 0.1)], ["a", "b", "c<"], ["x", "x", "y"],
        x="images/s", y="recall@1",
    )  # fmt: skip
    parser = _Parser()
    parser.feed(drawn)
    assert "a" in parser.text
    assert "b" in parser.text
    assert "c<" not in parser.text
    assert "c<: recall@1 0.1, 5 images/s" in parser.text  # the tip of the beaten one


def test_curves_that_are_less_asked_for_are_folded(tmp_path, images):
    points = [(1, 1.0), (2, 0.5)]
    names = ["grad_norm", "test/recall@1", "validation/recall@1", "test/mrr", "loss"]
    make_page(tmp_path, images, curves=dict.fromkeys(names, points))
    text = (tmp_path / "report" / "index.html").read_text()
    places = [text.index(f"<h3>{name}</h3>") for name in ("loss", "recall@1", "grad_norm", "mrr")]
    assert places == sorted(places)
    assert places[1] < text.index("2 more curves") < places[2]
    assert text.count("<svg") == 4  # one chart for the recall of both splits


def test_pareto_plot_labels_equal_points_once():
    drawn = pareto_plot("t", [(1.0, 0.5), (1.0, 0.5)], ["a", "b"], ["x", "y"], x="s", y="r")
    assert "a, b</text>" in drawn
    assert drawn.count('class="name"') == 1


def test_pareto_plot_of_similar_speeds_has_numbers():
    """Between 289 and 376 images/s no 1, 2 or 5 times a power of ten lies."""
    drawn = pareto_plot(
        "t", [(289.0, 0.5), (376.0, 0.4)], ["a", "b"], ["x", "y"], x="images/s", y="recall@1"
    )
    assert 'text-anchor="middle">300</text>' in drawn
    assert 'text-anchor="middle">360</text>' in drawn
