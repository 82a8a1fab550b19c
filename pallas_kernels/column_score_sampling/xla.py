"""Any-device back end: strips of sampled rows, one after another."""

import jax.numpy as jnp
from jax import lax

_STRIP_ELEMENTS = 1 << 23  # float32 logits held at once: 32 MiB


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
  per_strip = max(1, _STRIP_ELEMENTS // (batch * num_heads * kv_len))
  per_strip = min(per_strip, num_rows)
  missing = -num_rows % per_strip
  last_keys = jnp.pad(last_keys, ((0, 0), (0, missing)), constant_values=-1)
  q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
  # [strips, batch, rows, num_kv_heads, heads per kv head, head_dim]
  q = q.reshape(
    batch, -1, per_strip, num_kv_heads, num_heads // num_kv_heads, head_dim
  )
  last_keys = last_keys.reshape(batch, -1, per_strip)
  key = jnp.arange(kv_len, dtype=jnp.int32)

  def add_strip(total, operands):
    q, last = operands
    logits = scale * jnp.einsum(
      "brghd,bjgd->bghrj", q, k, preferred_element_type=jnp.float32
    )
    visible = key[None, None, :] <= last[:, :, None]
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    top = logits.max(-1, keepdims=True)
    p = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
    row_sum = p.sum(-1, keepdims=True)
    p /= jnp.where(row_sum == 0.0, 1.0, row_sum)
    return total + p.sum(3), None

  zeros = jnp.zeros(
    (batch, num_kv_heads, num_heads // num_kv_heads, kv_len), jnp.float32
  )
  total, _ = lax.scan(
    add_strip, zeros, (jnp.moveaxis(q, 1, 0), jnp.moveaxis(last_keys, 1, 0))
  )
  return total.reshape(batch, num_heads, kv_len)
