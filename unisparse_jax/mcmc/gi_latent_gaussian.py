# SPDX-License-Identifier: Apache-2.0
"""Gaussian-invariant sampler for likelihoods under a Gaussian prior."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisparse_jax.mcmc import base, checks, covariances, poisson
from unisparse_jax.mcmc import preconditioner as preconditioners

_MIN_CURVATURE = 1e-6


class GILatentGaussianState(NamedTuple):
  """Point of the chain.

  Attributes:
    position: [dim], the latent vector less the prior's mean.
    logdensity: log-likelihood, nats; the prior is not in it.
    likelihood_grad: its gradient.
    curvature: minus its mean second derivative over the coordinates, > 0.
    shifted: U^T (position + likelihood_grad / curvature).
  """

  position: Float[Array, " dim"]
  logdensity: Float[Array, ""]
  likelihood_grad: Float[Array, " dim"]
  curvature: Float[Array, ""]
  shifted: Float[Array, " dim"]


class GILatentGaussianInfo(NamedTuple):
  """The step just taken; as `gi_mala.GIMALAInfo`, with what A_x needs."""

  position_prev: Float[Array, " dim"]
  proposal: Float[Array, " dim"]
  acceptance_rate: Float[Array, ""]
  is_accepted: Bool[Array, ""]
  log_ratio: Float[Array, ""]
  proposal_mean: Float[Array, " dim"]
  likelihood_grad: Float[Array, " dim"]
  curvature: Float[Array, ""]


def mean_curvature(
  likelihood_fn: Callable, position: Float[Array, " dim"]
) -> Float[Array, ""]:
  """Minus the mean second derivative of a sum of functions of one coordinate.

  Its Hessian is diagonal, so that one product with a vector of ones gives it.
  """
  grad_fn = jax.grad(likelihood_fn)
  _, diagonal = jax.jvp(grad_fn, (position,), (jnp.ones_like(position),))
  return -jnp.mean(diagonal)


def init(
  position: Float[Array, " dim"],
  likelihood_fn: Callable,
  covariance: Any,
  curvature_fn: Callable | None = None,
) -> GILatentGaussianState:
  """State at a latent vector; see `build_kernel` for the arguments."""
  return _point(position, likelihood_fn, covariance, curvature_fn)


def build_kernel(curvature_fn: Callable | None = None) -> Callable:
  """The kernel: (rng_key, state, likelihood_fn, step_size, covariance) ->
  (state, info).

  Target: exp(likelihood_fn(x)) N(x; 0, C), C the covariance; for a prior mean m
    let likelihood_fn add it.
  Proposal: N(x + step_size A_x grad log pi(x), step_size (2 - step_size) A_x),
    A_x = (C^-1 + curvature(x) I)^-1, step_size in (0, 2). C^-1 is never formed.
  Invariant: the target. Every proposal is accepted where the likelihood is
    Gaussian with one variance for all coordinates.
  Cost: one gradient and two products with U; a third one where the proposal's
    mean is used, as control variates do.
  Source: Alexopoulos, Dellaportas, Titsias, arXiv 2506.21511; the ratio with
    the prior cancelled is checked against the direct one in the tests.

  Args:
    curvature_fn: latent vector -> scalar, a function of it alone; default
      `mean_curvature`. Values below 1e-6 are raised to it.
  """

  def kernel(rng_key, state, likelihood_fn, step_size, covariance):
    noise_key, accept_key = jax.random.split(rng_key)
    x = state.position
    step_size = jnp.asarray(step_size, x.dtype)
    noise_scale = step_size * (2 - step_size)
    values = covariance.values
    white = jax.random.normal(noise_key, x.shape, x.dtype)
    shrunk = values / (1 + state.curvature * values)
    noise = jnp.sqrt(noise_scale * shrunk) * white
    drift = step_size * state.curvature * shrunk * state.shifted
    y = (1 - step_size) * x + covariance.from_eigen(drift + noise)
    # Left out by the compiler where nothing uses it.
    proposal_mean = y - covariance.from_eigen(noise)
    proposed = _point(y, likelihood_fn, covariance, curvature_fn)
    log_ratio = (
      proposed.logdensity
      - state.logdensity
      + _log_proposal_gap(state, proposed, values, step_size)
    )
    accepted = base.accept_or_reject(
      accept_key, log_ratio, proposed.logdensity, proposed, state
    )
    info = GILatentGaussianInfo(
      x,
      y,
      *accepted[1:],
      proposal_mean,
      state.likelihood_grad,
      state.curvature,
    )
    return accepted.state, info

  return base.Kernel(kernel, _check)


def _check(state, step_size, covariance):
  checks.check_open_interval("step_size", step_size, 0, 2)
  size = covariance.values.shape[0]
  checks.check_shape(
    "position", state.position, ("num_chains", "dim"), (None, size)
  )


def as_top_level_api(
  likelihood_fn: Callable,
  step_size: Any,
  covariance: Any,
  curvature_fn: Callable | None = None,
) -> base.SamplingAlgorithm:
  """The sampler with its arguments bound; see `build_kernel`.

  Args:
    likelihood_fn: latent vector -> log-likelihood, nats; a sum over coordinates
      unless curvature_fn is given.
    step_size: in (0, 2).
    covariance: of the prior, one of `covariances`.
    curvature_fn: see `build_kernel`.

  Raises:
    ValueError: step_size out of range; from `init`, a covariance that has not
      the size of the position.
  """
  checks.check_open_interval("step_size", step_size, 0, 2)
  step = base.bind(build_kernel(curvature_fn), likelihood_fn)

  def init_fn(position, rng_key=None):
    del rng_key
    size = covariance.values.shape[0]
    checks.check_shape("position", position, ("dim",), (size,))
    return init(position, likelihood_fn, covariance, curvature_fn)

  def step_fn(rng_key, state):
    return step(rng_key, state, step_size, covariance)

  return base.SamplingAlgorithm(init_fn, step_fn)


def proposal_covariance(
  info: GILatentGaussianInfo, reference: poisson.Reference
) -> preconditioners.Scaled:
  """The `covariance_fn` of `control_variates` for this sampler.

  Args:
    info: of the step.
    reference: whose covariance is a `covariances.InverseShifted` at a typical
      curvature.
  """
  shifted = reference.covariance._replace(shift=info.curvature)
  return preconditioners.Scaled(shifted, reference.noise_scale)


def reference_precond_grad(
  info: GILatentGaussianInfo, reference: poisson.Reference
) -> Float[Array, " dim"]:
  """The `precond_grad_fn` of `control_variates` for this sampler.

  A_ref grad log pi = A_ref (grad log-likelihood + shift x) - x with the frozen
  A_ref of the reference; with A_x the score would not have mean zero.
  """
  x, shift = info.position_prev, reference.covariance.shift
  return reference.covariance.apply(info.likelihood_grad + shift * x) - x


def reference(
  step_size: Any, mean: Any, covariance: Any, curvature: Any
) -> poisson.Reference:
  """The reference Gaussian of a run.

  Args:
    step_size: of the kernel.
    mean: guess of the posterior mean, [dim].
    covariance: of the prior.
    curvature: a typical one, such as the mean over warm-up.
  """
  return poisson.Reference(
    step_size, mean, covariances.InverseShifted(covariance, curvature)
  )


def _point(position, likelihood_fn, covariance, curvature_fn):
  value, grad = jax.value_and_grad(likelihood_fn)(position)
  if curvature_fn is None:
    curvature = mean_curvature(likelihood_fn, position)
  else:
    curvature = curvature_fn(position)
  curvature = jnp.maximum(curvature, _MIN_CURVATURE)
  shifted = covariance.to_eigen(position + grad / curvature)
  return GILatentGaussianState(position, value, grad, curvature, shifted)


def _log_proposal_gap(state, proposed, values, step_size):
  """log q(x|y) - log q(y|x) + log prior(y) - log prior(x).

  Each term is the difference of the two directions before it is summed: the
  sums grow with dim, their difference does not, and float32 keeps it.
  """
  move = proposed.position - state.position

  def miss(at, forward):  # |v - u - (step_size / curvature) grad(u)|^2 terms
    gap = forward - (step_size / at.curvature) * at.likelihood_grad
    return at.curvature * gap**2

  def fit(at):
    return at.shifted**2 / (values + 1 / at.curvature)

  misses = miss(state, move) - miss(proposed, -move)
  log_dets = jnp.log1p(state.curvature * values) - jnp.log1p(
    proposed.curvature * values
  )
  fits = fit(state) - fit(proposed)
  noise_scale = step_size * (2 - step_size)
  return 0.5 * (
    jnp.sum(misses) / noise_scale
    - jnp.sum(log_dets)
    - step_size / (2 - step_size) * jnp.sum(fits)
  )
