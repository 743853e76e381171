"""Settings shared by all tests: one CPU device by default, strict numerics, and the real data if there is any."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora and golden outputs: PLM_REAL_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("PLM_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("real-data test did not run: set PLM_REAL_DATA to the folder of real corpora")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Every test builds its stores in a folder of its own."""
    monkeypatch.setenv("PLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def quick_compiles():
    """Toys compile far longer than they run, half as long without XLA's optimisations; what is proved of them holds for
    any. Tests that start processes have `fixtures.children.quick_compiles`."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def workdirs(tmp_path_factory):
    """{name: workdir} of `fixtures.models`."""
    from fixtures.models import make_workdirs

    return make_workdirs(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def models(workdirs):
    """{name: model} of `fixtures.models`."""
    from fixtures.models import make_models

    return make_models(workdirs)
