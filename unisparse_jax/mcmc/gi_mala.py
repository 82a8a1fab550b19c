# SPDX-License-Identifier: Apache-2.0
"""Gaussian-invariant Metropolis-adjusted Langevin algorithm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisparse_jax.mcmc import base, checks
from unisparse_jax.mcmc import preconditioner as preconditioners


class GIMALAState(NamedTuple):
  """Point of the chain.

  Attributes:
    position: pytree.
    logdensity: there, nats.
    logdensity_grad: pytree like position.
  """

  position: Any
  logdensity: Float[Array, ""]
  logdensity_grad: Any


class GIMALAInfo(NamedTuple):
  """The step just taken; vectors are raveled positions.

  Attributes:
    position_prev: before accept/reject.
    proposal: the point drawn, accepted or not.
    acceptance_rate: probability of accepting it.
    is_accepted: the coin.
    log_ratio: log of the Metropolis-Hastings ratio, not clipped; -inf where
      the proposal's log-density is not finite.
    proposal_mean: mean of the proposal's distribution.
    precond_grad: preconditioner times gradient at position_prev.
  """

  position_prev: Float[Array, " dim"]
  proposal: Float[Array, " dim"]
  acceptance_rate: Float[Array, ""]
  is_accepted: Bool[Array, ""]
  log_ratio: Float[Array, ""]
  proposal_mean: Float[Array, " dim"]
  precond_grad: Float[Array, " dim"]


def init(position: Any, logdensity_fn: Callable) -> GIMALAState:
  """State at a position, a pytree of one floating dtype."""
  base.ravel(position)
  value, grad = jax.value_and_grad(logdensity_fn)(position)
  return GIMALAState(position, value, grad)


def build_kernel() -> Callable:
  """The kernel: (rng_key, state, logdensity_fn, step_size, preconditioner) ->
  (state, info).

  Proposal: N(x + step_size A grad log pi(x), step_size (2 - step_size) A) with
    A the preconditioner, step_size in (0, 2).
  Invariant: the target. Every proposal is accepted on every Gaussian whose
    covariance is A, whatever its mean.
  Cost: one gradient and three products with A or its root.
  Source: Alexopoulos, Dellaportas, Titsias, arXiv 2506.21511. Nothing that
    depends on step_size or A is kept between steps.
  """

  def kernel(rng_key, state, logdensity_fn, step_size, preconditioner):
    noise_key, accept_key = jax.random.split(rng_key)
    x, unravel = base.ravel(state.position)
    grad_x, _ = base.ravel(state.logdensity_grad)
    step_size = jnp.asarray(step_size, x.dtype)
    precond_grad_x = preconditioner.apply(grad_x)
    proposal_mean = x + step_size * precond_grad_x
    white = jax.random.normal(noise_key, x.shape, x.dtype)
    noise = jnp.sqrt(step_size * (2 - step_size)) * preconditioner.root(white)
    y = proposal_mean + noise
    logdensity, grad_y = base.value_and_grad(logdensity_fn, y, unravel)
    precond_grad_y = preconditioner.apply(grad_y)

    def drift_gain(move, grad, precond_grad):
      return (move - 0.5 * step_size * precond_grad) @ grad / (2 - step_size)

    # Quadratic terms of both densities cancel: no solve, no determinant.
    log_ratio = (
      logdensity
      - state.logdensity
      + drift_gain(x - y, grad_y, precond_grad_y)
      - drift_gain(y - x, grad_x, precond_grad_x)
    )
    accepted = base.accept_or_reject(
      accept_key,
      log_ratio,
      logdensity,
      GIMALAState(unravel(y), logdensity, unravel(grad_y)),
      state,
    )
    info = GIMALAInfo(x, y, *accepted[1:], proposal_mean, precond_grad_x)
    return accepted.state, info

  return kernel


def as_top_level_api(
  logdensity_fn: Callable, step_size: Any, preconditioner: Any
) -> base.SamplingAlgorithm:
  """The sampler with its arguments bound.

  Args:
    logdensity_fn: of a position, nats.
    step_size: in (0, 2); see `build_kernel` for the proposal.
    preconditioner: guess of the target's covariance.

  Returns:
    The algorithm.

  Raises:
    ValueError: step_size out of range; from `init`, a preconditioner that has
      not the size of the position.
  """
  checks.check_open_interval("step_size", step_size, 0, 2)
  step = base.bind(build_kernel(), logdensity_fn)

  def init_fn(position, rng_key=None):
    del rng_key
    vector, _ = base.ravel(position)
    preconditioners.check_size(preconditioner, vector.shape[0])
    return init(position, logdensity_fn)

  def step_fn(rng_key, state):
    return step(rng_key, state, step_size, preconditioner)

  return base.SamplingAlgorithm(init_fn, step_fn)
