# SPDX-License-Identifier: Apache-2.0
"""Gaussian-invariant random walk Metropolis."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisparse_jax.mcmc import base, checks
from unisparse_jax.mcmc import preconditioner as preconditioners


class GIRWMState(NamedTuple):
  """Point of the chain.

  Attributes:
    position: pytree.
    logdensity: there, nats.
  """

  position: Any
  logdensity: Float[Array, ""]


class GIRWMInfo(NamedTuple):
  """The step just taken; vectors are raveled positions.

  Attributes:
    position_prev: before accept/reject.
    proposal: the point drawn, accepted or not.
    acceptance_rate: probability of accepting it.
    is_accepted: the coin.
    log_ratio: log of the Metropolis-Hastings ratio, not clipped; -inf where
      the proposal's log-density is not finite.
    proposal_mean: mean of the proposal's distribution.
  """

  position_prev: Float[Array, " dim"]
  proposal: Float[Array, " dim"]
  acceptance_rate: Float[Array, ""]
  is_accepted: Bool[Array, ""]
  log_ratio: Float[Array, ""]
  proposal_mean: Float[Array, " dim"]


def init(position: Any, logdensity_fn: Callable) -> GIRWMState:
  """State at a position, a pytree of one floating dtype."""
  base.ravel(position)
  return GIRWMState(position, logdensity_fn(position))


def build_kernel() -> Callable:
  """The kernel: (rng_key, state, logdensity_fn, step_size, mean,
  preconditioner) -> (state, info).

  Proposal: N((1 - step_size) x + step_size mean,
    step_size (2 - step_size) preconditioner), step_size in (0, 2).
  Invariant: the target. Every proposal is accepted on N(mean, preconditioner)
    and on no other distribution. With step_size 1 this is the independence
    sampler; with mean 0 and the prior's covariance it is pCN.
  Source: Alexopoulos, Dellaportas, Titsias, arXiv 2506.21511; the acceptance
    ratio is derived in the design notes.
  """

  def kernel(rng_key, state, logdensity_fn, step_size, mean, preconditioner):
    noise_key, accept_key = jax.random.split(rng_key)
    x, unravel = base.ravel(state.position)
    step_size = jnp.asarray(step_size, x.dtype)
    white = jax.random.normal(noise_key, x.shape, x.dtype)
    proposal_mean = x - step_size * (x - mean)
    noise = jnp.sqrt(step_size * (2 - step_size)) * preconditioner.root(white)
    y = proposal_mean + noise
    position = unravel(y)
    logdensity = logdensity_fn(position)

    def excess(vector, value):  # log pi - log N(mean, preconditioner)
      return value + 0.5 * jnp.sum(preconditioner.whiten(vector - mean) ** 2)

    log_ratio = excess(y, logdensity) - excess(x, state.logdensity)
    accepted = base.accept_or_reject(
      accept_key,
      log_ratio,
      logdensity,
      GIRWMState(position, logdensity),
      state,
    )
    return accepted.state, GIRWMInfo(x, y, *accepted[1:], proposal_mean)

  return base.Kernel(kernel, _check)


def _check(state, step_size, mean, preconditioner):
  checks.check_open_interval("step_size", step_size, 0, 2)
  dim = base.dim_of_chains(state)
  checks.check_shape("mean", mean, ("dim",), (dim,))
  preconditioners.check_size(preconditioner, dim)


def as_top_level_api(
  logdensity_fn: Callable,
  step_size: Any,
  mean: Float[Array, " dim"],
  preconditioner: Any,
) -> base.SamplingAlgorithm:
  """The sampler with its arguments bound.

  Args:
    logdensity_fn: of a position, nats.
    step_size: in (0, 2); see `build_kernel` for the proposal.
    mean: guess of the target's mean, raveled.
    preconditioner: guess of the target's covariance.

  Returns:
    The algorithm.

  Raises:
    ValueError: step_size out of range, or sizes that disagree.
  """
  checks.check_open_interval("step_size", step_size, 0, 2)
  checks.check_shape("mean", mean, ("dim",), (None,))
  preconditioners.check_size(preconditioner, jnp.shape(mean)[0])
  step = base.bind(build_kernel(), logdensity_fn)

  def init_fn(position, rng_key=None):
    del rng_key
    vector, _ = base.ravel(position)
    preconditioners.check_size(preconditioner, vector.shape[0])
    return init(position, logdensity_fn)

  def step_fn(rng_key, state):
    return step(rng_key, state, step_size, mean, preconditioner)

  return base.SamplingAlgorithm(init_fn, step_fn)
