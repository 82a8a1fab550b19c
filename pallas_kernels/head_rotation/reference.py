# SPDX-License-Identifier: Apache-2.0
"""The op as its contract reads."""

import jax.numpy as jnp
from jax import lax


def head_rotation(
  merged,  # [batch, q_len, channels]
  cos,  # float32 [batch or 1, q_len, 1, head_dim / 2]
  sin,  # as cos
  q_scale=None,  # [head_dim]
  k_scale=None,  # [head_dim]
  *,
  num_heads,
  num_kv_heads,
  eps,
):
  """See `api.head_rotation`."""
  heads = merged.reshape(*merged.shape[:2], num_heads + 2 * num_kv_heads, -1)
  q, k, v = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=2)

  def rotated(x, scale):
    wide = x.astype(jnp.float32)
    if scale is not None:
      mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
      scale = scale.astype(jnp.float32).reshape(1, 1, 1, -1)
      wide *= lax.rsqrt(mean_square + eps) * scale
      wide = wide.astype(x.dtype).astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    out = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(out, axis=-1).astype(x.dtype)

  return rotated(q, q_scale), rotated(k, k_scale), v
