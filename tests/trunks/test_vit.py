"""Vision Transformers against NumPy in float64, straight from a state dict as timm names it.

`benchmarks/timm_trunks.py` compares the same with timm itself.
"""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import siamese_jax as sj
from siamese_jax import weights
from siamese_jax.encoder.model import build_model, features
from siamese_jax.errors import UserError
from siamese_jax.trunks import positions, vit
from siamese_jax.trunks.table import CLIP, HALF, IMAGENET, TRUNKS, Trunk
from siamese_jax.weights import origin
from siamese_jax.weights.namings import walk
from siamese_jax.weights.sources import SOURCES

PLAN = vit.Plan(patch=4, grid=5, width=24, depth=2, heads=3)
PLANS = {
    "plain": PLAN,
    "dinov2": PLAN._replace(gains=True),
    "registers": PLAN._replace(gains=True, registers=2, class_position=False),
    "clip": PLAN._replace(pre_norm=True, act="quick_gelu", epsilon=1e-5),
    "siglip": PLAN._replace(
        class_token=False, attention_pool=True, act="gelu_tanh", hidden=50, grid=4
    ),
    "dinov3": PLAN._replace(gains=True, registers=2, turned=True),
    "plus": PLAN._replace(gains=True, registers=2, turned=True, biased=True, gated=True),
    "unicom": PLAN._replace(class_token=False, biased=False, act="relu6", flat=10),
}


def entries(plan, grid=None):
    """Names and shapes of timm's state dict."""
    c, hidden, grid = plan.width, plan.hidden or 4 * plan.width, grid or plan.grid
    dense = lambda name, a, b: [(f"{name}.weight", (b, a)), (f"{name}.bias", (b,))]  # noqa: E731
    norm = lambda name: [(f"{name}.weight", (c,)), (f"{name}.bias", (c,))]  # noqa: E731
    places = plan.class_token * plan.class_position + grid**2
    named = [] if plan.turned else [("pos_embed", (1, places, c))]
    named += [("cls_token", (1, 1, c))] * plan.class_token
    named += [("reg_token", (1, plan.registers, c))] * (plan.registers > 0)
    named += [("patch_embed.proj.weight", (c, 3, plan.patch, plan.patch))]
    named += norm("norm_pre") if plan.pre_norm else [("patch_embed.proj.bias", (c,))]
    for i in range(plan.depth):
        named += norm(f"blocks.{i}.norm1") + norm(f"blocks.{i}.norm2")
        named += dense(f"blocks.{i}.attn.qkv", c, 3 * c) + dense(f"blocks.{i}.attn.proj", c, c)
        for fc1 in ("fc1_g", "fc1_x") if plan.gated else ("fc1",):
            named += dense(f"blocks.{i}.mlp.{fc1}", c, hidden)
        named += dense(f"blocks.{i}.mlp.fc2", hidden, c)
        gains = ["gamma_1", "gamma_2"] if plan.turned else ["ls1.gamma", "ls2.gamma"]
        named += [(f"blocks.{i}.{gain}", (c,)) for gain in gains if plan.gains]
        biases = ("q_bias", "v_bias") if plan.turned and plan.biased else ()
        named += [(f"blocks.{i}.attn.{bias}", (c,)) for bias in biases]
    if plan.turned or plan.biased is False:
        named = [entry for entry in named if not entry[0].endswith("qkv.bias")]
    named += norm("norm")
    if plan.flat:
        for i, (a, b) in enumerate(((grid**2 * c, c), (c, plan.flat))):
            named += [(f"feature.{2 * i}.weight", (b, a))]
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                named += [(f"feature.{2 * i + 1}.{leaf}", (b,))]
    if plan.attention_pool:
        named += [("attn_pool.latent", (1, 1, c)), *norm("attn_pool.norm")]
        named += dense("attn_pool.q", c, c) + dense("attn_pool.kv", c, 2 * c)
        named += dense("attn_pool.proj", c, c) + dense("attn_pool.mlp.fc1", c, hidden)
        named += dense("attn_pool.mlp.fc2", hidden, c)
    return [*named, ("head.weight", (7, c)), ("head.bias", (7,))]


def fill(named, seed=0):
    rng = np.random.default_rng(seed)
    state = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in named}
    return {name: np.exp(v) if name.endswith("_var") else v for name, v in state.items()}


# The oracle.

ACTS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu6": lambda x: np.clip(x, 0, 6),
}


def dense(s, name, x):
    return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0.0)


def norm(s, name, x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def attention(q, k, v, heads):
    out = np.zeros_like(q)
    size = q.shape[-1] // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        logits = np.einsum("ntc,nsc->nts", q[..., part], k[..., part]) / math.sqrt(size)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., part] = np.einsum("nts,nsc->ntc", e / e.sum(-1, keepdims=True), v[..., part])
    return out


def mlp(s, name, x, act):
    if f"{name}.fc1_g.weight" in s:
        gate = dense(s, f"{name}.fc1_g", x)
        return dense(s, f"{name}.fc2", gate / (1 + np.exp(-gate)) * dense(s, f"{name}.fc1_x", x))
    return dense(s, f"{name}.fc2", ACTS[act](dense(s, f"{name}.fc1", x)))


def turned(x, rows, columns, heads, rule):
    """Pairs of the last rows * columns tokens, each turned as a complex number is."""
    x, size, first = x.copy(), x.shape[-1] // heads, x.shape[1] - rows * columns
    for place in range(rows * columns):
        at = (2 * (place // columns) + 1) / rows - 1, (2 * (place % columns) + 1) / columns - 1
        for h in range(heads):
            for i in range(size // 2):
                axis, j = divmod(i, size // 4)
                period = np.float32(100 ** (4 * j / size))
                if rule == "dino":
                    period = period.astype(jnp.bfloat16)
                angle = 2 * math.pi * at[axis] / float(period)
                a, b = h * size + i, h * size + i + size // 2
                pair = (x[:, first + place, a] + 1j * x[:, first + place, b]) * np.exp(1j * angle)
                x[:, first + place, a], x[:, first + place, b] = pair.real, pair.imag
    return x


def loop_resize(grid, size, rule):
    """One axis after the other, one output at a time, as PyTorch's documentation and PIL do."""

    def cubic(x, a):
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def axis(rows, new):
        old, out = len(rows), []
        for i in range(new):
            if rule == "dino":
                centre = (i + 0.5) * old / (new + 0.1) - 0.5
                taps = range(math.floor(centre) - 1, math.floor(centre) + 3)
                pairs = [(min(max(j, 0), old - 1), cubic(j - centre, -0.75)) for j in taps]
            else:
                wide = max(old / new, 1.0)
                centre = (i + 0.5) * old / new - 0.5
                pairs = [(j, cubic((j - centre) / wide, -0.5)) for j in range(old)]
            total = sum(w for _, w in pairs)
            out.append(sum(w / total * rows[j] for j, w in pairs))
        return np.stack(out)

    return axis(axis(grid, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)


def oracle(state, x, plan, rule="torch"):
    """{stage: output} of float64 images [n,h,w,3]."""
    s = {name: leaf.astype(np.float64) for name, leaf in state.items()}
    n, p, c = len(x), plan.patch, plan.width
    rows, columns = x.shape[1] // p, x.shape[2] // p
    tokens = np.zeros((n, rows, columns, c))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            tokens[:, i, j] = np.einsum("nabc,ocab->no", window, s["patch_embed.proj.weight"])
    tokens = tokens + s.get("patch_embed.proj.bias", 0.0)
    grid, before = 0.0, plan.class_token * plan.class_position * (not plan.turned)
    if not plan.turned:
        table = s["pos_embed"][0]
        side = math.isqrt(len(table) - before)
        grid = table[before:].reshape(side, side, c)
        grid = grid if side == rows == columns else loop_resize(grid, (rows, columns), rule)
    first = []
    if plan.class_token:
        first.append(s["cls_token"][0] + (table[:1] if before else 0.0))
    if plan.registers:
        first.append(s["reg_token"][0])
    first = [np.repeat(token[None], n, 0) for token in first]
    x = np.concatenate([*first, (tokens + grid).reshape(n, -1, c)], 1)
    if plan.pre_norm:
        x = norm(s, "norm_pre", x, plan.epsilon)
    patches = lambda x: x[:, x.shape[1] - rows * columns :].reshape(n, rows, columns, c)  # noqa: E731
    outputs = {"stem": patches(x), "stem:tokens": x}
    for i in range(plan.depth):
        name = f"blocks.{i}"
        qkv = dense(s, f"{name}.attn.qkv", norm(s, f"{name}.norm1", x, plan.epsilon))
        q, k, v = qkv[..., :c], qkv[..., c : 2 * c], qkv[..., 2 * c :]
        q, v = (y + s.get(f"{name}.attn.{b}_bias", 0.0) for y, b in ((q, "q"), (v, "v")))
        if plan.turned:
            q, k = (turned(part, rows, columns, plan.heads, rule) for part in (q, k))
        y = attention(q, k, v, plan.heads)
        gains = ("gamma_1", "gamma_2") if plan.turned else ("ls1.gamma", "ls2.gamma")
        first, second = (s.get(f"{name}.{gain}", 1.0) for gain in gains)
        x = x + first * dense(s, f"{name}.attn.proj", y)
        y = mlp(s, f"{name}.mlp", norm(s, f"{name}.norm2", x, plan.epsilon), plan.act)
        x = x + second * y
        outputs |= {f"block{i + 1}": patches(x), f"block{i + 1}:tokens": x}
        if plan.class_token:
            outputs[f"block{i + 1}:cls"] = norm(s, "norm", x, plan.epsilon)[:, :1, None]
    mean = norm(s, "norm", patches(x).mean((1, 2)), plan.epsilon)[:, None, None]
    x = norm(s, "norm", x, plan.epsilon)
    outputs |= {"top": patches(x), "top:tokens": x}
    if plan.class_token:
        return outputs | {"cls": x[:, :1, None], "mean": mean}
    if plan.flat:
        x = x.reshape(n, -1)
        for i in (0, 2):
            x, b = x @ s[f"feature.{i}.weight"].T, f"feature.{i + 1}"
            x = (x - s[f"{b}.running_mean"]) / np.sqrt(s[f"{b}.running_var"] + 2e-5)
            x = x * s[f"{b}.weight"] + s[f"{b}.bias"]
        return outputs | {"feature": x[:, None, None]}
    q = np.repeat(dense(s, "attn_pool.q", s["attn_pool.latent"]), n, 0)
    kv = dense(s, "attn_pool.kv", x)
    y = dense(s, "attn_pool.proj", attention(q, kv[..., :c], kv[..., c:], plan.heads))
    y = y + mlp(s, "attn_pool.mlp", norm(s, "attn_pool.norm", y, plan.epsilon), plan.act)
    return outputs | {"attention": y[:, :, None]}


@pytest.fixture
def small(monkeypatch):
    """The plans as trunks of the table."""
    for name, plan in PLANS.items():
        build, pixels = partial(vit.ViT, plan), plan.patch * plan.grid
        row = Trunk(build, plan.widths, positions.RULES, pixels, "none", HALF)
        monkeypatch.setitem(TRUNKS, f"small_{name}", row)


@pytest.mark.parametrize("name", PLANS)
def test_every_stage_is_that_of_the_definition(name, small, tmp_path, rng):
    """From a file that timm could have written; at its own size and two others, by both rules."""
    plan = PLANS[name]
    state = fill(entries(plan))
    save_file(state, tmp_path / "a.safetensors")
    found = weights.load(f"small_{name}", tmp_path / "a.safetensors")
    assert (found.form, found.preprocessing) == ("torch", HALF)
    if not plan.flat:
        np.testing.assert_array_equal(found.classifier["kernel"], state["head.weight"].T)
    own = plan.patch * plan.grid
    sizes = (((own, own), "torch"), ((28, 12), "torch"), ((12, 36), "dino"))
    for size, rule in sizes[:1] if plan.flat else sizes:
        x = rng.normal(size=(2, *size, 3))
        module = TRUNKS[f"small_{name}"].build(form=rule)
        outputs = jax.jit(module.apply)(found.variables, jnp.asarray(x, jnp.float32))
        expected = oracle(state, x, plan, rule)
        assert outputs.keys() == expected.keys()
        stages = {stage for stage in expected if ":" not in stage}
        assert TRUNKS[f"small_{name}"].channels.keys() == stages
        for stage, output in outputs.items():
            scale = np.abs(expected[stage]).max()
            np.testing.assert_allclose(output, expected[stage], rtol=0, atol=1e-5 * scale)
        if size == (own, own):
            go_on = jax.jit(partial(module.apply, after="block1"))
            rest = go_on(found.variables, outputs["block1:tokens"])
            assert rest.keys() == {stage for stage in outputs if not stage.startswith("stem")}
            for stage, output in rest.items():
                np.testing.assert_allclose(output, outputs[stage], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "registers"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_fine_tune_on_the_patches_mean(name, prefix, small, tmp_path, rng, caplog):
    """timm's `fc_norm` stands behind the mean, in place of the last norm; an export keeps that."""
    plan, images = PLANS[name], rng.integers(0, 256, (2, 20, 20, 3), np.uint8)
    state = fill(entries(plan))
    x = (images - 127.5) / 127.5
    outputs = oracle(state, x, plan)
    theirs = {prefix + re.sub(r"^norm\.", "fc_norm.", n): leaf for n, leaf in state.items()}
    save_file(theirs, tmp_path / "a.safetensors")
    found = weights.load(f"small_{name}", tmp_path / "a.safetensors")
    weights.save(tmp_path / "a.npz", found)
    assert "the norm of the patches' mean (fc_norm): --stage=mean" in caplog.text
    assert "keras" not in caplog.text  # a form that no Vision Transformer has
    np.testing.assert_array_equal(found.classifier["kernel"], state["head.weight"].T)
    for file in ("a.safetensors", "a.npz"):
        encoder = sj.load_encoder(f"small_{name}", tmp_path / file)
        assert encoder.model.stage == "mean"
        np.testing.assert_allclose(encoder(images), outputs["mean"][:, 0, 0], rtol=0, atol=1e-4)
        asked = sj.load_encoder(f"small_{name}", tmp_path / file, stage="cls")(images)
        np.testing.assert_allclose(asked, outputs["cls"][:, 0, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_both_forms_of_attention_are_the_definition(platform, rng, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    q, k, v = (rng.normal(0, 3, (2, n, 12)) for n in (5, 7, 7))
    heads = [jnp.asarray(x.reshape(2, -1, 3, 4), jnp.float32) for x in (q, k, v)]
    found = vit.attention(*heads).reshape(2, 5, 12)
    np.testing.assert_allclose(found, attention(q, k, v, 3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rule", positions.RULES)
@pytest.mark.parametrize(("old", "new"), [(5, (3, 9)), (14, (14, 15)), (37, (16, 24))])
def test_positions_are_resized_by_the_rule_of_their_source(rule, old, new, rng):
    grid = rng.normal(size=(old, old, 2))
    found = positions.resize(jnp.asarray(grid, jnp.float32), new, rule)
    np.testing.assert_allclose(found, loop_resize(grid, new, rule), rtol=0, atol=3e-6)
    same = jnp.asarray(grid, jnp.float32)
    assert positions.resize(same, (old, old), rule) is same


def test_weights_of_another_grid_keep_it(small, tmp_path, rng, caplog):
    """Fine-tuned at another size: resized from there, and exported and loaded as they are."""
    state = fill(entries(PLAN, grid=7))
    save_file(state, tmp_path / "a.safetensors")
    found = weights.load("small_plain", tmp_path / "a.safetensors")
    assert found.image_size == 28  # 7 patches of 4, where the trunk has 5
    assert "are of 7 x 7 patches: images of 28 pixels" in caplog.text
    weights.save(tmp_path / "a.npz", found)
    again = weights.load("small_plain", tmp_path / "a.npz")
    x = rng.normal(size=(1, 20, 20, 3))
    module = TRUNKS["small_plain"].build()
    assert again.image_size == 28
    output = module.apply(again.variables, jnp.asarray(x, jnp.float32))["cls"]
    np.testing.assert_allclose(output, oracle(state, x, PLAN)["cls"], rtol=0, atol=1e-4)
    state["pos_embed"] = state["pos_embed"][:, :-1]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"stem/positions has .* resize its positions to a square"):
        weights.load("small_plain", tmp_path / "b.safetensors")


@pytest.mark.parametrize(("pixels", "line"), [(28, None), (16, "resized to 4 x 4: image_size=28")])
def test_a_config_comes_before_the_grid_of_the_file(pixels, line, small, tmp_path, caplog):
    """What it says is the size of images; where that resizes the positions, one line says so."""
    scaled = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": pixels}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(scaled))
    save_file(fill(entries(PLAN, grid=7)), tmp_path / "a.safetensors")
    assert sj.load_encoder("small_plain", tmp_path / "a.safetensors").image_size == pixels
    (said,) = [r.getMessage() for r in caplog.records if "a.safetensors" in r.getMessage()]
    assert ("resized" in said) == (line is not None)
    assert (line or "") in said


@pytest.mark.parametrize(
    ("file", "trunk", "form", "scaling"),
    [
        ("dino_deitsmall16_pretrain.pth", "vit_small_patch16_224", "dino", IMAGENET),
        ("dinov2_vitb14_pretrain.pth", "vit_base_patch14_dinov2", "dino", IMAGENET),
        ("dinov2_vitb14_reg4_pretrain.pth", "vit_base_patch14_reg4_dinov2", None, IMAGENET),
        ("vit_small_patch16_224.dino.safetensors", "vit_small_patch16_224", None, IMAGENET),
        ("vit_small_patch16_224.augreg_in21k.bin", "vit_small_patch16_224", None, None),
        ("vit_base_patch32_clip_224.openai.bin", "vit_base_patch32_clip_quickgelu_224", None, None),
        ("vit_base_patch32_clip_224.openai_ft_in1k", "vit_base_patch32_clip_224", None, None),
    ],
)
def test_a_files_name_tells_what_its_leaves_do_not(file, trunk, form, scaling, tmp_path):
    told = origin.find(tmp_path / file, (), trunk, ())
    assert (told.name, told.form, told.preprocessing) == (trunk, form, scaling)
    if "_clip" in trunk:
        gelu, quick = "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"
        with pytest.raises(UserError, match=f"is of {trunk}"):
            origin.find(tmp_path / file, (), gelu if trunk == quick else quick, ())


def test_the_feature_is_that_of_timm():
    """The class token, SigLIP's attention pooling; of DINOv3 timm takes the patches' mean."""
    last = {name: list(plan.widths)[-1] for name, plan in PLANS.items()}
    others = {"siglip": "attention", "dinov3": "top", "plus": "top", "unicom": "feature"}
    assert last == dict.fromkeys(PLANS, "cls") | others


def test_sources_are_as_timm_1_0_31_lists_them():
    """(Pixels, size, licence) of those that are not as most of their trunk's."""
    for trunk, tag, expected in (
        ("vit_small_patch16_224", "dino", (IMAGENET, 224, "Apache-2.0")),
        ("vit_base_patch16_224", "mae", (IMAGENET, 224, "CC-BY-NC-4.0")),
        ("vit_base_patch16_384", "augreg_in1k", (HALF, 384, "Apache-2.0")),
        ("vit_large_patch14_clip_224", "laion2b", (HALF, 224, "Apache-2.0")),
        ("vit_large_patch14_clip_224", "laion400m_e32", (CLIP, 224, "MIT")),
        ("vit_base_patch16_dinov3", "lvd1689m", (IMAGENET, 256, "DINOv3-License")),
        ("vit_small_plus_patch16_dinov3_qkvb", "lvd1689m", (IMAGENET, 256, "DINOv3-License")),
        ("vit_tiny_patch16_dinov3_qkvb", "eupe_lvd1689m", (IMAGENET, 256, "FAIR-Noncommercial")),
        ("vit_base_patch14_dinov2", "lvd142m", (IMAGENET, 518, "Apache-2.0")),
    ):
        source = SOURCES[trunk, f"timm:{trunk}.{tag}"]
        found = (source.preprocessing, source.image_size, source.licence)
        assert (source.hub, *found) == (f"timm/{trunk}.{tag}", *expected)
    trunk = "vit_large_patch14_clip_quickgelu_336"
    assert SOURCES[trunk, f"timm:{trunk}.openai"].hub == "timm/vit_large_patch14_clip_336.openai"


def test_sources_of_facebookresearch_and_unicom():
    """As their torch.hub files, and Unicom's table of hashes, have them."""
    meta = "https://dl.fbaipublicfiles.com/"
    for trunk, name, form, size, url in (
        (
            "vit_small_patch16_224",
            "dino_deitsmall16",
            *("dino", 224, "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
        ),
        (
            "vit_large_patch14_reg4_dinov2",
            "dinov2_vitl14_reg4",
            *("torch", 518, "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"),
        ),
    ):
        source = SOURCES[trunk, f"facebookresearch:{name}"]
        assert (source.form, source.image_size, source.url) == (form, size, meta + url)
        assert (source.preprocessing, source.digest) == (IMAGENET, "")
    source = SOURCES["vit_large_patch14_unicom_336", "unicom"]
    assert source.url.endswith("unicom/releases/download/l14_336px/FP16-ViT-L-14-336px.pt")
    assert (source.preprocessing, source.image_size, source.licence) == (CLIP, 336, "MIT")
    assert source.digest.startswith("sha256:3916ab5a")


def test_a_feature_of_all_patches_is_for_their_own_grid(small, rng):
    """Its norms are those of the batch where it is trained, and never folded."""
    found = sj.load_encoder("small_unicom", "random")
    assert (found.image_size, found.embedding_dim) == (20, 10)
    with pytest.raises(UserError, match=r"16 x 16 pixels.* images of 20 x 20 alone"):
        found.at_size(16)(np.zeros((1, 16, 16, 3), np.uint8))
    images = rng.integers(0, 256, (4, 20, 20, 3), np.uint8)
    assert found(images).std(0).min() > 0
    model = build_model(weights.load("small_unicom", "random"), train_stages=("feature",))
    variables = weights.load("small_unicom", "random").variables
    run = jax.jit(partial(features, model, train=True))
    trained, statistics = run(variables["params"], variables["batch_stats"], images)
    np.testing.assert_allclose(trained.mean(0), 0, atol=1e-5)
    assert np.abs(statistics["feature"]["fc2"]["norm"]["mean"]).max() > 0


def test_class_tokens_of_several_blocks(small, rng):
    """As DINO's linear evaluation joins them: behind the last norm; here of unit length each."""
    images = rng.integers(0, 256, (3, 20, 20, 3), np.uint8)
    load = partial(sj.load_encoder, "small_registers", "random")
    one, last = (load(stage=stage)(images) for stage in ("block1:cls", "block2:cls"))
    np.testing.assert_allclose(last, load()(images), atol=1e-6)
    assert np.abs(one - last).max() > 0.1
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    both = np.concatenate([unit(one), unit(last)], 1)
    for options in ({"stage": "block1:cls,block2:cls"}, {"stage": "block1,block2", "pool": "cls"}):
        np.testing.assert_allclose(load(**options)(images), both, atol=1e-5)
    for trunk, stage in (("small_registers", "top"), ("small_siglip", "block1")):
        with pytest.raises(UserError, match=f"{trunk} has no class token beside '{stage}'"):
            sj.load_encoder(trunk, "random", stage=f"{stage}:cls")


@pytest.mark.parametrize("stage", ["cls:cls", "mean:max", "cls:gem3", "block1,cls:max"])
def test_one_vector_is_not_pooled(stage, small):
    name, way = stage.split(",")[-1].split(":")
    line = f"'{name}' of small_plain is one vector, which nothing pools: .* without '{way}'"
    with pytest.raises(UserError, match=line):
        sj.load_encoder("small_plain", "random", stage=stage)
    assert sj.load_encoder("small_plain", "random", stage=f"{name}:average").model.stage


def test_a_trunk_is_known_by_what_it_was_known_by():
    """Fits and caches name it so: options that came later are left out where they are not used."""
    assert repr(PLANS["dinov3"]).endswith("attention_pool=False, turned=True)")
    assert repr(PLANS["unicom"]).endswith("turned=False, biased=False, flat=10)")
    clip = repr(TRUNKS["vit_base_patch32_clip_224"].build().plan)
    assert clip == (
        "Plan(patch=32, grid=7, width=768, depth=12, heads=12, hidden=0, act='gelu', "
        "epsilon=1e-05, gains=False, registers=0, class_token=True, class_position=True, "
        "pre_norm=True, attention_pool=False, turned=False)"
    )
    distinct = {repr(plan) for plan in PLANS.values()}
    assert len(distinct) == len(PLANS)


def test_an_encoder_gives_the_class_token_or_what_is_asked_for(small, rng):
    images = rng.integers(0, 256, (3, 20, 20, 3), np.uint8)
    load = partial(sj.load_encoder, "small_registers", "random")
    found = load()
    assert (found.image_size, found.embedding_dim) == (20, 24)
    x = jnp.asarray((images / 255.0 - 0.5) / 0.5, jnp.float32)
    outputs = found.model.trunk.apply({"params": found.params["trunk"]}, x)
    np.testing.assert_allclose(found(images), outputs["cls"][:, 0, 0], atol=1e-5)
    means = load(stage="top")(images)
    np.testing.assert_allclose(means, outputs["top"].mean((1, 2)), atol=1e-5)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    both = load(stage="top,cls")(images)
    expected = np.concatenate([unit(means), unit(np.asarray(outputs["cls"][:, 0, 0]))], 1)
    np.testing.assert_allclose(both, expected, atol=1e-5)
    assert found.at_size(28)(images.repeat(2, 1)[:, :28].repeat(2, 2)[:, :, :28]).shape == (3, 24)
    with pytest.raises(UserError, match="no stage 'cls'; choose from stem, block1"):
        sj.load_encoder("small_siglip", "random", stage="cls")


def test_an_own_size_that_is_no_multiple_leaves_pixels_out(small, rng, monkeypatch):
    """At the bottom and on the right, as timm's so400m at 384: 27 patches of 14."""
    plan = PLANS["siglip"]._replace(rest=3)
    row = Trunk(partial(vit.ViT, plan), plan.widths, positions.RULES, 19, "none", HALF)
    monkeypatch.setitem(TRUNKS, "small_rest", row)
    images = rng.integers(0, 256, (2, 19, 19, 3), np.uint8)
    found = sj.load_encoder("small_rest", "random")
    same = sj.load_encoder("small_siglip", "random")
    assert found.image_size == 19
    np.testing.assert_allclose(found(images), same(images[:, :16, :16]), atol=1e-5)
    with pytest.raises(UserError, match="18 x 18 pixels are no whole number"):
        found.at_size(18)(images[:, :18, :18])
    own = TRUNKS["vit_so400m_patch14_siglip_384"]
    assert (own.image_size, own.build().plan.grid, own.build().plan.rest) == (384, 27, 6)


@pytest.mark.parametrize("size", [18, 3])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(size, small):
    match = rf"{size} x {size} pixels are no whole number.*4 x 4.*multiple, such as"
    with pytest.raises(UserError, match=match):
        sj.load_encoder("small_plain", "random", image_size=size)


def test_bfloat16_is_close(small, rng):
    images = rng.integers(0, 256, (2, 20, 20, 3), np.uint8)
    exact, near = (
        sj.load_encoder("small_dinov2", "random", dtype=dtype)(images)
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.linalg.norm(near - exact) < 0.05 * np.linalg.norm(exact)


def test_every_leaf_is_trained(small, rng):
    """Also where BatchNorm is asked to train, of which there is none."""
    found = weights.load("small_registers", "random")
    model = build_model(found, stage="block1,cls", train_stages=("block2", "top"))
    images = jnp.asarray(rng.integers(0, 256, (2, 28, 20, 3), np.uint8))
    direction = jnp.asarray(rng.normal(size=(2, 48)), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        pooled, statistics = features(model, params, {}, images, train=True)
        assert statistics == {}
        return jnp.vdot(pooled, direction)

    for path, leaf in walk(gradient(found.variables["params"])):
        assert np.abs(leaf).max() > 0, path
