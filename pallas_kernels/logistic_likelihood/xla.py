# SPDX-License-Identifier: Apache-2.0
"""Two matrix products and one exponential a logit; logits are stored."""

import jax.numpy as jnp


def logistic_likelihood(
  signed,  # [num_rows, dim]
  positions,  # [num_chains, dim]
):
  """See `api.logistic_likelihood`."""
  logits = positions @ signed.T
  small = jnp.exp(-jnp.abs(logits))
  values = jnp.sum(jnp.minimum(logits, 0) - jnp.log1p(small), axis=1)
  # Derivative of log sigmoid: the chance of the label that was not seen.
  slopes = jnp.where(logits > 0, small, 1) / (1 + small)
  return values, slopes @ signed
