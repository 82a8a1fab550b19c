# SPDX-License-Identifier: Apache-2.0
"""Small layers of the decoder: embedding, RMSNorm and gated MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

INIT_STDDEV = 0.02


def linear(
  in_dim: int,
  out_dim: int,
  *,
  rngs: nnx.Rngs,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  use_bias: bool = False,
  stddev: float = INIT_STDDEV,
) -> nnx.Linear:
  """A projection with kernel [in_dim, out_dim] and normal initial weights."""
  return nnx.Linear(
    in_dim,
    out_dim,
    use_bias=use_bias,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=nnx.initializers.normal(stddev),
    rngs=rngs,
  )


class Embed(nnx.Module):
  """Token embedding, which may also make the logits."""

  def __init__(
    self,
    vocab_size: int,
    embed_dim: int,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    init = nnx.initializers.normal(INIT_STDDEV)
    self.embedding = nnx.Param(
      init(rngs.params(), (vocab_size, embed_dim), param_dtype)
    )
    self.dtype = dtype

  def __call__(
    self, tokens: Int[Array, "batch q_len"]
  ) -> Float[Array, "batch q_len embed_dim"]:
    # Cast after the lookup: the gradient adds up in the parameters' dtype.
    rows = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
    return rows.astype(self.dtype)

  def attend(
    self, x: Float[Array, "... embed_dim"]
  ) -> Float[Array, "... vocab_size"]:
    """float32 product of x with every row of the embedding."""
    return _scores(x, self.embedding[...].astype(x.dtype))


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x ** 2) + eps) * scale over the last axis, in float32."""

  def __init__(self, dim: int, *, eps: float, param_dtype: DTypeLike):
    self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
    self.eps = eps

  def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = self.scale[...].astype(jnp.float32)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    out = wide * jax.lax.rsqrt(mean_square + self.eps) * scale
    return out.astype(x.dtype)


class GatedMLP(nnx.Module):
  """down(silu(gate(x)) * up(x))."""

  def __init__(
    self,
    embed_dim: int,
    mlp_dim: int,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    down_stddev: float = INIT_STDDEV,
  ):
    types = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    self.gate_proj = linear(embed_dim, mlp_dim, **types)
    self.up_proj = linear(embed_dim, mlp_dim, **types)
    self.down_proj = linear(mlp_dim, embed_dim, stddev=down_stddev, **types)

  def __call__(
    self, x: Float[Array, "batch q_len embed_dim"]
  ) -> Float[Array, "batch q_len embed_dim"]:
    # [batch, q_len, mlp_dim]
    hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(hidden)


@jax.custom_vjp
def _scores(x, embedding):
  """float32 x @ embedding.T, whose gradients multiply in the dtype of x."""
  return jnp.einsum(
    "...d,vd->...v", x, embedding, preferred_element_type=jnp.float32
  )


def _scores_fwd(x, embedding):
  return _scores(x, embedding), (x, embedding)


def _scores_bwd(residuals, cotangent):
  # A float32 cotangent would turn both products into float32 ones.
  x, embedding = residuals
  cotangent = cotangent.astype(x.dtype)
  return (
    jnp.einsum("...v,vd->...d", cotangent, embedding),
    jnp.einsum("...v,...d->vd", cotangent, x),
  )


_scores.defvjp(_scores_fwd, _scores_bwd)
