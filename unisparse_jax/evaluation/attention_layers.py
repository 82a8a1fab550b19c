# SPDX-License-Identifier: Apache-2.0
"""What a pattern keeps of the dense attention of one layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from unisparse_jax import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerQuality:
  """Of one layer on one input.

  Attributes:
    density: kept blocks over reachable blocks, mean over heads.
    nominal_density: kept pairs of tokens over visible pairs, likewise.
    recall: dense softmax mass on kept keys, mean over queries and heads.
    recall_p1: its first percentile.
    cra: its minimum over queries, then over heads.
    relative_l1: output error against dense attention.
    cosine: of the outputs.
  """

  density: float
  nominal_density: float
  recall: float
  recall_p1: float
  cra: float
  relative_l1: float
  cosine: float


def layer_quality(
  pattern: attention.Pattern,
  q: Array,
  k: Array,
  v: Array,
  dense_out: Array,
  *,
  causal: bool = True,
) -> LayerQuality:
  """Density, recall and output error of a pattern.

  Args:
    pattern: the method.
    q: [batch, q_len, num_heads, head_dim], from `models.capture_qkv`.
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    dense_out: dense attention of them, as q.
    causal: whether a query sees only keys at or before its position.
  """
  values = _quality(pattern, q, k, v, dense_out, causal=causal)
  return LayerQuality(**{name: float(x) for name, x in values.items()})


def mask_quality(
  mask: attention.BlockMask,
  q: Array,
  k: Array,
  v: Array,
  dense_out: Array,
  dense_lse: Array,
  *,
  implementation: str | None = None,
) -> dict[str, Array]:
  """The values of `LayerQuality` at the cost of one sparse attention.

  Args:
    mask: what is kept.
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    dense_out: dense attention of them, as q.
    dense_lse: float32 [batch, q_len, num_heads], its log-sum-exp, by the same
      back end.
    implementation: back end of sparse attention.

  Returns:
    Scalars by name, to be jitted; recall by `metrics.recall_from_lse`.
  """
  out, lse = attention.sparse_attention(
    q, k, v, mask, return_lse=True, implementation=implementation
  )
  recall = attention.metrics.recall_from_lse(lse, dense_lse)
  return _summary(mask, out, recall, dense_out)


@jax.jit(static_argnums=0, static_argnames="causal")
def _quality(pattern, q, k, v, dense_out, *, causal):
  mask = pattern.select(q, k, causal=causal)
  out = attention.sparse_attention(q, k, v, mask)
  recall = attention.metrics.recall(q, k, mask)
  return _summary(mask, out, recall, dense_out)


def _summary(mask, out, recall, dense_out):
  error = attention.metrics.output_error(out, dense_out)
  return {
    "density": attention.metrics.density(mask).mean(),
    "nominal_density": attention.metrics.nominal_density(mask).mean(),
    "recall": recall.mean(),
    "recall_p1": jnp.quantile(recall, 0.01),
    "cra": recall.min(),
    "relative_l1": error["relative_l1"],
    "cosine": error["cosine"],
  }
