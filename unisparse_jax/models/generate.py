# SPDX-License-Identifier: Apache-2.0
"""Prefill, one decoding step, and generation as one compiled loop.

The model goes through `jax.jit` as a `Flat`: as the nnx module that it is, it
would be flattened at every call.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import attention
from unisparse_jax.models import (
  arguments,
  decoder,
  flattened,
  kv_cache,
  prompt_pass,
  sampling,
  tree_forward,
)

# Prompts of similar length then share one compiled decoding loop.
_CAPACITY_MULTIPLE = 128


def prefill(
  model: decoder.Decoder | flattened.Flat,
  tokens: Int[Array | np.ndarray, "batch q_len"],
  *,
  cache: kv_cache.KVCache | None = None,
  capacity: int | None = None,
  lengths: Int[Array | np.ndarray, " batch"] | None = None,
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  chunk: int | None = None,
) -> tuple[Float[Array, "batch vocab_size"], kv_cache.KVCache]:
  """Runs a prompt through the model and keeps its keys and values.

  Compiled once per shape and settings.

  Args:
    model: a decoder, or its `Flat` for calls that are short.
    tokens: int [batch, q_len], right-padded.
    cache: earlier tokens that these follow; left as it is. Default: none.
    capacity: tokens that the new cache can hold; default q_len. Not with
      `cache`.
    lengths: int [batch], valid tokens of each row, 1 to q_len; default q_len.
    attention_fn: how every layer attends.
    chunk: tokens per pass, which bounds the memory of the activations; default
      all. A pass attends to the cache with a q_offset.

  Returns:
    float32 logits after each row's last valid token, and the cache.

  Raises:
    ValueError: an argument is off, the prompt exceeds the model's max_len or
      the capacity; the message names it. Nothing has run then.
  """
  flat_model = flattened.flat(model)
  model = flat_model.module
  tokens = arguments.as_tokens(tokens)
  batch, q_len = tokens.shape
  decoder.check_len("tokens", q_len, model.config)
  lengths = arguments.as_lengths(lengths, batch, q_len)
  arguments.check_hashable("attention_fn", attention_fn)
  if chunk is not None:
    checks.check_positive_int("chunk", chunk)
    chunk = int(chunk) if chunk < q_len else None
  if cache is None:
    capacity = q_len if capacity is None else capacity
    checks.check_positive_int("capacity", capacity)
    checks.require(
      capacity >= q_len,
      "capacity",
      "be at least the length of tokens",
      capacity,
      f"capacity >= {q_len}",
    )
  else:
    checks.require(
      capacity is None, "capacity", "be None with a cache", capacity
    )
    used = cache.check_room(q_len)
    decoder.check_len("cache and tokens", used + q_len, model.config)
  return _prefill(
    flat_model,
    tokens,
    lengths,
    cache,
    attention_fn=attention_fn,
    chunk=chunk,
    capacity=capacity,
  )


def decode_step(
  model: decoder.Decoder | flattened.Flat,
  tokens: Int[Array, " batch"],
  cache: kv_cache.KVCache,
  *,
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
) -> tuple[Float[Array, "batch vocab_size"], kv_cache.KVCache]:
  """One token a row, attending to the whole cache.

  Args:
    model: a decoder, or its `Flat` for calls that are short.
    tokens: int [batch].
    cache: earlier tokens. Donated: its buffers become those of the result.
    attention_fn: how every layer attends.

  Returns:
    float32 logits of the next token and the cache. NaN where the cache is full.
  """
  checks.check_shape("tokens", tokens, ("batch",), (cache.batch,))
  arguments.check_hashable("attention_fn", attention_fn)
  return _decode_step(
    flattened.flat(model), tokens, cache, attention_fn=attention_fn
  )


def decode(
  model: decoder.Decoder | flattened.Flat,
  logits: Float[Array, "batch vocab_size"],
  cache: kv_cache.KVCache,
  *,
  max_new_tokens: int,
  sampler: sampling.Sampler = sampling.Greedy(),
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  eos_id: int | Sequence[int] | None = None,
  rng_key: Array | None = None,
) -> tuple[Int[Array, "batch max_new_tokens"], kv_cache.KVCache]:
  """Draws new tokens after a `prefill`, in one compiled loop.

  Args:
    model: a decoder, or its `Flat` for calls that are short.
    logits: of the first new token, from `prefill`.
    cache: from `prefill`, with room for max_new_tokens - 1 more. Donated.
    max_new_tokens: at least 1.
    sampler: how tokens are drawn.
    attention_fn: how every layer attends.
    eos_id: token, or tokens, that end a row; the loop ends when all rows have.
    rng_key: needed by every sampler but Greedy: one key, or a typed key for
      each row. A row's noise depends on its key and on positions alone; one
      key stands for fold_in(rng_key, row).

  Returns:
    int32 [batch, max_new_tokens], filled up with the (first) eos_id after the
    end of a row, and the cache. The last token drawn is not in the cache.

  Raises:
    ValueError: an argument is off; the message names it.
  """
  flat_model = flattened.flat(model)
  model = flat_model.module
  checks.check_positive_int("max_new_tokens", max_new_tokens)
  vocab_size = model.config.vocab_size
  checks.check_shape(
    "logits", logits, ("batch", "vocab_size"), (cache.batch, vocab_size)
  )
  arguments.check_hashable("attention_fn", attention_fn)
  arguments.check_hashable("sampler", sampler)
  checks.require(
    rng_key is not None or not sampler.needs_key,
    "rng_key",
    "be given for this sampler",
    rng_key,
  )
  eos_ids = arguments.as_eos_ids(eos_id, vocab_size)
  used = cache.check_room(int(max_new_tokens) - 1)
  total = used + int(max_new_tokens)
  decoder.check_len("cache and max_new_tokens", total, model.config)
  return _decode(
    flat_model,
    logits,
    cache,
    rng_key,
    max_new_tokens=int(max_new_tokens),
    sampler=sampler,
    attention_fn=attention_fn,
    eos_ids=eos_ids,
  )


def generate(
  model: decoder.Decoder | flattened.Flat,
  tokens: Int[Array | np.ndarray, "batch q_len"],
  *,
  max_new_tokens: int,
  sampler: sampling.Sampler = sampling.Greedy(),
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  eos_id: int | Sequence[int] | None = None,
  lengths: Int[Array | np.ndarray, " batch"] | None = None,
  rng_key: Array | None = None,
  chunk: int | None = None,
) -> Int[Array, "batch max_new_tokens"]:
  """New tokens after each row of a right-padded batch of prompts.

  The prefill uses `attention_fn`; the decoding steps are dense.

  Args:
    model: a decoder, or its `Flat` for calls that are short.
    tokens: int [batch, q_len], right-padded.
    max_new_tokens: at least 1.
    sampler: how tokens are drawn.
    attention_fn: how every layer attends in the prefill.
    eos_id: token, or tokens, that end a row.
    lengths: int [batch], valid tokens of each row; default q_len.
    rng_key: needed by every sampler but Greedy: one key, or a typed key for
      each row. A row's noise depends on its key and on positions alone; one
      key stands for fold_in(rng_key, row).
    chunk: tokens per prefill pass; default all.

  Returns:
    int32 [batch, max_new_tokens], see `decode`.

  Raises:
    ValueError: an argument is off, or the prompt and the new tokens exceed the
      model's max_len; the message names it. Nothing has run then.
  """
  flat_model = flattened.flat(model)
  model = flat_model.module
  tokens = arguments.as_tokens(tokens)
  decoder.check_len("tokens", tokens.shape[1], model.config)
  checks.check_positive_int("max_new_tokens", max_new_tokens)
  total = tokens.shape[1] + int(max_new_tokens)
  decoder.check_len("tokens and max_new_tokens", total, model.config)
  # Checked again by `decode`, but before the prefill runs.
  checks.require(
    rng_key is not None or not sampler.needs_key,
    "rng_key",
    "be given for this sampler",
    rng_key,
  )
  arguments.as_eos_ids(eos_id, model.config.vocab_size)
  logits, cache = prefill(
    flat_model,
    tokens,
    capacity=-(-total // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE,
    lengths=lengths,
    attention_fn=attention_fn,
    chunk=chunk,
  )
  out, _ = decode(
    flat_model,
    logits,
    cache,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    eos_id=eos_id,
    rng_key=rng_key,
  )
  return out


@functools.partial(
  jax.jit, static_argnames=("attention_fn", "chunk", "capacity")
)
def _prefill(model, tokens, lengths, cache, *, attention_fn, chunk, capacity):
  model = model.module
  is_empty = cache is None
  if cache is None:
    cache = kv_cache.KVCache.init(
      model.config,
      batch=tokens.shape[0],
      capacity=capacity,
      dtype=model.dtype,
    )
  last, cache, _ = prompt_pass.prompt_pass(
    model,
    tokens,
    lengths,
    cache,
    attention_fn=attention_fn,
    chunk=chunk,
    is_empty=is_empty,
  )
  return model.logits(last), cache


@functools.partial(
  jax.jit, static_argnames="attention_fn", donate_argnames="cache"
)
def _decode_step(model, tokens, cache, *, attention_fn):
  return model.module(
    tokens[:, None],
    cache=cache,
    attention_fn=attention_fn,
    logits_for="last",
  )


@functools.partial(
  jax.jit,
  static_argnames=("max_new_tokens", "sampler", "attention_fn", "eos_ids"),
  donate_argnames="cache",
)
def _decode(
  model,
  logits,
  cache,
  rng_key,
  *,
  max_new_tokens,
  sampler,
  attention_fn,
  eos_ids,
):
  model = model.module
  batch, vocab_size = logits.shape
  keys = None
  if sampler.needs_key:
    keys = sampling.row_keys(rng_key, batch)
  # Dense decoding reads a layout of its own; another attention_fn, the cache's.
  is_dense = attention_fn == attention.DenseAttention()
  if is_dense:
    cache = tree_forward.TreeCache.from_cache(cache)

  def draw(step, logits, positions, is_done, out):
    noise = None
    if keys is not None:
      noise = sampling.noise_at(keys, positions, vocab_size)
    token = sampling.draw_with_noise(sampler, logits, noise)
    if eos_ids:
      token = jnp.where(is_done, eos_ids[0], token)
      is_eos = [token == eos_id for eos_id in eos_ids]
      is_done = functools.reduce(operator.or_, is_eos, is_done)
    # All of it: a contiguous slice, that of one row, would end a GPU's graph.
    column = jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :]
    out = jnp.where(column == step, token[:, None], out)
    return token, is_done, out

  def body(carry):
    step, token, is_done, out, cache = carry
    lengths = jnp.where(is_done, 0, 1)
    if is_dense:
      logits, cache = _dense_step(model, token, cache, lengths)
    else:
      logits, cache = model(
        token[:, None],
        cache=cache,
        attention_fn=attention_fn,
        lengths=lengths,
        logits_for="last",
      )
    token, is_done, out = draw(step, logits, cache.lengths, is_done, out)
    return step + 1, token, is_done, out, cache

  def is_running(carry):
    step, _, is_done, *_ = carry
    return (step < max_new_tokens) & ~jnp.all(is_done)

  fill = eos_ids[0] if eos_ids else 0
  out = jnp.full((batch, max_new_tokens), fill, jnp.int32)
  step = jnp.int32(0)
  is_done = jnp.zeros((batch,), bool)
  token, is_done, out = draw(step, logits, cache.lengths, is_done, out)
  carry = (step + 1, token, is_done, out, cache)
  if eos_ids:
    carry = lax.while_loop(is_running, body, carry)
  else:
    # A known number of rounds spares a GPU the question whether to go on.
    carry = lax.fori_loop(1, max_new_tokens, lambda _, x: body(x), carry)
  *_, out, cache = carry
  return out, cache.to_cache() if is_dense else cache


def _dense_step(model, token, cache, lengths):
  """Logits after one token a row, and the cache with it."""
  mask = jnp.ones((token.shape[0], 1, 1), bool)
  out = tree_forward.tree_forward(
    model, token[:, None], cache.lengths[:, None], mask, cache
  )
  # A write past the end would land on valid slots: never silently.
  fits = (cache.lengths < cache.capacity)[:, None]
  hidden = out.hidden[:, 0]
  hidden = jnp.where(fits, hidden, jnp.array(jnp.nan, hidden.dtype))
  return model.logits(hidden), cache.append(out.k, out.v, lengths, num_slots=1)
