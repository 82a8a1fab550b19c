"""From block scores to a mask: forced blocks, then top-p or top-k."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels import checks
from unisparse_jax.attention import block_mask


def forced_blocks(
  grid: block_mask.BlockGrid, *, num_sink_blocks: int, num_local_blocks: int
) -> Bool[Array, "batch num_q_blocks num_kv_blocks"]:
  """Blocks that are kept whatever their score.

  Args:
    grid: the blocks spoken of.
    num_sink_blocks: first key blocks, seen by every row.
    num_local_blocks: key blocks before the diagonal. A causal grid always
      keeps the diagonal itself, without which a row's first query may see no
      key; a bidirectional one has none.

  Returns:
    bool [batch, num_q_blocks, num_kv_blocks].
  """
  admissible = grid.admissible()
  block = lax.broadcasted_iota(jnp.int32, admissible.shape, 2)
  forced = (block < num_sink_blocks) & admissible
  if grid.causal or num_local_blocks:
    forced |= grid.local(num_local_blocks)
  return forced


def select_blocks(
  grid: block_mask.BlockGrid,
  block_scores: Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"],
  forced: Bool[Array, "batch num_q_blocks num_kv_blocks"],
  *,
  top_p: float | None = None,
  top_k: int | None = None,
  max_blocks: int | None = None,
) -> block_mask.BlockMask:
  """Keeps forced blocks, then the best others until the budget is met.

  With `top_p`, the smallest set of blocks in falling order of score whose mass,
  that of the forced ones included, reaches top_p; 1.0 keeps every admissible
  block. With `top_k`, that number of blocks, the forced ones included. Equal
  scores: the lower block first.

  Args:
    grid: the blocks spoken of.
    block_scores: float32 [batch, num_mask_heads, num_q_blocks, num_kv_blocks],
      >= 0 and summing to 1 over the admissible blocks of a row (top_p), or any
      finite values (top_k).
    forced: blocks kept whatever their score.
    top_p: mass to keep, in (0, 1]; exactly one of top_p and top_k is given.
    top_k: blocks to keep in a row.
    max_blocks: room in a list; forced blocks, then the best, go in first, and
      the mask's `num_dropped` counts the rest.

  Returns:
    The mask.
  """
  checks.require(
    (top_p is None) != (top_k is None),
    "top_p",
    "be given if and only if top_k is not",
    (top_p, top_k),
  )
  admissible = grid.admissible()[:, None]
  forced = (forced[:, None] & admissible) | jnp.zeros_like(
    block_scores, jnp.bool_
  )
  admissible |= forced
  if top_p == 1.0:
    # A float32 running sum may reach 1 before the last block.
    mask = block_mask.BlockMask.from_dense(grid, admissible | forced)
    if max_blocks is None:
      return mask

  # Forced blocks sort first, inadmissible ones last.
  key = jnp.where(forced, -jnp.inf, -block_scores)
  key = jnp.where(admissible, key, jnp.inf)
  block = lax.broadcasted_iota(jnp.int32, key.shape, 3)
  mass = jnp.where(admissible, block_scores, 0.0)
  key, block, mass = lax.sort(
    (key, block, mass), dimension=3, is_stable=True, num_keys=1
  )
  slot = lax.broadcasted_iota(jnp.int32, key.shape, 3)
  if top_p is not None:
    mass_before = jnp.cumsum(mass, axis=-1) - mass
    kept = (mass_before < top_p) if top_p < 1.0 else slot >= 0
  else:
    assert top_k is not None
    kept = slot < top_k
  kept = (kept | jnp.isneginf(key)) & ~jnp.isposinf(key)
  count = kept.sum(-1, dtype=jnp.int32)
  room = key.shape[-1] if max_blocks is None else max_blocks
  lists = jnp.where(kept & (slot < room), block, -1)[..., :room]
  mask = block_mask.BlockMask.from_lists(grid, lists)
  dropped = jnp.maximum(count - room, 0).sum(-1, dtype=jnp.int32)
  return block_mask.BlockMask(
    grid=grid,
    kv_block_indices=mask.kv_block_indices,
    num_kv_blocks=mask.num_kv_blocks,
    num_dropped=dropped,
  )
