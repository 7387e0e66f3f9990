import pytest
import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("data") / "shop")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs and features of one module's runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
