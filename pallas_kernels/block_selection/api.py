# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.block_selection import reference, triton, xla

IMPLEMENTATIONS = {
  "reference": reference.block_selection,
  "xla": xla.block_selection,
  "triton": triton.block_selection,
}


def block_selection(
  block_scores: Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"],
  *,
  q_len: int | Int[Array, "..."],
  kv_len: int | Int[Array, "..."],
  block_q: int = 128,
  block_kv: int = 128,
  causal: bool = True,
  q_offset: int | Int[Array, "..."] = 0,
  top_p: float | Float[Array, " num_mask_heads"] | None = None,
  top_k: int | None = None,
  num_sink_blocks: int = 0,
  num_local_blocks: int = 0,
  max_blocks: int | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[
  Int[Array, "batch num_mask_heads num_q_blocks max_blocks"],
  Int[Array, "batch num_mask_heads num_q_blocks"],
  Int[Array, "batch num_mask_heads num_q_blocks"],
]:
  """Keeps forced blocks, then the best others until a budget is met.

  A block is admissible if a query of the row may see a key of it; forced, if it
  is admissible and one of the first `num_sink_blocks`, one that holds a
  position of the row (causal), or one of `num_local_blocks` before these. With
  top_p the smallest set of blocks in falling order of score is kept whose mass,
  that of the forced ones included, reaches top_p; 1.0 keeps every admissible
  block. With top_k, that number of blocks, the forced ones included. Equal
  scores: the lower block first.

  Args:
    block_scores: float32 [batch, num_mask_heads, num_q_blocks, num_kv_blocks];
      >= 0 and of sum 1 over a row's admissible blocks (top_p), or any finite
      values (top_k).
    q_len: number of valid queries; scalar or [batch].
    kv_len: number of valid keys; scalar or [batch].
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys at or before its own position.
    q_offset: absolute position of query 0; scalar or [batch].
    top_p: mass to keep, in (0, 1], or float32 [num_mask_heads]; exactly one of
      top_p and top_k is given.
    top_k: blocks to keep in a row.
    num_sink_blocks: first key blocks that every row keeps.
    num_local_blocks: blocks before the diagonal that every row keeps.
    max_blocks: room in a list; forced blocks, then the best, go in first.
      Default: num_kv_blocks.
    implementation: "triton", "xla", "reference", a sequence to try in order, or
      None for this platform's default.

  Returns:
    kv_block_indices, int32 [batch, num_mask_heads, num_q_blocks, max_blocks]:
    each row's blocks in descending order, then zeros.
    num_kv_blocks, int32 [batch, num_mask_heads, num_q_blocks].
    num_selected, int32 of the same shape: blocks that the budget asked for;
    more than num_kv_blocks where `max_blocks` had no room.

  Raises:
    ValueError: shapes, dtypes or settings disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: "xla" and "triton" bisect the bits of the last kept score: 32 sums over
    each row and no sort. Masses that meet top_p to within float32 rounding may
    be cut one block apart between implementations.
  """
  axes = ("batch", "num_mask_heads", "num_q_blocks", "num_kv_blocks")
  checks.check_shape("block_scores", block_scores, axes, (None,) * 4)
  checks.check_dtype("block_scores", block_scores.dtype, ("float32",))
  batch, num_mask_heads, _, num_kv_blocks = block_scores.shape
  checks.check_positive_int("block_q", block_q)
  checks.check_positive_int("block_kv", block_kv)
  checks.require(
    (top_p is None) != (top_k is None),
    "top_p",
    "be given if and only if top_k is not",
    (top_p, top_k),
  )
  if isinstance(top_p, jax.Array | np.ndarray):
    checks.check_shape("top_p", top_p, ("num_mask_heads",), (num_mask_heads,))
  elif top_p is not None:
    checks.check_fraction("top_p", top_p)
  if top_k is not None:
    checks.check_positive_int("top_k", top_k)
  checks.check_non_negative_int("num_sink_blocks", num_sink_blocks)
  checks.check_non_negative_int("num_local_blocks", num_local_blocks)
  max_blocks = num_kv_blocks if max_blocks is None else max_blocks
  checks.check_positive_int("max_blocks", max_blocks)
  kv_len = checks.per_row("kv_len", kv_len, batch)
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    block_scores,
    checks.per_row("q_len", q_len, batch),
    jnp.minimum(kv_len, jnp.int32(num_kv_blocks * block_kv)),
    checks.per_row("q_offset", q_offset, batch),
    _mass_budget(top_p, num_mask_heads),
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    top_k=top_k,
    num_sink_blocks=num_sink_blocks,
    num_local_blocks=num_local_blocks,
    max_blocks=min(max_blocks, num_kv_blocks),
  )


def _mass_budget(top_p, num_mask_heads):
  """float32 [num_mask_heads]; infinity where every block shall be kept.

  A float32 running sum may reach 1 before the last block.
  """
  top_p = jnp.asarray(math.inf if top_p is None else top_p, jnp.float32)
  budget = jnp.where(top_p >= 1.0, math.inf, top_p)
  return jnp.broadcast_to(budget, (num_mask_heads,))
