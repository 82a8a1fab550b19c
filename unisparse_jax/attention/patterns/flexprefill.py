# SPDX-License-Identifier: Apache-2.0
"""FlexPrefill: per head, query-aware blocks or verticals and slashes.

Source: FlexPrefill (arXiv 2502.20766) and its released code. Differs from it
in: slashes are binned from the diagonal outwards, so that a ragged length does
not split the nearest bin; a zero in a distribution does not make its divergence
NaN; budgets are counted in key blocks, where the code has a fixed 128 tokens;
any q_offset, batches with ragged lengths.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import special

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask, profiles, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill:
  """Keeps verticals and slashes, or the best blocks, by a test of each head.

  The last block of queries is attended exactly. Where pooled keys predict its
  attention well, the head is query-aware: block scores from pooled queries and
  keys are cut at a mass for the whole head. Otherwise its largest verticals and
  slashes are kept, as many as cover that mass.

  Attributes:
    top_p: mass to keep (the paper's gamma), in (0, 1], or a tuple with one for
      each query head. 1 keeps everything.
    max_divergence: square root of the Jensen-Shannon divergence below which a
      head is query-aware (the paper's tau).
    min_budget: tokens of verticals, and of slashes, that are kept at least.
      Inputs no longer than this, or than two blocks, keep everything.
    block_q: queries per block.
    block_kv: keys per block; also the number of last queries looked at.
    max_blocks: room in each row's list; None: all. The most recent are kept.

  Causal attention only: `select` raises ValueError otherwise.
  """

  top_p: float | tuple[float, ...] = 0.95
  max_divergence: float = 0.1
  min_budget: int = 1024
  block_q: int = 128
  block_kv: int = 128
  max_blocks: int | None = None

  def __post_init__(self):
    checks.check_fractions("top_p", self.top_p)
    checks.require(
      0.0 <= self.max_divergence <= 1.0,
      "max_divergence",
      "be in [0, 1]",
      self.max_divergence,
    )
    for name in ("min_budget", "block_q", "block_kv"):
      checks.check_positive_int(name, getattr(self, name))
    if self.max_blocks is not None:
      checks.check_positive_int("max_blocks", self.max_blocks)

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    checks.require(causal, "causal", "be True for flexprefill", causal)
    grid = block_mask.BlockGrid.create(
      q,
      k,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=True,
      q_offset=q_offset,
      kv_len=kv_len,
    )
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    top_p = scoring.per_head("top_p", self.top_p, q.shape[2])
    top_p = jnp.broadcast_to(top_p[None], (grid.batch, q.shape[2]))
    rows, is_counted = profiles.last_rows(grid, self.block_kv)
    columns, slashes = profiles.attention_of_rows(
      q, k, grid, rows, is_counted, scale=scale
    )
    count = is_counted.sum((1, 2)).astype(jnp.float32)[:, None, None]
    columns, slashes = columns / count, slashes / count

    # [batch, num_heads]
    min_blocks = jnp.int32(math.ceil(self.min_budget / self.block_kv))
    length = profiles.num_keys(grid)
    num_blocks = ((length + self.block_kv - 1) // self.block_kv)[:, None]
    num_columns, num_slashes = jnp.maximum(
      self._blocks_for_mass(jnp.stack([columns, slashes]), top_p), min_blocks
    )
    column_blocks = profiles.sum_blocks(columns, self.block_kv)
    slash_blocks = profiles.sum_blocks(slashes, self.block_kv)
    k_pooled = self._pooled_keys(q, k, grid)
    is_query_aware = self._predicts(
      q, k_pooled, grid, rows, is_counted, scale, column_blocks
    )
    num_columns, num_slashes = (
      jnp.minimum(jnp.where(is_query_aware, min_blocks, x), num_blocks)
      for x in (num_columns, num_slashes)
    )
    column_blocks = column_blocks.at[..., 0].set(jnp.inf)
    slash_blocks = slash_blocks.at[..., 0].set(jnp.inf)
    kept = scoring.top_count(column_blocks, num_columns)[:, :, None, :]
    kept |= profiles.touched_by_block_slashes(
      grid, scoring.top_count(slash_blocks, num_slashes)
    )
    # The released code scores the blocks of query-aware heads alone, one head
    # at a time. Here all at once, or none.
    best = lax.cond(
      is_query_aware.any(),
      lambda: self._query_aware_blocks(q, k_pooled, grid, scale, top_p),
      lambda: jnp.zeros_like(kept),
    )
    kept |= best & is_query_aware[:, :, None, None]
    shortest = max(
      self.block_q + self.block_kv,
      math.ceil(self.min_budget / self.block_kv) * self.block_kv,
    )
    is_all = (length[:, None] <= shortest) | (top_p >= 1.0)
    return block_mask.BlockMask.from_dense(
      grid, kept | is_all[:, :, None, None], max_blocks=self.max_blocks
    )

  def _blocks_for_mass(self, mass, top_p):
    """Tokens whose running mass reaches top_p, as a number of blocks."""
    within = scoring.top_within(mass, jnp.broadcast_to(top_p, mass.shape[:-1]))
    return (within.sum(-1, dtype=jnp.int32) + 1) // self.block_kv + 1

  def _pooled_keys(self, q, k, grid):
    """Block means of keys, by query head: float32."""
    k_pooled, _ = pallas_kernels.composite_pooling(
      k, window=self.block_kv, length=profiles.num_keys(grid)
    )
    return jnp.repeat(k_pooled, q.shape[2] // k.shape[2], axis=2)

  def _predicts(self, q, k_pooled, grid, rows, is_counted, scale, true_blocks):
    """Heads whose pooled keys predict the last rows' attention."""
    index = jnp.clip(rows[:, 0], 0, grid.q_len - 1)
    last = jnp.take_along_axis(q, index[:, :, None, None], axis=1)
    weight = is_counted[:, 0].astype(jnp.float32)[:, :, None, None]
    mean = (last.astype(jnp.float32) * weight).sum(1) / weight.sum(1)
    attn_logits = scale * jnp.einsum("bhd,bjhd->bhj", mean, k_pooled)
    first_key = self.block_kv * jnp.arange(grid.num_kv_blocks, dtype=jnp.int32)
    visible = first_key[None, :] < profiles.num_keys(grid)[:, None]
    estimate = jax.nn.softmax(
      jnp.where(visible[:, None], attn_logits, -jnp.inf), axis=-1
    )
    middle = 0.5 * (estimate + true_blocks)
    divergence = 0.5 * (
      special.rel_entr(estimate, middle) + special.rel_entr(true_blocks, middle)
    ).sum(-1)
    return jnp.sqrt(jnp.maximum(divergence, 0.0)) < self.max_divergence

  def _query_aware_blocks(self, q, k_pooled, grid, scale, top_p):
    """Best blocks of a whole head, their running mass at most top_p of all."""
    q_pooled, _ = pallas_kernels.composite_pooling(
      q, window=self.block_q, length=profiles.num_queries(grid)
    )
    attn_logits = scale * jnp.einsum("bihd,bjhd->bhij", q_pooled, k_pooled)
    visible = grid.admissible()[:, None]
    attn_logits = jnp.where(visible, attn_logits, -jnp.inf)
    scores = jax.nn.softmax(attn_logits, axis=-1)
    first_query = self.block_q * jnp.arange(grid.num_q_blocks, dtype=jnp.int32)
    is_row = first_query[None, :] < profiles.num_queries(grid)[:, None]
    scores = jnp.where(is_row[:, None, :, None], scores, 0.0)
    flat = scores.reshape(*scores.shape[:2], -1)
    budget = top_p * is_row.sum(-1)[:, None].astype(jnp.float32)
    return scoring.top_within(flat, budget).reshape(scores.shape)
