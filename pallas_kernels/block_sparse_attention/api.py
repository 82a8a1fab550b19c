# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu,
  mosaic_tpu,
  reference,
  triton,
  xla,
)

IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu.block_sparse_attention,
  "reference": reference.block_sparse_attention,
  "triton": triton.block_sparse_attention,
  "mosaic_tpu": mosaic_tpu.block_sparse_attention,
  "xla": xla.block_sparse_attention,
}


def block_sparse_attention(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  v: Float[Array, "batch kv_len num_kv_heads head_dim"],
  kv_block_indices: Int[Array, "batch num_mask_heads num_q_blocks max_blocks"],
  num_kv_blocks: Int[Array, "batch num_mask_heads num_q_blocks"],
  *,
  block_q: int = 128,
  block_kv: int = 128,
  causal: bool = True,
  scale: float | None = None,
  q_offset: int | Int[Array, "..."] = 0,
  kv_len: int | Int[Array, "..."] | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[
  Float[Array, "batch q_len num_heads head_dim"],
  Float[Array, "batch q_len num_heads"],
]:
  """Softmax attention of every query over the listed blocks of keys.

  out[i] = sum_j softmax_j(scale * <q_i, k_j>) v_j over the keys j of the blocks
  listed for row i // block_q, with j < kv_len and, if causal,
  j <= q_offset + i.

  Args:
    q: [batch, q_len, num_heads, head_dim]; float32, bfloat16 or float16.
    k: [batch, kv_len, num_kv_heads, head_dim], dtype of q. Query head h reads
      key head h // (num_heads // num_kv_heads).
    v: as k.
    kv_block_indices: int32 [batch, num_mask_heads, ceil(q_len / block_q),
      max_blocks]; the first `num_kv_blocks` of a row are its blocks, each once,
      those that need a per-token mask (diagonal, ragged end) first. Query head
      h reads mask head h // (num_heads // num_mask_heads).
    num_kv_blocks: int32 [batch, num_mask_heads, ceil(q_len / block_q)].
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys at or before its own position.
    scale: softmax scale, dimensionless; default head_dim ** -0.5.
    q_offset: absolute position of query 0; scalar or [batch].
    kv_len: number of valid keys; scalar or [batch]; default all of k.
    implementation: "mosaic_gpu" (Hopper), "triton" (NVIDIA GPUs of compute
      capability 8.0 and newer), "mosaic_tpu", "xla" (any device), "reference",
      a sequence to try in order, or None for this platform's default.

  Returns:
    out, [batch, q_len, num_heads, head_dim], dtype of q; rows without keys: 0.
    lse, float32 [batch, q_len, num_heads]: natural log of the sum of
    exponentials of the row's scaled scores; -inf for rows with no key.

  Raises:
    ValueError: shapes, dtypes or block sizes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: O(kept blocks * block_q * block_kv * head_dim); no q_len x kv_len array
    ("reference" excepted).
  """
  checks.check_qkv(q, k, v)
  checks.check_positive_int("block_q", block_q)
  checks.check_positive_int("block_kv", block_kv)
  checks.check_scale(scale)
  batch, q_len, num_heads, head_dim = q.shape
  num_q_blocks = math.ceil(q_len / block_q)
  checks.check_shape(
    "num_kv_blocks",
    num_kv_blocks,
    ("batch", "num_mask_heads", "num_q_blocks"),
    (batch, None, num_q_blocks),
  )
  num_mask_heads = num_kv_blocks.shape[1]
  checks.check_divides("num_mask_heads", num_mask_heads, "num_heads", num_heads)
  checks.check_shape(
    "kv_block_indices",
    kv_block_indices,
    ("batch", "num_mask_heads", "num_q_blocks", "max_blocks"),
    (batch, num_mask_heads, num_q_blocks, None),
  )
  checks.check_dtype("kv_block_indices", kv_block_indices.dtype, ("int32",))
  checks.check_dtype("num_kv_blocks", num_kv_blocks.dtype, ("int32",))
  if scale is None:
    scale = head_dim**-0.5
  capacity = k.shape[1]
  kv_len = capacity if kv_len is None else kv_len
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    q,
    k,
    v,
    kv_block_indices,
    num_kv_blocks,
    checks.per_row("q_offset", q_offset, batch),
    jnp.minimum(checks.per_row("kv_len", kv_len, batch), jnp.int32(capacity)),
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    scale=float(scale),
  )
