"""The package imports fast, and its numerical core without TensorFlow or ml_collections."""

import subprocess
import sys

CORE = (
    "distances losses losses.miners losses.memory trunks.table weights encoder encoder.embedding "
    "search.ranking search.rerank metrics train.collapse train.optim train.step storage.checkpoint"
)


def test_the_core_brings_neither_tensorflow_nor_ml_collections():
    program = f"""
import importlib, sys
for name in "{CORE}".split():
    importlib.import_module("siamese_jax." + name)
heavy = [m for m in ("tensorflow", "ml_collections", "keras", "torch") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_the_public_names_are_there():
    program = """
import sys, siamese_jax
assert "jax" not in sys.modules  # so the import itself costs milliseconds
for name in siamese_jax.__all__:
    assert getattr(siamese_jax, name) is not None
assert set(siamese_jax.__all__) <= set(dir(siamese_jax))
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
