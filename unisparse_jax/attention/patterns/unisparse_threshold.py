# SPDX-License-Identifier: Apache-2.0
"""Composite-token scores cut at one threshold for all rows and heads.

Not in the UniSparse paper. `experiments.selector_study` compared many ways to
score and to cut on the shipped model (results/selector_study.json). What the
scores are made of hardly matters, how they are cut does: top-p makes every row
reach the same mass, and spends most of its blocks on rows whose attention is
spread thin; a threshold spends each block where it holds most.

Density needed for a mean recall of 0.90 and 0.95, 16,384 tokens, three texts:

  windows of 16, a mask for 3 heads, top-p (UniSparse)  0.268  0.423
  windows of 16, a mask for each head, top-p            0.245  0.386
  windows of 16, a mask for 3 heads, threshold          0.194  0.361
  windows of 16, a mask for each head, threshold        0.173  0.328
  windows of 8, a mask for each head, top-p             0.239  0.375
  windows of 8, a mask for each head, threshold         0.168  0.319
  XAttention's scores, stride 8, top-p                  0.236  0.375
  XAttention's scores, stride 8, threshold              0.168  0.319
  windows of 32, a mask for each head, threshold        0.176  0.343
  true block masses of each head, top-p                 0.219  0.352
  true block masses of each head, threshold             0.160  0.300

The first percentile over rows at 0.95 is 0.865 in the first line and 0.849 in
the fourth (true masses with top-p: 0.941). On next tokens at 8,192 min_score
0.5 has KL 0.0062 at density 0.29, UniSparse with 0.95 has 0.0074 at 0.37
(results/frontier_threshold.jsonl).

Which of a block's queries speak, and what it costs: growth of the loss of whole
dense answers (nats; nine tasks, 12 prompts each, 8,192 tokens, one H100,
bfloat16) beside the density, a mask for each key head, key blocks of 64
(results/query_aggregation_h100.jsonl, "dense" beside; the script is not here):

  windows of 4, mean      1.39 at 0.209, 0.35 at 0.306, 0.14 at 0.373
  windows of 4, largest   0.47 at 0.201, 0.13 at 0.301
  windows of 8, largest   0.68 at 0.262
  queries 4, keys 8       0.87 at 0.204, 0.14 at 0.306
  queries 4, keys 16      1.39 at 0.205, 0.24 at 0.312
  windows of 2, largest   0.19 at 0.237
  every token, largest    0.27 at 0.189 (the dense scores)
  a mask for each head, windows of 4, largest   0.19 at 0.227
  root of the mean square, windows of 4         0.63 at 0.223
  UniSparse, windows of 16, top-p 0.97          0.36 at 0.497
  calibrated by layer and head, windows of 8 and 16   0.07 at 0.214 (48 prompts)

Keeping a block for either reason, and attending to the dropped blocks through
their mean key and value, changed the first two lines by less than 0.1. The last
line is `experiments.calibrate_answers`: one of the 16 key heads of the model
makes most of the loss, and half of the layers bear a tenth of the blocks.

At the same rule XAttention's scores, one mask a head, are thus as good as ours
with windows of 8 and 3% better than ours with windows of 16.

Tried on the first line of the first table at 0.95 and within 2% of it: windows
of 8 and of 32, exact keys, a quarter of the query window, half the variance
within a window added to its logit, the largest key, the outlier key apart, a
temperature of 1.25, a finer second level (of all blocks within 98% of the
coarse mass, not of the uncertain ones alone). A temperature of 0.8 needs 2.3%
more, a mask for 6 heads 1.3 times the density, the scores of the layer before
1.7 times. One mask for 3 heads that were found to be alike needs 2% less than
one for the 3 of a key head, both by the mean of their scores, and 6% more than
a mask for each (8,192 tokens, threshold; selector_study_similarity.json).

Keys that the last queries look at (num_columns): with 500 of them a threshold
of 4 keeps 100, 99.1, 100.3 and 99.3% of a study model's dense answers at 16K to
128K, without them 99.3, 95.1, 100.3 and 94.8%, of as many pairs (0.102 for
0.101 at 128K) and at the same recall; 2,000 of them are no better
(results/frontier_{columns,more_prompts}_h200.jsonl).
"""

import dataclasses
import math
import numbers

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import checks
from pallas_kernels.composite_scores import api as composite_scores
from unisparse_jax.attention import block_mask, profiles, scoring
from unisparse_jax.attention.patterns import unisparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniSparseThreshold:
  """Keeps every block whose composite attention exceeds a fixed value.

  Attributes:
    min_score: smallest score of a kept block, as a multiple of what a row gives
      to each block when it gives all the same; 0 or more, or a tuple with one
      for each mask head. 0 keeps everything. With over_queries="mean" a row
      drops at most this share of its composite attention, mostly far less.
    over_queries: which of a block's composite queries speak for it: their
      "mean", or the one that gives most ("max"), so that a single query that
      looks at a single place is heard.
    window_q: queries in one composite; divides block_q.
    window_kv: keys in one composite; divides block_kv.
    head_group: consecutive query heads in one composite, which share their
      mask; see `unisparse.UniSparse`.
    num_sink_blocks: first key blocks that every row keeps (causal only).
    num_local_blocks: blocks before the diagonal that every row keeps (causal
      only).
    num_columns: single keys that every row keeps beside the blocks, those that
      the last `num_last` queries give most, as in MInference (causal only).
    num_last: how many queries choose them.
    block_q: queries per block.
    block_kv: keys per block.
    max_blocks: room in each row's list; None: all. The most recent are kept.
  """

  min_score: float | tuple[float, ...] = 0.5
  over_queries: str = "mean"
  window_q: int = 32
  window_kv: int = 32
  head_group: int | None = 1
  num_sink_blocks: int = 1
  num_local_blocks: int = 0
  num_columns: int = 0
  num_last: int = 64
  block_q: int = 128
  block_kv: int = 128
  max_blocks: int | None = None

  def __post_init__(self):
    values = self.min_score
    values = values if isinstance(values, tuple) else (values,)
    checks.require(len(values) > 0, "min_score", "not be empty", values)
    for value in values:
      checks.require(
        isinstance(value, numbers.Real) and 0.0 <= float(value) < math.inf,
        "min_score",
        "be a finite number >= 0",
        value,
      )
    checks.check_choice(
      "over_queries", self.over_queries, composite_scores.OVER_QUERIES
    )
    checks.check_non_negative_int("num_sink_blocks", self.num_sink_blocks)
    checks.check_non_negative_int("num_local_blocks", self.num_local_blocks)
    checks.check_non_negative_int("num_columns", self.num_columns)
    checks.check_positive_int("num_last", self.num_last)
    if self.max_blocks is not None:
      checks.check_positive_int("max_blocks", self.max_blocks)
    self._scorer()  # checks the rest

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    grid = block_mask.BlockGrid.create(
      q,
      k,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=causal,
      q_offset=q_offset,
      kv_len=kv_len,
    )
    scores = self.block_scores(q, k, grid, scale=scale)
    mask = self.cut(grid, scores, self.min_score)
    if not (self.num_columns and causal):
      return mask
    columns = self._columns(q, k, grid, scores.shape[1], scale)
    return dataclasses.replace(mask, columns=columns)

  def block_scores(
    self, q, k, grid: block_mask.BlockGrid, *, scale: float | None = None
  ) -> Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"]:
    """What `cut` takes; see `unisparse.UniSparse.block_scores`."""
    return self._scorer().block_scores(
      q, k, grid, scale=scale, over_queries=self.over_queries
    )

  def cut(
    self,
    grid: block_mask.BlockGrid,
    scores: Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"],
    min_score: float | tuple[float, ...] | Float[Array, " num_mask_heads"],
  ) -> block_mask.BlockMask:
    """The mask of the blocks whose score reaches the limit.

    Args:
      grid: the blocks spoken of.
      scores: float32 [batch, num_mask_heads, num_q_blocks, num_kv_blocks].
      min_score: as the attribute; an array may be traced.

    Returns:
      The mask.
    """
    num_blocks = (profiles.num_keys(grid) + self.block_kv - 1) // self.block_kv
    limit = scoring.per_head("min_score", min_score, scores.shape[1])
    limit = (
      limit[None, :] / jnp.maximum(num_blocks, 1).astype(jnp.float32)[:, None]
    )
    forced = scoring.forced_blocks(
      grid,
      num_sink_blocks=self.num_sink_blocks if grid.causal else 0,
      num_local_blocks=self.num_local_blocks if grid.causal else 0,
    )
    kept = (scores >= limit[:, :, None, None]) | forced[:, None]
    # Where a row spreads evenly, all its blocks may miss a limit above 1.
    kept |= scores >= scores.max(-1, keepdims=True)
    return block_mask.BlockMask.from_dense(
      grid, kept, max_blocks=self.max_blocks
    )

  def _columns(self, q, k, grid, num_mask_heads, scale):
    rows, is_counted = profiles.last_rows(grid, self.num_last)
    profile = profiles.columns_of_rows(
      q, k, grid, rows[:, 0], is_counted[:, 0], scale=scale
    )
    profile = profile.reshape(grid.batch, num_mask_heads, -1, grid.kv_capacity)
    num_keys = profiles.num_keys(grid)[:, None]
    key = jnp.arange(grid.kv_capacity, dtype=jnp.int32)[None, :]
    exists = key < num_keys
    profile = jnp.where(exists[:, None], profile.sum(2), -jnp.inf)
    room = min(self.num_columns, grid.kv_capacity)
    return block_mask.ColumnSet(
      column_indices=lax.top_k(profile, room)[1].astype(jnp.int32),
      num_columns=jnp.broadcast_to(
        jnp.minimum(room, num_keys), profile.shape[:2]
      ),
    )

  def _scorer(self) -> unisparse.UniSparse:
    return unisparse.UniSparse(
      window_q=self.window_q,
      window_kv=self.window_kv,
      head_group=self.head_group,
      block_q=self.block_q,
      block_kv=self.block_kv,
    )
