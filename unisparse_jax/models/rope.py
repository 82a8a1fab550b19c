# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding with angles that stay accurate far out.

A float32 product position * frequency is off by up to 8e-3 radians at position
131,072. Here the angle is a 44-bit fixed-point fraction of a turn, so wrapping
is exact and cos and sin are within 4e-7 up to `config.MAX_POSITION`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unisparse_jax.models import config as config_lib

_LOW_BITS = 12  # MAX_POSITION * 2 ** _LOW_BITS fits in 32 bits


def frequencies(config: config_lib.DecoderConfig) -> tuple[np.ndarray, float]:
  """Angular frequencies and the factor on cos and sin.

  Args:
    config: of the decoder.

  Returns:
    float64 [head_dim / 2], radians per token, and the attention factor.
  """
  half = np.arange(config.head_dim // 2, dtype=np.float64)
  plain = float(config.rope_theta) ** (-2.0 * half / config.head_dim)
  scaling = config.rope_scaling
  match scaling:
    case None:
      return plain, 1.0
    case config_lib.LinearScaling():
      return plain / scaling.factor, 1.0
    case config_lib.Llama3Scaling():
      return _llama3(plain, scaling), 1.0
    case config_lib.YarnScaling():
      return _yarn(plain, scaling, config), _yarn_attention_factor(scaling)
  raise AssertionError(f"rope_scaling was not checked: {scaling}")


def cos_sin(
  positions: Int[Array, "batch q_len"], config: config_lib.DecoderConfig
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Cosines and sines of the angles at integer positions.

  Args:
    positions: [batch, q_len], in [0, config.MAX_POSITION).
    config: of the decoder.

  Returns:
    Two float32 [batch, q_len, 1, head_dim / 2].
  """
  radians, factor = frequencies(config)
  turns = radians / (2.0 * math.pi) * 2.0**32  # below 2 ** 30
  high = np.floor(turns)
  low = np.floor((turns - high) * 2.0**_LOW_BITS)
  position = positions.astype(jnp.uint32)[:, :, None, None]
  high, low = (x.astype(np.uint32)[None, None, None, :] for x in (high, low))
  # Wraps modulo one turn.
  phase = position * high + ((position * low) >> np.uint32(_LOW_BITS))
  signed = jax.lax.bitcast_convert_type(phase, jnp.int32)
  angle = signed.astype(jnp.float32) * np.float32(math.pi / 2.0**31)
  factor = np.float32(factor)
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def apply(
  x: Float[Array, "batch q_len heads head_dim"],
  cos: Float[Array, "#batch q_len 1 half"],
  sin: Float[Array, "#batch q_len 1 half"],
) -> Float[Array, "batch q_len heads head_dim"]:
  """Rotates channel i with channel i + head_dim / 2, in float32.

  Args:
    x: [batch, q_len, heads, head_dim].
    cos: from `cos_sin`.
    sin: from `cos_sin`.

  Returns:
    Shape and dtype of x.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def _llama3(plain: np.ndarray, scaling: config_lib.Llama3Scaling):
  wavelength = 2.0 * math.pi / plain
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  smooth = (scaling.original_max_len / wavelength - low) / (high - low)
  smooth = np.clip(smooth, 0.0, 1.0)  # 0 divides, 1 keeps
  return plain * ((1.0 - smooth) / scaling.factor + smooth)


def _yarn(
  plain: np.ndarray,
  scaling: config_lib.YarnScaling,
  config: config_lib.DecoderConfig,
):
  dim, theta = config.head_dim, float(config.rope_theta)

  def channel(rotations: float) -> float:
    wavelength = scaling.original_max_len / rotations
    return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

  low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
  return plain * (ramp / scaling.factor + (1.0 - ramp))


def _yarn_attention_factor(scaling: config_lib.YarnScaling) -> float:
  def magnitude(mscale: float) -> float:
    if scaling.factor <= 1.0:
      return 1.0
    return 0.1 * mscale * math.log(scaling.factor) + 1.0

  if scaling.attention_factor is not None:
    return float(scaling.attention_factor)
  if scaling.mscale and scaling.mscale_all_dim:
    return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
  return magnitude(1.0)
