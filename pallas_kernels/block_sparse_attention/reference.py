# SPDX-License-Identifier: Apache-2.0
"""Dense float32 oracle: quadratic in memory, written to be read."""

import jax
import jax.numpy as jnp
from jax import lax


def block_sparse_attention(
  q,  # [batch, q_len, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  v,  # [batch, kv_len, num_kv_heads, head_dim]
  kv_block_indices,  # int32 [batch, num_mask_heads, num_q_blocks, max_blocks]
  num_kv_blocks,  # int32 [batch, num_mask_heads, num_q_blocks]
  q_offset,  # int32 [batch]
  kv_len,  # int32 [batch]
  *,
  block_q,
  block_kv,
  causal,
  scale,
):
  """See `api.block_sparse_attention`."""
  num_heads, num_kv_heads = q.shape[2], k.shape[2]
  k = jnp.repeat(k, num_heads // num_kv_heads, axis=2)
  v = jnp.repeat(v, num_heads // num_kv_heads, axis=2)

  # [batch, num_heads, q_len, kv_len]
  shape = (q.shape[0], num_heads, q.shape[1], k.shape[1])
  query = lax.broadcasted_iota(jnp.int32, shape, 2)
  key = lax.broadcasted_iota(jnp.int32, shape, 3)
  kept = key < kv_len[:, None, None, None]
  if causal:
    kept &= key <= q_offset[:, None, None, None] + query
  # The mask row of each query: [batch, num_heads, q_len, max_blocks]
  block_of_query = jnp.arange(q.shape[1]) // block_q
  to_heads = num_heads // num_kv_blocks.shape[1]
  listed = jnp.where(
    lax.broadcasted_iota(jnp.int32, kv_block_indices.shape, 3)
    < num_kv_blocks[..., None],
    kv_block_indices,
    -1,
  )
  listed = jnp.repeat(listed, to_heads, axis=1)[:, :, block_of_query]
  kept &= jnp.any(listed[..., None, :] == key[..., None] // block_kv, axis=-1)

  attn_logits = scale * jnp.einsum(
    "bihd,bjhd->bhij",
    q.astype(jnp.float32),
    k.astype(jnp.float32),
    precision="highest",
  )
  attn_logits = jnp.where(kept, attn_logits, -jnp.inf)
  lse = jax.nn.logsumexp(attn_logits, axis=-1)
  finite_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  weights = jnp.where(kept, jnp.exp(attn_logits - finite_lse[..., None]), 0.0)
  out = jnp.einsum(
    "bhij,bjhd->bihd", weights, v.astype(jnp.float32), precision="highest"
  )
  return out.astype(q.dtype), lse.swapaxes(1, 2)
