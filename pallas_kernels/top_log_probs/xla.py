# SPDX-License-Identifier: Apache-2.0
"""`lax.top_k` and a log-sum-exp."""

import jax
import jax.numpy as jnp
from jax import lax


def top_log_probs(
  logits,  # [..., vocab_size]
  width,
):
  """See `api.top_log_probs`."""
  logits = logits.astype(jnp.float32)
  top, tokens = lax.top_k(logits, width)
  log_probs = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return tokens.astype(jnp.int32), jnp.minimum(log_probs, 0.0)
