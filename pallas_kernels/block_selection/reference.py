# SPDX-License-Identifier: Apache-2.0
"""The contract by a full sort of every row, written to be read."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_selection import rules


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
  block = lax.broadcasted_iota(jnp.int32, shape, 3)
  first, last = rules.row_positions(
    lax.broadcasted_iota(jnp.int32, shape, 2),
    block_q,
    q_len[:, None, None, None],
    q_offset[:, None, None, None],
  )
  admissible, forced = rules.admissible_and_forced(
    block,
    first,
    last,
    kv_len[:, None, None, None],
    block_kv=block_kv,
    causal=causal,
    num_sink_blocks=num_sink_blocks,
    num_local_blocks=num_local_blocks,
  )
  # Forced blocks sort first, inadmissible ones last.
  key = jnp.where(forced, -jnp.inf, -block_scores)
  key = jnp.where(admissible, key, jnp.inf)
  mass = jnp.where(admissible, block_scores, 0.0)
  key, block, mass = lax.sort(
    (key, block, mass), dimension=3, is_stable=True, num_keys=1
  )
  slot = lax.broadcasted_iota(jnp.int32, shape, 3)
  if top_k is not None:
    kept = slot < top_k
  else:
    mass_before = jnp.cumsum(mass, axis=-1) - mass
    kept = mass_before < mass_budget[None, :, None, None]
  kept = (kept | jnp.isneginf(key)) & ~jnp.isposinf(key)
  num_selected = kept.sum(-1, dtype=jnp.int32)
  listed = jnp.where(kept & (slot < max_blocks), block, -1)
  indices = -jnp.sort(-listed, axis=-1)[..., :max_blocks]
  num_kept = jnp.minimum(num_selected, max_blocks)
  return jnp.maximum(indices, 0), num_kept, num_selected
