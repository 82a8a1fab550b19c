# SPDX-License-Identifier: Apache-2.0
"""Dense float32 oracle: holds every composite score, written to be read."""

import jax
import jax.numpy as jnp

from pallas_kernels.composite_scores import layout


def composite_scores(
  q,  # [batch, num_q_composites * parts, num_groups, head_dim]
  k,  # [batch, num_k_composites * parts, num_k_groups, head_dim]
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
  over_queries,
  parts,
):
  """See `api.composite_scores`."""
  rows, columns = block_q // window_q, block_kv // window_kv
  q, k = (x.astype(jnp.float32) for x in layout.fold_parts(q, k, parts))
  q, q_counts = (layout.pad_composites(x, rows) for x in (q, q_counts))
  k, k_counts = (layout.pad_composites(x, columns) for x in (k, k_counts))
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  # [batch, num_groups, num_q_composites, num_k_composites]
  attn_logits = scale * jnp.einsum("bugd,bwgd->bguw", q, k, precision="highest")
  attn_logits += layout.key_bias(k_counts, window_kv)[:, None, None, :]
  visible = (k_counts > 0)[:, None, None, :]
  if causal:
    last = layout.last_positions(q_counts, q_offset, window_q)
    first_key = jnp.arange(k.shape[1]) * window_kv
    visible &= first_key[None, None, None, :] <= last[:, None, :, None]
  p = jax.nn.softmax(attn_logits, axis=-1, where=visible)
  p = jnp.where(visible, p, 0.0)
  batch, num_groups, num_q, num_k = p.shape
  p = p.reshape(
    batch, num_groups, num_q // rows, rows, num_k // columns, columns
  ).sum(5)
  weight = layout.row_weights(q_counts, rows)
  weight = weight.reshape(batch, 1, num_q // rows, rows, 1)
  if over_queries == "max":
    return jnp.where(weight > 0.0, p, 0.0).max(3)
  return (p * weight).sum(3)
