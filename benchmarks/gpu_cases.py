"""What `gpu.py` measures, a case a process: a dict of plain values in, one out, both as JSON.

    python benchmarks/gpu_cases.py '{"part": "triplets", "batch": 256, ...}'

So a case has the whole memory of the card, its peak is its own, and one that fails ends alone. A
turn is as many calls as take `least` seconds, and waits for the last: a GPU is never idle in it.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory as well
sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

import encode
import jax
import jax.numpy as jnp
import losses
import measuring
import numpy as np
from jax import lax
from train import LAST

from siamese_jax.encoder.model import run_embed
from siamese_jax.losses import LOSSES
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import MEMORY_LIMIT, rank

Case = Mapping[str, Any]
# A call that may return before its work is done, and what waits for the result of one.
Contender = tuple[Callable[[], Any], Callable[[Any], Any]]

# What configs/resnet_triplet.py has, which is the default; that file needs ml_collections.
HEAD = {"layers": (512,), "dropout": 0.3, "signed_sqrt": True, "unit": True, "centre": True}
LOSS = {"mining": "hard", "margin": 0.2}
OPTIM = {"name": "adamw", "learning_rate": 3e-4, "weight_decay": 1e-4}
PER_CLASS = 2


def medians(contenders: Mapping[str, Contender], case: Case) -> dict[str, float]:
    """Seconds of a call of each: they take turns, and the median of a turn counts."""
    counts, runs = {}, {}
    for name, (call, wait) in contenders.items():
        wait(call())  # compiles
        once = measuring.turns({name: lambda c=call, w=wait: w(c())}, 1)[name][0].wall
        counts[name] = max(1, min(1000, round(case["least"] / once)))
        runs[name] = functools.partial(repeated, call, wait, counts[name])
    spent = measuring.turns(runs, case["repeats"])
    return {name: measuring.median(spent[name]).wall / counts[name] for name in runs}


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any], count: int) -> None:
    for _ in range(count):
        last = call()
    wait(last)


def peak() -> int | None:
    """The most bytes that this process had on the device; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def device(case: Case) -> dict[str, Any]:
    """What is measured."""
    first = jax.devices()[0]
    return {"kind": first.device_kind, "platform": first.platform, "jax": jax.__version__}


def matrix(case: Case) -> dict[str, Any]:
    """FLOP/s of each kind of product and each size."""
    cpu = jax.default_backend() == "cpu"
    kinds = [kind for kind in measuring.PRODUCTS if not (cpu and kind == "tf32")]
    return {"rates": {k: {n: measuring.matrix_rate(k, n) for n in case["sizes"]} for k in kinds}}


def encoded(case: Case) -> dict[str, Any]:
    """Seconds of a batch: ours, the same from host memory, PyTorch's; how far they differ."""
    found = measuring.random_weights(case["trunk"], "torch")
    rng, shape = np.random.default_rng(1), (case["batch"], case["pixels"], case["pixels"], 3)
    images = rng.integers(0, 256, shape, np.uint8)
    encoder = encode.ours(found, case["pixels"], case["dtype"])
    there = jax.device_put(images)
    held = (encoder.model, encoder.params, encoder.batch_stats, there, encoder.kernels)
    ours: Contender = (lambda: run_embed(*held), jax.block_until_ready)
    contenders: dict[str, Contender] = {"ours": ours, "host": (lambda: encoder(images), np.asarray)}
    told: list[str] = []
    difference = None
    theirs = torch_contenders(found, images, case["dtype"], told)
    if "eager" in theirs:
        a, b = np.asarray(ours[0]()), theirs["eager"][0]().float().cpu().numpy()
        difference = float(np.abs(a - b).max() / np.abs(b).max())
    spent = medians(contenders | theirs, case)
    work = measuring.flops(found, case["pixels"]) * case["batch"]
    return {"seconds": spent, "flops": work, "difference": difference, "told": told}


def torch_contenders(
    found: Any, images: np.ndarray, dtype: str, told: list[str]
) -> dict[str, Contender]:
    """The same layers and weights in PyTorch, eager and compiled, channels last, on the same kind
    of device; what is left out, and why, goes into `told`."""
    try:
        import torch

        cuda = jax.default_backend() == "gpu"
        if cuda and not torch.cuda.is_available():
            told.append("PyTorch is left out: it finds no GPU")
            return {}
        device = torch.device("cuda" if cuda else "cpu")
        model, scale = encode.torch_model(found, device)
    except ImportError as error:
        of = "" if error.name == "torch" else f" of {found.trunk}"
        told.append(f"PyTorch is left out{of}: {error}")
        return {}
    torch.set_float32_matmul_precision("high")  # tf32, as XLA takes it
    kind = getattr(torch, dtype)
    model = model.eval().to(kind)
    pixels = torch.from_numpy(images).to(device)

    def forward(pixels: Any) -> Any:
        return model(scale(pixels).to(kind)).mean((2, 3))

    def call(run: Callable[[Any], Any]) -> Any:
        with torch.inference_mode():
            return run(pixels)

    def wait(_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()

    contenders: dict[str, Contender] = {"eager": (lambda: call(forward), wait)}
    told.append(f"PyTorch {torch.__version__}")
    compiled = torch.compile(forward)
    try:
        call(compiled)
        contenders["compile"] = (lambda: call(compiled), wait)
    except RuntimeError as error:  # no C++ compiler, or no Triton
        told.append(f"torch.compile is left out: {str(error).strip().splitlines()[0]}")
    return contenders


def trained(case: Case) -> dict[str, Any]:
    """Seconds of a step of the triplet default, and the device's memory at the peak."""
    found = measuring.random_weights(case["trunk"], "torch")
    moving = {"frozen": (), "partly": LAST[case["trunk"]]["ours"], "whole": None}[case["moves"]]
    loss = LOSSES["triplet"](**LOSS)
    made = measuring.training(found, moving, head=HEAD, loss=loss, dtype=case["dtype"], **OPTIM)
    rng, n = np.random.default_rng(1), case["batch"]
    if case["moves"] == "frozen":
        width = made.model.head.unit[0]
        inputs = {"feature": rng.standard_normal((n, width), np.float32)}
    else:
        size = case["pixels"]
        inputs = {"image": rng.integers(0, 256, (n, size, size, 3), np.uint8)}
    labels = (np.arange(n) // PER_CLASS).astype(np.int32)
    batch = jax.device_put({**inputs, "label": labels, "mask": np.ones(n, bool)})
    held = [made.state]

    def step() -> Any:
        held[0], metrics = made.step(held[0], batch)
        return metrics["loss"]

    first = float(step())
    spent = medians({"step": (step, jax.block_until_ready)}, case)["step"]
    return {"seconds": spent, "peak": peak(), "loss": first}


def triplets(case: Case) -> dict[str, Any]:
    """Seconds of the loss over all triplets of a batch, with its gradient."""
    n, c = case["batch"], case["per_class"]
    step = losses.gradient("triplet, all", *losses.data(n, case["axes"], c))
    spent = medians({"": (step, jax.block_until_ready)}, case)[""]
    return {"seconds": spent, "triplets": n * (c - 1) * (n - c), "peak": peak()}


def ranked(case: Case) -> dict[str, Any]:
    """Seconds of a search at each precision, of a product with top_k, and how many are right."""
    q, g, d, k = case["shape"]
    x, y = made_rows(q, d, 0), made_rows(g, d, 1)
    limit = MEMORY_LIMIT if jax.default_backend() == "cpu" else 8 * 2**30
    gallery = Gallery(y, resident=True)
    searches: dict[str, Callable[[], np.ndarray]] = {}
    for kind in case["kinds"]:
        search = functools.partial(rank, x, gallery, k, precision=kind, memory_limit=limit)
        searches[f"rank {kind}"] = lambda search=search: search().indices  # type: ignore[misc]
    for kind in [kind for kind in case["kinds"] if kind != "bfloat16"]:
        searches[f"top_k {kind}"] = plain_search(x, y, k, kind)
    some = np.unique(np.linspace(0, q - 1, case["checked"]).astype(int))
    truth = measuring.float64_sort(x[some], y, k)
    right = {name: float((s()[some] == truth).all(1).mean()) for name, s in searches.items()}
    spent = medians({name: (s, np.asarray) for name, s in searches.items()}, case)
    return {"seconds": spent, "right": right, "checked": len(some)}


def made_rows(n: int, d: int, seed: int) -> np.ndarray:
    """Normal numbers, float32 [n, d], made a block at a time."""
    rows = np.empty((n, d), np.float32)
    for at in range(0, n, 65536):
        block = rows[at : at + 65536]
        np.random.default_rng([seed, at]).standard_normal(dtype=np.float32, out=block)
    return rows


def plain_search(x: np.ndarray, y: np.ndarray, k: int, kind: str) -> Callable[[], np.ndarray]:
    """What one would write: x y^T - |y|^2 / 2 of a block of queries, and the k largest."""
    most = 2**25 if jax.default_backend() == "cpu" else 2**28
    step = max(1, min(len(x), most // len(y)))
    queries, rows = jax.device_put(x), jax.device_put(y)
    half = jnp.sum(rows * rows, axis=1) / 2

    @jax.jit
    def nearest(block: jax.Array, rows: jax.Array, half: jax.Array) -> jax.Array:
        scores = jnp.matmul(block, rows.T, precision=measuring.PRODUCTS[kind][1]) - half[None]
        return lax.top_k(scores, k)[1]

    def search() -> np.ndarray:
        starts = range(0, len(x), step)
        found = [nearest(queries[at : at + step], rows, half) for at in starts]
        return np.concatenate([np.asarray(part) for part in found])

    return search


MEASURES = {
    "device": device,
    "matrix": matrix,
    "encode": encoded,
    "train": trained,
    "triplets": triplets,
    "rank": ranked,
}


def main() -> None:
    case = json.loads(sys.argv[1])
    try:
        found = MEASURES[case["part"]](case)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {"missing": "the device's memory does not suffice"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
