"""Strict by default: no silent dtype promotion, no silent rank promotion, warnings are errors."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A command that begins again for huge pages imports all packages twice.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")

import jax
import pytest

collect_ignore = ["offline_site", "keras_oracle.py"]

# Each worker compiles a program once for all its tests, and for the processes that they start.
# Not all workers together: JAX may read a file there that another process has not written whole.
PROGRAMS = {
    "jax_compilation_cache_dir": tempfile.mkdtemp(prefix="programs"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
atexit.register(shutil.rmtree, PROGRAMS["jax_compilation_cache_dir"], ignore_errors=True)
for name, value in PROGRAMS.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files of minutes, the longest first: workers take whole files, and none should end alone.
LONG = (
    "test_readme.py",
    "test_config_fields.py",
    "test_gpu.py",
    "test_keras.py",
    "test_boundary.py",
    "test_losses.py",
    "test_mesh.py",
    "test_choosing.py",
    "test_configs.py",
    "test_experiment.py",
    "test_degenerate.py",
    "test_trunks.py",
    "test_disk.py",
)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def small_trunk():
    """ResNet-18 is a small stand-in in all the module's tests: they test what is around it."""
    import small_trunk

    with small_trunk.installed():
        yield


@pytest.fixture(scope="module")
def short_trunk():
    """ResNet-18 has one block a stage in all the module's tests: half of it compiles in half."""
    import small_trunk

    with small_trunk.installed(small_trunk.SHORT):
        yield
