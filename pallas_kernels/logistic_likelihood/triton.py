# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for NVIDIA GPUs: one launch, no logit stored.

A program holds a tile of chains and walks the rows of the design. Where XLA
writes every logit, reads it for the sum, writes the slope and reads that for
the second product, here both stay in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend

# Chains and rows of a tile, warps, pipeline stages, programs that share the
# rows. 10,000 chains of 31 coefficients and 569 rows (2,000 rows of 30), by the
# time of the two bare matrix products, on an H200: 0.91 (0.84); shared by 1, 2
# and 8 programs 1.27, 0.99, 0.97 (1.28, 0.97, 0.86); tiles of 64 rows 0.94
# (0.94), of 16 chains and 128 rows 1.33 (1.19); XLA 1.84 (1.53). On an H100
# with one program: 1.29 (1.26); 64 rows 1.38 (1.39); 128 chains, 8 warps 1.38
# (1.42); 32 chains 2.8 (2.9); 128 rows, 8 warps 3.9 (3.7); "ieee" 3.1 (3.4).
TILE = (64, 32, 4, 2, 4)
# How a product of float32 operands is made. "tf32x3": three tensor-core
# products of their TensorFloat-32 parts, 21 bits or more; "ieee": fused
# multiply-add, 24 bits.
PRODUCTS = {
  "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
  "ieee": lax.Precision.HIGHEST,
}


def logistic_likelihood(
  signed,  # [num_rows, dim]
  positions,  # [num_chains, dim]
  *,
  tile=None,
  products="tf32x3",
  capability=None,
  interpret=False,
):
  """See `api.logistic_likelihood` and, for the last two, `triton_backend`.

  Args:
    signed: see there.
    positions: see there.
    tile: of `TILE`'s form; the last may be left out: 1.
    products: of `PRODUCTS`.
    capability: see `triton_backend.target`.
    interpret: see there.
  """
  triton_backend.target(capability, interpret)
  num_rows, dim = signed.shape
  num_chains = positions.shape[0]
  if signed.dtype != jnp.float32 or positions.dtype != jnp.float32:
    raise NotImplementedError(
      "triton needs float32; got "
      f"signed.dtype={signed.dtype}, positions.dtype={positions.dtype}. "
      'Use implementation="xla".'
    )
  if dim > 128:
    raise NotImplementedError(
      f'triton needs dim <= 128; got dim={dim}. Use implementation="xla".'
    )
  tile_chains, tile_rows, num_warps, num_stages, *splits = tile or TILE
  splits = min(*(splits or (1,)), pl.cdiv(num_rows, tile_rows))
  padded_dim = max(16, pl.next_power_of_2(dim))
  tiles_a_split = pl.cdiv(pl.cdiv(num_rows, tile_rows), splits)
  whole_rows = splits * tiles_a_split * tile_rows
  whole_chains = pl.cdiv(num_chains, tile_chains) * tile_chains
  pad = triton_backend.pad_axis
  signed = pad(pad(signed, 1, padded_dim), 0, whole_rows)
  positions = pad(pad(positions, 1, padded_dim), 0, whole_chains)
  values, grads = triton_backend.call(
    functools.partial(
      _kernel,
      num_rows=num_rows,
      tile_rows=tile_rows,
      splits=splits,
      tiles_a_split=tiles_a_split,
      # The interpreter knows no such products; its own are exact.
      precision=PRODUCTS["ieee" if interpret else products],
    ),
    grid=(whole_chains // tile_chains, splits),
    in_specs=[
      pl.BlockSpec((whole_rows, padded_dim), lambda i, j: (0, 0)),
      pl.BlockSpec((tile_chains, padded_dim), lambda i, j: (i, 0)),
    ],
    out_specs=[
      pl.BlockSpec((None, tile_chains), lambda i, j: (j, i)),
      pl.BlockSpec((None, tile_chains, padded_dim), lambda i, j: (j, i, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((splits, whole_chains), jnp.float32),
      jax.ShapeDtypeStruct((splits, whole_chains, padded_dim), jnp.float32),
    ],
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
    name="logistic_likelihood",
  )(signed, positions)
  values, grads = values.sum(0), grads.sum(0)
  return values[:num_chains], grads[:num_chains, :dim]


def _kernel(
  signed_ref,  # [whole_rows, padded_dim], rows of zeros at the end
  positions_ref,  # [tile_chains, padded_dim]
  values_ref,  # [tile_chains]
  grads_ref,  # [tile_chains, padded_dim]
  *,
  num_rows,
  tile_rows,
  splits,
  tiles_a_split,
  precision,
):
  positions = positions_ref[...]
  product = functools.partial(
    lax.dot_general, precision=precision, preferred_element_type=jnp.float32
  )

  def step(index, carry, masked):
    value, grad = carry
    start = pl.multiple_of(index * tile_rows, tile_rows)
    rows = signed_ref[pl.ds(start, tile_rows), :]
    logits = product(positions, rows, (((1,), (1,)), ((), ())))
    small = jnp.exp(-jnp.abs(logits))
    # log1p has no more digits beside a sum of many.
    fit = jnp.minimum(logits, 0.0) - jnp.log(1.0 + small)
    if masked:
      row = start + jnp.arange(tile_rows, dtype=jnp.int32)
      fit = jnp.where((row < num_rows)[None, :], fit, 0.0)
    slope = jnp.where(logits > 0.0, small, 1.0) / (1.0 + small)
    grad = grad + product(slope, rows, (((1,), (0,)), ((), ())))
    return value + fit.sum(1), grad

  carry = (
    jnp.zeros((positions.shape[0],), jnp.float32),
    jnp.zeros(positions.shape, jnp.float32),
  )
  # Whole tiles of this program's share of the rows, then one that is not whole.
  first = pl.program_id(1) * tiles_a_split if splits > 1 else jnp.int32(0)
  last = first + tiles_a_split
  full = jnp.minimum(last, num_rows // tile_rows)
  carry = lax.fori_loop(
    first, full, functools.partial(step, masked=False), carry
  )
  if num_rows % tile_rows:
    end = jnp.minimum(last, num_rows // tile_rows + 1)
    carry = lax.fori_loop(
      jnp.maximum(first, full),
      end,
      functools.partial(step, masked=True),
      carry,
    )
  values_ref[...], grads_ref[...] = carry
