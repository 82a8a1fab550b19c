# SPDX-License-Identifier: Apache-2.0
"""Two products with the cache, two with the tree, one softmax over both."""

import jax
import jax.numpy as jnp

from pallas_kernels.tree_attention import flat_rows

_MASKED = -1e30


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
  batch, q_len, num_heads, head_dim = q.shape
  num_kv_heads, capacity = cache_k.shape[1:3]
  group = num_heads // num_kv_heads

  # [batch, num_kv_heads, group * q_len, head_dim]
  q = q.reshape(batch, q_len, num_kv_heads, group, head_dim)
  q = jnp.transpose(q, (0, 2, 3, 1, 4))
  q = q.reshape(batch, num_kv_heads, group * q_len, head_dim)
  # [batch, num_kv_heads, tree_len, head_dim]
  tree_k = jnp.transpose(tree_k, (0, 2, 1, 3)).astype(q.dtype)
  tree_v = jnp.transpose(tree_v, (0, 2, 1, 3)).astype(q.dtype)
  cache_k, cache_v = cache_k.astype(q.dtype), cache_v.astype(q.dtype)

  def dots(k):
    logits = jnp.einsum(
      "bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32
    )
    return logits * jnp.float32(scale)

  slot = jnp.arange(capacity, dtype=jnp.int32)
  in_cache = (slot[None, :] < cache_len[:, None])[:, None, None, :]
  # [batch, 1, group * q_len, tree_len]
  in_tree = jnp.tile(tree_mask, (1, group, 1))[:, None]
  cache_logits = jnp.where(in_cache, dots(cache_k), _MASKED)
  tree_logits = jnp.where(in_tree, dots(tree_k), _MASKED)
  top = jnp.maximum(
    jnp.max(cache_logits, axis=-1, keepdims=True),
    jnp.max(tree_logits, axis=-1, keepdims=True),
  )
  top = jax.lax.stop_gradient(top)
  cache_p, tree_p = jnp.exp(cache_logits - top), jnp.exp(tree_logits - top)
  total = jnp.sum(cache_p, axis=-1, keepdims=True) + jnp.sum(
    tree_p, axis=-1, keepdims=True
  )

  def mix(p, v):
    return jnp.einsum(
      "bhqk,bhkd->bhqd",
      (p / total).astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )

  out = (mix(cache_p, cache_v) + mix(tree_p, tree_v)).astype(q.dtype)
  out = out.reshape(batch, num_kv_heads, group, q_len, head_dim)
  out = jnp.transpose(out, (0, 3, 1, 2, 4))
  out = out.reshape(batch, q_len, num_heads, head_dim)
  if counts is None:
    return out
  query = jnp.arange(q_len, dtype=jnp.int32)
  is_counted = query[None, :] < counts[:, None]
  return jnp.where(is_counted[:, :, None, None], out, jnp.zeros((), out.dtype))
