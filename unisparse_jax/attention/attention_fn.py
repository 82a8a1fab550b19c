# SPDX-License-Identifier: Apache-2.0
"""Attention as a value that a model is given: dense, or sparse by a pattern.

Both are frozen dataclasses: hashable, hence static under `jit`, and printable.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from unisparse_jax.attention import dense, executor, selector
from unisparse_jax.attention.patterns import unisparse


class AttentionFn(Protocol):
  """What the decoder calls in prefill."""

  def __call__(
    self,
    q: Float[Array, "batch q_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    v: Float[Array, "batch kv_len num_kv_heads head_dim"],
    *,
    causal: bool = True,
    scale: float | None = None,
    q_offset: Any = 0,
    kv_len: Any = None,
  ) -> Float[Array, "batch q_len num_heads head_dim"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAttention:
  """`dense_attention` as a value.

  Attributes:
    implementation: see `dense.dense_attention`.
  """

  implementation: str | None = None

  def __post_init__(self):
    if self.implementation is not None:
      checks.check_choice(
        "implementation", self.implementation, dense.IMPLEMENTATIONS
      )

  def __call__(
    self, q, k, v, *, causal=True, scale=None, q_offset=0, kv_len=None
  ):
    return dense.dense_attention(
      q,
      k,
      v,
      causal=causal,
      scale=scale,
      q_offset=q_offset,
      kv_len=kv_len,
      implementation=self.implementation,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttention:
  """Selects blocks by a pattern, then attends them.

  Attributes:
    pattern: the method and its settings.
    dense_below: calls with fewer keys than this use dense attention. Where it
      should lie depends on the model and the card. Measured: one call of 4,096
      keys on an H100 (32 query heads of 128, bfloat16; UniSparse at density
      0.25, selection included) took 0.53 of cuDNN's time, 0.37 at 8,192; with 8
      heads on an H200 UniSparse at 0.95 took 0.94 at 4,096. The shipped model
      (6 heads of 64) on an H200 has its first token sooner only above 8,192
      keys: UniSparse at 0.95 0.95x of dense attention's speed there, 1.35x at
      16,384 (results/frontier_default_h200.jsonl). Calls of fewer than 4,096
      keys were not timed on a card: `experiments.calibrate` does.
    implementation: back end of `sparse_attention`.
    dense_implementation: that of dense attention below the limit.
  """

  pattern: selector.Pattern = unisparse.UniSparse()
  dense_below: int = 0
  implementation: dispatch.Implementation = None
  dense_implementation: str | None = None

  def __post_init__(self):
    checks.check_non_negative_int("dense_below", self.dense_below)
    checks.require(
      hasattr(self.pattern, "select"),
      "pattern",
      "have a method `select`",
      self.pattern,
      "a value such as UniSparse()",
    )

  def __call__(
    self, q, k, v, *, causal=True, scale=None, q_offset=0, kv_len=None
  ):
    where = dict(causal=causal, scale=scale, q_offset=q_offset, kv_len=kv_len)
    if k.shape[1] < self.dense_below:
      return dense.dense_attention(
        q, k, v, implementation=self.dense_implementation, **where
      )
    # A choice has no gradient, and the kernels that score have no rule for one.
    mask = self.pattern.select(*lax.stop_gradient((q, k)), **where)
    return executor.sparse_attention(
      q, k, v, mask, scale=scale, implementation=self.implementation
    )


def as_flax_attention(
  attention: AttentionFn, *, causal: bool = True
) -> Callable[..., Array]:
  """The `attention_fn` argument of Flax's own multi-head attention layers.

  Serves `nnx.MultiHeadAttention` and `nn.MultiHeadDotProductAttention`.
  Neither layer tells its attention function reliably whether it is causal, so
  that is said here.

  Args:
    attention: the attention to plug in.
    causal: whether a query sees only keys at or before its own position.

  Returns:
    A function of (query, key, value, ...) as both layers call it. It raises
    ValueError for a mask, a bias or active dropout, which block lists cannot
    express.
  """

  # Linen passes only what the signature names.
  def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=True,
    dtype=None,
    precision=None,
    module=None,
    is_causal=False,
    **unused,
  ):
    del broadcast_dropout, dropout_rng, precision, module, unused
    for name, given in (("mask", mask), ("bias", bias)):
      checks.require(
        given is None,
        name,
        "be None",
        given is not None and given.shape,
        "causality from as_flax_attention(causal=...)",
      )
    checks.require(
      deterministic or dropout_rate == 0.0,
      "dropout_rate",
      "be 0 in sparse attention",
      dropout_rate,
    )
    if dtype is not None:
      query, key, value = (x.astype(dtype) for x in (query, key, value))
    return attention(query, key, value, causal=causal or is_causal)

  return attention_fn
