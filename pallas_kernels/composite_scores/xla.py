"""Any-device back end: strips of query blocks, one after another."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.composite_scores import layout

_STRIP_ELEMENTS = 1 << 22  # float32 composite scores held at once: 16 MiB


def composite_scores(
  q,  # float32 [batch, num_q_composites, num_groups, head_dim]
  k,  # float32 [batch, num_k_composites, num_k_groups, head_dim]
  q_counts,  # int32 [batch, num_q_composites]
  k_counts,  # int32 [batch, num_k_composites]
  q_offset,  # int32 [batch]
  *,
  window_q,
  window_kv,
  block_q,
  block_kv,
  causal,
  scale,
):
  """See `api.composite_scores`."""
  rows, columns = block_q // window_q, block_kv // window_kv
  q, q_counts = (layout.pad_composites(x, rows) for x in (q, q_counts))
  k, k_counts = (layout.pad_composites(x, columns) for x in (k, k_counts))
  batch, num_q, num_groups, head_dim = q.shape
  num_k, num_k_groups = k.shape[1:3]
  num_q_blocks, num_kv_blocks = num_q // rows, num_k // columns
  bias = layout.key_bias(k_counts, window_kv)
  first_key = jnp.arange(num_k, dtype=jnp.int32) * window_kv

  def strips(x):  # [batch, num_q, ...] to [num_q_blocks, batch, rows, ...]
    x = x.reshape(batch, num_q_blocks, rows, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def score_strip(operands):
    q, last, weight = operands
    # [batch, num_k_groups, groups per k group, rows, num_k]
    logits = jnp.einsum(
      "brghd,bwgd->bghrw", q, k, preferred_element_type=jnp.float32
    )
    logits += bias[:, None, None, None, :]
    if causal:
      visible = first_key[None, None, :] <= last[:, :, None]
      logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    top = logits.max(-1, keepdims=True)
    p = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
    total = p.sum(-1, keepdims=True)
    p *= weight[:, None, None, :, None] / jnp.where(total == 0.0, 1.0, total)
    p = p.sum(3).reshape(batch, num_groups, num_kv_blocks, columns)
    return p.sum(-1)

  per_strip = batch * num_groups * rows * num_k
  grouped = (q * scale).reshape(batch, num_q, num_k_groups, -1, head_dim)
  scores = lax.map(
    score_strip,
    (
      strips(grouped),
      strips(layout.last_positions(q_counts, q_offset, window_q)),
      strips(layout.row_weights(q_counts, rows)),
    ),
    batch_size=max(1, min(num_q_blocks, _STRIP_ELEMENTS // per_strip)),
  )
  return jnp.moveaxis(scores, 0, 2)
