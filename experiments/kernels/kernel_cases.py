# SPDX-License-Identifier: Apache-2.0
"""One small call of each Hopper kernel, for tools that watch it run.

  python -m experiments.kernels.kernel_cases CASE

Ragged lengths, rows without keys, and more tiles than thread blocks.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks, device
from pallas_kernels.block_sparse_attention import columns, mosaic_gpu
from pallas_kernels.column_score_sampling import mosaic_gpu as sampling

Q_LEN, KV_LEN, HEADS, KV_HEADS = 300, 333, 4, 2


def attention(head_dim: int, backward: bool, dtype: Any = jnp.bfloat16):
  """Blocks as wide as the head, 128 at most; gradients, or out and lse."""
  block = min(head_dim, 128)
  rng = np.random.default_rng(0)
  q, k, v = _draw(rng, head_dim, dtype)
  rows, blocks = -(-Q_LEN // block), -(-KV_LEN // block)
  lists = np.tile(np.arange(blocks, dtype=np.int32), (1, KV_HEADS, rows, 1))
  lists = rng.permuted(lists, axis=-1)
  counts = rng.integers(0, blocks + 1, (1, KV_HEADS, rows), np.int32)
  where = (jnp.array([KV_LEN - Q_LEN]), jnp.array([KV_LEN]))

  def attend(q, k, v) -> Any:
    return mosaic_gpu.attention(
      q,
      k,
      v,
      jnp.asarray(lists),
      jnp.asarray(counts),
      *where,
      block_q=block,
      block_kv=block,
      causal=True,
      scale=head_dim**-0.5,
    )

  def loss(q, k, v):
    out, lse = attend(q, k, v)
    return (
      jnp.sin(out).sum(dtype=jnp.float32)
      + jnp.where(jnp.isinf(lse), 0.0, lse).sum()
    )

  gradients = jax.grad(loss, argnums=(0, 1, 2))
  return (gradients if backward else attend), (q, k, v)


def column_attention(head_dim: int, dtype: Any = jnp.bfloat16):
  """Every key is a column."""
  rng = np.random.default_rng(0)
  block = 128
  q, k, v = _draw(rng, head_dim, dtype)
  position = np.sort(rng.permutation(KV_LEN)).astype(np.int32)
  position = np.tile(position, (1, KV_HEADS, -(-Q_LEN // block), 1))

  def attend(q, k, v):
    return columns.attend_on_hopper(
      q,
      k,
      v,
      jnp.asarray(position),
      jnp.zeros((1,), jnp.int32),
      (block, True, head_dim**-0.5),
    )

  return attend, (q, k, v)


def sampled_scores(head_dim: int, dtype: Any = jnp.bfloat16):
  """Rows in rising order, some without keys."""
  rng = np.random.default_rng(0)
  q, k, _ = _draw(rng, head_dim, dtype)
  last = np.sort(rng.integers(-1, KV_LEN, (1, Q_LEN), np.int32), axis=-1)

  def sample(q, k):
    return sampling.sample(
      q,
      k,
      jnp.asarray(last),
      scale=head_dim**-0.5,
      schedule=sampling.Schedule(),
    )

  return sample, (q, k)


def _draw(rng, head_dim, dtype):
  return tuple(
    jnp.asarray(rng.standard_normal((1, length, heads, head_dim)), dtype)
    for length, heads in (
      (Q_LEN, HEADS),
      (KV_LEN, KV_HEADS),
      (KV_LEN, KV_HEADS),
    )
  )


# Name to a function that makes (a kernel's caller, its arrays).
CASES: dict[str, Callable[[], tuple[Callable[..., Any], Sequence[Any]]]] = {
  "forward_128": functools.partial(attention, 128, False),
  "forward_64": functools.partial(attention, 64, False),
  "backward_128": functools.partial(attention, 128, True),
  "backward_64": functools.partial(attention, 64, True),
  "columns": functools.partial(column_attention, 128),
  "sampled": functools.partial(sampled_scores, 128),
}


def main(name: str):
  """One call on this card; prints the sum of each result's absolute values."""
  checks.check_choice("case", name, CASES)
  device.num_multiprocessors = lambda: 4  # each thread block walks some tiles
  fn, arrays = CASES[name]()
  results = jax.block_until_ready(jax.jit(fn)(*arrays))
  sums = [
    float(jnp.where(jnp.isinf(x), 0, jnp.abs(x)).astype(jnp.float32).sum())
    for x in jax.tree.leaves(results)
  ]
  print(name, sums, flush=True)
  os._exit(0)  # what JAX does at its exit is not the kernel's


if __name__ == "__main__":
  main(sys.argv[1])
