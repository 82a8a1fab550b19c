# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for NVIDIA GPUs: all buffers of a decoder in one launch.

XLA takes two launches a layer, 1.7 us each in a decoding step that waits for
launches (H200, 155M decoder of 32 layers).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.triton_backend import plgpu

# A kernel takes 4 KiB of arguments; each buffer is three pointers of 8 bytes.
_MAX_BUFFERS = 160
_SLOTS = 16  # of a program, which goes through all buffers
_UNDER_WAY = 1024  # values that a warp loads before it stores them


@functools.partial(
  jax.jit, static_argnames=("num_slots", "capability", "interpret")
)
def cache_append(
  buffers,  # each [batch, num_kv_heads, capacity, head_dim]
  new,  # each [batch, n, num_kv_heads, head_dim]
  starts,  # int32 [batch]
  *,
  num_slots,
  capability=None,
  interpret=False,
):
  """See `api.cache_append` and, for the last two, `triton_backend`."""
  triton_backend.target(capability, interpret)
  batch, num_kv_heads, capacity, head_dim = buffers[0].shape
  triton_backend.check_head_dim(head_dim, instead="reference")
  tile = min(_SLOTS, pl.next_power_of_2(num_slots)), head_dim
  num_warps = max(1, min(4, tile[0] * tile[1] // 512))
  starts = jnp.clip(starts, 0, capacity - num_slots)
  out = []
  for first in range(0, len(buffers), _MAX_BUFFERS):
    some = slice(first, first + _MAX_BUFFERS)
    count = len(buffers[some])
    out += triton_backend.call(
      functools.partial(
        _kernel,
        count=count,
        num_slots=num_slots,
        tile=tile,
        together=max(1, num_warps * _UNDER_WAY // (tile[0] * tile[1])),
      ),
      grid=(batch, num_kv_heads, pl.cdiv(num_slots, tile[0])),
      out_shape=tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in buffers[some]
      ),
      input_output_aliases={index: index for index in range(count)},
      num_warps=num_warps,
      num_stages=1,
      interpret=interpret,
      name="cache_append",
    )(*buffers[some], *new[some], starts)
  return tuple(out)


def _kernel(
  *refs,  # buffers, new, starts int32 [batch], and the buffers again, written
  count,
  num_slots,
  tile,
  together,
):
  new, starts_ref, written = (
    refs[count : 2 * count],
    refs[2 * count],
    refs[2 * count + 1 :],
  )
  b, head, program = (pl.program_id(axis) for axis in range(3))
  slot = program * tile[0] + jnp.arange(tile[0], dtype=jnp.int32)[:, None]
  channel = jnp.arange(tile[1], dtype=jnp.int32)[None, :]
  slot, channel = jnp.broadcast_to(slot, tile), jnp.broadcast_to(channel, tile)
  near = jnp.minimum(slot, num_slots - 1)
  at = starts_ref[b] + slot
  for first in range(0, count, together):
    # No load may pass a store, for all that a compiler knows.
    some = slice(first, first + together)
    values = [ref[b, near, head, channel] for ref in new[some]]
    for out, value in zip(written[some], values, strict=True):
      value = value.astype(out.dtype)
      plgpu.store(out.at[b, head, at, channel], value, mask=slot < num_slots)
