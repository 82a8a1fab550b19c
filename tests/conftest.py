"""Strict modes for every test, and what must be set before JAX starts."""

import gc
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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Less optimisation: most tests are many programs that run for moments.

  Set before any fixture of the test runs, for the processes that it starts
  too; what was compiled the other way, by a test before it in this process, is
  forgotten.
  """
  quick = item.get_closest_marker("optimised") is None
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
  if jax.config.read("jax_disable_most_optimizations") != quick:
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marks
def pytest_collection_modifyitems(config, items):
  """Marks what is `optimised` by its folder.

  Skips `gpu` tests on machines without one: the only skip of this kind.
  """
  for item in items:
    if _OPTIMISED & set(item.path.relative_to(config.rootpath).parts):
      item.add_marker("optimised")
  if jax.default_backend() == "gpu":
    return
  for item in items:
    if item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish():
  """Keeps what the imports made out of every garbage collection to come."""
  gc.collect()
  gc.freeze()
