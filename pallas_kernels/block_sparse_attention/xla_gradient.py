# SPDX-License-Identifier: Apache-2.0
"""Gradients of back ends that have a forward pass alone, by the XLA one's."""

import functools

import jax

from pallas_kernels.block_sparse_attention import xla


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 8))
def attend(forward, q, k, v, indices, counts, q_offset, kv_len, settings):
  """`forward` of the arrays, with the XLA back end's gradients.

  Args:
    forward: (q, k, v, indices, counts, q_offset, kv_len, *, block_q, block_kv,
      causal, scale) to (out, lse).
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    counts: int32 [batch, num_mask_heads, num_q_blocks].
    q_offset: int32 [batch].
    kv_len: int32 [batch].
    settings: (block_q, block_kv, causal, scale).

  Returns:
    (out, lse), as of `api.block_sparse_attention`.
  """
  return _forward(forward, q, k, v, indices, counts, q_offset, kv_len, settings)


def _forward(forward, *arrays_and_settings):
  *arrays, (block_q, block_kv, causal, scale) = arrays_and_settings
  return forward(
    *arrays, block_q=block_q, block_kv=block_kv, causal=causal, scale=scale
  )


def _fwd(forward, q, k, v, indices, counts, q_offset, kv_len, settings):
  arrays = (q, k, v, indices, counts, q_offset, kv_len)
  out, lse = _forward(forward, *arrays, settings)
  return (out, lse), (*arrays, out, lse)


def _bwd(forward, settings, residuals, cotangents):
  # The fifth setting, blocks of a step, is one of the forward pass.
  return xla._attention_bwd((*settings, 1), residuals, cotangents)


attend.defvjp(_fwd, _bwd)
