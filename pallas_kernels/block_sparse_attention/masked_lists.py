"""Which leading part of a list needs a per-token mask."""

import jax.numpy as jnp
from jax import lax


def num_masked_blocks(
  indices, counts, q_offset, kv_len, *, block_q, block_kv, causal
):
  """Slots up to the last block that some query of its row may not see whole.

  Args:
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    counts: int32 [batch, num_mask_heads, num_q_blocks].
    q_offset: int32 [batch].
    kv_len: int32 [batch].
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys at or before its own position.

  Returns:
    int32 [batch, num_mask_heads, num_q_blocks]; right for lists in any order,
    small for those in which such blocks come first.
  """
  last_key = (indices + 1) * block_kv - 1
  needs = last_key >= kv_len[:, None, None, None]
  if causal:
    row = lax.broadcasted_iota(jnp.int32, indices.shape, 2) * block_q
    needs |= last_key > q_offset[:, None, None, None] + row
  slot = lax.broadcasted_iota(jnp.int32, indices.shape, 3)
  needs &= slot < counts[..., None]
  return jnp.where(needs, slot + 1, 0).max(-1)
