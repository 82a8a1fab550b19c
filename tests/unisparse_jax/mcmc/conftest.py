# SPDX-License-Identifier: Apache-2.0
import jax
import pytest


@pytest.fixture
def x64():
  """float64 for one test; the others stay in float32."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="package", autouse=True)
def quick_compile():
  """Less optimisation: these tests are many programs that run for moments."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
