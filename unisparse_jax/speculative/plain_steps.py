# SPDX-License-Identifier: Apache-2.0
"""Plain decoding inside the speculative loop, for as long as no draft pays.

A step here is one of plain decoding and little else. The drafter hears of the
tokens afterwards, all at once. Loops of zero or one round stand for conditions:
a `lax.cond` that returns a cache would copy it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from unisparse_jax import models
from unisparse_jax.models import sampling
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree, verification
from unisparse_jax.speculative.drafters import base

MAX_STEPS = 32  # then the drafter is told, and the policy asked again


def plain_steps(
  target: models.Decoder,
  drafter: base.Drafter,
  policy: policy_lib.Policy,
  state: Any,
  *,
  wants_plain: Callable[[Any], Any],
  is_end: Callable[[Any], Any],
  shape: tree.TreeShape,
  sampler: sampling.Sampler,
  taps: Sequence[int],
) -> Any:
  """Takes up to `MAX_STEPS` plain steps, then extends the drafter if any.

  Args:
    target: the model whose output is produced.
    drafter: its state follows.
    policy: hears of every step.
    state: an `engine.DecodeState`.
    wants_plain: bool scalar of a state: whether to go on.
    is_end: which of int32 tokens end a row.
    shape: sizes, for the log.
    sampler: how tokens are drawn.
    taps: layers whose input the drafter needs.

  Returns:
    The state.
  """
  batch = state.lengths.shape[0]
  before = state.lengths
  tapped = None
  if taps:
    width = len(taps) * target.config.embed_dim
    tapped = jnp.zeros((batch, MAX_STEPS, width), target.dtype)

  def body(carry):
    step, state, tapped = carry
    state, new_taps = one_step(
      target,
      policy,
      state,
      is_end=is_end,
      shape=shape,
      sampler=sampler,
      taps=taps,
    )
    if tapped is not None:
      tapped = lax.dynamic_update_slice(tapped, new_taps, (0, step, 0))
    return step + 1, state, tapped

  _, state, tapped = lax.while_loop(
    lambda carry: (carry[0] < MAX_STEPS) & wants_plain(carry[1]),
    body,
    (jnp.int32(0), state, tapped),
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
      counts=state.lengths - before,
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

  has_new = jnp.any(state.lengths > before)
  _, state = lax.while_loop(lambda carry: carry[0], extend, (has_new, state))
  return state


def one_step(
  target: models.Decoder,
  policy: policy_lib.Policy,
  state: Any,
  *,
  is_end: Callable[[Any], Any],
  shape: tree.TreeShape,
  sampler: sampling.Sampler,
  taps: Sequence[int] = (),
) -> tuple[Any, Any]:
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
  done = state.done | (active & is_end(token)) | (lengths >= state.limits)
  zeros = jnp.zeros((batch,), jnp.int32)
  outcome = policy_lib.Outcome(
    decision=policy_lib.Decision(depth=zeros, nodes=zeros, bin=zeros),
    evidence_entropy=jnp.zeros((batch,), jnp.float32),
    accept_len=zeros,
    num_emitted=count,
    bucket=jnp.int32(0),
    draft_levels=jnp.int32(0),
    active=active,
    remaining=jnp.where(done, 0, state.limits - lengths),
  )
  new_state = dataclasses.replace(
    state,
    tokens=tree.write_rows(state.tokens, token[:, None], state.lengths),
    lengths=lengths,
    done=done,
    cache=state.cache.append(out.k, out.v, count),
    policy_state=policy.update(state.policy_state, outcome),
    log=state.log.append(
      outcome,
      draft=tree.root_only(root[:, 0], shape.max_nodes),
      num_nodes=count,
      bucket_size=jnp.int32(batch if shape.packed else 1),
      path=jnp.zeros((batch, shape.max_depth + 1), jnp.int32),
      score=jnp.zeros((batch,), jnp.float32),
    ),
  )
  return new_state, out.taps
