# SPDX-License-Identifier: Apache-2.0
"""A prompt through the model, in one pass or in chunks of bounded memory."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from unisparse_jax import attention
from unisparse_jax.models import decoder, kv_cache


def prompt_pass(
  model: decoder.Decoder,
  tokens: Int[Array, "batch q_len"],
  lengths: Int[Array, " batch"] | None,
  cache: kv_cache.KVCache,
  *,
  attention_fn: attention.AttentionFn,
  chunk: int | None,
  is_empty: bool,
  taps: Sequence[int] = (),
) -> tuple[Float[Array, "batch embed_dim"], kv_cache.KVCache, Array | None]:
  """Puts prompts in a cache.

  Args:
    model: a decoder.
    tokens: int32 [batch, q_len], right-padded.
    lengths: int32 [batch], valid tokens, or None for all.
    cache: earlier tokens.
    attention_fn: how every layer attends.
    chunk: static; tokens per pass, or None for all.
    is_empty: static promise that the cache holds nothing.
    taps: static; layers whose input is returned as well.

  Returns:
    Each row's last valid hidden state, the cache, and the taps
    [batch, q_len, len(taps) * embed_dim], or None for no taps.
  """
  batch, q_len = tokens.shape
  if chunk is None:
    hidden, new_cache, tapped = model.hidden_states_and_taps(
      tokens,
      taps=taps,
      cache=cache,
      attention_fn=attention_fn,
      lengths=lengths,
      cache_is_empty=is_empty,
    )
    assert new_cache is not None, "a model that is given a cache returns one"
    return decoder.last_valid(hidden, lengths), new_cache, tapped

  if lengths is None:
    lengths = jnp.full((batch,), q_len, jnp.int32)

  def run(carry, start, chunk_tokens):
    cache, last = carry
    valid = jnp.clip(lengths - start, 0, chunk_tokens.shape[1])
    hidden, new_cache, tapped = model.hidden_states_and_taps(
      chunk_tokens,
      taps=taps,
      cache=cache,
      attention_fn=attention_fn,
      lengths=valid,
    )
    # A row that ended in an earlier chunk keeps what it had.
    last = jnp.where(
      (valid > 0)[:, None], decoder.last_valid(hidden, valid), last
    )
    return (new_cache, last), tapped

  num_chunks = q_len // chunk
  starts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk
  # [num_chunks, batch, chunk]
  chunks = tokens[:, : num_chunks * chunk].reshape(batch, num_chunks, chunk)
  chunks = jnp.transpose(chunks, (1, 0, 2))
  last = jnp.zeros((batch, model.config.embed_dim), model.dtype)
  carry, tapped = lax.scan(
    lambda carry, x: run(carry, *x), (cache, last), (starts, chunks)
  )
  pieces = []
  if tapped is not None:  # [num_chunks, batch, chunk, taps_dim]
    tapped = jnp.swapaxes(tapped, 0, 1)
    pieces.append(tapped.reshape(batch, num_chunks * chunk, -1))
  if q_len % chunk:
    carry, rest = run(
      carry, num_chunks * chunk, tokens[:, num_chunks * chunk :]
    )
    pieces.append(rest)
  filled, last = carry
  return last, filled, jnp.concatenate(pieces, axis=1) if taps else None
