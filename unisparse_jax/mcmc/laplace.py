# SPDX-License-Identifier: Apache-2.0
"""Mode and curvature of a log-density: where samplers start."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisparse_jax.mcmc import checks


class Laplace(NamedTuple):
  """Gaussian approximation at the mode.

  Attributes:
    mean: the mode.
    covariance: inverse of minus the Hessian there.
    is_converged: whether the last Newton step was below the tolerance.
  """

  mean: Float[Array, " dim"]
  covariance: Float[Array, "dim dim"]
  is_converged: Bool[Array, ""]


def laplace(
  logdensity_fn: Callable,
  start: Float[Array, " dim"],
  *,
  max_steps: int = 100,
) -> Laplace:
  """Newton's method with step halving on a log-concave density.

  Args:
    logdensity_fn: of a vector.
    start: where to start, [dim].
    max_steps: Newton steps at most.

  Returns:
    The approximation; `is_converged` is False where the density is not concave
    along the way or the steps did not suffice.

  Raises:
    ValueError: start is no vector.

  Cost: a Hessian and a Cholesky factor of it for each step, O(dim^3).
  """
  checks.check_shape("start", start, ("dim",), (None,))
  return _newton(logdensity_fn, start, max_steps)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _newton(logdensity_fn, start, max_steps):
  value = logdensity_fn
  gradient = jax.grad(value)
  hessian = jax.hessian(value)
  tolerance = jnp.finfo(start.dtype).eps * 100

  def newton_step(carry):
    position, count, _ = carry
    slope = gradient(position)
    factor = jnp.linalg.cholesky(-hessian(position))
    step = jax.scipy.linalg.cho_solve((factor, True), slope)
    decrement = slope @ step  # twice the gain that Newton's model expects
    here = value(position)

    def too_long(scale):
      there = value(position + scale * step)
      is_short = there >= here - 1e-6 * jnp.abs(here)
      return ~is_short & (scale > 1e-6)

    scale = jax.lax.while_loop(
      too_long, lambda s: s / 2, jnp.ones((), start.dtype)
    )
    moved = position + jnp.where(jnp.isfinite(step), scale * step, 0)
    return moved, count + 1, decrement

  def going_on(carry):
    _, count, decrement = carry
    # A NaN decrement (no Cholesky factor) ends the search.
    return (decrement > tolerance) & (count < max_steps)

  first = (start, jnp.int32(0), jnp.asarray(jnp.inf, start.dtype))
  mode, _, decrement = jax.lax.while_loop(going_on, newton_step, first)
  precision = -hessian(mode)
  covariance = jnp.linalg.inv((precision + precision.T) / 2)
  return Laplace(mode, (covariance + covariance.T) / 2, decrement <= tolerance)
