# SPDX-License-Identifier: Apache-2.0
"""Rows that are taken to write a given text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.speculative import drafters_for_tests
from unisparse_jax import models, speculative
from unisparse_jax.speculative import engine

VOCAB, NEW, BATCH, EOS = 24, 20, 4, 10
LENGTHS = np.asarray([9, 1, 6, 4], np.int32)
LIMITS = np.asarray([NEW, 13, NEW, NEW], np.int32)
SHAPE = speculative.TreeShape(width=3, base_depth=2, max_depth=4, buckets=(13,))
PACKED = dataclasses.replace(SHAPE, packed=(24,))
KEYS = jax.random.split(jax.random.key(5), BATCH)
# 24 tokens of like chance: no row of 20 draws what a text has by accident.
SAMPLED = dict(sampler=models.Temperature(temperature=2.0), rng_key=KEYS)
FREE = np.full((BATCH, NEW), -1, np.int32)


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return rng.integers(0, VOCAB, (BATCH, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def text():
  """Random tokens; the last row ends at its ninth."""
  rng = np.random.default_rng(1)
  text = rng.integers(EOS + 1, VOCAB, (BATCH, NEW)).astype(np.int32)
  text[3, 8] = EOS
  return text


def drafter_of(text):
  """Drafts the text, at some places as another child or not at all."""
  rng = np.random.default_rng(2)
  rows = np.full((BATCH, 48), -1, np.int32)
  for row, length in enumerate(LENGTHS):
    rows[row, length : length + NEW] = text[row]
  wrong = rng.random(rows.shape) < 0.4
  shifts = np.where(wrong, rng.integers(-3, 3, rows.shape), 0)
  return drafters_for_tests.ReferenceDrafter(
    reference=jnp.asarray(rows),
    shifts=jnp.asarray(shifts, jnp.int32),
    vocab_size=VOCAB,
  )


def run(target, text, prompts, **kwargs):
  return speculative.generate(
    target,
    drafter_of(text),
    prompts,
    **dict(shape=SHAPE, max_new_tokens=LIMITS, lengths=LENGTHS, eos_id=EOS)
    | kwargs,
  )


def walk(drafter, log, step, row, known):
  """Accepted nodes: down the drafted tree for as long as it has the text."""
  trees = log.trees
  parents, depths, scores = (
    np.asarray(values)[step, row, : log.column("nodes")[step, row]]
    for values in (trees.parents, trees.depths, trees.scores)
  )
  at = np.maximum(known + depths - 1, 0)
  sibling = np.rint((-scores - 0.1 * depths) / 0.5).astype(int)
  drafted = np.asarray(drafter.reference + drafter.shifts)[row, at] + sibling
  node, accepted = 0, 0
  while True:
    wanted = drafter.reference[row, known + accepted]
    is_next = (depths == accepted + 1) & (parents == node)
    found = np.flatnonzero(is_next & (drafted % VOCAB == wanted))
    if not len(found):
      return accepted
    node, accepted = found[0], accepted + 1


@pytest.mark.parametrize("shape", [SHAPE, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_accepted_lengths_are_those_of_the_text(
  target, prompts, text, how, shape
):
  given = dict(shape=shape, log_trees=True, **how)
  result = run(target, text, prompts, reference=text, **given)
  counts = np.minimum(LIMITS, [NEW, NEW, NEW, 9])
  np.testing.assert_array_equal(result.num_tokens, counts)
  for row, count in enumerate(counts):
    np.testing.assert_array_equal(result.tokens[row, :count], text[row, :count])
  drafter, log = drafter_of(text), result.log
  emitted, accept_len = log.column("num_emitted"), log.column("accept_len")
  seen = []
  for row, count in enumerate(counts):
    done = 1
    for step in np.flatnonzero(emitted[:, row] > 0):
      accepted = walk(drafter, log, step, row, LENGTHS[row] + done)
      assert emitted[step, row] == min(accepted + 1, count - done)
      if accepted + 1 <= count - done:
        assert accept_len[step, row] == accepted
      done += emitted[step, row]
      seen.append(accepted)
    assert done == count
  assert set(seen) >= {0, 1, 2, 4}
  # The model writes another text; the same program says so.
  known = engine.decode._cache_size()
  free = run(target, text, prompts, reference=FREE, **given)
  own = run(target, text, prompts, **given)
  np.testing.assert_array_equal(free.tokens, own.tokens)
  assert np.mean(np.asarray(free.tokens) != text) > 0.5
  assert engine.decode._cache_size() == known + 1  # of the run without any


def test_the_own_text_changes_nothing(target, prompts):
  own = models.generate(
    target,
    prompts,
    max_new_tokens=NEW,
    lengths=LENGTHS,
    eos_id=EOS,
    **SAMPLED,
  )
  own = np.asarray(own)
  free, given = (
    run(target, own, prompts, reference=reference, log_trees=True, **SAMPLED)
    for reference in (FREE, own)
  )
  np.testing.assert_array_equal(free.num_tokens, given.num_tokens)
  for row, count in enumerate(np.asarray(free.num_tokens)):
    np.testing.assert_array_equal(free.tokens[row, :count], own[row, :count])
  np.testing.assert_array_equal(free.tokens, given.tokens)
  jax.tree.map(np.testing.assert_array_equal, free.log, given.log)
  assert speculative.summarize(free.log)["tokens_per_step"] > 1.5


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_where_the_text_ends_the_model_goes_on(target, prompts, text, how):
  given = 7
  prefix = np.where(np.arange(NEW) < given, text, -1)
  result = run(
    target,
    text,
    prompts,
    reference=prefix,
    max_new_tokens=NEW,
    eos_id=None,
    **how,
  )
  longer = np.zeros((BATCH, 9 + given), np.int32)
  for row, length in enumerate(LENGTHS):
    longer[row, :length] = prompts[row, :length]
    longer[row, length : length + given] = text[row, :given]
  expected = models.generate(
    target, longer, max_new_tokens=NEW - given, lengths=LENGTHS + given, **how
  )
  np.testing.assert_array_equal(result.tokens[:, :given], text[:, :given])
  np.testing.assert_array_equal(result.tokens[:, given:], expected)


def test_plain_steps_and_policies_that_decline_follow(target, prompts, text):
  everything = speculative.Fixed(depth=4, nodes=12)
  gated = speculative.Gated(policy=everything, step_cost=9.0, period=3)
  declines = speculative.HeteroSpec.create(
    thresholds=np.arange(7.0),
    depth=[2] * 8,
    nodes=[0] * 8,
    base_depth=2,
    width=3,
    declines=True,
  )
  for policy in (gated, declines):
    result = run(target, text, prompts, reference=text, policy=policy)
    for row, count in enumerate(np.asarray(result.num_tokens)):
      assert count == (NEW, 13, NEW, 9)[row]
      np.testing.assert_array_equal(
        result.tokens[row, :count], text[row, :count]
      )
    levels = result.log.column("draft_levels")
    assert (levels == 0).any()


@pytest.mark.parametrize(
  ("reference", "message"),
  [
    (FREE[:, 1:], "^reference must have shape.*expected new_tokens=20"),
    (FREE[0], "^reference must have shape"),
    (FREE.astype(np.float32), "^reference must have an integer dtype"),
    (FREE + VOCAB + 1, "^reference must hold tokens of the vocabulary, or -1"),
    (FREE - 1, "^reference must hold tokens of the vocabulary, or -1"),
  ],
)
def test_bad_references(target, prompts, text, reference, message):
  with pytest.raises(ValueError, match=message):
    run(target, text, prompts, reference=reference)


def test_rejection_takes_no_reference(target, prompts, text):
  sampler = models.Temperature()
  with pytest.raises(ValueError, match=r"^reference must be None where"):
    speculative.generate(
      target,
      speculative.SampledChain(model=target, sampler=sampler),
      prompts,
      max_new_tokens=NEW,
      shape=speculative.TreeShape(width=1, base_depth=3, buckets=(4,)),
      sampler=sampler,
      rng_key=KEYS,
      reference=text,
    )
