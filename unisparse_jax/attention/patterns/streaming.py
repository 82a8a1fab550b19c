# SPDX-License-Identifier: Apache-2.0
"""Sinks and a local window, chosen without a look at the content."""

import dataclasses
import math

from pallas_kernels import checks
from unisparse_jax.attention import block_mask, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
  """Keeps the first keys and the most recent ones, rounded out to blocks.

  It cannot retrieve anything in between: the floor for causal language models.

  Attributes:
    num_sink: first tokens that every query keeps.
    num_local: tokens before its own that every query keeps; without causality,
      as many after it.
    block_q: queries per block.
    block_kv: keys per block.

  Source: StreamingLLM (arXiv 2309.17453), as a prefill mask.
  """

  num_sink: int = 128
  num_local: int = 1024
  block_q: int = 128
  block_kv: int = 128

  def __post_init__(self):
    checks.check_non_negative_int("num_sink", self.num_sink)
    checks.check_positive_int("num_local", self.num_local)
    checks.check_positive_int("block_q", self.block_q)
    checks.check_positive_int("block_kv", self.block_kv)

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    del scale
    grid = block_mask.BlockGrid.create(
      q,
      k,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=causal,
      q_offset=q_offset,
      kv_len=kv_len,
    )
    num_local_blocks = math.ceil(self.num_local / self.block_kv)
    kept = scoring.forced_blocks(
      grid,
      num_sink_blocks=math.ceil(self.num_sink / self.block_kv),
      num_local_blocks=num_local_blocks,
    )
    if not causal:
      _, last, key = grid.bounds()
      near = key <= last + num_local_blocks * self.block_kv
      kept |= (key > last) & near & grid.admissible()
    return block_mask.BlockMask.from_dense(grid, kept[:, None])
