"""Strict modes for every test, and what must be set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Where it matters what the compiler makes of a program, or where another
# process must give the same bits.
_OPTIMISED = {"pallas_kernels", "attention", "training"}


@pytest.fixture(scope="module", autouse=True)
def quick_compile(request):
  """Less optimisation: most tests are many programs that run for moments."""
  parts = request.path.relative_to(request.config.rootpath).parts
  quick = not _OPTIMISED & set(parts)
  jax.config.update("jax_disable_most_optimizations", quick)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised():
  """All optimisation, for one test of a module that goes without."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items):
  """Skips `gpu` tests on machines without one: the only skip of this kind."""
  if jax.default_backend() == "gpu":
    return
  for item in items:
    if item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
