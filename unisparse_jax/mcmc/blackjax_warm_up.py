# SPDX-License-Identifier: Apache-2.0
"""GI-MALA in the warm-up loops of BlackJAX.

    warm_up = blackjax.window_adaptation(
      mcmc.blackjax_warm_up.GIMALA, logdensity_fn,
      is_mass_matrix_diagonal=False, target_acceptance_rate=0.775,
    )
    (state, found), _ = warm_up.run(rng_key, position, num_steps=1000)
    sampler = mcmc.gi_mala.as_top_level_api(
      logdensity_fn, *mcmc.blackjax_warm_up.parameters(**found)
    )

Those loops (`window_adaptation`, `pathfinder_adaptation`) look for a positive
step size and for a covariance as an array, one chain at a time; `adaptation`
does the same for all chains together.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks, gi_mala, preconditioner


class GIMALA:
  """What those loops take for `blackjax.hmc`: `init` and `build_kernel`."""

  init = staticmethod(gi_mala.init)

  @staticmethod
  def build_kernel() -> Callable:
    """(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix) ->
    (state, info); step_size is any positive number, see `parameters`.
    """
    kernel = gi_mala.build_kernel()

    def adapted(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix):
      gamma, a = parameters(step_size, inverse_mass_matrix)
      return kernel(rng_key, state, logdensity_fn, gamma, a)

    return adapted


def parameters(
  step_size: Any, inverse_mass_matrix: Float[Array, "..."]
) -> tuple[Float[Array, ""], Any]:
  """Parameters of `gi_mala` from what such a loop found.

  Args:
    step_size: s > 0; that of `gi_mala` is 2 s / (1 + s), in (0, 2).
    inverse_mass_matrix: [dim] or [dim, dim], estimate of the covariance.

  Returns:
    (step_size, preconditioner).

  Raises:
    ValueError: an array of another shape.
  """
  matrix = jnp.asarray(inverse_mass_matrix)
  checks.require(
    matrix.ndim in (1, 2),
    "inverse_mass_matrix",
    "be a vector or a matrix",
    matrix.shape,
    "(dim,) or (dim, dim)",
  )
  if matrix.ndim == 1:
    a = preconditioner.Diagonal(matrix)
  else:
    a = preconditioner.Dense(matrix, jnp.linalg.cholesky(matrix))
  step_size = jnp.asarray(step_size, matrix.dtype)
  return 2 * step_size / (1 + step_size), a
