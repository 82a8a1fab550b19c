# SPDX-License-Identifier: Apache-2.0
"""The textbook formula in float32: one row of keys, heads repeated."""

import jax
import jax.numpy as jnp

from pallas_kernels.tree_attention import flat_rows


@flat_rows.unpacked
def tree_attention(
  q,  # [batch, q_len, num_heads, head_dim]
  cache_k,  # [batch, num_kv_heads, capacity, head_dim]
  cache_v,  # [batch, num_kv_heads, capacity, head_dim]
  cache_len,  # int32 [batch]
  tree_k,  # [batch, tree_len, num_kv_heads, head_dim]
  tree_v,  # [batch, tree_len, num_kv_heads, head_dim]
  tree_mask,  # bool [batch, q_len, tree_len]
  counts=None,  # int32 [batch], or None
  *,
  scale,
):
  """See `api.tree_attention`."""
  batch, q_len, num_heads, _ = q.shape
  num_kv_heads, capacity = cache_k.shape[1:3]

  def joined(cache, tree):
    # [batch, capacity + tree_len, num_heads, head_dim]
    parts = jnp.swapaxes(cache, 1, 2), tree
    keys = jnp.concatenate([x.astype(jnp.float32) for x in parts], axis=1)
    return jnp.repeat(keys, num_heads // num_kv_heads, axis=2)

  slot = jnp.arange(capacity, dtype=jnp.int32)
  in_cache = slot[None, :] < cache_len[:, None]
  in_cache = jnp.broadcast_to(in_cache[:, None], (batch, q_len, capacity))
  visible = jnp.concatenate([in_cache, jnp.asarray(tree_mask)], axis=-1)
  exact = dict(precision=jax.lax.Precision.HIGHEST)
  logits = jnp.float32(scale) * jnp.einsum(
    "bqhd,bkhd->bhqk",
    q.astype(jnp.float32),
    joined(cache_k, tree_k),
    **exact,
  )
  p = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1)
  out = jnp.einsum("bhqk,bkhd->bqhd", p, joined(cache_v, tree_v), **exact)
  if counts is not None:
    query = jnp.arange(q_len, dtype=jnp.int32)
    is_counted = query[None, :] < counts[:, None]
    out = jnp.where(is_counted[:, :, None, None], out, 0.0)
  return out.astype(q.dtype)
