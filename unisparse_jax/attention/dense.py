# SPDX-License-Identifier: Apache-2.0
"""Dense attention: the baseline, and what decoding uses."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, device
from pallas_kernels.block_sparse_attention import xla
from unisparse_jax.attention import block_mask

IMPLEMENTATIONS = ("tiled", "xla", "cudnn")
_DECODE_LEN = 16  # up to here the logit matrix is no larger than a tile


def dense_attention(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  v: Float[Array, "batch kv_len num_kv_heads head_dim"],
  *,
  causal: bool = True,
  scale: float | None = None,
  q_offset: int | Int[Array, "..."] = 0,
  kv_len: int | Int[Array, "..."] | None = None,
  implementation: str | None = None,
) -> Float[Array, "batch q_len num_heads head_dim"]:
  """Softmax attention over all valid keys.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    causal: whether a query sees only keys at or before its own position.
    scale: softmax scale; default head_dim ** -0.5.
    q_offset: absolute position of query 0; scalar or [batch].
    kv_len: number of valid keys; scalar or [batch]; default all of k. Where
      causal queries have all keys up to their own (q_offset 0, as many keys as
      queries), those past it are padding too: cuDNN lets them see padding.
    implementation: "tiled": a loop over blocks with memory linear in length.
      "xla", "cudnn": `jax.nn.dot_product_attention`. None: "cudnn" on a GPU
      where it serves the call, "xla" for a few queries, else "tiled".

  Returns:
    [batch, q_len, num_heads, head_dim], dtype of q.

  Raises:
    ValueError: shapes, dtypes or settings are off.
  """
  checks.check_qkv(q, k, v)
  checks.check_scale(scale)
  if kv_len is not None:
    kv_len = checks.per_row("kv_len", kv_len, q.shape[0])
  # Only a plain call may use the library's own causal mask, which hides keys
  # past kv_len from all queries that count.
  starts = isinstance(q_offset, int) and q_offset == 0
  is_square = causal and starts and q.shape[1] == k.shape[1]
  plain = is_square or (not causal and starts and kv_len is None)
  if implementation is None:
    implementation = "xla" if q.shape[1] <= _DECODE_LEN else "tiled"
    if jax.default_backend() == "gpu" and plain and _serves(q):
      implementation = "cudnn"
  checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
  if implementation == "tiled":
    return _tiled(q, k, v, causal, scale, q_offset, kv_len)

  mask = None
  if not (plain and (kv_len is None or implementation == "cudnn")):
    batch, shape = q.shape[0], (q.shape[0], 1, q.shape[1], k.shape[1])
    key = lax.broadcasted_iota(jnp.int32, shape, 3)
    limit = jnp.int32(k.shape[1])
    if kv_len is not None:
      limit = kv_len[:, None, None, None]
    if causal:
      position = lax.broadcasted_iota(jnp.int32, shape, 2)
      offset = checks.per_row("q_offset", q_offset, batch)
      position += offset[:, None, None, None]
      limit = jnp.minimum(limit, position + 1)
    mask = key < limit
  # The library promotes inside, which a caller's strict mode would refuse.
  with jax.numpy_dtype_promotion("standard"):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      mask=mask,
      scale=scale,
      is_causal=causal and mask is None,
      implementation=implementation,
    )


def _serves(q) -> bool:
  """Whether cuDNN takes such queries on the default device."""
  is_half = jnp.dtype(q.dtype).itemsize == 2
  newer = (device.nvidia_compute_capability() or (0, 0)) >= (9, 0)
  head_dim = q.shape[-1]
  return is_half and head_dim % 8 == 0 and head_dim <= (256 if newer else 128)


def _tiled(q, k, v, causal, scale, q_offset, kv_len):
  """The block-sparse loop over full lists."""
  grid = block_mask.BlockGrid.create(
    q,
    k,
    block_q=128,
    block_kv=128,
    causal=causal,
    q_offset=q_offset,
    kv_len=kv_len,
  )
  mask = block_mask.BlockMask.full(grid)
  out, _ = xla.block_sparse_attention(
    q,
    k,
    v,
    mask.kv_block_indices,
    mask.num_kv_blocks,
    grid.q_offset,
    grid.kv_len,
    block_q=grid.block_q,
    block_kv=grid.block_kv,
    causal=causal,
    scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
  )
  return out
