# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention layer; how to attend is an argument."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import dispatch, triton_backend
from unisparse_jax.models import config as config_lib
from unisparse_jax.models import kv_cache, layers, rope

# Tokens whose heads wait for launches and not for arithmetic: a plain step of
# 16 rows takes an H200 0.92 ms, with three products and norms 1.08 (155M).
# Timed with up to 1,024 tokens.
_MERGED_UP_TO = 2048


class Attention(nnx.Module):
  """Projections, RoPE, cache write and the call of `attention_fn`."""

  def __init__(
    self,
    config: config_lib.DecoderConfig,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    out_stddev: float = layers.INIT_STDDEV,
  ):
    types = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    embed_dim, head_dim = config.embed_dim, config.head_dim
    q_dim, kv_dim = config.num_heads * head_dim, config.num_kv_heads * head_dim
    bias = dict(use_bias=config.attention_bias)
    self.q_proj = layers.linear(embed_dim, q_dim, **bias, **types)
    self.k_proj = layers.linear(embed_dim, kv_dim, **bias, **types)
    self.v_proj = layers.linear(embed_dim, kv_dim, **bias, **types)
    self.o_proj = layers.linear(q_dim, embed_dim, stddev=out_stddev, **types)
    if config.qk_norm:
      norm = dict(eps=config.norm_eps, param_dtype=param_dtype)
      self.q_norm = layers.RMSNorm(head_dim, **norm)
      self.k_norm = layers.RMSNorm(head_dim, **norm)
    self.config = config

  def __call__(
    self,
    x: Float[Array, "batch q_len embed_dim"],
    cos: Float[Array, "#batch q_len 1 half"],
    sin: Float[Array, "#batch q_len 1 half"],
    *,
    attention_fn,
    lengths: Int[Array, " batch"] | None = None,
    cache: kv_cache.KVCache | None = None,
    layer: int = 0,
    cache_is_empty: bool = False,
  ) -> tuple[Float[Array, "batch q_len embed_dim"], kv_cache.KVCache | None]:
    """Attends from x to x and to what the cache holds.

    Args:
      x: [batch, q_len, embed_dim], normalised.
      cos: of the positions of x, from `rope.cos_sin`.
      sin: as cos.
      attention_fn: (q, k, v, causal, scale, q_offset, kv_len) -> out.
      lengths: valid tokens of x in each row, or None for all.
      cache: read and written at `layer`; its lengths are left alone.
      layer: index in the cache.
      cache_is_empty: promise that attention needs x alone.

    Returns:
      [batch, q_len, embed_dim] and the cache.
    """
    q_len = x.shape[1]
    q, k, v = self.project(x, cos, sin)
    q_offset, kv_len = 0, lengths
    if cache is not None:
      cache = cache.append(layer, k, v, is_empty=cache_is_empty)
      if not cache_is_empty:
        q_offset = cache.lengths
        kv_len = cache.lengths + (q_len if lengths is None else lengths)
        k = cache.k[layer].astype(q.dtype)
        v = cache.v[layer].astype(q.dtype)
    out = attention_fn(
      q, k, v, causal=True, scale=None, q_offset=q_offset, kv_len=kv_len
    )
    return self.output(out), cache

  def project(
    self,
    x: Float[Array, "batch q_len embed_dim"],
    cos: Float[Array, "#batch q_len 1 half"],
    sin: Float[Array, "#batch q_len 1 half"],
  ) -> tuple[Array, Array, Array]:
    """q, k and v of x after RoPE, [batch, q_len, heads, head_dim] each."""
    config = self.config
    return project_heads(
      x,
      (self.q_proj, self.k_proj, self.v_proj),
      cos,
      sin,
      norms=(self.q_norm, self.k_norm) if config.qk_norm else None,
      config=config,
    )

  def output(
    self, out: Float[Array, "batch q_len num_heads head_dim"]
  ) -> Float[Array, "batch q_len embed_dim"]:
    """What the heads found, back in the residual stream's width."""
    return self.o_proj(out.reshape(*out.shape[:2], -1))


def project_heads(
  x: Float[Array, "batch q_len in_dim"],
  projections: tuple[nnx.Linear, nnx.Linear, nnx.Linear],
  cos: Float[Array, "#batch q_len 1 half"],
  sin: Float[Array, "#batch q_len 1 half"],
  *,
  norms: tuple[layers.RMSNorm, layers.RMSNorm] | None,
  config: config_lib.DecoderConfig,
) -> tuple[Array, Array, Array]:
  """q, k and v of x after norms and RoPE, in heads.

  On an NVIDIA GPU the heads of few tokens, as in a decoding step, come out of
  one product and the op `head_rotation` if there are norms (XLA takes as few
  launches where there are none); elsewhere they do where `dispatch.preferring`
  names a back end for that op. Always from three products where one of the
  projections is not a plain one. XLA makes no array of the weights side by side
  in a decoding step: the product reads all three.

  Args:
    x: [batch, q_len, in_dim].
    projections: to q, k and v.
    cos: of the positions of x, from `rope.cos_sin`.
    sin: as cos.
    norms: of q and k, over a head's channels; or None.
    config: for the numbers of heads.

  Returns:
    [batch, q_len, num_heads, head_dim] and twice [batch, q_len, num_kv_heads,
    head_dim].
  """
  is_plain = all(type(p) is nnx.Linear for p in projections)
  is_asked = dispatch.preferred("head_rotation") is not None
  pays = (
    norms is not None
    and x.shape[0] * x.shape[1] <= _MERGED_UP_TO
    and triton_backend.serves()
  )
  if not (is_plain and (is_asked or pays)):
    shape = (*x.shape[:2], -1, config.head_dim)
    q, k, v = (project(x).reshape(shape) for project in projections)
    if norms is not None:
      q, k = norms[0](q), norms[1](k)
    return rope.apply(q, cos, sin), rope.apply(k, cos, sin), v
  dtype = projections[0].dtype
  kernel = jnp.concatenate([p.kernel[...] for p in projections], axis=1)
  merged = x.astype(dtype) @ kernel.astype(dtype)
  biases = [p.bias[...] for p in projections if p.bias is not None]
  if biases:
    merged += jnp.concatenate(biases).astype(dtype).reshape(1, 1, -1)
  scales = (None, None) if norms is None else [n.scale[...] for n in norms]
  return pallas_kernels.head_rotation(
    merged,
    cos,
    sin,
    *scales,
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    eps=config.norm_eps,
  )
