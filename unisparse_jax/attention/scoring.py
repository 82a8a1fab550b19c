# SPDX-License-Identifier: Apache-2.0
"""From block scores to a mask: forced blocks, then top-p or top-k."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask

# 31 bits of a float that is not negative: `top_within` reads the scores once a
# digit, and a GPU takes all candidates for a digit in that one pass. On an H200
# digits of 1, 2, 3 and 4 bits took 8 heads of 1024 x 1024 blocks 0.79, 0.52,
# 0.49 and 0.64 ms, and a sort 2.54; a CPU 116, 189, 296 and 442, and 698. Short
# rows are sorted: 8 heads of 128 x 128 blocks in 0.10 ms, by digits in 0.20.
_SORT_BELOW = 1 << 16
_DIGIT_BITS = 3
_NUM_DIGITS = -(-31 // _DIGIT_BITS)


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
  top_p: float | tuple[float, ...] | Array | None = None,
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
    top_p: mass to keep, in (0, 1], or one for each mask head, as a tuple or an
      array, which may be traced; exactly one of top_p and top_k is given.
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
  if isinstance(top_p, float | int) and top_p == 1.0:
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
    limit = per_head("top_p", top_p, key.shape[1])[None, :, None, None]
    kept = (mass_before < limit) | (limit >= 1.0)
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


def best_blocks(
  grid: block_mask.BlockGrid,
  block_scores: Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"],
  *,
  num_sink_blocks: int = 0,
  num_local_blocks: int = 0,
  top_p: float | tuple[float, ...] | Array | None = None,
  top_k: int | None = None,
  max_blocks: int | None = None,
) -> block_mask.BlockMask:
  """`select_blocks` of `forced_blocks`, by a threshold search and no sort.

  Args:
    grid: the blocks spoken of.
    block_scores: as of `select_blocks`.
    num_sink_blocks: as of `forced_blocks`.
    num_local_blocks: as of `forced_blocks`.
    top_p: as of `select_blocks`.
    top_k: as of `select_blocks`.
    max_blocks: as of `select_blocks`.

  Returns:
    The same mask, in a tenth of the time on a CPU; on a GPU by one kernel.
  """
  share = top_p
  if isinstance(top_p, tuple | jax.Array):
    share = per_head("top_p", top_p, block_scores.shape[1])
  indices, counts, num_selected = pallas_kernels.block_selection(
    block_scores,
    q_len=grid.q_len,
    kv_len=grid.kv_len,
    block_q=grid.block_q,
    block_kv=grid.block_kv,
    causal=grid.causal,
    q_offset=grid.q_offset,
    top_p=share,
    top_k=top_k,
    num_sink_blocks=num_sink_blocks,
    num_local_blocks=num_local_blocks,
    max_blocks=max_blocks,
  )
  return block_mask.BlockMask(
    grid=grid,
    kv_block_indices=indices,
    num_kv_blocks=counts,
    num_dropped=(num_selected - counts).sum(-1, dtype=jnp.int32),
  )


def per_head(
  name: str, value: float | tuple[float, ...] | Array, num_heads: int
) -> Float[Array, " num_heads"]:
  """A setting for all heads, or one a head, as an array.

  Args:
    name: of the setting, for the message.
    value: the setting; an array, [] or [num_heads], may be traced.
    num_heads: heads that it is for.

  Returns:
    float32 [num_heads].

  Raises:
    ValueError: a tuple or array of another length.
  """
  if isinstance(value, jax.Array):
    checks.require(
      value.shape in ((), (num_heads,)),
      name,
      "be an array with one value, or one for each mask head",
      value.shape,
      f"[] or [{num_heads}]",
    )
    return jnp.broadcast_to(value.astype(jnp.float32), (num_heads,))
  if not isinstance(value, tuple):
    value = (value,) * num_heads
  checks.require(
    len(value) == num_heads,
    name,
    "have one value for each mask head",
    value,
    f"{num_heads} values",
  )
  return jnp.asarray(value, jnp.float32)


def top_count(
  scores: Float[Array, "... num_items"], count: Int[Array, "..."]
) -> Bool[Array, "... num_items"]:
  """The `count` largest along the last axis; equal ones: the first.

  Args:
    scores: any values but NaN.
    count: how many, for each row; may exceed the row.

  Returns:
    bool of the scores' shape.
  """
  return _top_of_sorted(scores, -jnp.sort(-scores, axis=-1), count)


def top_mass(
  scores: Float[Array, "... num_items"],
  share: Float[Array, "..."],
  most: Int[Array, "..."] | int | None = None,
) -> Bool[Array, "... num_items"]:
  """The fewest largest that reach a share of their sum; equal ones: the first.

  Args:
    scores: finite, >= 0.
    share: in (0, 1], for each row; 1 asks for all.
    most: no more than so many, for each row.

  Returns:
    bool of the scores' shape, one True a row at least.
  """
  falling = -jnp.sort(-scores, axis=-1)
  running = jnp.cumsum(falling, axis=-1)
  needed = share[..., None] * running[..., -1:]
  count = (running - falling < needed).sum(-1, dtype=jnp.int32)
  count = jnp.where(share >= 1.0, scores.shape[-1], jnp.maximum(count, 1))
  if most is not None:
    count = jnp.minimum(count, most)
  return _top_of_sorted(scores, falling, count)


def top_within(
  scores: Float[Array, "... num_items"], budget: Float[Array, "..."]
) -> Bool[Array, "... num_items"]:
  """The largest whose running sum is at most a budget; equal ones: the first.

  Long rows are not sorted: the bits of floats that are not negative are ordered
  as these are, and those of the first that does not fit are found digit by
  digit.

  Args:
    scores: finite, >= 0.
    budget: for each row.

  Returns:
    bool of the scores' shape: all if their sum is at most the budget.
  """
  if scores.shape[-1] < _SORT_BELOW:
    falling = -jnp.sort(-scores, axis=-1)
    count = jnp.cumsum(falling, axis=-1) <= budget[..., None]
    return _top_of_sorted(scores, falling, count.sum(-1, dtype=jnp.int32))
  bits = lax.bitcast_convert_type(scores, jnp.int32)
  bits = jnp.maximum(bits, 0)  # -0.0 has a sign

  def mass(is_counted):
    return jnp.where(is_counted, scores, 0.0).sum(-1)

  def add_digit(step, level):
    # The larger the digit, the less is summed: those that exceed come first.
    shift = (_NUM_DIGITS - 1 - step) * _DIGIT_BITS
    digit = jnp.zeros_like(level)
    for candidate in range(1, 1 << _DIGIT_BITS):
      least = level + jnp.left_shift(jnp.int32(candidate), shift)
      exceeds = mass(bits >= least[..., None]) > budget
      # The first digit has fewer bits: what it cannot be would wrap around.
      exceeds &= candidate <= jnp.right_shift(jnp.int32(0x7FFFFFFF), shift)
      digit += exceeds.astype(jnp.int32)
    return level + jnp.left_shift(digit, shift)

  level = jnp.zeros(scores.shape[:-1], jnp.int32)
  level = lax.fori_loop(0, _NUM_DIGITS, add_digit, level)[..., None]
  above, tied = bits > level, bits == level
  rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32).astype(jnp.float32)
  return above | (
    tied & (mass(above)[..., None] + rank * scores <= budget[..., None])
  )


def _top_of_sorted(scores, falling, count):
  """The `count` largest, given the scores in falling order too."""
  num_items = scores.shape[-1]
  count = jnp.clip(count, 0, num_items)[..., None]
  cutoff = jnp.take_along_axis(falling, jnp.maximum(count - 1, 0), axis=-1)
  above = scores > cutoff
  level = scores == cutoff
  room = count - above.sum(-1, keepdims=True, dtype=jnp.int32)
  first = jnp.cumsum(level, axis=-1, dtype=jnp.int32) <= room
  return (above | (level & first)) & (count > 0)
