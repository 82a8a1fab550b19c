# SPDX-License-Identifier: Apache-2.0
"""Plain decoding inside the speculative loop, for as long as no draft pays.

A step here is one of plain decoding and nothing else. Log, policy and drafter
hear of a stretch at its end; and most steps are taken in blocks whose length is
known, as a GPU waits for the host where a loop asks whether to go on. With a
log entry, an update of the gate and that question at every step, one took 1.35
ms where plain decoding takes 1.28 (H200, 155M target, batch 16).

Loops of zero or one round stand for conditions: a `lax.cond` that returns a
cache would copy it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from unisparse_jax import models
from unisparse_jax.models import sampling
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree, verification
from unisparse_jax.speculative.drafters import base

MAX_STEPS = 64  # then the drafter is told, and the policy asked again
_BLOCK = 8


def stretch(
  target: models.Decoder,
  drafter: base.Drafter,
  policy: policy_lib.Policy,
  state: Any,
  num_steps: Int[Array, ""],
  *,
  is_end: Callable[[Any], Any],
  shape: tree.TreeShape,
  sampler: sampling.Sampler,
  taps: Sequence[int],
) -> Any:
  """Takes plain steps until every row is done, then tells who has to know.

  Args:
    target: the model whose output is produced.
    drafter: its state follows.
    policy: hears of the stretch.
    state: an `engine.DecodeState`.
    num_steps: int32 scalar, steps wanted; at most `MAX_STEPS` are taken.
    is_end: which of int32 tokens end a row.
    shape: sizes, for the log.
    sampler: how tokens are drawn.
    taps: layers whose input the drafter needs.

  Returns:
    The state.
  """
  batch = state.lengths.shape[0]
  before, active = state.lengths, ~state.done
  num_steps = jnp.minimum(num_steps, MAX_STEPS)
  tapped = None
  if taps:
    width = len(taps) * target.config.embed_dim
    tapped = jnp.zeros((batch, MAX_STEPS, width), target.dtype)

  def one(carry):
    step, state, tapped = carry
    state, new_taps = _one_step(
      target, state, is_end=is_end, sampler=sampler, taps=taps
    )
    if tapped is not None:
      tapped = lax.dynamic_update_slice(tapped, new_taps, (0, step, 0))
    return step + 1, state, tapped

  def has_block(carry):
    step, state, _ = carry
    left = jnp.where(state.done, 0, state.limits - state.lengths)
    return (step + _BLOCK <= num_steps) & (jnp.max(left) >= _BLOCK)

  def has_step(carry):
    step, state, _ = carry
    return (step < num_steps) & jnp.any(~state.done)

  def block(carry):
    return lax.fori_loop(0, _BLOCK, lambda _, carry: one(carry), carry)

  carry = (jnp.int32(0), state, tapped)
  carry = lax.while_loop(has_block, block, carry)
  taken, state, tapped = lax.while_loop(has_step, one, carry)
  counts = state.lengths - before
  zeros = jnp.zeros((batch,), jnp.int32)
  outcome = policy_lib.Outcome(
    decision=policy_lib.Decision(depth=zeros, nodes=zeros, bin=zeros),
    evidence_entropy=jnp.zeros((batch,), jnp.float32),
    accept_len=zeros,
    num_emitted=counts,
    bucket=jnp.int32(0),
    draft_levels=jnp.int32(0),
    active=active,
    remaining=jnp.where(state.done, 0, state.limits - state.lengths),
    steps=taken,
  )
  state = dataclasses.replace(
    state,
    policy_state=policy.update(state.policy_state, outcome),
    log=state.log.append_plain(
      taken, counts, bucket_size=batch if shape.packed else 1
    ),
  )

  def extend(carry):
    _, state = carry
    index = (
      before[:, None] - 1 + jnp.arange(MAX_STEPS + 1, dtype=jnp.int32)[None]
    )
    known = jnp.take_along_axis(state.tokens, index, axis=1, mode="clip")
    committed = base.Committed(
      tokens=known[:, :-1],
      next_tokens=known[:, 1:],
      start=before - 1,
      counts=counts,
      taps=tapped,
    )
    drafter_state = drafter.extend(
      target,
      state.drafter_state,
      committed,
      is_prefill=False,
      attention_fn=None,
    )
    return jnp.bool_(False), dataclasses.replace(
      state, drafter_state=drafter_state
    )

  _, state = lax.while_loop(lambda carry: carry[0], extend, (taken > 0, state))
  return state


def _one_step(target, state, *, is_end, sampler, taps):
  """The state after one token a row, and the taps [batch, 1, ...] or None."""
  batch = state.lengths.shape[0]
  active = ~state.done
  root = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
  out = models.tree_forward(
    target,
    root,
    state.lengths[:, None] - 1,
    jnp.ones((batch, 1, 1), bool),
    state.cache,
    taps=taps,
  )
  logits = target.logits(out.hidden[:, 0])
  noise = None
  if state.keys is not None:
    noise = sampling.noise_at(state.keys, state.lengths, logits.shape[-1])
  token = sampling.draw_with_noise(sampler, logits, noise)
  if state.reference is not None:
    token = verification.follow(token, state.reference, state.lengths)
  count = active.astype(jnp.int32)
  lengths = state.lengths + count
  new_state = dataclasses.replace(
    state,
    tokens=tree.write_rows(state.tokens, token[:, None], state.lengths),
    lengths=lengths,
    done=state.done | (active & is_end(token)) | (lengths >= state.limits),
    cache=state.cache.append(out.k, out.v, count),
  )
  return new_state, out.taps
