# SPDX-License-Identifier: Apache-2.0
"""Attention from a few new tokens to a cache and to one another under a mask.

Serves a decoding step (one token), a draft tree and a chain alike. The cache is
only read, so that it need not pass through the branches of a `lax.switch`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checks

_MASKED = -1e30


def tree_attention(
  q: Float[Array, "batch q_len num_heads head_dim"],
  cache_k: Float[Array, "batch num_kv_heads capacity head_dim"],
  cache_v: Float[Array, "batch num_kv_heads capacity head_dim"],
  cache_len: Int[Array, " batch"],
  tree_k: Float[Array, "batch tree_len num_kv_heads head_dim"],
  tree_v: Float[Array, "batch tree_len num_kv_heads head_dim"],
  tree_mask: Bool[Array, "batch q_len tree_len"],
  *,
  scale: float | None = None,
) -> Float[Array, "batch q_len num_heads head_dim"]:
  """One softmax over the cache's valid slots and the visible new tokens.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    cache_k: [batch, num_kv_heads, capacity, head_dim]: heads before slots,
      which lets a batched matrix product read it without a copy.
    cache_v: as cache_k; every slot must be finite.
    cache_len: int32 [batch], valid slots.
    tree_k: [batch, tree_len, num_kv_heads, head_dim].
    tree_v: as tree_k.
    tree_mask: bool [batch, q_len, tree_len], True where visible. A query needs
      a visible key, as its own.
    scale: softmax scale; default head_dim ** -0.5.

  Returns:
    [batch, q_len, num_heads, head_dim], dtype of q.

  Raises:
    ValueError: shapes disagree.
  """
  axes = ("batch", "q_len", "num_heads", "head_dim")
  checks.check_shape("q", q, axes, (None,) * 4)
  batch, q_len, num_heads, head_dim = q.shape
  axes = ("batch", "num_kv_heads", "capacity", "head_dim")
  checks.check_shape("cache_k", cache_k, axes, (batch, None, None, head_dim))
  num_kv_heads, capacity = cache_k.shape[1:3]
  checks.check_shape("cache_v", cache_v, axes, cache_k.shape)
  axes = ("batch", "tree_len", "num_kv_heads", "head_dim")
  sizes = (batch, None, num_kv_heads, head_dim)
  checks.check_shape("tree_k", tree_k, axes, sizes)
  checks.check_shape("tree_v", tree_v, axes, tree_k.shape)
  tree_len = tree_k.shape[1]
  axes = ("batch", "q_len", "tree_len")
  checks.check_shape("tree_mask", tree_mask, axes, (batch, q_len, tree_len))
  checks.check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
  checks.check_scale(scale)
  scale = head_dim**-0.5 if scale is None else scale
  group = num_heads // num_kv_heads

  # [batch, num_kv_heads, group * q_len, head_dim]
  q = q.reshape(batch, q_len, num_kv_heads, group, head_dim)
  q = jnp.transpose(q, (0, 2, 3, 1, 4))
  q = q.reshape(batch, num_kv_heads, group * q_len, head_dim)
  # [batch, num_kv_heads, tree_len, head_dim]
  tree_k = jnp.transpose(tree_k, (0, 2, 1, 3)).astype(q.dtype)
  tree_v = jnp.transpose(tree_v, (0, 2, 1, 3)).astype(q.dtype)
  cache_k, cache_v = cache_k.astype(q.dtype), cache_v.astype(q.dtype)

  def dots(k):
    logits = jnp.einsum(
      "bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32
    )
    return logits * jnp.float32(scale)

  slot = jnp.arange(capacity, dtype=jnp.int32)
  in_cache = (slot[None, :] < cache_len[:, None])[:, None, None, :]
  # [batch, 1, group * q_len, tree_len]
  in_tree = jnp.tile(tree_mask, (1, group, 1))[:, None]
  cache_logits = jnp.where(in_cache, dots(cache_k), _MASKED)
  tree_logits = jnp.where(in_tree, dots(tree_k), _MASKED)
  top = jnp.maximum(
    jnp.max(cache_logits, axis=-1, keepdims=True),
    jnp.max(tree_logits, axis=-1, keepdims=True),
  )
  top = jax.lax.stop_gradient(top)
  cache_p, tree_p = jnp.exp(cache_logits - top), jnp.exp(tree_logits - top)
  total = jnp.sum(cache_p, axis=-1, keepdims=True) + jnp.sum(
    tree_p, axis=-1, keepdims=True
  )

  def mix(p, v):
    return jnp.einsum(
      "bhqk,bhkd->bhqd",
      (p / total).astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )

  out = (mix(cache_p, cache_v) + mix(tree_p, tree_v)).astype(q.dtype)
  out = out.reshape(batch, num_kv_heads, group, q_len, head_dim)
  out = jnp.transpose(out, (0, 3, 1, 2, 4))
  return out.reshape(batch, q_len, num_heads, head_dim)
