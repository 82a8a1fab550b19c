# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for NVIDIA GPUs: a program holds a few tokens of one head.

A decoding step of a small model takes as long as its launches: XLA takes about
seven for what is one here (19 a layer with all else, 1.7 us each, H200, 155M
decoder of 32 layers; a step of 16 rows 1.08 ms, with this 0.92, with
`cache_append`, too, 0.84 to 0.86).

The gradient is the reference's: training waits for no launches.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.head_rotation import reference
from pallas_kernels.triton_backend import plgpu

_TILE_ELEMENTS = 512  # of a head's half, held by one warp


# Or a model called outside jit would compile the kernel anew in every layer.
@functools.partial(
  jax.jit,
  static_argnames=(
    "num_heads",
    "num_kv_heads",
    "eps",
    "capability",
    "interpret",
  ),
)
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
  capability=None,
  interpret=False,
):
  """See `api.head_rotation` and, for the last two, `triton_backend`."""
  triton_backend.target(capability, interpret)
  batch, q_len, channels = merged.shape
  num_all = num_heads + 2 * num_kv_heads
  head_dim = channels // num_all
  half = head_dim // 2
  triton_backend.check_head_dim(head_dim, instead="reference")
  num_rows = batch * q_len
  tile = max(1, min(_TILE_ELEMENTS // half, pl.next_power_of_2(num_rows)))

  @jax.custom_vjp
  def rotate(merged, cos, sin, q_scale, k_scale):
    cos, sin = (
      jnp.broadcast_to(x, (batch, q_len, 1, half)).reshape(num_rows, half)
      for x in (cos, sin)
    )
    out = triton_backend.call(
      functools.partial(_kernel, tile=tile, eps=eps),
      grid=(num_all, pl.cdiv(num_rows, tile)),
      out_shape=tuple(
        jax.ShapeDtypeStruct((num_rows, count, head_dim), merged.dtype)
        for count in (num_heads, num_kv_heads, num_kv_heads)
      ),
      num_warps=1,
      num_stages=1,
      interpret=interpret,
      name="head_rotation",
    )(merged.reshape(num_rows, channels), cos, sin, q_scale, k_scale)
    return tuple(x.reshape(batch, q_len, -1, head_dim) for x in out)

  def pull_back(arrays, cotangents):
    settings = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps)
    plain = functools.partial(reference.head_rotation, **settings)
    return jax.vjp(plain, *arrays)[1](cotangents)

  rotate.defvjp(lambda *arrays: (rotate(*arrays), arrays), pull_back)
  return rotate(merged, cos, sin, q_scale, k_scale)


def _kernel(
  merged_ref,  # [num_rows, channels]
  cos_ref,  # float32 [num_rows, head_dim / 2]
  sin_ref,  # as cos_ref
  q_scale_ref,  # [head_dim], or None
  k_scale_ref,  # [head_dim], or None
  q_ref,  # [num_rows, num_heads, head_dim]
  k_ref,  # [num_rows, num_kv_heads, head_dim]
  v_ref,  # [num_rows, num_kv_heads, head_dim]
  *,
  tile,
  eps,
):
  head, program = pl.program_id(0), pl.program_id(1)
  num_rows, num_heads, head_dim = q_ref.shape
  num_kv_heads, half = k_ref.shape[1], head_dim // 2
  row = program * tile + jnp.arange(tile, dtype=jnp.int32)[:, None]
  near = jnp.minimum(row, num_rows - 1)
  channel = jnp.arange(half, dtype=jnp.int32)[None, :]
  near, row, channel = (
    jnp.broadcast_to(x, (tile, half)) for x in (near, row, channel)
  )
  is_query = head < num_heads
  is_value = head >= num_heads + num_kv_heads

  def load(offset):
    return merged_ref[near, head * head_dim + offset + channel]

  plain = load(0), load(half)
  first, second = (x.astype(jnp.float32) for x in plain)
  if q_scale_ref is not None:
    square = jnp.sum(first * first + second * second, axis=-1)
    norm = lax.rsqrt(square / head_dim + eps)[:, None]

    def normalised(x, offset):
      at = offset + channel
      scale = jnp.where(is_query, q_scale_ref[at], k_scale_ref[at])
      x = x * (norm * scale.astype(jnp.float32))
      return x.astype(merged_ref.dtype).astype(jnp.float32)

    first, second = normalised(first, 0), normalised(second, half)
  cos, sin = cos_ref[near, channel], sin_ref[near, channel]
  rotated = first * cos - second * sin, second * cos + first * sin

  outputs = (q_ref, 0), (k_ref, num_heads), (v_ref, num_heads + num_kv_heads)
  for ref, start in outputs:
    # A program stores to the output that its head is of.
    own = head - start
    is_own = (own >= 0) & (own < ref.shape[1]) & (row < num_rows)
    at = jnp.broadcast_to(jnp.clip(own, 0, ref.shape[1] - 1), (tile, half))
    for offset, raw, turned in zip((0, half), plain, rotated, strict=True):
      out = jnp.where(is_value, raw, turned.astype(ref.dtype))
      plgpu.store(ref.at[row, at, offset + channel], out, mask=is_own)
