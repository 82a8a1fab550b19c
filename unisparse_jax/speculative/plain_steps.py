# SPDX-License-Identifier: Apache-2.0
"""Plain decoding inside the speculative loop, for as long as no draft pays.

A step here is one of plain decoding and little else, as each further operation
on a few numbers takes a GPU 2 to 4 us. All rows go on, those that are done too:
what they write lies behind their ends, and past the cache's end in its last
slot, which is nobody's. Log, policy and drafter hear of a stretch when it is
over. Most steps are taken in blocks of known length, as a GPU waits 0.2 ms for
the host where a loop asks whether to go on.

Measured on an H200 (155M target, batch 16, temperature 1), where plain decoding
takes 1.08 ms a step: with a log entry, an update of the gate and that question
at every step, 0.075 ms more; with lengths, ends and tokens of the rows kept up
to date at every step, 0.034 more; in blocks of 32 steps instead of 8, with 256
slots of the cache for what is written behind, 0.043; without these slots, in
which attention took 0.027, and 256 steps in one stretch, 0.02.

Loops of zero or one round stand for conditions: a `lax.cond` that returns a
cache would copy it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from unisparse_jax import models
from unisparse_jax.models import sampling
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree, verification
from unisparse_jax.speculative.drafters import base

MAX_STEPS = 256  # then the drafter is told, and the policy asked again
# Longest first. Where tokens may end a batch, what is left of a block is lost.
_BLOCKS, _BLOCKS_TO_END = (32, 8, 1), (8, 1)


def stretch(
  target: models.Decoder,
  drafter: base.Drafter,
  policy: policy_lib.Policy,
  state: Any,
  num_steps: Int[Array, ""],
  *,
  eos_ids: tuple[int, ...],
  shape: tree.TreeShape,
  sampler: sampling.Sampler,
  taps: Sequence[int],
) -> Any:
  """Takes plain steps while any row goes on, then tells who has to know.

  Args:
    target: the model whose output is produced.
    drafter: its state follows.
    policy: hears of the stretch.
    state: an `engine.DecodeState`.
    num_steps: int32 scalar, steps wanted; at most `MAX_STEPS` are taken.
    eos_ids: tokens that end a row.
    shape: sizes, for the log.
    sampler: how tokens are drawn.
    taps: layers whose input the drafter needs.

  Returns:
    The state.
  """
  batch = state.lengths.shape[0]
  before, active = state.lengths, ~state.done
  left = jnp.where(active, state.limits - before, 0)
  num_steps = jnp.minimum(num_steps, jnp.minimum(jnp.max(left), MAX_STEPS))
  tapped = None
  if taps:
    width = len(taps) * target.config.embed_dim
    tapped = jnp.zeros((batch, MAX_STEPS, width), target.dtype)

  def one(run):
    positions = run.cache.lengths
    out = models.tree_forward(
      target,
      run.token[:, None],
      positions[:, None],
      jnp.ones((batch, 1, 1), bool),
      run.cache,
      taps=taps,
    )
    logits = target.logits(out.hidden[:, 0])
    noise = None
    if state.keys is not None:
      noise = sampling.noise_at(state.keys, positions + 1, logits.shape[-1])
    token = sampling.draw_with_noise(sampler, logits, noise)
    if state.reference is not None:
      token = verification.follow(token, state.reference, positions + 1)
    tapped = run.tapped
    if tapped is not None:
      tapped = lax.dynamic_update_slice(tapped, out.taps, (0, run.step, 0))
    return _Run(
      step=run.step + 1,
      token=token,
      tokens=lax.dynamic_update_slice(
        run.tokens, token[:, None], (0, run.step)
      ),
      ended=run.ended | verification.is_any(token, eos_ids),
      cache=run.cache.append(
        out.k, out.v, jnp.ones_like(positions), num_slots=1
      ),
      tapped=tapped,
    )

  def has(steps):
    def condition(run):
      goes_on = run.step + steps <= num_steps
      if eos_ids:
        goes_on &= jnp.any(~run.ended & (run.step < left))
      return goes_on

    return condition

  root = jnp.take_along_axis(state.tokens, before[:, None] - 1, axis=1)[:, 0]
  run = _Run(
    step=jnp.int32(0),
    token=root,
    tokens=jnp.zeros((batch, MAX_STEPS), jnp.int32),
    ended=state.done,
    cache=state.cache,
    tapped=tapped,
  )
  for size in _BLOCKS_TO_END if eos_ids else _BLOCKS:
    run = lax.while_loop(has(size), functools.partial(_repeat, one, size), run)

  # Cut at the limit and after the first end token.
  counts, ended = verification.until_end(
    run.tokens, jnp.minimum(left, run.step), eos_ids
  )
  # What is left of a block once every row is done is no step.
  num_taken = jnp.max(counts)
  lengths = before + counts
  done = state.done | ended | (lengths >= state.limits)
  zeros = jnp.zeros((batch,), jnp.int32)
  outcome = policy_lib.Outcome(
    decision=policy_lib.Decision(depth=zeros, nodes=zeros, bin=zeros),
    evidence_entropy=jnp.zeros((batch,), jnp.float32),
    accept_len=zeros,
    num_emitted=counts,
    bucket=jnp.int32(0),
    draft_levels=jnp.int32(0),
    active=active,
    remaining=jnp.where(done, 0, state.limits - lengths),
    steps=num_taken,
  )
  state = dataclasses.replace(
    state,
    tokens=tree.write_rows(state.tokens, run.tokens, before),
    lengths=lengths,
    done=done,
    cache=dataclasses.replace(run.cache, lengths=state.cache.lengths + counts),
    policy_state=policy.update(state.policy_state, outcome),
    log=state.log.append_plain(
      num_taken, counts, bucket_size=batch if shape.packed else 1
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
      taps=run.tapped,
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

  is_wanted = (num_taken > 0) & jnp.any(~done)
  _, state = lax.while_loop(lambda carry: carry[0], extend, (is_wanted, state))
  return state


def _repeat(one, size: int, run):
  return lax.fori_loop(0, size, lambda _, run: one(run), run)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
  """What a step changes: `tokens` [batch, MAX_STEPS] is all that it wrote."""

  step: Int[Array, ""]
  token: Int[Array, " batch"]
  tokens: Int[Array, "batch max_steps"]
  ended: Bool[Array, " batch"]
  cache: models.TreeCache
  tapped: Any
