# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for NVIDIA GPUs: a row of logits stays in registers.

8 of 4,096 logits of 8 rows take 13.0 us on an H200 (8 warps; 2, 4, 16 warps
19.9, 12.2, 13.7), by XLA 28.3, of which its top-k is 21 and the log-sum-exp two
or three launches.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.triton_backend import plgpu

_MAX_VOCAB = 32_768  # twice as many spill registers
_LOGITS_A_THREAD = 16


def top_log_probs(
  logits,  # [..., vocab_size]
  width,
  *,
  num_warps=None,
  capability=None,
  interpret=False,
):
  """See `api.top_log_probs` and, for the last two, `triton_backend`.

  num_warps: of the program that holds a row; default: 16 logits a thread, at
    most 16 warps.
  """
  triton_backend.target(capability, interpret)
  vocab_size = logits.shape[-1]
  if vocab_size > _MAX_VOCAB:
    raise NotImplementedError(
      f"triton needs vocab_size <= {_MAX_VOCAB}; got vocab_size={vocab_size}. "
      'Use implementation="xla".'
    )
  padded = max(32, pl.next_power_of_2(vocab_size))
  if num_warps is None:
    num_warps = min(16, max(1, padded // (32 * _LOGITS_A_THREAD)))
  rows = logits.reshape(-1, vocab_size)
  shape = (rows.shape[0], width)
  tokens, log_probs = triton_backend.call(
    functools.partial(_kernel, padded=padded),
    grid=shape[:1],
    out_shape=(
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    num_warps=num_warps,
    num_stages=1,
    interpret=interpret,
    name="top_log_probs",
  )(rows)
  shape = (*logits.shape[:-1], width)
  return tokens.reshape(shape), log_probs.reshape(shape)


def _kernel(
  logits_ref,  # [num_rows, vocab_size]
  tokens_ref,  # int32 [num_rows, width]
  log_probs_ref,  # float32 [num_rows, width]
  *,
  padded,
):
  row = pl.program_id(0)
  vocab_size, width = logits_ref.shape[1], tokens_ref.shape[1]
  token = jnp.arange(padded, dtype=jnp.int32)
  is_token = token < vocab_size
  if padded == vocab_size:
    logits = logits_ref[row, :].astype(jnp.float32)
  else:
    near = jnp.minimum(token, vocab_size - 1)
    logits = logits_ref[row, near].astype(jnp.float32)
    logits = jnp.where(is_token, logits, -jnp.inf)
  top = logits.max(-1)
  lse = top + jnp.log(jnp.exp(logits - top).sum(-1))

  def pick(rank, last):
    # What comes after the last one: smaller, or equal and further right.
    value, index = last
    rest = (logits < value) | ((logits == value) & (token > index))
    rest &= is_token
    value = jnp.where(rest, logits, -jnp.inf).max(-1)
    index = jnp.where(rest & (logits == value), token, vocab_size - 1).min(-1)
    plgpu.store(tokens_ref.at[row, rank], index)
    plgpu.store(log_probs_ref.at[row, rank], jnp.minimum(value - lse, 0.0))
    return value, index

  lax.fori_loop(0, width, pick, (jnp.float32(jnp.inf), jnp.int32(-1)))
