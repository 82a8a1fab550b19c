# SPDX-License-Identifier: Apache-2.0
"""The textbook formula by automatic differentiation."""

import jax
import jax.numpy as jnp


def logistic_likelihood(
  signed,  # [num_rows, dim]
  positions,  # [num_chains, dim]
):
  """See `api.logistic_likelihood`."""

  def one(position):
    return jnp.sum(jax.nn.log_sigmoid(signed @ position))

  return jax.vmap(jax.value_and_grad(one))(positions)
