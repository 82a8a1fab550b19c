# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.composite_scores import mosaic_tpu, reference, triton, xla

OVER_QUERIES = ("mean", "max")
IMPLEMENTATIONS = {
  "reference": reference.composite_scores,
  "xla": xla.composite_scores,
  "triton": triton.composite_scores,
  "mosaic_tpu": mosaic_tpu.composite_scores,
}


def composite_scores(
  q: Float[Array, "batch num_q_vectors num_groups head_dim"],
  k: Float[Array, "batch num_k_vectors num_k_groups head_dim"],
  q_counts: Int[Array, "batch num_q_composites"],
  k_counts: Int[Array, "batch num_k_composites"],
  *,
  window_q: int,
  window_kv: int,
  block_q: int = 128,
  block_kv: int = 128,
  causal: bool = True,
  scale: float | None = None,
  q_offset: int | Int[Array, "..."] = 0,
  over_queries: str = "mean",
  parts: int = 1,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "batch num_groups num_q_blocks num_kv_blocks"]:
  """Softmax between composite tokens, summed over each block of keys.

  scores[i, j] = sum_u weight_u sum_w softmax_w(scale * <q_u, k_w> + bias_w),
  over the composites u of query block i and w of key block j, with weight_u =
  q_counts_u / (valid queries of block i) and bias_w = log(k_counts_w /
  window_kv). If causal, u sees w when w's first key is not after u's last
  query. With over_queries="max" the largest over u stands for the weighted sum.

  A composite may be several vectors, as all tokens of a window beside one
  another: <q_u, k_w> = sum_s <q_u[parts - 1 - s], k_w[s]>, along the
  antidiagonal of a tile. They are read where they lie.

  Args:
    q: [batch, num_q_composites * parts, num_groups, head_dim]; means over
      `window_q` queries, as `composite_pooling` makes them, or queries.
      float32, bfloat16 or float16.
    k: [batch, num_k_composites * parts, num_k_groups, head_dim] of q's dtype;
      means over `window_kv` keys, or keys. Query group g reads key group
      g // (num_groups // num_k_groups).
    q_counts: int32 [batch, num_q_composites], valid queries in each window.
    k_counts: int32 [batch, num_k_composites], valid keys; 0: never seen.
    window_q: queries in one composite; divides block_q.
    window_kv: keys in one composite; divides block_kv.
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys at or before its own position.
    scale: softmax scale, dimensionless; default head_dim ** -0.5.
    q_offset: absolute position of query 0; scalar or [batch].
    over_queries: how a block's composite queries become one score: "mean", by
      their counts, or "max".
    implementation: a name in `IMPLEMENTATIONS`, a sequence of names to try in
      order, or None for this platform's default.
    parts: consecutive vectors in one composite.

  Returns:
    float32 [batch, num_groups, ceil(num_q_composites * window_q / block_q),
    ceil(num_k_composites * window_kv / block_kv)]. Rows sum to 1 (mean) or
    more (max), or are 0 where no query is valid or none sees a key.

  Raises:
    ValueError: shapes, dtypes or sizes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: O(num_q_composites * num_k_composites * parts * head_dim) per group; no
    [num_q_composites, num_k_composites] array ("reference" excepted; "xla"
    holds strips of it). "triton" multiplies float32 in TensorFloat-32.
  Source: UniSparse (arXiv 2512.14082), attention in the compressed space;
    XAttention (arXiv 2503.16428), the antidiagonals.
  """
  axes = ("batch", "num_q_vectors", "num_groups", "head_dim")
  checks.check_shape("q", q, axes, (None,) * 4)
  batch, num_q, num_groups, head_dim = q.shape
  axes = ("batch", "num_k_vectors", "num_k_groups", "head_dim")
  checks.check_shape("k", k, axes, (batch, None, None, head_dim))
  checks.check_dtype("q", q.dtype, ("float32", "bfloat16", "float16"))
  checks.check_dtype("k", k.dtype, (jnp.dtype(q.dtype).name,))
  checks.check_positive_int("parts", parts)
  checks.check_divides("num_k_groups", k.shape[2], "num_groups", num_groups)
  for name, counts, length in (
    ("q_counts", q_counts, num_q),
    ("k_counts", k_counts, k.shape[1]),
  ):
    checks.check_divides("parts", parts, f"num_{name[0]}_vectors", length)
    axes = ("batch", f"num_{name[0]}_composites")
    checks.check_shape(name, counts, axes, (batch, length // parts))
    checks.check_dtype(name, counts.dtype, ("int32",))
  for name, window, block_name, block in (
    ("window_q", window_q, "block_q", block_q),
    ("window_kv", window_kv, "block_kv", block_kv),
  ):
    checks.check_positive_int(name, window)
    checks.check_positive_int(block_name, block)
    checks.check_divides(name, window, block_name, block)
  checks.check_scale(scale)
  checks.check_choice("over_queries", over_queries, OVER_QUERIES)
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    q,
    k,
    q_counts,
    k_counts,
    checks.per_row("q_offset", q_offset, batch),
    window_q=window_q,
    window_kv=window_kv,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    scale=float(head_dim**-0.5 if scale is None else scale),
    over_queries=over_queries,
    parts=parts,
  )
