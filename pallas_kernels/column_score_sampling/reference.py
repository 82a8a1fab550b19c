# SPDX-License-Identifier: Apache-2.0
"""Dense float32 oracle: holds every logit, written to be read."""

import jax.numpy as jnp
from jax import lax


def column_score_sampling(
  q,  # [batch, num_rows, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys,  # int32 [batch, num_rows], the last key that a row sees; -1: none
  *,
  scale,
):
  """See `api.column_score_sampling`."""
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  # [batch, num_heads, num_rows, kv_len]
  attn_logits = scale * jnp.einsum(
    "bihd,bjhd->bhij",
    q.astype(jnp.float32),
    k.astype(jnp.float32),
    precision="highest",
  )
  key = lax.broadcasted_iota(jnp.int32, attn_logits.shape, 3)
  visible = key <= last_keys[:, None, :, None]
  attn_logits = jnp.where(visible, attn_logits, -jnp.inf)
  top = attn_logits.max(-1, keepdims=True)
  p = jnp.exp(attn_logits - jnp.where(jnp.isneginf(top), 0.0, top))
  total = p.sum(-1, keepdims=True)
  return (p / jnp.where(total == 0.0, 1.0, total)).sum(2)
