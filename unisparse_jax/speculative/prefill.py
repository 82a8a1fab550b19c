# SPDX-License-Identifier: Apache-2.0
"""Prompts through target and drafter: the state that decoding starts from."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from unisparse_jax import attention, models
from unisparse_jax.models import kv_cache, prompt_pass, sampling
from unisparse_jax.speculative import engine, statistics, tree, verification
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative.drafters import base


def prefill(
  target: models.Flat[models.Decoder],
  drafter: models.Flat[base.Drafter],
  policy: policy_lib.Policy,
  tokens: Int[Array, "batch q_len"],
  lengths: Int[Array, " batch"],
  limits: Int[Array, " batch"],
  keys: Any,
  reference: Int[Array, "batch new_tokens"] | None,
  *,
  attention_fn: Any,
  settings: engine.Settings,
  drafter_attention_fn: Any = None,
) -> engine.DecodeState:
  """Runs the prompts through target and drafter and draws the first token.

  The target's pass is a program of its own, which drafters, policies and
  samplers share.

  Args:
    target: the model whose output is produced.
    drafter: proposes tokens.
    policy: sizes the trees.
    tokens: int32 [batch, q_len], right-padded.
    lengths: int32 [batch], valid tokens.
    limits: int32 [batch], see `engine.DecodeState`.
    keys: see `engine.DecodeState`.
    reference: see `generate`.
    attention_fn: how target and drafter attend in the prompt.
    settings: static.
    drafter_attention_fn: see `generate`.

  Returns:
    The state after one token a row.
  """
  if drafter_attention_fn is None:
    # Settings by layer are the target's own.
    is_layered = hasattr(attention_fn, "for_layer")
    drafter_attention_fn = (
      attention.DenseAttention() if is_layered else attention_fn
    )
  logits, cache, taps = _prompt(
    target,
    tokens,
    lengths,
    attention_fn=attention_fn,
    capacity=settings.capacity,
    chunk=settings.chunk,
    taps=engine.taps_of(target.module, drafter.module),
  )
  rest = _first_state(
    target,
    drafter,
    policy,
    tokens,
    lengths,
    limits,
    keys,
    reference,
    logits,
    taps,
    attention_fn=drafter_attention_fn,
    settings=settings,
  )
  return engine.DecodeState(cache=cache, **rest)


@functools.partial(
  jax.jit, static_argnames=("attention_fn", "capacity", "chunk", "taps")
)
def _prompt(target, tokens, lengths, *, attention_fn, capacity, chunk, taps):
  """Logits [batch, vocab_size] after the prompts, `TreeCache` and taps."""
  target = target.module
  cache = kv_cache.KVCache.init(
    target.config,
    batch=tokens.shape[0],
    capacity=capacity,
    dtype=target.dtype,
  )
  last, cache, taps = prompt_pass.prompt_pass(
    target,
    tokens,
    lengths,
    cache,
    attention_fn=attention_fn,
    chunk=chunk,
    is_empty=True,
    taps=taps,
  )
  return target.logits(last), models.TreeCache.from_cache(cache), taps


@functools.partial(jax.jit, static_argnames=("attention_fn", "settings"))
def _first_state(
  target,
  drafter,
  policy,
  tokens,
  lengths,
  limits,
  keys,
  reference,
  logits,
  taps,
  *,
  attention_fn,
  settings,
):
  """Fields of `engine.DecodeState` but the cache, after the first token."""
  target, drafter = target.module, drafter.module
  batch, q_len = tokens.shape
  shape = settings.shape
  slots = settings.capacity + settings.slack
  noise = None
  if keys is not None:
    noise = sampling.noise_at(keys, lengths, target.config.vocab_size)
  first = sampling.draw_with_noise(settings.sampler, logits, noise)
  if reference is not None:
    free = jnp.full((batch, slots), -1, jnp.int32)
    reference = tree.write_rows(free, reference, lengths)
    first = verification.follow(first, reference, lengths)
  buffer = jnp.pad(tokens, ((0, 0), (0, slots - q_len)))
  buffer = tree.write_rows(buffer, first[:, None], lengths)
  committed = base.Committed(
    tokens=tokens,
    next_tokens=buffer[:, 1 : q_len + 1],
    start=jnp.zeros((batch,), jnp.int32),
    counts=lengths,
    taps=taps,
  )
  drafter_state = drafter.extend(
    target,
    drafter.init(target, batch=batch, capacity=slots),
    committed,
    is_prefill=True,
    attention_fn=attention_fn,
  )
  lengths = lengths + 1
  return dict(
    tokens=buffer,
    lengths=lengths,
    limits=limits,
    done=verification.is_any(first, settings.eos_ids) | (lengths >= limits),
    keys=keys,
    reference=reference,
    drafter_state=drafter_state,
    policy_state=policy.init_state(batch),
    log=statistics.StepLog.init(
      max_steps=settings.max_steps,
      batch=batch,
      max_nodes=shape.max_nodes,
      max_depth=shape.max_depth,
      with_trees=settings.log_trees,
      is_packed=bool(shape.packed),
    ),
  )
