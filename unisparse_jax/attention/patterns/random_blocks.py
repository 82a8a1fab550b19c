# SPDX-License-Identifier: Apache-2.0
"""Random blocks: the floor that a selector must beat at equal density."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks
from unisparse_jax.attention import block_mask, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomBlocks:
  """Keeps a share of each row's blocks, drawn without a look at the content.

  Attributes:
    density: share of a row's reachable blocks, rounded up; in (0, 1], or a
      tuple with one for each query head. The forced blocks are among them, or
      more where they alone exceed it.
    num_sink_blocks: first key blocks that every row keeps (causal only).
    num_local_blocks: blocks before the diagonal, likewise.
    seed: of the draw; the same shape and seed give the same blocks on one kind
      of device.
    block_q: queries per block.
    block_kv: keys per block.
  """

  density: float | tuple[float, ...] = 0.25
  num_sink_blocks: int = 1
  num_local_blocks: int = 0
  seed: int = 0
  block_q: int = 128
  block_kv: int = 128

  def __post_init__(self):
    checks.check_fractions("density", self.density)
    for name in ("num_sink_blocks", "num_local_blocks", "seed"):
      checks.check_non_negative_int(name, getattr(self, name))
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
    admissible = grid.admissible()[:, None]
    forced = scoring.forced_blocks(
      grid,
      num_sink_blocks=self.num_sink_blocks if causal else 0,
      num_local_blocks=self.num_local_blocks if causal else 0,
    )[:, None]
    num_heads = q.shape[2]
    # A seed that the compiler knows would make it draw while it compiles.
    seed = lax.optimization_barrier(jnp.uint32(self.seed))
    scores = jax.random.uniform(
      # It compiles 5 times faster than the default generator.
      jax.random.key(seed, impl="rbg"),
      (grid.batch, num_heads, grid.num_q_blocks, grid.num_kv_blocks),
    )
    scores = jnp.where(forced, jnp.inf, scores)
    scores = jnp.where(admissible, scores, -jnp.inf)
    density = scoring.per_head("density", self.density, num_heads)
    reachable = admissible.sum(-1, dtype=jnp.int32)
    count = jnp.ceil(
      # A product that should be whole may come out a little above.
      density[None, :, None] * reachable.astype(jnp.float32) - 1e-4
    ).astype(jnp.int32)
    kept = scoring.top_count(scores, jnp.maximum(count, 1)) | forced
    return block_mask.BlockMask.from_dense(grid, kept)
