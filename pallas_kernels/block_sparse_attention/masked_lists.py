# SPDX-License-Identifier: Apache-2.0
"""Block lists as kernels take them: which blocks need a per-token mask."""

import jax.numpy as jnp
from jax import lax


def needs_mask(indices, q_offset, kv_len, *, block_q, block_kv, causal):
  """Which listed blocks are not seen as a whole by every query of their row.

  Args:
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    q_offset: int32 [batch].
    kv_len: int32 [batch].
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys up to its own position.

  Returns:
    bool, shape of indices.
  """
  seen = kv_len[:, None, None, None]
  if causal:
    q_block = lax.broadcasted_iota(jnp.int32, indices.shape, 2)
    first_query = q_offset[:, None, None, None] + q_block * block_q
    seen = jnp.minimum(seen, first_query + 1)
  return (indices + 1) * block_kv > seen


def prepare(indices, counts, q_offset, kv_len, **blocks):
  """Lists as the kernels take them.

  Args:
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    counts: int32 [batch, num_mask_heads, num_q_blocks].
    q_offset: int32 [batch].
    kv_len: int32 [batch].
    **blocks: block_q, block_kv and causal, as of `needs_mask`.

  Returns:
    indices, with room for one block at least.
    int32 [batch, num_mask_heads, num_q_blocks]: how many leading blocks of each
    list may need a per-token mask; right for lists in any order, small for
    those in which such blocks come first.
  """
  if indices.shape[-1] == 0:
    indices = jnp.zeros((*indices.shape[:-1], 1), jnp.int32)
  slot = lax.broadcasted_iota(jnp.int32, indices.shape, 3)
  is_masked = needs_mask(indices, q_offset, kv_len, **blocks)
  is_masked &= slot < counts[..., None]
  return indices, jnp.max(jnp.where(is_masked, slot + 1, 0), axis=-1)
