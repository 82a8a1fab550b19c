"""Attention over single keys that were gathered once per head."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, device, dispatch
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
  if not device.is_hopper():
    raise NotImplementedError(
      "mosaic_gpu needs an NVIDIA GPU of compute capability 9.0 (Hopper); got "
      f"device={jax.devices()[0].device_kind!r}."
    )
  mosaic_gpu.check_supported(q, settings[0], 128)
  return attend_on_hopper(q, k, v, positions, q_offset, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_on_hopper(q, k, v, positions, q_offset, settings):
  """The kernel, with the gradients of the XLA back end."""
  block_q, causal, scale = settings
  return mosaic_gpu.column_attention(
    q, k, v, positions, q_offset, block_q=block_q, causal=causal, scale=scale
  )


def _hopper_fwd(q, k, v, positions, q_offset, settings):
  result = attend_on_hopper(q, k, v, positions, q_offset, settings)
  return result, (q, k, v, positions, q_offset)


def _hopper_bwd(settings, residuals, cotangents):
  q, k, v, positions, q_offset = residuals
  _, gradient = jax.vjp(
    lambda q, k, v: _xla(q, k, v, positions, q_offset, settings), q, k, v
  )
  return *gradient(cotangents), None, None


attend_on_hopper.defvjp(_hopper_fwd, _hopper_bwd)


def _xla(q, k, v, positions, q_offset, settings):
  """One block of queries after the other, each over all columns."""
  block_q, causal, scale = settings
  batch, q_len, num_heads, head_dim = q.shape
  num_units, num_q_blocks = positions.shape[1:3]
  k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
  pad = num_q_blocks * block_q - q_len
  # [num_q_blocks, batch, units, group, block_q, head_dim]
  q_blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  q_blocks = q_blocks.reshape(
    batch, num_q_blocks, block_q, num_units, -1, head_dim
  )
  q_blocks = jnp.transpose(q_blocks, (1, 0, 3, 4, 2, 5))

  @jax.checkpoint
  def attend_block(operands):
    q_block, index, position = operands  # position: [batch, units, columns]
    limit = jnp.full((batch, block_q), NEVER - 1, jnp.int32)
    if causal:
      row = jnp.arange(block_q, dtype=jnp.int32)[None, :]
      limit = row + q_offset[:, None] + index * block_q
    visible = position[:, :, None, :] <= limit[:, None, :, None]
    visible = visible[:, :, None]  # over the heads of a unit
    attn_logits = scale * jnp.einsum(
      "bugqd,bucd->bugqc", q_block, k, preferred_element_type=jnp.float32
    )
    attn_logits = jnp.where(visible, attn_logits, -1e30)
    top = lax.stop_gradient(attn_logits.max(-1, keepdims=True))
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

  indices = jnp.arange(num_q_blocks, dtype=jnp.int32)
  by_block = jnp.moveaxis(positions, 2, 0)
  out, lse = lax.map(attend_block, (q_blocks, indices, by_block))
  # [num_q_blocks, batch, units, group, block_q, ..] to [batch, q_len, heads]
  out = jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(
    batch, -1, num_heads, head_dim
  )
  lse = jnp.transpose(lse, (1, 0, 4, 2, 3)).reshape(batch, -1, num_heads)
  return out[:, :q_len], lse[:, :q_len]
