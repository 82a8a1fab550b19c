# SPDX-License-Identifier: Apache-2.0
"""Attention over single keys that were gathered once per head."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch, mosaic_gpu_backend
from pallas_kernels.block_sparse_attention import mosaic_gpu

_WITH_COLUMNS = ("mosaic_gpu", "xla")
NEVER = int(jnp.iinfo(jnp.int32).max)  # position of a key that no query sees


def column_attention(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch max_columns num_units head_dim"],
  v: Float[Array, "batch max_columns num_units head_dim"],
  positions: Int[Array, "batch num_units num_q_blocks max_columns"],
  *,
  block_q: int,
  causal: bool = True,
  scale: float | None = None,
  q_offset: int | Int[Array, "..."] = 0,
  implementation: dispatch.Implementation = None,
) -> tuple[
  Float[Array, "batch q_len num_heads head_dim"],
  Float[Array, "batch q_len num_heads"],
]:
  """Softmax attention of every query over a compact set of keys.

  out[i] = sum_c softmax_c(scale * <q_i, k_c>) v_c over the columns c with
  positions[i // block_q, c] <= q_offset + i, if causal, else with a position
  other than `NEVER`.

  Args:
    q: [batch, q_len, num_heads, head_dim]; float32, bfloat16 or float16.
    k: [batch, max_columns, num_units, head_dim], dtype of q: the keys that the
      heads of a unit attend. Query head h belongs to unit
      h // (num_heads // num_units).
    v: as k.
    positions: int32 [batch, num_units, ceil(q_len / block_q), max_columns],
      absolute positions; `NEVER` where the block of queries must not see the
      column.
    block_q: queries per block.
    causal: whether a query sees only keys at or before its own position.
    scale: softmax scale, dimensionless; default head_dim ** -0.5.
    q_offset: absolute position of query 0; scalar or [batch].
    implementation: "mosaic_gpu", "xla", a sequence to try in order, or None for
      this platform's default.

  Returns:
    out and lse as of `block_sparse_attention`.

  Raises:
    ValueError: shapes or dtypes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.
  """
  checks.check_qkv(q, k, v)
  checks.check_positive_int("block_q", block_q)
  checks.check_scale(scale)
  batch, q_len, _, head_dim = q.shape
  checks.check_shape(
    "positions",
    positions,
    ("batch", "num_units", "num_q_blocks", "max_columns"),
    (batch, k.shape[2], math.ceil(q_len / block_q), k.shape[1]),
  )
  checks.check_dtype("positions", positions.dtype, ("int32",))
  return dispatch.dispatch(
    {"mosaic_gpu": _mosaic_gpu, "xla": _xla},
    implementation,
    q,
    k,
    v,
    positions,
    checks.per_row("q_offset", q_offset, batch),
    (block_q, causal, head_dim**-0.5 if scale is None else float(scale)),
  )


def with_columns(
  implementation: dispatch.Implementation,
) -> dispatch.Implementation:
  """The named back ends of block_sparse_attention that have columns, or xla."""
  if implementation is None or implementation in _WITH_COLUMNS:
    return implementation
  if isinstance(implementation, str):
    return "xla"
  named = tuple(name for name in implementation if name in _WITH_COLUMNS)
  return named or "xla"


def _mosaic_gpu(q, k, v, positions, q_offset, settings):
  mosaic_gpu_backend.check_hopper()
  mosaic_gpu.check_supported(q, settings[0], 128)
  return attend_on_hopper(q, k, v, positions, q_offset, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, positions, q_offset, forward, settings):
  return forward(q, k, v, positions, q_offset, settings)


def _attend_fwd(q, k, v, positions, q_offset, forward, settings):
  out, lse = forward(q, k, v, positions, q_offset, settings)
  return (out, lse), (q, k, v, positions, q_offset, out, lse)


def _attend_bwd(forward, settings, residuals, cotangents):
  del forward
  return *_gradient(residuals, cotangents, settings), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend_on_hopper(q, k, v, positions, q_offset, settings):
  """The kernel, without a look at the device; its gradients are XLA's."""
  return _attend(q, k, v, positions, q_offset, _hopper_forward, settings)


def _xla(q, k, v, positions, q_offset, settings):
  return _attend(q, k, v, positions, q_offset, _xla_forward, settings)


def _hopper_forward(q, k, v, positions, q_offset, settings):
  block_q, causal, scale = settings
  return mosaic_gpu.column_attention(
    q, k, v, positions, q_offset, block_q=block_q, causal=causal, scale=scale
  )


class _Layout:
  """Blocks of queries as [num_q_blocks, batch, units, group, block_q, ...]."""

  def __init__(self, q, positions, block_q):
    self.batch, self.q_len, self.num_heads = q.shape[:3]
    self.num_units, self.num_q_blocks = positions.shape[1:3]
    self.block_q = block_q

  def split(self, x):
    """[batch, q_len, num_heads, ...] to blocks; rows beyond the last are 0."""
    pad = self.num_q_blocks * self.block_q - self.q_len
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(
      self.batch,
      self.num_q_blocks,
      self.block_q,
      self.num_units,
      -1,
      *x.shape[3:],
    )
    return jnp.moveaxis(x, (1, 2), (0, 4))

  def join(self, x):
    """Inverse of `split`."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    x = x.reshape(self.batch, -1, self.num_heads, *x.shape[5:])
    return x[:, : self.q_len]


def _logits(q_block, k, position, index, q_offset, settings):
  """float32 logits [batch, units, group, block_q, columns]; what is seen."""
  block_q, causal, scale = settings
  limit = jnp.full((q_block.shape[0], block_q), NEVER - 1, jnp.int32)
  if causal:
    row = jnp.arange(block_q, dtype=jnp.int32)[None, :]
    limit = row + q_offset[:, None] + index * block_q
  visible = position[:, :, None, :] <= limit[:, None, :, None]
  attn_logits = scale * jnp.einsum(
    "bugqd,bucd->bugqc", q_block, k, preferred_element_type=jnp.float32
  )
  return attn_logits, visible[:, :, None]  # over the heads of a unit


def _by_block(layout, positions, *arrays):
  """What a scan over blocks of queries reads."""
  index = jnp.arange(layout.num_q_blocks, dtype=jnp.int32)
  blocks = tuple(layout.split(x) for x in arrays)
  return index, jnp.moveaxis(positions, 2, 0), *blocks


def _xla_forward(q, k, v, positions, q_offset, settings):
  """One block of queries after the other, each over all columns."""
  layout = _Layout(q, positions, settings[0])
  k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))  # [batch, units, columns, d]

  def attend_block(operands):
    index, position, q_block = operands  # position: [batch, units, columns]
    attn_logits, visible = _logits(
      q_block, k, position, index, q_offset, settings
    )
    attn_logits = jnp.where(visible, attn_logits, -1e30)
    top = attn_logits.max(-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(attn_logits - top), 0.0)
    total = p.sum(-1)
    safe = jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum(
      "bugqc,bucd->bugqd",
      p.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    lse = jnp.where(total == 0.0, -jnp.inf, top[..., 0] + jnp.log(safe))
    return (out / safe[..., None]).astype(q.dtype), lse

  out, lse = lax.map(attend_block, _by_block(layout, positions, q))
  return layout.join(out), layout.join(lse)


def _gradient(residuals, cotangents, settings):
  """(dq, dk, dv), from the saved lse; the sums over queries are in float32.

  In the dtype of k, the sum over the 256 blocks of 32,768 queries had a
  relative error of 1.2e-2 in bfloat16.
  """
  q, k, v, positions, q_offset, out, lse = residuals
  d_out, d_lse = cotangents
  scale = settings[2]
  layout = _Layout(q, positions, settings[0])
  k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
  delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
  lse = jnp.where(jnp.isneginf(lse), 0.0, lse)  # of rows that see no column
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def add_block(sums, operands):
    index, position, q_block, d_out, lse, delta = operands
    attn_logits, visible = _logits(
      q_block, k, position, index, q_offset, settings
    )
    p = jnp.where(visible, jnp.exp(attn_logits - lse[..., None]), 0.0)
    d_p = product("bugqd,bucd->bugqc", d_out, v)
    d_logits = jnp.where(visible, p * (d_p - delta[..., None]), 0.0)
    p, d_logits = p.astype(q.dtype), d_logits.astype(q.dtype)
    dk, dv = sums
    dk += product("bugqc,bugqd->bucd", d_logits, q_block)
    dv += product("bugqc,bugqd->bucd", p, d_out)
    dq = scale * product("bugqc,bucd->bugqd", d_logits, k)
    return (dk, dv), dq.astype(q.dtype)

  zeros = jnp.zeros(k.shape, jnp.float32)
  operands = _by_block(layout, positions, q, d_out, lse, delta)
  (dk, dv), dq = lax.scan(add_block, (zeros, zeros), operands)
  dk, dv = (jnp.moveaxis(x, 1, 2).astype(q.dtype) for x in (scale * dk, dv))
  return layout.join(dq), dk, dv
