# SPDX-License-Identifier: Apache-2.0
"""Strict modes for every test, and what must be set before JAX starts."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Linux gives a process 65,530 mappings, and a compiled program takes some: the
# compiler aborts when none is left.
_MOST_MAPPINGS = 30_000
_MAPPINGS = pathlib.Path("/proc/self/maps")
_files_seen = set()
# JAX says of its Triton back end that it will go. On a card the selection of
# blocks and steps of decoding run through it by default, tests of an op or not.
_TRITON_GOES = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend:DeprecationWarning"
)


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
  if item.path not in _files_seen:
    _files_seen.add(item.path)
    _forget_many_programs()


def _forget_many_programs():
  """Forgets what was compiled, where it takes many mappings."""
  if (
    _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS
  ):
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marks
def pytest_collection_modifyitems(items):
  """Compiles as for users what runs on a GPU, the only reason to skip here.

  On a CPU the mark stands where it matters what the compiler makes of a
  program: back ends by XLA, programs for TPUs, the same bits in two processes.
  """
  has_gpu = jax.default_backend() == "gpu"
  for item in items:
    if item.get_closest_marker("gpu"):
      item.add_marker("optimised")
      item.add_marker(_TRITON_GOES)
      if not has_gpu:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish():
  """Keeps what the imports made out of every garbage collection to come."""
  gc.collect()
  gc.freeze()
  # Tracing makes many small objects and few cycles: by default a collection
  # comes so often that a tenth of the time goes into them.
  gc.set_threshold(50_000, 20, 50)
