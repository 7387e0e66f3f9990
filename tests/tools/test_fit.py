"""`fit`: trunks, stages, sizes, shrinkage, width by folds; one folder that all tools take."""

import contextlib
import io
import json

import numpy as np
import pytest
import tiny
from PIL import Image

import siamese_jax as sj
from siamese_jax.__main__ import main
from siamese_jax.data.sources import load_images
from siamese_jax.encoder import lda
from siamese_jax.encoder.embedding import embed_folder
from siamese_jax.errors import UserError
from siamese_jax.train import fit, fitting
from siamese_jax.train.fitting import Candidate

FIT = ["fit", "--trunk=resnet18", "--weights=random"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, short_trunk):
    root = tmp_path_factory.mktemp("fit")
    tiny.make_folder(root / "shop", classes=8, images=4, noise=30)
    rng = np.random.default_rng(1)
    for path in sorted(
        (root / "shop").glob("*/*.png")
    ):  # in a light that says nothing of the class
        lit = np.asarray(Image.open(path), float) + rng.normal(0, 60, 3)
        Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield root


def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(argument) for argument in argv]) == 0
    return printed.getvalue()


def test_one_table_one_folder_and_a_warning(world, tmp_path):
    """Two sizes, two sets of stages, two shrinkages; then measured on what it was fitted to."""
    out = tmp_path / "encoder"
    told = run(*FIT, f"--images={world}/shop", f"--out={out}", "--image-size=24,32",
               "--stages=stage2", "--stages=stage1, stage2", "--shrinkage=.2,.7")  # fmt: skip
    assert "to try, of the trunk's stages: stage2; or stage1 and stage2\n" in told
    table = json.loads((out / "fit.json").read_text())
    tried = {(row["encoder"], row["stages"], row["what"], row["shrinkage"]) for row in table}
    assert len(tried) == 2 * 2 * (2 + 2)  # the bare trunk, and the roots that are fitted to
    assert all(row["low"] <= row["map@r"] <= row["high"] for row in table)
    means = [row["map@r"] for row in table]
    assert means == sorted(means, reverse=True)
    (chosen,) = [row for row in table if row["chosen"]]
    wide = chosen["stages"] == "stage1,stage2"  # stage2 has 128 itself
    assert {row["width"] for row in table} == ({128, "all"} if wide else {"all"})
    assert f"fitted to 32 images of {world}/shop" in told
    encoder = sj.load_encoder(out)
    assert encoder.parts[0].model.stage == chosen["stages"]
    assert encoder.image_size == int(chosen["encoder"].split()[1])
    assert len(encoder.fitted_to) == 32
    again = run("evaluate", f"--encoder={out}", f"--query={world}/shop", f"--out={tmp_path}/a.json")
    assert "was fitted to 32 of the queries and 32 of the gallery" in again
    assert json.loads((tmp_path / "a.json").read_text())["provenance"]["fitted_to"] == {
        "query": 32,
        "gallery": 32,
    }
    bare = [FIT[1].replace("trunk", "encoder"), FIT[2], f"--query={world}/shop"]
    plain = run("evaluate", *bare, "--image-size=32", f"--out={tmp_path}/b.json")
    assert "fitted" not in plain
    differs = run("diff", tmp_path / "b.json", tmp_path / "a.json")
    assert "B: WARNING: the encoder was fitted to 32" in differs
    # Embeddings of a file say it as well.
    run("embed", f"--encoder={out}", f"--images={world}/shop", f"--out={tmp_path}/e.npz")
    assert "fitted to 32" in run("evaluate", f"--query={tmp_path}/e.npz")


def test_where_no_fit_is_better_the_encoder_is_saved_as_it_is(world, tmp_path, caplog):
    """Of classes whose pictures are all but alike, the features find every one; a fit no more."""
    shop = tiny.make_folder(tmp_path / "easy", classes=6, images=3, noise=1)
    out = tmp_path / "encoder"
    told = run(*FIT, f"--images={shop}", f"--out={out}", "--image-size=32", "--stages=stage2")
    assert "3 folds, not 4: each needs two classes" in caplog.text
    assert "is replaced" not in caplog.text
    assert "LDA is not told apart from resnet18 32 stage2 (bare trunk): map@r +0.0000" in told
    assert f"wrote {out}: it is resnet18 32 stage2 (bare trunk), without a fit" in told
    (chosen,) = [row for row in json.loads((out / "fit.json").read_text()) if row["chosen"]]
    assert (chosen["what"], chosen["shrinkage"], chosen["map@r"]) == ("bare trunk", None, 1)
    rows = embed_folder(sj.load_encoder(out), shop).vectors
    how = {"image_size": 32, "stage": "stage2"}
    plain = embed_folder(sj.load_encoder("resnet18", "random", **how), shop).vectors
    np.testing.assert_array_equal(rows, plain)
    assert not sj.load_encoder(out).fitted_to
    # One candidate is not a choice; and what was there makes room.
    one = ["--stages=stage2", "--shrinkage=.5", "--width=8", "--image-size=32"]
    run(*FIT, f"--images={shop}", f"--out={out}", *one)
    assert sj.load_encoder(out).embedding_dim == 8
    whitening = (out / "whitening.npz").read_bytes()
    run(*FIT, f"--images={shop}", f"--out={out}", "--image-size=32", "--stages=stage2")
    assert f"{out}: what was fitted there before is replaced" in caplog.text
    assert sj.load_encoder(out).embedding_dim == 128
    # Killed before the old fit is removed: the pointer says that there is none.
    (out / "whitening.npz").write_bytes(whitening)
    assert sj.load_encoder(out).embedding_dim == 128


def fold_of(labels, count, seed):
    """int [n], the fold of each image of one class; -1 for none."""
    held = [images for images, _ in fitting.held_folds(labels, count, seed)]
    assert (np.sum(held, axis=0) == (labels >= 0)).all()
    return np.where(labels >= 0, np.argmax(held, axis=0), -1)


def map_at_r(x, labels):
    """Of each image among the others of its fold, by cosine."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = []
    for i, row in enumerate(x @ x.T - 9 * np.eye(len(x))):
        many = (labels == labels[i]).sum() - 1
        right = labels[np.argsort(-row)[:many]] == labels[i]
        found.append((np.cumsum(right) / np.arange(1, many + 1) * right).sum() / many)
    return found


def test_what_is_printed_is_short_with_the_bare_trunk_and_the_reasons(world, tmp_path):
    """auto: of its sets the best few; the bare trunk is the last stage without roots."""
    out = tmp_path / "encoder"
    told = run(*FIT, f"--images={world}/shop", f"--out={out}", "--image-size=32").splitlines()
    table = json.loads((out / "fit.json").read_text())
    heading, *lines = told[
        : next(i for i, line in enumerate(told) if "not told apart from" in line)
    ]
    assert heading.split()[:5] == ["encoder", "stages", "what", "shrinkage", "width"]
    assert 3 <= len(lines) <= 7
    means = [float(line.removesuffix("chosen").split()[-3]) for line in lines]
    assert means == sorted(means, reverse=True)
    (bare,) = [row for row in table if row["what"] == "bare trunk"]
    (line,) = [line for line in lines if "bare trunk" in line]
    assert bare["stages"] == "stage4"
    assert f"{bare['map@r']:.4f}" in line
    x = embed_folder(sj.load_encoder("resnet18", "random", 32), world / "shop").vectors
    labels = load_images(world / "shop").label
    fold = fold_of(labels, 4, 0)
    hits = [map_at_r(x[fold == number], labels[fold == number]) for number in range(4)]
    assert bare["map@r"] == pytest.approx(np.mean(np.concatenate(hits)))
    assert sum(line.endswith("chosen") for line in lines) == 1
    alike = sum(row["not told apart from the best"] for row in table)
    assert told[len(lines) + 1].startswith(
        f"{alike - 1} of the other {len(table) - 1} are not told apart from the best"
    )
    assert "asked among themselves" in told[len(lines) + 2]
    why = told[len(lines) + 3]
    assert "resnet18 32 stage4 (bare trunk): map@r" in why
    assert told[len(lines) + 4].startswith("LDA of stage")
    assert "; shrinkage 0." in told[len(lines) + 4]


def test_the_axes_kept_are_the_fewest_that_are_as_good_and_better_than_none(rng, monkeypatch):
    """128 are told from neither side, 256 from no fit; of what is told from nothing the fewest."""
    base, noise = rng.random(400), rng.normal(0, 0.1, 400)
    noise -= noise.mean()
    source = fit.Source("some", lambda stages: None, [("a",)])

    def row(width, gain, spread, shrinkage=0.5):
        values = base + gain + spread * noise
        return fit.Row(source, fitting.Scored(Candidate(("a",), shrinkage, width), values))

    monkeypatch.setattr(fit, "_readable", lambda top, records, options: len(records))

    def kept(*narrower, gain):
        monkeypatch.setattr(fit, "_scored", lambda *rest: [*narrower])
        monkeypatch.setattr(fit, "_parts", lambda *rest: {"a": 512})
        top, plain = row(None, gain, 0), row(None, 0, 0, None)
        chosen, found, (why,) = fit._narrowed(top, plain, range(2000), fit.Grid(), {})
        assert found == [*narrower]
        return chosen.scored.candidate.width, why

    few = "the fewest that are not told apart from the best"
    assert kept(row(128, 0.005, 1), row(256, 0.011, 0.1), gain=0.011) == (256, f"256 axes, {few}")
    assert kept(row(128, 0.005, 1), row(256, 0.011, 0.1), gain=0) == (128, f"128 axes, {few}")
    worse = row(128, 0.001, 0), row(256, 0.002, 0)
    assert kept(*worse, gain=0.01) == (None, "all 512 axes, as fewer are worse")
    monkeypatch.setattr(fit, "_parts", lambda *rest: {"a": 300})
    top, plain = row(None, 0.01, 0), row(None, 0, 0, None)
    said = "all 300 axes, as 200 images are too few to tell which to leave out"
    assert fit._narrowed(top, plain, range(200), fit.Grid(), {}) == (top, [], [said])


def test_the_scores_are_those_of_fitting_anew(world):
    """Folds by subtraction against a fit to the other folds' rows; the stages' columns by hand."""
    encoder = sj.load_encoder("resnet18", "random", 32, stage="stage1,stage2", signed_sqrt=True)
    found = embed_folder(encoder, world / "shop")
    records, x = load_images(world / "shop"), found.vectors.astype(np.float64)
    parts = {"stage1": 64, "stage2": 128}
    candidates = [
        Candidate(("stage2",), 0.3),
        Candidate(("stage1", "stage2"), 0.6, 16),
        Candidate(("stage1",), None),
    ]
    scored = fitting.score(lambda p: x[p], records, parts, candidates, folds=3, seed=1)
    assert {one.candidate for one in scored} == set(candidates)
    fold = fold_of(records.label, 3, 1)
    assert all(len(set(fold[records.label == c])) == 1 for c in range(8))
    columns = {"stage1": np.arange(64), "stage2": np.arange(64, 192)}
    for candidate, values, _ in scored:
        chosen = x[:, np.concatenate([columns[stage] for stage in candidate.stages])]
        hits = []
        for number in range(3):
            held = np.flatnonzero(fold == number)
            rest = np.flatnonzero(fold != number)
            z = chosen[held]
            if candidate.shrinkage is not None:
                own = chosen[rest]
                every = lda.scatter(lambda p, own=own: own[p], records.label[rest])
                mean, projection = lda.closed_form(
                    every, shrinkage=candidate.shrinkage, width=candidate.width or chosen.shape[1]
                )
                z = (z - mean) @ projection.T
            z /= np.linalg.norm(z, axis=1, keepdims=True)
            alike = z @ z.T - 9 * np.eye(len(z))
            label = records.label[held]
            for i, row in enumerate(alike):
                order = np.argsort(-row)[:3]  # three others of its class
                right = label[order] == label[i]
                precision = np.cumsum(right) / (1 + np.arange(3))
                hits.append((precision * right).sum() / 3)
        np.testing.assert_allclose(values, hits, atol=1e-6)


def test_several_labels_and_pairs_are_fitted(world, tmp_path):
    rows = ["path,label"]
    for c in range(8):
        rows += [f"class{c}/{i}.png,colour{c % 4};shape{c % 2}" for i in range(4)]
    (world / "shop" / "several.csv").write_text("\n".join(rows) + "\n")
    try:
        told = run(*FIT, f"--images={world}/shop/several.csv", "--label-separator=;",
                   f"--out={tmp_path}/several", "--image-size=32", "--stages=last",
                   "--shrinkage=.5", "--width=8")  # fmt: skip
    finally:
        (world / "shop" / "several.csv").unlink()
    assert "512 -> 8 dimensions, shrinkage 0.5, fitted to 32 images" in told
    for c in range(8):
        for i, side in enumerate(("anchor", "positive")):
            target = tmp_path / "pairs" / side / f"{c}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((world / "shop" / f"class{c}" / f"{i}.png").read_bytes())
    run(*FIT, f"--images={tmp_path}/pairs", f"--out={tmp_path}/of_pairs", "--image-size=32",
        "--stages=last", "--shrinkage=.3", "--width=8")  # fmt: skip
    assert sj.load_encoder(tmp_path / "of_pairs").fitted_to


def test_what_is_named_twice_is_tried_once(world, tmp_path):
    run("fit", "--trunk=resnet18,resnet18", *FIT[2:], f"--images={world}/shop",
        f"--out={tmp_path}/out", "--image-size=32,32", "--stages=last", "--stages=last",
        "--shrinkage=.5,.5", "--width=8,8")  # fmt: skip
    table = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert len(table) == 3  # with the bare trunk and its roots


def test_widths_and_all_are_tried_together(world, tmp_path):
    """Those that are named, and all axes, and no others."""
    run(*FIT, f"--images={world}/shop", f"--out={tmp_path}/out", "--image-size=32",
        "--stages=last", "--shrinkage=.5", "--width=8,all")  # fmt: skip
    table = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert {row["width"] for row in table if row["shrinkage"] is not None} == {8, "all"}
    with pytest.raises(UserError, match=r"stage and pool: for a trunk by its name; .* is a folder"):
        sj.load_encoder(tmp_path / "out", stage="stage1", pool="max")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images={shop}"], "give --trunk=NAME"),
        (["--images={shop}", "--trunk=resnet18"], "give --out=DIR"),
        (["--trunk=resnet18", "--out={out}"], "give --images=DIR"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--shrinkage=2"], "from 0 to 1"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--width=8,wide"], "--width"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--stages=stage9"], "no stage 'stage9'"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--stages=stage2+stage3"],
         "as in --stages=stage2,stage3, and each set has a --stages of its own"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--pool=average,max"], "give one pooling"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--signed-sqrt"], "takes the roots at any"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--method=pca"],
         "--method=pca knows no classes to choose a trunk by: give --encoder=resnet18"),
        (["--images={shop}/class0", *FIT[1:], "--out={out}", "--labels=none"],
         "has no labels to choose a trunk by: give --encoder=resnet18"),
        (["--images={shop}", *FIT[1:], "--out={out}", "--width=900", "--stages=last",
          "--image-size=32"], "keeps 1 to 512 axes"),
        (["--images={one}", *FIT[1:], "--out={out}", "--image-size=32"], "nothing to choose by"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(world, tmp_path, options, said, capsys):
    tiny.make_folder(tmp_path / "one", classes=2, images=1)
    places = {"shop": world / "shop", "out": tmp_path / "out", "one": tmp_path / "one"}
    assert main(["fit", *(option.format(**places) for option in options)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_too_few_classes_are_said():
    """Of a fold of one class every answer is right, so a fold has two classes or more."""
    with pytest.raises(UserError, match="3 classes have two images"):
        fitting.held_folds(np.array([0, 0, 1, 1, 2, 2, 3, -1]), 4, 0)
    fold = fold_of(np.repeat(np.arange(7), 2), 4, 0)
    assert [len(set(np.repeat(np.arange(7), 2)[fold == f])) for f in range(3)] == [3, 2, 2]
    assert fold.max() == 2


def copies(root, classes, *, differ=0):
    """Three pictures a class, all of them one; but for some classes."""
    rng = np.random.default_rng(7)
    one = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    for number in range(classes):
        (root / f"c{number}").mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, one.shape).astype(np.uint8) if number < differ else one
            Image.fromarray(pixels).save(root / f"c{number}" / f"{i}.png")
    return root


@pytest.mark.parametrize("differ", [0, 1])
def test_copies_of_one_picture_tell_nothing(world, tmp_path, capsys, differ):
    shop = copies(tmp_path / "shop", 6, differ=differ)
    options = [f"--images={shop}", f"--out={tmp_path / 'out'}", "--image-size=32"]
    assert main([*FIT, *options, "--stages=last"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "all images of a class are copies of one another; resnet18 as it is needs no" in error


def test_too_few_classes_come_with_a_way(world, tmp_path, capsys):
    shop = tiny.make_folder(tmp_path / "shop", classes=3, images=3)
    options = [f"--images={shop}", f"--out={tmp_path / 'out'}", "--image-size=32"]
    assert main([*FIT, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    way = "give one set of --stages, one --shrinkage and one --width"
    assert error.endswith(f"to fit all the same, {way}")
    assert main([*FIT, *options, "--stages=last", "--shrinkage=0.5", "--width=8"]) == 0
    assert "whether it is better than resnet18 32 as it is, evaluate" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert (row["map@r"], row["shrinkage"], row["width"]) == (None, 0.5, 8)
    assert row["chosen"] is True


def test_features_of_more_stages_are_taken_as_they_are_only_where_they_are_told(rng, monkeypatch):
    """Of the unfitted ones a better mean alone does not leave the bare trunk."""
    base, noise = rng.random(400), rng.normal(0, 0.3, 400)
    bare = fit.Source("some", lambda stages: stages, [("top",)], fit.BARE, fits=False)
    roots = fit.Source("some", lambda stages: stages, [("top",), ("a", "top")], fit.ROOTS)

    def chosen(gain, spread):
        def scored(source, candidates, *rest):
            values = {
                (): base,
                ("a", "top"): base + gain + spread * (noise - noise.mean()),
            }
            of = [c.stages if c.shrinkage is None and source is roots else () for c in candidates]
            found = [values.get(stages, base) for stages in of]
            worse = [0.5 if c.shrinkage is not None else 0 for c in candidates]
            return [
                fit.Row(source, fitting.Scored(c, v - w))
                for c, v, w in zip(candidates, found, worse, strict=True)
            ]

        monkeypatch.setattr(fit, "_scored", scored)
        monkeypatch.setattr(fit, "_narrowed", lambda top, *rest: (top, [], []))
        monkeypatch.setattr(fit, "content_keys", lambda records: [b"x"])
        monkeypatch.setattr(fit, "told_copies", lambda records, keys: [])
        monkeypatch.setattr(fitting, "held_folds", lambda *args, **kwargs: [])

        class Images:
            label = np.repeat(np.arange(8), 50)

        made = fit.fit([roots, bare], Images())
        return made.chosen.scored.candidate.stages, made.chosen.what

    assert chosen(0.01, 1.0) == (("top",), fit.BARE)
    assert chosen(0.1, 0.1) == (("a", "top"), fit.ROOTS)
