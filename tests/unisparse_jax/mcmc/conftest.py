# SPDX-License-Identifier: Apache-2.0
import jax
import pytest

from unisparse_jax.mcmc import chain_loop

# Longer bodies of loops save users time and cost tests the compilation of them;
# `base_test` compares both.
chain_loop.UNROLL_AHEAD["cpu"] = 1


@pytest.fixture
def x64():
  """float64 for one test; the others stay in float32."""
  with jax.enable_x64(True):
    yield
