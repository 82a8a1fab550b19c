# SPDX-License-Identifier: Apache-2.0
"""TPU kernel: one read of x as it lies, means over tokens and heads."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tpu_backend

_BLOCK_BYTES = 2 << 20  # of a block of x in float32


def composite_pooling(
  x,  # [batch, len, num_heads, head_dim]
  length,  # int32 [batch]
  *,
  window,
  head_group,
  compile_only=False,
  interpret=False,
):
  """See `api.composite_pooling` and, for the last two, `tpu_backend`."""
  tpu_backend.check(compile_only, interpret)
  batch, x_len, num_heads, head_dim = x.shape
  if x.dtype == jnp.float16:  # not a TPU's type
    x = x.astype(jnp.float32)
  num_composites = pl.cdiv(x_len, window)
  num_groups = num_heads // head_group
  tile = max(1, _BLOCK_BYTES // (4 * window * num_heads * head_dim))
  if tile >= num_composites:
    tile = num_composites
    x = jnp.pad(x, ((0, 0), (0, tile * window - x_len), (0, 0), (0, 0)))
  means = tpu_backend.call(
    functools.partial(_kernel, window=window, head_group=head_group),
    num_scalar_prefetch=1,
    grid=(batch, pl.cdiv(num_composites, tile)),
    in_specs=[
      pl.BlockSpec(
        (None, tile * window, num_heads, head_dim),
        lambda b, i, _: (b, i, 0, 0),
      )
    ],
    out_specs=pl.BlockSpec(
      (None, tile, num_groups, head_dim), lambda b, i, _: (b, i, 0, 0)
    ),
    out_shape=jax.ShapeDtypeStruct(
      (batch, num_composites, num_groups, head_dim), jnp.float32
    ),
    semantics=("parallel", "parallel"),
    cost=pl.CostEstimate(
      flops=x.size,
      transcendentals=0,
      bytes_accessed=x.size * x.dtype.itemsize
      + 4 * batch * num_composites * num_groups * head_dim,
    ),
    interpret=interpret,
    name="composite_pooling",
  )(length, x)
  first = jnp.arange(num_composites, dtype=jnp.int32) * window
  end = jnp.minimum(length, jnp.int32(x_len))[:, None]
  count = jnp.clip(end - first[None, :], 0, window)
  return means, count


def _kernel(
  length_ref,  # int32 [batch], scalar memory
  x_ref,  # [tile * window, num_heads, head_dim]
  means_ref,  # float32 [tile, num_groups, head_dim]
  *,
  window,
  head_group,
):
  b, i = pl.program_id(0), pl.program_id(1)
  tile, num_groups, head_dim = means_ref.shape
  length = length_ref[b]
  x = x_ref[...].astype(jnp.float32)
  token = i * (tile * window) + lax.broadcasted_iota(jnp.int32, x.shape, 0)
  x = jnp.where(token < length, x, 0.0)
  x = x.reshape(tile, window, num_groups * head_group, head_dim).sum(1)
  x = x.reshape(tile, num_groups, head_group, head_dim).sum(2)
  composite = i * tile + lax.broadcasted_iota(jnp.int32, x.shape, 0)
  count = jnp.clip(length - composite * window, 1, window)
  means_ref[...] = x / (count * head_group).astype(jnp.float32)
