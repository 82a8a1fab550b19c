# SPDX-License-Identifier: Apache-2.0
"""Settings of a decoder of the Llama and Qwen family."""

import dataclasses
import math
import numbers
from typing import Any

from pallas_kernels import checks

MAX_POSITION = 1 << 20  # up to here the angles of `rope` are accurate


def _check_real(name: str, value: Any, minimum: float, strict: bool = False):
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  number = float(value) if is_number else math.nan
  ok = math.isfinite(number) and (
    number > minimum if strict else number >= minimum
  )
  rule = f"be a finite number {'>' if strict else '>='} {minimum:g}"
  checks.require(ok, name, rule, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
  """All RoPE frequencies divided by `factor`."""

  factor: float

  def __post_init__(self):
    _check_real("factor", self.factor, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Llama 3.1: low frequencies divided by `factor`, high ones kept.

  Attributes:
    factor: divisor of the low frequencies.
    low_freq_factor: wavelengths above original_max_len / low_freq_factor are
      divided.
    high_freq_factor: wavelengths below original_max_len / high_freq_factor are
      kept; between the two the frequency is interpolated.
    original_max_len: tokens, length of the first training.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_len: int

  def __post_init__(self):
    _check_real("factor", self.factor, 1.0)
    _check_real("low_freq_factor", self.low_freq_factor, 0.0, strict=True)
    checks.require(
      isinstance(self.high_freq_factor, numbers.Real)
      and math.isfinite(self.high_freq_factor)
      and self.high_freq_factor > self.low_freq_factor,
      "high_freq_factor",
      "be a finite number > low_freq_factor",
      self.high_freq_factor,
    )
    checks.check_positive_int("original_max_len", self.original_max_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
  """YaRN, as `transformers` computes it.

  Attributes:
    factor: divisor of the low frequencies.
    original_max_len: tokens, length of the first training.
    beta_fast: rotations over original_max_len above which a frequency is kept.
    beta_slow: rotations below which a frequency is divided by `factor`.
    attention_factor: multiplies cos and sin; None: from factor and the mscales.
    mscale: see `transformers`; used where mscale_all_dim is also set.
    mscale_all_dim: see mscale.
    truncate: whether the ends of the ramp are rounded to whole channels.
  """

  factor: float
  original_max_len: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def __post_init__(self):
    _check_real("factor", self.factor, 1.0)
    checks.check_positive_int("original_max_len", self.original_max_len)
    _check_real("beta_slow", self.beta_slow, 0.0, strict=True)
    _check_real("beta_fast", self.beta_fast, float(self.beta_slow))
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
      if getattr(self, name) is not None:
        _check_real(name, getattr(self, name), 0.0)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Architecture of a decoder.

  Attributes:
    vocab_size: number of tokens.
    num_layers: number of blocks.
    embed_dim: width of the residual stream.
    mlp_dim: width of the gated MLP.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides num_heads.
    head_dim: channels of a head, even.
    max_len: longest sequence in tokens, prompt and new tokens together.
    rope_theta: base of the RoPE frequencies.
    rope_scaling: how the frequencies are stretched, or None.
    norm_eps: added to the mean square in RMSNorm.
    qk_norm: RMSNorm over each head of q and k before RoPE (Qwen3).
    attention_bias: biases on the q, k and v projections (Qwen2).
    tie_embeddings: whether the embedding also makes the logits.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_len: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-6
  qk_norm: bool = False
  attention_bias: bool = False
  tie_embeddings: bool = True

  def __post_init__(self):
    for name in (
      "vocab_size",
      "num_layers",
      "embed_dim",
      "mlp_dim",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "max_len",
    ):
      checks.check_positive_int(name, getattr(self, name))
    checks.check_divides(
      "num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads
    )
    checks.require(self.head_dim % 2 == 0, "head_dim", "be even", self.head_dim)
    checks.require(
      self.max_len <= MAX_POSITION,
      "max_len",
      f"be at most {MAX_POSITION}",
      self.max_len,
    )
    _check_real("rope_theta", self.rope_theta, 1.0, strict=True)
    _check_real("norm_eps", self.norm_eps, 0.0)
    checks.require(
      self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
      "rope_scaling",
      "be None, LinearScaling, Llama3Scaling or YarnScaling",
      self.rope_scaling,
    )
    for name in ("qk_norm", "attention_bias", "tie_embeddings"):
      value = getattr(self, name)
      checks.require(isinstance(value, bool), name, "be a bool", value)
