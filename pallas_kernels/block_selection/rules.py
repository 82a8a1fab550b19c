# SPDX-License-Identifier: Apache-2.0
"""Which blocks may and which must be kept: shared by all back ends."""

import jax.numpy as jnp


def admissible_and_forced(
  block,
  first,
  last,
  kv_len,
  *,
  block_kv,
  causal,
  num_sink_blocks,
  num_local_blocks,
):
  """Booleans of the shape of `block`; all arrays broadcast to one another.

  Args:
    block: int32, key blocks.
    first: int32, position of the row's first query.
    last: int32, position of the row's last valid query.
    kv_len: int32, number of valid keys.
    block_kv: keys per block.
    causal: whether a query sees only keys at or before its own position.
    num_sink_blocks: first blocks that are forced.
    num_local_blocks: blocks before the diagonal that are forced.
  """
  key = block * block_kv
  admissible = key < kv_len
  if causal:
    admissible &= key <= last
  forced = block < num_sink_blocks
  if causal or num_local_blocks:
    reach = (num_local_blocks + 1) * block_kv
    forced |= (key + reach > first) & (key <= last)
  return admissible, forced & admissible


def row_positions(q_block, block_q, q_len, q_offset):
  """int32: positions of a row's first and of its last valid query."""
  first = q_block * block_q
  last = jnp.minimum(first + block_q, q_len) - 1
  return first + q_offset, last + q_offset
