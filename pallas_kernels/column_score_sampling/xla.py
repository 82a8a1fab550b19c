# SPDX-License-Identifier: Apache-2.0
"""Any-device back end: strips of sampled rows, head by head.

A strip's logits stay in a CPU's cache: strips of all heads at once, of 32 MiB,
took five to ten times as long at 8K keys.
"""

import jax.numpy as jnp
from jax import lax

_ROWS_PER_STRIP = 64
# Finite: infinities, through the exponential, cost a CPU half as much again.
_MASKED = -1e30


def column_score_sampling(
  q,  # [batch, num_rows, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys,  # int32 [batch, num_rows], the last key that a row sees; -1: none
  *,
  scale,
):
  """See `api.column_score_sampling`."""
  batch, num_rows, num_heads, head_dim = q.shape
  kv_len, num_kv_heads = k.shape[1:3]
  group = num_heads // num_kv_heads
  per_strip = min(_ROWS_PER_STRIP, num_rows)
  missing = -num_rows % per_strip
  last_keys = jnp.pad(last_keys, ((0, 0), (0, missing)), constant_values=-1)
  q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
  # [batch, num_kv_heads, strips, group, per_strip, head_dim]
  q = q.reshape(batch, -1, per_strip, num_kv_heads, group, head_dim)
  q = jnp.transpose(q, (0, 3, 1, 4, 2, 5))
  last_keys = last_keys.reshape(batch, -1, per_strip)
  key = jnp.arange(kv_len, dtype=jnp.int32)

  def one_head(task):
    b, kv_head = task // num_kv_heads, task % num_kv_heads
    keys = k[b, :, kv_head]

    def add_strip(total, strip):
      queries, last = strip
      logits = scale * jnp.einsum(
        "grd,kd->grk", queries, keys, preferred_element_type=jnp.float32
      )
      visible = (key[None, :] <= last[:, None])[None]
      logits = jnp.where(visible, logits, _MASKED)
      logits -= logits.max(-1, keepdims=True)
      p = jnp.where(visible, jnp.exp(logits), 0.0)
      mass = p.sum(-1, keepdims=True)
      p /= jnp.where(mass == 0.0, 1.0, mass)
      return total + p.sum(1), None

    zeros = jnp.zeros((group, kv_len), jnp.float32)
    return lax.scan(add_strip, zeros, (q[b, kv_head], last_keys[b]))[0]

  scores = lax.map(one_head, jnp.arange(batch * num_kv_heads))
  return scores.reshape(batch, num_heads, kv_len)
