# SPDX-License-Identifier: Apache-2.0
"""Per-composite terms and padding that the back ends share."""

import math

import jax.numpy as jnp


def pad_composites(x, multiple):
  """Zeros at the end of axis 1 up to a multiple."""
  missing = -x.shape[1] % multiple
  return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))


def fold_parts(q, k, parts):
  """Composites of `parts` vectors as one longer vector each.

  q, k: [batch, num_composites * parts, num_groups, head_dim] to [batch,
  num_composites, num_groups, parts * head_dim]; k's parts in reverse, so that
  plain products go along the antidiagonal.
  """
  if parts == 1:
    return q, k

  def fold(x, order):
    batch, length, num_groups, head_dim = x.shape
    x = x.reshape(batch, length // parts, parts, num_groups, head_dim)
    x = jnp.moveaxis(x[:, :, ::order], 2, 3)
    return x.reshape(batch, length // parts, num_groups, parts * head_dim)

  return fold(q, 1), fold(k, -1)


def key_bias(k_counts, window_kv):
  """float32 [batch, num_k_composites]: log(count / window); -inf where none.

  Short tail composites weigh as many tokens as they hold.
  """
  count = jnp.maximum(k_counts, 1).astype(jnp.float32)
  bias = jnp.log(count) - math.log(window_kv)
  return jnp.where(k_counts > 0, bias, -jnp.inf)


def last_positions(q_counts, q_offset, window_q):
  """int32 [batch, num_q_composites]: position of a composite's last query.

  -1, before every key, where there is none: padding is not worked on.
  """
  first = jnp.arange(q_counts.shape[1], dtype=jnp.int32) * window_q
  last = q_offset[:, None] + first[None, :] + q_counts - 1
  return jnp.where(q_counts > 0, last, -1)


def row_weights(q_counts, per_block):
  """float32 [batch, num_q_composites]: share of its block's valid queries.

  q_counts: int32 [batch, num_q_blocks * per_block].
  """
  count = q_counts.astype(jnp.float32)
  count = count.reshape(count.shape[0], -1, per_block)
  weight = count / jnp.maximum(count.sum(-1, keepdims=True), 1.0)
  return weight.reshape(q_counts.shape)
