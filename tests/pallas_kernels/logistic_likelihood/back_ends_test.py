# SPDX-License-Identifier: Apache-2.0
"""logistic_likelihood on every back end that a CPU can run, and on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.logistic_likelihood import api, triton
from tests import helpers
from unisparse_jax.mcmc import targets

# rows, dim, chains: whole tiles, and none of them whole.
SHAPES = {"whole": (64, 16, 64), "ragged": (150, 31, 70), "few": (5, 1, 3)}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  fn = functools.partial(triton.logistic_likelihood, interpret=True)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted", fn)


def make_case(rows, dim, chains, scale=1.0):
  rng = np.random.default_rng(rows)
  signed = rng.standard_normal((rows, dim))
  positions = scale * rng.standard_normal((chains, dim))
  return jnp.float32(signed), jnp.float32(positions)


def in_float64(signed, positions):
  signed, positions = (np.asarray(x, np.float64) for x in (signed, positions))
  logits = positions @ signed.T
  slopes = scipy.special.expit(-logits)
  return scipy.special.log_expit(logits).sum(1), slopes @ signed


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_value_and_gradient(implementation, name):
  case = make_case(*SHAPES[name])
  found = api.logistic_likelihood(*case, implementation=implementation)
  for got, expected in zip(found, in_float64(*case), strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-6)


@pytest.mark.parametrize("splits", [2, 4])
def test_programs_share_the_rows(splits):
  case = make_case(150, 31, 70)  # 3 tiles of rows: a fourth program has none
  found = triton.logistic_likelihood(
    *case, tile=(32, 64, 4, 2, splits), interpret=True
  )
  for got, expected in zip(found, in_float64(*case), strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-6)


@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_large_logits_stay_finite(implementation):
  case = make_case(20, 4, 8, scale=1e4)
  found = api.logistic_likelihood(*case, implementation=implementation)
  for got, expected in zip(found, in_float64(*case), strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-6)


def test_chains_share_one_call_and_the_posterior_is_the_same():
  rng = np.random.default_rng(0)
  features, labels = rng.standard_normal((40, 3)), np.arange(40) % 2
  interpreted = api.IMPLEMENTATIONS["interpreted"]
  own, ours = (
    targets.logistic_regression(
      features, labels, dtype=jnp.float32, likelihood_fn=fn
    )
    for fn in (None, api.differentiable(interpreted))
  )
  positions = jnp.float32(rng.standard_normal((6, 4)))
  both = jax.vmap(jax.value_and_grad(ours.logdensity_fn))
  assert str(jax.make_jaxpr(both)(positions)).count("pallas_call[") == 1
  found = both(positions)
  expected = jax.vmap(jax.value_and_grad(own.logdensity_fn))(positions)
  for got, wanted in zip(found, expected, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
  alone = jax.grad(ours.logdensity_fn)(positions[0])
  np.testing.assert_allclose(alone, found[1][0], rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_named():
  signed, positions = make_case(8, 3, 2)
  with pytest.raises(ValueError, match=r"positions must have shape"):
    api.logistic_likelihood(signed, positions[:, :2])
  with pytest.raises(ValueError, match=r"positions must have dtype float32"):
    api.logistic_likelihood(signed, positions.astype(jnp.float16))
  half = signed.astype(jnp.float16), positions.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match=r"triton needs float32"):
    api.logistic_likelihood(*half, implementation="interpreted")
  wide = make_case(8, 130, 2)
  with pytest.raises(NotImplementedError, match=r"dim <= 128; got dim=130"):
    api.logistic_likelihood(*wide, implementation="interpreted")
  both = jax.vmap(lambda s, p: api.log_likelihood(s, p, implementation="xla"))
  with pytest.raises(NotImplementedError, match=r"one design for all"):
    both(jnp.stack([signed] * 2), positions)
