# SPDX-License-Identifier: Apache-2.0
"""Masks of a few heads, for the pictures of the long-context experiment."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from unisparse_jax import attention


def different_heads(mass: np.ndarray, groups: Sequence) -> list[int]:
  """Four heads that behave differently, by their true attention.

  Args:
    mass: [num_heads, num_q_blocks, num_kv_blocks], rows sum to 1.
    groups: of each head; equal for heads that share their mask. A second head
      of a group is taken only where no other is left.

  Returns:
    Indices of the head that looks nearest, of the one that looks most at the
    first keys, of the one that spreads most, and of the one that looks most at
    few blocks in between; fewer where there are fewer heads.
  """
  num_q_blocks, num_kv_blocks = mass.shape[1:]
  rows = np.arange(num_q_blocks)[:, None]
  columns = np.arange(num_kv_blocks)[None, :]
  # Queries may have another block size than keys.
  diagonal = rows * num_kv_blocks // num_q_blocks
  near = np.abs(columns - diagonal) <= 1
  local = (mass * near).sum((1, 2))
  sink = mass[:, :, 0].sum(1)
  entropy = -(mass * np.log(np.maximum(mass, 1e-9))).sum((1, 2))
  between = np.where(near | (columns == 0), 0.0, mass).max(2).sum(1)
  chosen: list[int] = []
  for feature in (local, sink, entropy, between):
    seen = {groups[i] for i in chosen}
    order = [int(i) for i in np.argsort(-feature) if i not in chosen]
    order.sort(key=lambda i: groups[i] in seen)
    chosen.extend(order[:1])
  return chosen


@functools.partial(jax.jit, static_argnums=0)
def mass_and_mask(pattern, q, k):
  """The true attention of all blocks, and those that a pattern keeps.

  Args:
    pattern: an `attention.Pattern`.
    q: [batch, len, num_heads, head_dim].
    k: [batch, len, num_kv_heads, head_dim].

  Returns:
    float32 [batch, num_heads, num_q_blocks, num_kv_blocks], and the mask's
    blocks, bool [batch, num_mask_heads, num_q_blocks, num_kv_blocks].
  """
  mask = pattern.select(q, k)
  return attention.metrics.block_mass(q, k, mask.grid), mask.to_dense()
