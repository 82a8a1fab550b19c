# SPDX-License-Identifier: Apache-2.0
"""The true block masses: the ceiling of recall for any selector of blocks.

No method can use it, for it costs as much as dense attention. With as many
blocks in a row, no other choice holds more of the row's dense softmax. Answers
and next tokens may be better with less: a row's mass is a mean over its queries
(results/README.md, "Next tokens").
"""

import dataclasses

from pallas_kernels import checks
from unisparse_jax.attention import block_mask, metrics, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
  """Keeps the fewest blocks that hold a share of each row's dense softmax.

  Attributes:
    top_p: share to keep in each row, mean over its queries, in (0, 1], or a
      tuple with one for each mask head.
    head_group: consecutive query heads that share their mask, by their mean.
    num_sink_blocks: first key blocks that every row keeps (causal only); 0
      adds none, which is the true ceiling but for the diagonal.
    block_q: queries per block.
    block_kv: keys per block.
    max_blocks: room in each row's list; None: all. On overflow the best stay.
  """

  top_p: float | tuple[float, ...] = 0.95
  head_group: int = 1
  num_sink_blocks: int = 0
  block_q: int = 128
  block_kv: int = 128
  max_blocks: int | None = None

  def __post_init__(self):
    checks.check_fractions("top_p", self.top_p)
    for name in ("head_group", "block_q", "block_kv"):
      checks.check_positive_int(name, getattr(self, name))
    if self.max_blocks is not None:
      checks.check_positive_int("max_blocks", self.max_blocks)
    checks.check_non_negative_int("num_sink_blocks", self.num_sink_blocks)

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    checks.check_divides("head_group", self.head_group, "num_heads", q.shape[2])
    grid = block_mask.BlockGrid.create(
      q,
      k,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=causal,
      q_offset=q_offset,
      kv_len=kv_len,
    )
    # Rows of block_q x kv_len at a time.
    mass = metrics.block_mass(q, k, grid, scale=scale)
    mass = mass.reshape(grid.batch, -1, self.head_group, *mass.shape[2:]).mean(
      2
    )
    forced = scoring.forced_blocks(
      grid,
      num_sink_blocks=self.num_sink_blocks if causal else 0,
      num_local_blocks=0,
    )
    return scoring.select_blocks(
      grid, mass, forced, top_p=self.top_p, max_blocks=self.max_blocks
    )
