# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.column_score_sampling import (
  mosaic_gpu,
  mosaic_tpu,
  reference,
  triton,
  xla,
)

IMPLEMENTATIONS = {
  "reference": reference.column_score_sampling,
  "xla": xla.column_score_sampling,
  "mosaic_gpu": mosaic_gpu.column_score_sampling,
  "triton": triton.column_score_sampling,
  "mosaic_tpu": mosaic_tpu.column_score_sampling,
}


def column_score_sampling(
  q: Float[Array, "batch num_rows num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  positions: Int[Array, "batch num_rows"],
  *,
  causal: bool = True,
  scale: float | None = None,
  kv_len: int | Int[Array, "..."] | None = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "batch num_heads kv_len"]:
  """Exact softmax rows of sampled queries, added up by key.

  scores[j] = sum_t softmax_j(scale * <q_t, k_j>) over the sampled queries t,
  with j < kv_len and, if causal, j <= positions[t].

  Args:
    q: [batch, num_rows, num_heads, head_dim], the sampled queries alone;
      float32, bfloat16 or float16.
    k: [batch, kv_len, num_kv_heads, head_dim], dtype of q. Query head h reads
      key head h // (num_heads // num_kv_heads).
    positions: int32 [batch, num_rows], absolute position of each sampled query;
      ascending is fastest. A negative one marks a row that counts nothing.
    causal: whether a query sees only keys at or before its own position.
    scale: softmax scale, dimensionless; default head_dim ** -0.5.
    kv_len: number of valid keys; scalar or [batch]; default all of k.
    implementation: "mosaic_gpu" (many rows on Hopper), "triton", "mosaic_tpu",
      "xla", "reference", a sequence to try in order, or None for this
      platform's default.

  Returns:
    float32 [batch, num_heads, kv_len]; its sum over keys is the number of rows
    that see a key.

  Raises:
    ValueError: shapes or dtypes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: twice the products of num_rows x kv_len logits; none is stored
    ("reference" excepted; "xla" holds strips of them).
  Source: SampleAttention (arXiv 2406.15486), stage 1, query-guided sampling.
  """
  checks.check_qkv(q, k, None)
  checks.check_scale(scale)
  batch, num_rows, _, head_dim = q.shape
  checks.check_shape(
    "positions", positions, ("batch", "num_rows"), (batch, num_rows)
  )
  checks.check_dtype("positions", positions.dtype, ("int32",))
  capacity = k.shape[1]
  kv_len = checks.per_row(
    "kv_len", capacity if kv_len is None else kv_len, batch
  )
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    q,
    k,
    # The last key that a row sees.
    jnp.where(
      positions < 0,
      -1,
      jnp.minimum(
        positions if causal else jnp.int32(capacity), kv_len[:, None] - 1
      ),
    ),
    scale=float(head_dim**-0.5 if scale is None else scale),
  )
