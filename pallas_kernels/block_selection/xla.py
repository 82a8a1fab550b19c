# SPDX-License-Identifier: Apache-2.0
"""Any-device back end: threshold search over all rows at once."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_selection import rules, search


def block_selection(
  block_scores,  # float32 [batch, num_mask_heads, num_q_blocks, num_kv_blocks]
  q_len,  # int32 [batch]
  kv_len,  # int32 [batch]
  q_offset,  # int32 [batch]
  mass_budget,  # float32 [num_mask_heads]; infinity: none
  *,
  block_q,
  block_kv,
  causal,
  top_k,
  num_sink_blocks,
  num_local_blocks,
  max_blocks,
):
  """See `api.block_selection`."""
  shape = block_scores.shape
  first, last = rules.row_positions(
    lax.broadcasted_iota(jnp.int32, shape, 2),
    block_q,
    q_len[:, None, None, None],
    q_offset[:, None, None, None],
  )
  admissible, forced = rules.admissible_and_forced(
    lax.broadcasted_iota(jnp.int32, shape, 3),
    first,
    last,
    kv_len[:, None, None, None],
    block_kv=block_kv,
    causal=causal,
    num_sink_blocks=num_sink_blocks,
    num_local_blocks=num_local_blocks,
  )
  scores, admissible, forced = (
    x.reshape(-1, shape[-1]) for x in (block_scores, admissible, forced)
  )
  kept, num_selected = search.keep(
    scores,
    admissible,
    forced,
    jnp.broadcast_to(mass_budget[None, :, None], shape[:3]).reshape(-1),
    top_k,
    max_blocks,
  )
  slot, count = search.slots(kept)
  row = lax.broadcasted_iota(jnp.int32, kept.shape, 0)
  block = lax.broadcasted_iota(jnp.int32, kept.shape, 1)
  indices = jnp.zeros((kept.shape[0], max_blocks), jnp.int32)
  indices = indices.at[row, jnp.where(kept, slot, max_blocks)].set(
    block, mode="drop", unique_indices=False
  )
  return (
    indices.reshape(*shape[:3], max_blocks),
    count.reshape(shape[:3]),
    num_selected.reshape(shape[:3]),
  )
