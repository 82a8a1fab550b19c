# SPDX-License-Identifier: Apache-2.0
"""Any-device back end: strips of query blocks, one after another.

A strip's scores stay in a core's cache, and a causal strip is scored against
the keys up to its own end, rounded up to an eighth of all. Measured on 2 CPU
cores, float32, 2 groups of head_dim 64, ms by (strip elements, lengths):

  tokens, windows   one strip of 2^22, 1   2^18, 1   2^18, 8   2^19, 8   2^20, 8
  8,192, 4 and 4    120 (74 before)           24        20        18        21
  16,384, 4 and 4   243 (162)                105       105        77        80
  16,384, 4 and 8   396 (145)                 67        41        37        50

("before": weights and masks applied to every composite instead of to a block's
sum.) Long composites, 8 vectors of 64, 6 heads on 2, want larger strips: 16,384
tokens take 170, 131, 109 and 100 ms in strips of 2^19 to 2^22, 130 without
skipping the future; 2,048 tokens 3.4 in one strip, 2.4 without.

Measured later, as it is now: with the scores brought from one order of axes to
another, and not the queries, 16,384 tokens with windows of 4 take 39.6 ms for
17.5, and the long composites above 107 for 70.
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.composite_scores import layout

# Finite: infinities, through the exponential, cost a CPU half as much again.
# Below the logits, however large they are.
_MASKED = -1e38
_STRIP_ELEMENTS = 1 << 19  # float32 composite scores held at once: 2 MiB
_LONG_STRIP_ELEMENTS = 1 << 22  # of composites of several vectors
_LENGTHS = 8  # lengths of keys that a causal strip is compiled for


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
  q, k = layout.fold_parts(q, k, parts)
  q, q_counts = (layout.pad_composites(x, rows) for x in (q, q_counts))
  k, k_counts = (layout.pad_composites(x, columns) for x in (k, k_counts))
  batch, num_q, num_groups, head_dim = q.shape
  num_k, num_k_groups = k.shape[1:3]
  num_q_blocks, num_kv_blocks = num_q // rows, num_k // columns
  strip_blocks = _strip_blocks(
    num_q_blocks,
    batch * num_groups * rows * num_k,
    _STRIP_ELEMENTS if parts == 1 else _LONG_STRIP_ELEMENTS,
  )
  strip_rows = strip_blocks * rows
  bias = jnp.maximum(layout.key_bias(k_counts, window_kv), _MASKED)
  first_key = jnp.arange(num_k, dtype=jnp.int32) * window_kv
  # [batch, num_k_groups, head_dim, num_k]
  k = jnp.transpose(k, (0, 2, 3, 1))

  def strips(x):  # [batch, num_q, ...] to [num_strips, batch, rows, ...]
    x = x.reshape(batch, -1, strip_rows, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def score(visible_blocks, q, last, weight):
    """[batch, num_groups, strip_blocks, num_kv_blocks] of the first blocks."""
    keys = visible_blocks * columns
    # [batch, num_k_groups, groups per k group, strip_rows, keys], the order of
    # a product. Of a batch in another, XLA for CPUs (JAX 0.11.2) fails on
    # bfloat16.
    logits = jnp.einsum(
      "bghrd,bgdw->bghrw",
      jnp.moveaxis(q, 1, 3),
      k[..., :keys],
      preferred_element_type=jnp.float32,
    )
    row_bias = bias[:, None, :keys]
    if causal:
      is_past = first_key[None, None, :keys] <= last[:, :, None]
      row_bias = jnp.where(is_past, row_bias, _MASKED)
    logits = logits * scale + row_bias[:, None, None]
    # A row without a key must not become uniform.
    row_max = jnp.maximum(logits.max(-1, keepdims=True), 0.1 * _MASKED)
    p = jnp.exp(logits - row_max)
    p = p.reshape(batch, num_groups, strip_rows, visible_blocks, columns)
    p = p.sum(-1)
    total = p.sum(-1, keepdims=True)
    if over_queries == "max":
      weight = jnp.where(weight > 0.0, 1.0, 0.0)
    p *= weight[:, None, :, None] / jnp.where(total == 0.0, 1.0, total)
    p = p.reshape(batch, num_groups, strip_blocks, rows, visible_blocks)
    p = p.max(3) if over_queries == "max" else p.sum(3)
    missing = num_kv_blocks - visible_blocks
    return jnp.pad(p, ((0, 0),) * 3 + ((0, missing),))

  per_length = -(-num_kv_blocks // _LENGTHS) if causal else num_kv_blocks
  lengths = range(per_length, num_kv_blocks + per_length, per_length)
  by_length = [
    functools.partial(score, min(length, num_kv_blocks)) for length in lengths
  ]

  def score_strip(operands):
    q, last, weight = operands
    if len(by_length) == 1:
      return by_length[0](q, last, weight)
    length = jnp.max(last) // (per_length * block_kv)
    length = jnp.clip(length, 0, len(by_length) - 1)
    return lax.switch(length, by_length, q, last, weight)

  grouped = q.reshape(batch, num_q, num_k_groups, -1, head_dim)
  # [num_strips, batch, num_groups, strip_blocks, num_kv_blocks]
  scores = lax.map(
    score_strip,
    (
      strips(grouped),
      strips(layout.last_positions(q_counts, q_offset, window_q)),
      strips(layout.row_weights(q_counts, rows)),
    ),
  )
  return jnp.moveaxis(scores, 0, 2).reshape(
    batch, num_groups, num_q_blocks, num_kv_blocks
  )


def _strip_blocks(num_q_blocks, per_block, strip_elements):
  """Blocks in a strip: a divisor of all, as many as its memory allows."""
  most = max(1, min(num_q_blocks, strip_elements // per_block))
  return max(n for n in range(1, most + 1) if num_q_blocks % n == 0)
