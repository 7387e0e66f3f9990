"""Trunks against timm's own, with random weights that its saving code wrote.

    python benchmarks/timm_trunks.py [--trunks vit_small_patch16_224 ...] [--images 2]

Every leaf is random, so that every leaf matters. Features are compared at the trunk's own size and
at two others, one of them not square: the largest difference to timm in float64, relative to the
largest feature, and timm's own in float32 beside it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timm
import torch
from safetensors.torch import save_file

from siamese_jax import weights
from siamese_jax.trunks.table import TRUNKS, find, normalise


def randomised(name: str) -> Any:
    """timm's model, whose gains are near 1 and whose other leaves are near 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"dynamic_img_size": True} if name.startswith(("vit", "deit")) else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **sizes).eval()
    for key, leaf in model.state_dict().items():
        noise = torch.rand(leaf.shape, generator=generator)
        if key.endswith(("running_var", "gamma")) or (leaf.ndim == 1 and key.endswith("weight")):
            leaf.copy_(0.5 + noise)
        elif leaf.ndim == 1 or key.endswith(("token", "embed", "latent", "gamma")):
            leaf.copy_(0.4 * noise - 0.2)
    return model


def theirs(model: Any, x: np.ndarray, dtype: Any) -> np.ndarray:
    """What `forward_head(pre_logits=True)` gives of [n,h,w,3]."""
    pixels = torch.tensor(x).permute(0, 3, 1, 2).to(dtype)
    patches = getattr(model, "patch_embed", None)
    if patches is not None:  # of its own size alone, timm leaves out what no patch is
        patches.strict_img_size = patches.img_size == tuple(pixels.shape[2:])
    with torch.no_grad():
        model = model.to(dtype)
        return model.forward_head(model.forward_features(pixels), pre_logits=True).double().numpy()


def ours(name: str, form: str) -> Any:
    """The same of our trunk: (variables, [n,h,w,3]) -> [n,c]."""
    module, last = find(name).build(form=form), find(name).stages[-1]

    def run(variables: Any, x: Any) -> Any:
        outputs: Any = module.apply(variables, x)
        return outputs[last].mean((1, 2))

    return jax.jit(run)


def sizes(name: str) -> list[tuple[int, int]]:
    """The trunk's own size and two others, in whole patches."""
    own = find(name).image_size
    plan: Any = getattr(find(name).build(), "plan", None)
    step = getattr(plan, "patch", 32)
    return [(own, own), (5 * step, 8 * step), (own // step // 2 * step + step,) * 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", nargs="+", default=["vit_small_patch16_224"], choices=TRUNKS)
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_args()
    print(f"timm {timm.__version__}, torch {torch.__version__}, jax {jax.__version__}")
    print(
        "trunk                                 size       ours - float64  timm's float32 - float64"
    )
    for name in args.trunks:
        model = randomised(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.safetensors"
            save_file(model.state_dict(), path)
            found = weights.load(name, path)
        run = ours(name, found.form)
        rng = np.random.default_rng(0)
        for size in sizes(name):
            images = rng.integers(0, 256, (args.images, *size, 3), np.uint8)
            x = np.asarray(normalise(images, found.preprocessing))
            exact = theirs(model, x, torch.float64)
            errors = [
                np.abs(y - exact).max() / np.abs(exact).max()
                for y in (np.asarray(run(found.variables, x)), theirs(model, x, torch.float32))
            ]
            print(
                f"{name:37} {size[0]}x{size[1]}  {errors[0]:12.1e}  {errors[1]:12.1e}", flush=True
            )


if __name__ == "__main__":
    main()
