# SPDX-License-Identifier: Apache-2.0
import jax
import pytest


@pytest.fixture
def x64():
  """float64 for one test; the others stay in float32."""
  with jax.enable_x64(True):
    yield
