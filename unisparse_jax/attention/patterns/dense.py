# SPDX-License-Identifier: Apache-2.0
"""Every block: sparse attention that must equal dense attention."""

import dataclasses

from pallas_kernels import checks
from unisparse_jax.attention import block_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
  """Keeps all blocks.

  Attributes:
    block_q: queries per block.
    block_kv: keys per block.
  """

  block_q: int = 128
  block_kv: int = 128

  def __post_init__(self):
    checks.check_positive_int("block_q", self.block_q)
    checks.check_positive_int("block_kv", self.block_kv)

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    del scale
    return block_mask.BlockMask.full(
      block_mask.BlockGrid.create(
        q,
        k,
        block_q=self.block_q,
        block_kv=self.block_kv,
        causal=causal,
        q_offset=q_offset,
        kv_len=kv_len,
      )
    )
