# SPDX-License-Identifier: Apache-2.0
"""Stretches of plain steps end with the last row, and leave nothing behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax import models, speculative
from unisparse_jax.speculative import engine

NEW, EOS = 20, (10, 11)
LENGTHS = np.asarray([9, 1, 6, 4], np.int32)
SHAPE = speculative.TreeShape(width=2, base_depth=2, buckets=(7,))
DECLINES = speculative.HeteroSpec.create(
  thresholds=np.full(7, np.inf),
  depth=[2] * 8,
  nodes=[0] * 8,
  base_depth=2,
  width=2,
  declines=True,
)


@pytest.fixture(scope="module")
def prompts():
  return np.asarray(jax.random.randint(jax.random.key(0), (4, 9), 0, 24))


@pytest.fixture(scope="module")
def plain(target, prompts):
  out = models.generate(
    target, prompts, max_new_tokens=NEW, lengths=LENGTHS, eos_id=EOS
  )
  return np.asarray(out)


def check(result, plain, counts):
  """Tokens are `plain`'s, and every step of the log brought some row one."""
  np.testing.assert_array_equal(result.num_tokens, counts)
  for row, count in enumerate(counts):
    np.testing.assert_array_equal(
      result.tokens[row, :count], plain[row, :count]
    )
  emitted = np.maximum(result.log.column("num_emitted"), 0)
  np.testing.assert_array_equal(emitted.sum(axis=0), np.asarray(counts) - 1)
  assert emitted.max(axis=1).min() == 1


@pytest.mark.parametrize(
  ("rows", "limits", "counts"),
  [
    ((1, 3), (NEW, NEW), (10, 7)),  # end tokens amid a block of steps
    ((0, 3), (3, NEW), (3, 7)),  # the row with room for most ends early
    ((0, 2), (NEW, 12), (NEW, 12)),
  ],
)
def test_no_step_is_taken_for_rows_that_are_done(
  target, prompts, plain, rows, limits, counts
):
  rows = np.asarray(rows)
  result = speculative.generate(
    target,
    speculative.PromptLookup(),
    prompts[rows],
    max_new_tokens=np.asarray(limits),
    lengths=LENGTHS[rows],
    eos_id=EOS,
    shape=SHAPE,
    policy=DECLINES,
    capacity=9 + NEW + engine.room_behind(SHAPE),
  )
  check(result, plain[rows], counts)
  summary = speculative.summarize(result.log)
  steps = max(counts) - 1
  assert summary["steps"] == steps
  expected = 1 - (sum(counts) - 2) / (2 * steps)
  np.testing.assert_allclose(summary["padding"], expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(speculative.Fixed):
  """Drafts one step, then asks for the next of `stretches` of plain ones.

  Its state counts what it was told of.
  """

  stretches: jax.Array
  can_skip = True

  def init_state(self, batch):
    del batch
    return jnp.zeros((2,), jnp.int32)

  def plain_steps(self, state, context):
    del context
    told = state[0]
    wanted = self.stretches[told // 2 % len(self.stretches)]
    return jnp.where(told % 2 == 1, wanted, 0)

  def decide(self, state, evidence):
    return super().decide((), evidence)

  def update(self, state, outcome):
    return state + jnp.stack([jnp.minimum(outcome.steps, 1), outcome.steps])


@pytest.mark.parametrize("stretches", [(1, 3, 7), (9, 200, 200), (200, 1, 1)])
def test_stretches_of_any_length_with_the_least_capacity(
  target, other_model, prompts, plain, stretches
):
  policy = Alternating(
    depth=jnp.int32(2),
    nodes=jnp.int32(6),
    stretches=jnp.asarray(stretches, jnp.int32),
  )
  limits = np.asarray([NEW, 4, 13, NEW])

  def detokenize(tokens):
    return "".join(f"<{token}>" for token in tokens)

  text = detokenize(plain[0, 12:16])
  session = speculative.prepare(
    target,
    speculative.SmallDecoder(model=other_model),
    prompts,
    max_new_tokens=limits,
    lengths=LENGTHS,
    eos_id=EOS,
    shape=SHAPE,
    policy=policy,
    capacity=9 + NEW + engine.room_behind(SHAPE),
  )
  for chunk in session.chunks(5):  # ends amid stretches
    chunk.stop_at((text,), detokenize)
  result = session.result()
  counts = np.asarray(result.num_tokens)
  assert counts.tolist() == [9, 4, 13, 7]
  for row, count in enumerate(counts):
    np.testing.assert_array_equal(
      result.tokens[row, :count], plain[row, :count]
    )
  levels = result.log.column("draft_levels").max(axis=1)
  assert (levels == 0).any() and (levels == 2).any()
  # A stretch of no steps is told as one of none.
  assert int(session.state.policy_state[1]) == int(result.log.num_steps)


def test_long_stretches_are_plain_decoding(target, prompts):
  new = 50  # 32, 8, 8 and 1 steps
  expected = models.generate(target, prompts, max_new_tokens=new)
  result = speculative.generate(
    target,
    speculative.PromptLookup(),
    prompts,
    max_new_tokens=new,
    shape=SHAPE,
    policy=DECLINES,
  )
  check(result, np.asarray(expected), [new] * 4)
