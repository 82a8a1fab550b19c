# SPDX-License-Identifier: Apache-2.0
"""Back ends that know rows alone, given one flat row of all rows' tokens."""

import functools

import jax.numpy as jnp


def unpacked(fn):
  """`fn` as it is, and with `starts` by way of [batch, n].

  See `api.tree_attention` for both forms.
  """

  @functools.wraps(fn)
  def tree_attention(
    q,
    cache_k,
    cache_v,
    cache_len,
    tree_k,
    tree_v,
    tree_mask,
    counts=None,
    starts=None,
    *,
    scale,
  ):
    by_row = functools.partial(fn, scale=scale)
    rest = cache_k, cache_v, cache_len
    if starts is None or counts is None:
      return by_row(q, *rest, tree_k, tree_v, tree_mask, counts)
    batch, n = tree_mask.shape[:2]
    packed = q.shape[1]
    column = jnp.arange(n, dtype=jnp.int32)[None, :]
    is_counted = column < counts[:, None]
    slot = jnp.where(is_counted, starts[:, None] + column, packed)

    def unpack(values):
      return jnp.take(values[0], slot, axis=0, mode="fill", fill_value=0)

    out = by_row(
      unpack(q), *rest, unpack(tree_k), unpack(tree_v), tree_mask, counts
    )
    # Slots of no token read the zeros behind the last row.
    token = jnp.full((packed,), batch * n, jnp.int32)
    index = jnp.arange(batch * n, dtype=jnp.int32).reshape(batch, n)
    token = token.at[slot].set(index, mode="drop")
    out = out.reshape(batch * n, *out.shape[2:])
    return jnp.take(out, token, axis=0, mode="fill", fill_value=0)[None]

  return tree_attention
