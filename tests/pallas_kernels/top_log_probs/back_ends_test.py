# SPDX-License-Identifier: Apache-2.0
"""top_log_probs on every back end that a CPU can run, and on a card."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.top_log_probs import api, triton
from tests import helpers


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  fn = functools.partial(triton.top_log_probs, interpret=True)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted", fn)


def by_numpy(logits, width):
  logits = np.asarray(logits, np.float64)
  order = np.argsort(-logits, axis=-1, kind="stable")[..., :width]
  log_probs = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
  return order, np.take_along_axis(log_probs, order, axis=-1)


def check(logits, width, implementation):
  tokens, log_probs = api.top_log_probs(
    logits, width, implementation=implementation
  )
  wanted_tokens, wanted = by_numpy(logits, width)
  assert tokens.dtype == jnp.int32
  assert log_probs.dtype == jnp.float32
  np.testing.assert_array_equal(tokens, wanted_tokens)
  np.testing.assert_allclose(log_probs, wanted, rtol=1e-6, atol=4e-6)
  return log_probs


@pytest.mark.parametrize(
  ("shape", "width"),
  [((2, 3, 4096), 8), ((5, 1000), 3), ((17,), 17), ((1, 1), 1)],
)
@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_equals_numpy(implementation, shape, width):
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal(shape).astype(np.float32)
  check(jnp.asarray(logits), width, implementation)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_lower_of_equals_comes_first(implementation, dtype):
  rng = np.random.default_rng(1)
  logits = rng.integers(0, 4, (6, 200))  # some 50 of each value
  check(jnp.asarray(logits, dtype), 80, implementation)


@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_impossible_tokens_come_last_and_once_each(implementation):
  logits = np.full((2, 40), -np.inf, np.float32)
  logits[0, [3, 7]] = 1.0, 2.0
  logits[1, 39] = -1e4
  log_probs = check(jnp.asarray(logits), 6, implementation)
  assert np.all(np.isneginf(log_probs[:, 2:]))
  assert float(log_probs[1, 0]) == 0.0  # never above


def test_bad_arguments_are_named():
  logits = jnp.zeros((2, 5))
  with pytest.raises(ValueError, match=r"^width must be at most the voc.*<= 5"):
    api.top_log_probs(logits, 6)
  with pytest.raises(ValueError, match=r"^width must be an integer >= 1"):
    api.top_log_probs(logits, 0)
  with pytest.raises(ValueError, match=r"^logits must have an axis of tokens"):
    api.top_log_probs(jnp.float32(0.0), 1)
  wide = jnp.zeros((1, 32_769))
  with pytest.raises(NotImplementedError, match=r"got vocab_size=32769"):
    api.top_log_probs(wide, 2, implementation="interpreted")
