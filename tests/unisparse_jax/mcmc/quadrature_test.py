# SPDX-License-Identifier: Apache-2.0
"""The samplers as transition matrices on a grid, one dimension, skewed target.

Every entry comes from the kernel itself, its noise set so that it proposes the
grid point; integrals are then exact to the grid.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.unisparse_jax.mcmc import forced
from unisparse_jax.mcmc import (
  control_variates,
  gi_hessian_mala,
  gi_mala,
  gi_rwm,
  poisson,
  preconditioner,
)

GAMMA = 0.6
GRID = np.linspace(-17.0, 8.0, 501)
STEP = GRID[1] - GRID[0]
SAMPLERS = ("gi_mala", "gi_rwm", "gi_hessian_mala")
FUNCTIONS = (
  poisson.Linear(),
  poisson.Square(),
  poisson.Product(((0, 0),)),
  poisson.exponential(np.array([[0.4]])),
  poisson.indicator(1, (0,), (0.3,)),
)


def pi():
  logs = GRID - np.exp(GRID) - GRID**2 / 4
  density = np.exp(logs - logs.max())
  return density / (density.sum() * STEP)


@functools.cache
def grid_terms(name):
  """q, alpha and log ratio [x, y]; F [x, f]; terms [x, y, num_terms, f]."""
  a = preconditioner.diagonal(np.array([1.3]))
  module, more = {
    "gi_mala": (gi_mala, (a,)),
    "gi_rwm": (gi_rwm, (jnp.array([-0.5]), a)),
    "gi_hessian_mala": (gi_hessian_mala, ()),
  }[name]
  hooks = {}
  if name == "gi_hessian_mala":
    hooks = dict(
      covariance_fn=gi_hessian_mala.proposal_covariance,
      precond_grad_fn=gi_hessian_mala.reference_precond_grad,
    )
  variates = control_variates.poisson_terms(
    FUNCTIONS, score=name != "gi_rwm", **hooks
  )
  kernel, gamma = module.build_kernel(), jnp.float64(GAMMA)
  reference = poisson.Reference(gamma, jnp.array([-0.5]), a)

  def one(x, y):
    state = module.init(x, forced.skewed)

    def move(white):
      return forced.step(kernel, state, white, forced.skewed, gamma, *more)[1]

    centre = move(jnp.zeros(1)).proposal_mean
    sd = move(jnp.ones(1)).proposal - centre
    info = move((y - centre) / sd)
    found = variates.term_fn(info, reference)
    return centre[0], sd[0], info.acceptance_rate, info.log_ratio, *found

  points = jnp.asarray(GRID)[:, None]
  every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
  centre, sd, alpha, ratio, values, terms = map(
    np.asarray, every(points, points)
  )
  q = scipy.stats.norm(centre, sd).pdf(GRID[None])
  return q, alpha, ratio, values[:, 0], terms


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_target_is_invariant(name, x64):
  q, alpha, ratio, _, _ = grid_terms(name)
  np.testing.assert_allclose(ratio, -ratio.T, atol=1e-6 * np.abs(ratio).max())
  moves = q * alpha * STEP
  assert np.max(moves.sum(1)) < 1 + 1e-9
  # pi q alpha is symmetric, so that pi P = pi.
  flow = pi()[:, None] * moves
  np.testing.assert_allclose(flow, flow.T, rtol=1e-7, atol=1e-300)
  matrix = moves + np.diag(1 - moves.sum(1))
  np.testing.assert_allclose(pi() @ matrix, pi(), rtol=1e-9, atol=1e-12)
  assert 0.3 < np.sum(pi() * moves.sum(1)) * STEP < 0.99


@pytest.mark.parametrize("name", SAMPLERS)
def test_terms_have_mean_zero(name, x64):
  q, _, _, values, terms = grid_terms(name)
  weight = pi()[:, None] * q * STEP**2  # pi(x) q(y|x), on the grid
  means = np.einsum("xy,xyjf->jf", weight, terms)
  scale = np.sqrt(np.einsum("xy,xyjf->jf", weight, terms**2))
  # The indicator jumps inside a cell of the grid: H2 knows it to a cell only.
  smooth = slice(0, 4)
  assert np.max(np.abs(means / scale)[:, smooth]) < 1e-7
  assert np.max(np.abs(means / scale)) < 0.05
  assert np.min(scale) > 1e-2
  # Given x, the static term alone has mean zero.
  given = np.einsum("xy,xyf->xf", q * STEP, terms[:, :, 1, smooth])
  middle = np.abs(GRID) < 2
  assert np.max(np.abs(given[middle])) < 1e-7
  assert np.all(np.isfinite(values))


def test_the_state_after_the_step_is_the_wrong_one(x64):
  # With x taken after accept/reject, the first term is 0 whenever y is taken.
  q, alpha, _, _, terms = grid_terms("gi_mala")
  weight = pi()[:, None] * q * STEP**2
  right = np.einsum("xy,xyf->f", weight, terms[:, :, 0])
  wrong = np.einsum("xy,xyf->f", weight * (1 - alpha), terms[:, :, 0])
  assert np.abs(right[0]) < 1e-9
  assert np.abs(wrong[0]) > 1e-3


def test_the_poisson_equation_of_the_reference(x64):
  # P G - G = -(F - pi F) on N(m, v), by quadrature over the autoregression.
  mean, variance, gamma = -0.5, 1.3, 0.6
  a = preconditioner.diagonal(np.array([variance]))
  reference = poisson.Reference(jnp.float64(gamma), jnp.array([mean]), a)
  scaled = preconditioner.Scaled(a, reference.noise_scale)
  expectations = (
    mean,
    mean**2 + variance,
    mean**2 + variance,
    np.exp(0.4 * mean + 0.08 * variance),
    scipy.stats.norm(mean, np.sqrt(variance)).sf(0.3),
  )
  points = jnp.array([[-2.0], [0.2], [0.9]])
  for function, expectation in zip(FUNCTIONS, expectations, strict=True):
    if isinstance(function, poisson.Ridge):
      function = dataclasses.replace(function, num_terms=80)

    def residual(x, function=function):
      moved = reference.mean + reference.rho * (x - reference.mean)
      smoothed = function.expected(moved, scaled, reference)
      return smoothed - function.solution(x, reference) + function.value(x)

    found = jax.vmap(residual)(points)[:, 0]
    constant = 0.0
    if not isinstance(function, poisson.Ridge):
      # The series drops pi(F) per term; polynomials are exact as they are.
      constant = float(found[0]) - expectation
      assert abs(constant) < 1e-12
    np.testing.assert_allclose(found, expectation, atol=1e-10)
