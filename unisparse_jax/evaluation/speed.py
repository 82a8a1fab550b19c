# SPDX-License-Identifier: Apache-2.0
"""Times of selection, of attention, and to the first token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from unisparse_jax import attention, models, timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTime:
  """Of one layer's prefill attention, compiled apart.

  Attributes:
    select_ms: choosing the blocks; 0 for dense attention.
    attend_ms: attention over them.
    total_ms: both in one program.
    peak_bytes: arguments, results and temporaries of that program.
    compile_s: of that program.
  """

  select_ms: float
  attend_ms: float
  total_ms: float
  peak_bytes: int | None
  compile_s: float


def time_attention(
  attention_fn: attention.AttentionFn,
  q: Array,
  k: Array,
  v: Array,
  *,
  causal: bool = True,
  repeats: int = 5,
  warmup: int = 1,
) -> AttentionTime:
  """Times one layer's attention on real inputs; no host transfer inside.

  Args:
    attention_fn: dense or sparse.
    q: [batch, q_len, num_heads, head_dim], from `models.capture_qkv`.
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    causal: whether a query sees only keys at or before its position.
    repeats: timed calls, of which the median counts.
    warmup: calls before them.
  """
  measure = functools.partial(timing.measure, repeats=repeats, warmup=warmup)
  attend_all = functools.partial(attention_fn, causal=causal)
  whole = measure(jax.jit(attend_all), q, k, v)
  select_ms, attend_ms = 0.0, whole.median_ms
  if isinstance(attention_fn, attention.SparseAttention):
    select = jax.jit(
      functools.partial(attention_fn.pattern.select, causal=causal)
    )
    select_ms = measure(select, q, k).median_ms
    attend = functools.partial(
      attention.sparse_attention, implementation=attention_fn.implementation
    )
    attend_ms = measure(jax.jit(attend), q, k, v, select(q, k)).median_ms
  return AttentionTime(
    select_ms=select_ms,
    attend_ms=attend_ms,
    total_ms=whole.median_ms,
    peak_bytes=whole.peak_bytes,
    compile_s=whole.compile_s,
  )


def time_prefill(
  model: models.Decoder,
  tokens: Array,
  attention_fn: attention.AttentionFn,
  *,
  repeats: int = 3,
  warmup: int = 1,
) -> timing.Timing:
  """Times a whole prefill to the first token's logits, the cache written.

  Args:
    model: a decoder.
    tokens: int [batch, len].
    attention_fn: how every layer attends.
    repeats: timed calls.
    warmup: calls before them.
  """
  graphdef, state = nnx.split(model)

  @jax.jit
  def first_token(state, tokens):
    model = nnx.merge(graphdef, state)
    cache = models.KVCache.init(
      model.config,
      batch=tokens.shape[0],
      capacity=tokens.shape[1],
      dtype=model.dtype,
    )
    logits, cache = model(
      tokens,
      cache=cache,
      attention_fn=attention_fn,
      logits_for="last",
      cache_is_empty=True,
    )
    return jnp.argmax(logits, axis=-1), cache

  return timing.measure(
    first_token, state, jnp.asarray(tokens), repeats=repeats, warmup=warmup
  )
