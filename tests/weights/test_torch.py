"""Files that torch, timm and safetensors write themselves, against the features of timm's own.

Skipped where torch or timm is not installed; test_weights_files.py writes such files without them.
"""

import argparse
import collections

import numpy as np
import pytest
from PIL import Image

import siamese_jax as sj
from siamese_jax import weights
from siamese_jax.__main__ import main
from siamese_jax.errors import UserError

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

SIZE = 64
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
MODELS = ("resnet50", "efficientnet_b0", "tf_efficientnet_b0")


def randomised(name, seed=0):
    """A model whose every leaf matters."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    for key, leaf in model.state_dict().items():
        if key.endswith("running_var") or (key.endswith("weight") and leaf.ndim == 1):
            leaf.copy_(0.5 + torch.rand(leaf.shape, generator=generator))
        elif leaf.ndim == 1:
            leaf.copy_(0.2 * torch.randn(leaf.shape, generator=generator))
    return model


def features(model):
    mean, std = (torch.tensor(model.default_cfg[key]) for key in ("mean", "std"))
    x = (torch.tensor(IMAGES).float() / 255 - mean) / std
    with torch.no_grad():
        return model.forward_head(model.forward_features(x.permute(0, 3, 1, 2)), pre_logits=True)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    made = randomised(request.param)
    return request.param, made, features(made).numpy()


def state(model, prefix=""):
    return {prefix + key: leaf for key, leaf in model.state_dict().items()}


def old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def by_safetensors(model, folder, name):
    from safetensors.torch import save_file

    save_file(state(model), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def for_the_hub(model, folder, name):
    from timm.models import save_for_hf

    save_for_hf(model, folder, safe_serialization=True)
    return folder / "model.safetensors"


def of_timms_training(model, folder, name):
    """As timm's CheckpointSaver writes it; its own file name says nothing."""
    trained = randomised(name, 1)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "arch": name,
        "state_dict": state(model),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(model=name, lr=0.1, betas=(0.9, 0.999)),
        "metric": np.float64(71.3),
        "amp_scaler": {"scale": 65536.0},
    }
    torch.save(value, folder / "last.pth.tar")
    old(value, folder / "last-old.pth.tar")
    return folder / "last.pth.tar", folder / "last-old.pth.tar"


def of_lightning(model, folder, name):
    value = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": collections.OrderedDict(state(model, "model._orig_mod.")),
        "hyper_parameters": {"backbone": name, "where": folder, "device": torch.device("cpu")},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "rng": {"torch": torch.get_rng_state()},
    }
    torch.save(value, folder / "epoch=3.ckpt", pickle_protocol=4)
    return folder / "epoch=3.ckpt"


def whole(model, folder, name):
    torch.save(model, folder / f"{name}-whole")
    old({"model": torch.nn.DataParallel(model)}, folder / f"{name}-old")
    return folder / f"{name}-whole", folder / f"{name}-old"


def an_average(model, folder, name):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    value = {"model": randomised(name, 1).state_dict(), "model_ema": averaged.state_dict()}
    torch.save(value, folder / f"{name}.pt")
    return folder / f"{name}.pt"


WRITERS = (by_safetensors, for_the_hub, of_timms_training, of_lightning, whole, an_average)


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_features_are_those_of_timm(write, model, tmp_path):
    name, made, expected = model
    trunk = name.removeprefix("tf_")
    images = tmp_path / "images"
    images.mkdir()
    for i, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(images / f"{i}.png")
    paths = write(made, tmp_path, name)
    for path in paths if isinstance(paths, tuple) else [paths]:
        found = sj.load_encoder(trunk, path, SIZE)
        assert cosines(found(IMAGES), expected).min() > 1 - 1e-5
        argv = ["embed", f"--encoder={trunk}", f"--weights={path}", f"--images={images}"]
        argv += ["--labels=none", f"--image-size={SIZE}", f"--out={tmp_path}/v.npz"]
        assert main([*argv, f"--cache-dir={tmp_path}/cache"]) == 0
        assert cosines(np.load(tmp_path / "v.npz")["vectors"], expected).min() > 1 - 1e-5


@pytest.mark.slow
def test_the_wrong_form_would_be_seen(tmp_path):
    """That the comparison above can fail: as timm's own form, the features differ."""
    made = randomised("tf_efficientnet_b0")
    path = by_safetensors(made, tmp_path, "tf_efficientnet_b0")
    found = sj.load_encoder("efficientnet_b0", path, SIZE, form="torch")
    assert cosines(found(IMAGES), features(made).numpy()).max() < 1 - 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_blurred_resnet_is_refused_by_its_config(tmp_path):
    path = for_the_hub(randomised("resnetblur50"), tmp_path, "")
    with pytest.raises(UserError, match=r"is of resnetblur50, by config\.json"):
        weights.load("resnet50", path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path):
    made = randomised("resnet18")
    torch.jit.save(torch.jit.trace(made, torch.zeros(1, 3, 64, 64)), tmp_path / "a.pt")
    found = weights.load("resnet18", tmp_path / "a.pt")
    kernel = made.state_dict()["conv1.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found.variables["params"]["stem"]["conv"]["kernel"], kernel)
