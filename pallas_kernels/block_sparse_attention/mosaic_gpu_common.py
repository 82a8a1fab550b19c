# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernels share: lists, order of tiles."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.block_sparse_attention import tuning

COMPUTE_REGISTERS = 240
_EVEN = 1.02  # work of the busiest thread block over the mean, from which on
# fewer heads side by side matter more


@dataclasses.dataclass(frozen=True)
class BackwardTiling:
  """Static sizes of one call."""

  num_heads: int
  num_kv_heads: int
  num_mask_heads: int
  num_q_blocks: int
  num_kv_blocks: int
  max_blocks: int
  head_dim: int
  batch: int
  block_q: int
  block_kv: int
  causal: bool
  scale: float
  config: tuning.BackwardConfig

  @property
  def group(self) -> int:
    return self.num_heads // self.num_kv_heads

  @property
  def heads_per_mask(self) -> int:
    return self.num_heads // self.num_mask_heads

  @property
  def scale_log2(self) -> float:
    return self.scale * backend.LOG2_E


def longest_first(lengths, tiles_per_row=1, num_workers=None):
  """int32 [groups * rows]: numbers of the rows, longest first.

  Rows are sorted within a group, so that the tiles that run side by side read
  the same keys, or within several groups where turns would be uneven otherwise.

  Args:
    lengths: int32 [groups, rows], work of each row.
    tiles_per_row: tiles of equal work that follow from each row.
    num_workers: thread blocks, or clusters of them, that take turns; None: a
      thread block a tile.
  """
  if num_workers is not None:
    together = _groups_together(*lengths.shape, tiles_per_row, num_workers)
    lengths = lengths.reshape(-1, together * lengths.shape[1])
  groups, rows = lengths.shape
  order = jnp.argsort(-lengths, axis=-1, stable=True).astype(jnp.int32)
  first = jnp.arange(groups, dtype=jnp.int32) * rows
  return (order + first[:, None]).reshape(-1)


@functools.cache
def _groups_together(groups, rows, tiles_per_row, num_workers):
  """The fewest groups to sort as one for which turns are even.

  Judged by rows whose work rises evenly, as under a causal mask: 256 of them on
  132 thread blocks, group by group, keep the busiest 1.76 times as long as the
  mean.
  """
  divisors = [n for n in range(1, groups + 1) if groups % n == 0]
  unevenness = {}
  for together in divisors:
    work = np.repeat(np.arange(rows, 0, -1), together * tiles_per_row)
    work = np.tile(work, groups // together)
    whole, rest = divmod(work.size, num_workers)
    turns = work[: whole * num_workers].reshape(whole, num_workers)
    load = turns[::2].sum(0) + turns[1::2, ::-1].sum(0)
    load[:rest] += work[work.size - rest :]
    unevenness[together] = load.max() / load.mean()
    if unevenness[together] <= _EVEN:
      break
  return min(unevenness, key=unevenness.__getitem__)


def tile_gradients(ask_logits, ask_dp, read, mask, scale_log2):
  """p and p * (d_p - delta) of one tile; the softmax runs beside d_p's product.

  Args:
    ask_logits: (accumulator) asks for the tile's logits, float32 [64, columns].
    ask_dp: (accumulator) asks for d_p, which is d_out v^T or its transpose.
    read: (name) reads "lse" (base 2) or "delta", broadcast to the tile.
    mask: (logits) to logits that are -inf where a query does not see a key.
    scale_log2: factor of the logits, in base 2.

  Returns:
    A function of the accumulators of both products.
  """
  _, plgpu = backend.pallas()

  def run(logits_ref, dp_ref):
    ask_logits(logits_ref)
    ask_dp(dp_ref)
    lse, delta = read("lse"), read("delta")
    logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
    logits = mask(lax.optimization_barrier(logits))
    p = jnp.exp2(logits * scale_log2 - lse)
    p = lax.optimization_barrier(p)
    dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
    dp = lax.optimization_barrier(dp)
    return p, p * (dp - delta)

  return run


def rounds(num_tiles, num_ctas, cta):
  """How many tiles a thread block walks, and the function that numbers them.

  Turns alternate in direction, because tiles get shorter along each.
  """
  whole, rest = divmod(num_tiles, num_ctas)

  def tile_at(turn):
    is_back = (lax.rem(turn, 2) == 1) & (turn < whole)
    return turn * num_ctas + jnp.where(is_back, num_ctas - 1 - cta, cta)

  return whole + (cta < rest).astype(jnp.int32), tile_at
