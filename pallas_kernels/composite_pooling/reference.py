# SPDX-License-Identifier: Apache-2.0
"""Composite pooling in plain XLA, which fuses it into one read of x."""

import math

import jax.numpy as jnp


def composite_pooling(
  x,  # [batch, len, num_heads, head_dim]
  length,  # int32 [batch]
  *,
  window,
  head_group,
):
  """See `api.composite_pooling`."""
  batch, x_len, num_heads, head_dim = x.shape
  num_composites = math.ceil(x_len / window)
  x = jnp.pad(x, ((0, 0), (0, num_composites * window - x_len), (0, 0), (0, 0)))
  token = jnp.arange(num_composites * window)[None, :]
  is_valid = token < length[:, None]
  x = jnp.where(is_valid[:, :, None, None], x.astype(jnp.float32), 0.0)
  # [batch, num_composites, window, num_groups, head_group, head_dim]
  x = x.reshape(
    batch,
    num_composites,
    window,
    num_heads // head_group,
    head_group,
    head_dim,
  )
  count = is_valid.reshape(batch, num_composites, window).sum(
    -1, dtype=jnp.int32
  )
  weight = head_group * jnp.maximum(count, 1).astype(jnp.float32)
  return x.sum((2, 4)) / weight[:, :, None, None], count
