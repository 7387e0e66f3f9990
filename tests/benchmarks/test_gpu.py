"""benchmarks/gpu.py runs on a CPU, where neither TensorFlow nor ml_collections is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quick

from benchmarks import gpu, gpu_cases
from configs import resnet_triplet

measuring, records = gpu.measuring, gpu.records
BENCHMARKS = Path(gpu.__file__).parent
# What the package asks for beyond jax, flax, optax and numpy, and what they ask for themselves.
ABSENT = (
    "tensorflow ml_collections keras torch timm h5py huggingface_hub importlib_resources PIL "
    "safetensors tensorboard tensorflow_datasets threadpoolctl tqdm"
)
SITE = f"""
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
"""


def run(tmp_path, *arguments):
    """A benchmark in an environment that has jax, flax, optax and numpy alone."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = quick.FLAGS  # that it runs is what is asked
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def table(text, name):
    """The rows under a name, split at blanks, without what was told between them."""
    lines = text.split(f"\n{name}\n")[1].split("\n\n")[0].splitlines()
    told = ("left out", "PyTorch", "no peak")
    return [re.split(r"\s{2,}", line) for line in lines if not line.startswith(told)]


@pytest.mark.slow
def test_all_parts_run_without_tensorflow_and_ml_collections(tmp_path):
    done = run(tmp_path, BENCHMARKS / "gpu.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "no GPU: sizes for a CPU" in said
    assert said.count("No module named 'torch'") == 1  # once, although two cases lack it
    assert said.count("no peak of memory") == 2  # in train and in triplets
    found = {name: table(said, name) for name in gpu.PARTS}
    for name, (heads, *rows) in found.items():
        assert heads == gpu.PARTS[name].columns
        assert rows, name
        assert all(len(row) == len(heads) for row in rows), name
    assert [row[0] for row in found["matrix"][1:]] == ["bfloat16", "float32"]
    assert [row[1] for row in found["encode"][1:]] == ["bfloat16", "float32"]
    assert [row[2] for row in found["train"][1:]] == ["frozen", "partly", "whole"]
    # 32 rows, 4 of a class: each has 3 positives and 28 negatives.
    assert [row[2] for row in found["triplets"][1:]] == [f"{32 * 3 * 28:,}"]
    searches = ["rank bfloat16", "rank float32", "top_k float32"]
    assert [row[1] for row in found["rank"][1:]] == searches
    assert [row[4] for row in found["rank"][1:3]] == ["100% of 4"] * 2


def test_the_records_need_neither_either(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu, records
print(records.machine())
"""
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+ cores, ", done.stdout)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--quick"], "--quick is no measurement"), (["--parts", "rank"], "jax finds none here")],
)
def test_no_record_is_kept_that_is_none_of_a_gpu(tmp_path, options, says):
    done = run(tmp_path, BENCHMARKS / "gpu.py", "--record", *options)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


class Card:
    device_kind, platform = "NVIDIA H100 80GB HBM3", "gpu"


FOUND = {
    "device": {"kind": Card.device_kind, "platform": "gpu", "jax": "0.10.2"},
    "matrix": {"rates": {"bfloat16": {"4096": 5e14, "8192": 6e14}, "tf32": {"4096": 3e14}}},
    "train": {"seconds": 0.5, "peak": 3_000_000_000},
    "encode": {
        "seconds": {"ours": 0.256, "host": 0.512, "compile": 0.512, "eager": 1.024},
        "flops": 6e13,
        "difference": 0.01,
        "told": ["PyTorch 2"],
    },
}


def test_a_gpus_record_has_date_card_and_shares_of_its_rate(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(case):
        asked.append(case)
        if case.get("moves") == "whole":
            return {"missing": "the device's memory does not suffice"}
        return FOUND[case["part"]]

    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setattr(records, "FOLDER", tmp_path / "benchmarks" / "records")
    monkeypatch.setattr("jax.devices", lambda: [Card])
    records.FOLDER.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "encode", "train", "--record"])
    assert gpu.main() == 0
    kept = records.read(records.FOLDER)
    assert set(kept) == {"gpu_matrix", "gpu_encode", "gpu_train"}
    assert all(Card.device_kind in record["machine"] for record in kept.values())
    encode = kept["gpu_encode"]
    speeds = ["1000.0", "39.1%", "500.0", "500.0", "2.00", "250.0", "4.00", "1e-02"]
    assert encode["notes"] == [f"{Card.device_kind}, jax 0.10.2.", "PyTorch 2"]
    # 6e13 in 0.256 s is 2.34e14 a second: of the best bfloat16 rate, and for float32 of tf32's.
    assert encode["rows"][0][4:] == speeds
    assert encode["rows"][1][5] == "78.1%"
    assert [row[2] for row in kept["gpu_train"]["rows"]] == ["frozen", "partly"] * 6
    assert any("memory does not suffice" in note for note in kept["gpu_train"]["notes"])
    assert {case["batch"] for case in asked if case.get("moves") == "frozen"} == {256}
    assert "left out: train resnet50" in capsys.readouterr().out


def test_a_case_that_fails_is_told_and_the_status_says_so(monkeypatch, capsys):
    found = {**FOUND, "train": {"failed": "ValueError: what it was"}}
    monkeypatch.setattr(gpu, "measured", lambda case: found[case["part"]])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "train"])
    assert gpu.main() == 1
    assert "ValueError: what it was" in capsys.readouterr().out


def test_a_process_gives_its_last_object_or_its_last_words():
    ended = [sys.executable, "-c", "print('{\"a\": 1}'); print('that is all')"]
    assert measuring.in_process(ended) == {"a": 1}
    fallen = [sys.executable, "-c", "raise ValueError('no card')"]
    assert measuring.in_process(fallen) == {"failed": "ValueError: no card"}


def test_the_step_that_is_measured_is_the_default_one():
    config = resnet_triplet.get_config()
    head = {k: v for k, v in config.head.items() if k not in ("init", "shrinkage")}
    assert {**head, **gpu_cases.HEAD} == head
    assert {"activation", "norm", "normalize"} == set(head) - set(gpu_cases.HEAD)
    assert config.loss.to_dict() == {"name": "triplet", **gpu_cases.LOSS}
    assert {k: config.optim[k] for k in gpu_cases.OPTIM} == gpu_cases.OPTIM
    assert config.sampler.per_class == gpu_cases.PER_CLASS
    assert config.sampler.batch_size == gpu.SIZES["train_batch"][0][0]


@pytest.mark.parametrize(
    ("trunk", "billions"),
    # Multiply-adds that torchvision's tables of weights and the papers of ViT's trunks give.
    [("resnet50", 4.09), ("efficientnet_b0", 0.39), ("vit_small_patch16_224", 4.6)],
)
def test_work_is_what_is_published(trunk, billions):
    found = measuring.random_weights(trunk, "torch")
    assert measuring.flops(found, 224) == pytest.approx(2e9 * billions, rel=0.05)


def test_turns_alternate():
    calls = []
    spent = measuring.turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert {name: len(times) for name, times in spent.items()} == {"a": 3, "b": 3}
    times = [measuring.Spent(1.0, 7.0), measuring.Spent(3.0, 8.0), measuring.Spent(2.0, 9.0)]
    assert measuring.median(times) == (2.0, 8.0)
