# SPDX-License-Identifier: Apache-2.0
"""A stable sort of all logits."""

import jax
import jax.numpy as jnp


def top_log_probs(
  logits,  # [..., vocab_size]
  width,
):
  """See `api.top_log_probs`."""
  logits = logits.astype(jnp.float32)
  order = jnp.argsort(-logits, axis=-1, stable=True)[..., :width]
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  log_probs = jnp.take_along_axis(log_probs, order, axis=-1)
  return order.astype(jnp.int32), jnp.minimum(log_probs, 0.0)
