# SPDX-License-Identifier: Apache-2.0
"""Speculative output is that of plain decoding, whatever is drafted."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.unisparse_jax.speculative import drafters_for_tests
from unisparse_jax import models, speculative
from unisparse_jax.speculative import engine
from unisparse_jax.speculative.drafters import base

VOCAB, NEW, BATCH, EOS = 24, 20, 4, (10, 11)
# Where sizes do not matter, one compiles a third as long as three.
ONE_SIZE = speculative.TreeShape(
  width=3, base_depth=2, max_depth=4, buckets=(13,)
)
SHAPE = speculative.TreeShape(
  width=3, base_depth=2, max_depth=4, buckets=(1, 6, 13)
)
LENGTHS = np.asarray([9, 1, 6, 4], np.int32)
DEEP = dict(depth=[4] * 8, nodes=[12] * 8)


def hetero(
  depth, nodes, thresholds=(0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5), width=3
):
  """A policy whose numbers are data: all tests share one compiled loop."""
  return speculative.HeteroSpec.create(
    thresholds=thresholds,
    depth=depth,
    nodes=nodes,
    base_depth=2,
    width=width,
  )


def absolute(prompts, lengths, out):
  """Prompt and output of each row by absolute position."""
  rows = np.zeros((len(prompts), 48), np.int32)
  for row, length in enumerate(lengths):
    known = [*np.asarray(prompts[row, :length]), *np.asarray(out[row])]
    rows[row, : len(known)] = known
  return rows


@pytest.fixture(scope="module")
def prompts():
  return np.asarray(
    jax.random.randint(jax.random.key(0), (BATCH, 9), 0, VOCAB), np.int32
  )


@pytest.fixture(scope="module")
def plain(target, prompts):
  out = models.generate(
    target, prompts, max_new_tokens=NEW, lengths=LENGTHS, eos_id=EOS
  )
  return np.asarray(out)


@pytest.fixture(scope="module")
def make_drafter(prompts, plain):
  """A drafter that is off by `shifts` [batch, 48], or a number."""

  def make(shifts):
    reference = absolute(prompts, LENGTHS, plain)
    shifts = np.broadcast_to(np.asarray(shifts, np.int32), reference.shape)
    return drafters_for_tests.ReferenceDrafter(
      reference=jnp.asarray(reference),
      shifts=jnp.asarray(shifts),
      vocab_size=VOCAB,
    )

  return make


@pytest.fixture(scope="module")
def mixed(make_drafter):
  """Right three times in four, at random places; else by a sibling or not."""
  rng = np.random.default_rng(0)
  wrong = rng.random((BATCH, 48)) < 0.25
  return make_drafter(np.where(wrong, rng.integers(1, VOCAB, wrong.shape), 0))


def run(target, drafter, prompts, *, policy=None, lengths=LENGTHS, **kwargs):
  policy = hetero(**DEEP) if policy is None else policy
  kwargs = dict(max_new_tokens=NEW, eos_id=EOS, shape=SHAPE) | kwargs
  return speculative.generate(
    target, drafter, prompts, policy=policy, lengths=lengths, **kwargs
  )


def num_valid(plain):
  """Tokens up to and with the first EOS of every row."""
  is_end = np.isin(plain, EOS)
  return np.where(is_end.any(axis=1), np.argmax(is_end, axis=1) + 1, NEW)


def test_the_setup_has_rows_that_end_early(plain):
  counts = num_valid(plain)
  assert counts.tolist() == [20, 10, 20, 7]


def test_perfect_drafter(target, prompts, plain, make_drafter):
  result = run(target, make_drafter(0), prompts)
  np.testing.assert_array_equal(result.tokens, plain)
  counts = num_valid(plain)
  np.testing.assert_array_equal(result.num_tokens, counts)
  # Every call gives max_depth + 1 tokens, but the last one of a row.
  emitted = result.log.column("num_emitted")
  for row, count in enumerate(counts):
    calls = emitted[:, row][emitted[:, row] > 0]
    assert (calls[:-1] == SHAPE.max_depth + 1).all()
    assert calls.sum() == count - 1 and len(calls) == -(-(count - 1) // 5)
  accept = result.log.column("accept_len")
  full = emitted == SHAPE.max_depth + 1
  assert (accept[full] == SHAPE.max_depth).all()


def test_drafter_that_is_always_wrong(target, prompts, plain, make_drafter):
  result = run(target, make_drafter(5), prompts)
  np.testing.assert_array_equal(result.tokens, plain)
  summary = speculative.summarize(result.log)
  assert summary["tokens_per_step"] == 1.0 and summary["accept_len"] == 0.0
  assert summary["terminal_rank"] == [summary["calls"]]


@pytest.mark.parametrize("seed", range(4))
def test_any_table_gives_the_same_output(target, prompts, plain, mixed, seed):
  rng = np.random.default_rng(seed)
  policy = hetero(rng.integers(1, 5, 8), rng.integers(0, 13, 8))
  result = run(target, mixed, prompts, policy=policy)
  np.testing.assert_array_equal(result.tokens, plain)
  np.testing.assert_array_equal(result.num_tokens, num_valid(plain))
  # Tables that differ lead to sizes that differ: bucket 1, 6 and 13 all ran.
  nodes = result.log.column("nodes")
  assert len(np.unique(nodes[nodes > 0])) > 2


def test_no_draft_is_plain_decoding(target, prompts, plain, mixed):
  result = run(
    target, mixed, prompts, policy=hetero(depth=[1] * 8, nodes=[0] * 8)
  )
  np.testing.assert_array_equal(result.tokens, plain)
  summary = speculative.summarize(result.log)
  assert summary["buckets"] == {1: summary["calls"]}
  assert summary["tokens_per_step"] == 1.0


def test_accounting(target, prompts, mixed):
  result = run(target, mixed, prompts)
  column = result.log.column
  took = column("num_emitted") > 0
  kept = np.minimum(column("accept_len") + 1, column("num_emitted"))[took]
  np.testing.assert_array_equal(kept, column("num_emitted")[took])
  last = took & ~np.roll(took, -1, axis=0)
  last[-1] = took[-1]
  uncut = took & ~last
  np.testing.assert_array_equal(
    column("accept_len")[uncut] + 1, column("num_emitted")[uncut]
  )
  summary = speculative.summarize(result.log)
  # One more token a row came from the prompt.
  assert summary["tokens"] == int(result.num_tokens.sum()) - BATCH
  assert 1.0 <= summary["tokens_per_step"] <= SHAPE.max_depth + 1
  assert summary["accept_len"] > 0.5  # the drafter is right most of the time
  assert sum(summary["terminal_rank"]) == summary["calls"]


def test_limits_of_each_row(target, prompts, plain, mixed):
  limits = np.asarray([NEW, 1, 7, 3])
  result = run(target, mixed, prompts, max_new_tokens=limits)
  expected = np.minimum(limits, num_valid(plain))
  np.testing.assert_array_equal(result.num_tokens, expected)
  for row, count in enumerate(expected):
    np.testing.assert_array_equal(
      result.tokens[row, :count], plain[row, :count]
    )
    assert (result.tokens[row, count:] == EOS[0]).all()


def test_permuting_rows_permutes_the_output(target, prompts, plain, mixed):
  order = np.asarray([2, 0, 3, 1])
  drafter = dataclasses.replace(
    mixed, reference=mixed.reference[order], shifts=mixed.shifts[order]
  )
  result = run(target, drafter, prompts[order], lengths=LENGTHS[order])
  np.testing.assert_array_equal(result.tokens, plain[order])


def test_chunks_stream_the_same_tokens(target, prompts, plain, mixed):
  session = speculative.prepare(
    target,
    mixed,
    prompts,
    max_new_tokens=NEW,
    eos_id=EOS,
    shape=SHAPE,
    policy=hetero(**DEEP),
    lengths=LENGTHS,
  )
  counts = []
  for chunk in session.chunks(2):
    rows = chunk.new_tokens()
    counts.append(sum(map(len, rows)))
    for row, tokens in enumerate(rows):
      np.testing.assert_array_equal(tokens, plain[row, : len(tokens)])
  assert len(counts) > 3 and counts == sorted(counts)
  np.testing.assert_array_equal(session.result().tokens, plain)


def test_stop_text(target, prompts, plain, mixed):
  row, at = 0, 5
  assert num_valid(plain)[row] > at + 2
  text = "".join(f"<{token}>" for token in plain[row, at : at + 2])
  result = run(
    target,
    mixed,
    prompts,
    stop=(text,),
    detokenize=lambda tokens: "".join(f"<{token}>" for token in tokens),
    steps_per_chunk=3,
  )
  count = int(result.num_tokens[row])
  assert count == at + 2  # the text is not there before
  np.testing.assert_array_equal(result.tokens[row, :count], plain[row, :count])
  assert (result.tokens[row, count:] == EOS[0]).all()


def test_junk_in_the_cache_is_never_read(target, prompts, plain, mixed):
  session = speculative.prepare(
    target,
    mixed,
    prompts,
    max_new_tokens=NEW,
    eos_id=EOS,
    shape=SHAPE,
    policy=hetero(**DEEP),
    lengths=LENGTHS,
  )
  cache = session.state.cache
  slot = np.arange(cache.capacity)[None, None, :, None]
  junk = slot >= np.asarray(cache.lengths)[:, None, None, None]

  def poison(buffers, value):
    return tuple(jnp.where(junk, jnp.float32(value), x) for x in buffers)

  # A value of NaN would survive a weight of zero; a huge one shows the same.
  session.state = dataclasses.replace(
    session.state,
    cache=models.TreeCache(
      k=poison(cache.k, np.nan), v=poison(cache.v, 1e30), lengths=cache.lengths
    ),
  )
  np.testing.assert_array_equal(session.run().result().tokens, plain)


def test_cache_equals_that_of_a_fresh_prefill(target, prompts, plain, mixed):
  session = speculative.prepare(
    target,
    mixed,
    prompts,
    max_new_tokens=NEW,
    eos_id=EOS,
    shape=SHAPE,
    policy=hetero(**DEEP),
    lengths=LENGTHS,
  ).run(3)
  cache = session.state.cache.to_cache()
  known = np.asarray(session.state.lengths)
  np.testing.assert_array_equal(cache.lengths, known - 1)
  # The drafter was told about every token of the cache, once.
  np.testing.assert_array_equal(session.state.drafter_state[0], known - 1)
  tokens = absolute(prompts, LENGTHS, plain)[:, : known.max() - 1]
  _, fresh = models.prefill(target, tokens, lengths=known - 1)
  for layer in range(target.config.num_layers):
    for row, length in enumerate(known - 1):
      for ours, theirs in ((cache.k, fresh.k), (cache.v, fresh.v)):
        np.testing.assert_allclose(
          ours[layer][row, :length], theirs[layer][row, :length], atol=1e-4
        )


def test_other_tables_drafts_and_limits_compile_nothing(
  target, prompts, mixed, make_drafter
):
  run(target, mixed, prompts)
  known = engine.decode._cache_size()
  for seed in range(2):
    rng = np.random.default_rng(seed)
    policy = hetero(rng.integers(1, 5, 8), rng.integers(0, 13, 8))
    run(target, mixed, prompts, policy=policy)
  run(target, make_drafter(5), prompts)
  run(target, mixed, prompts, max_new_tokens=np.asarray([3, NEW, 5, 1]))
  assert engine.decode._cache_size() == known


def test_rows_equal_their_own_batch_of_one(target, prompts, plain, mixed):
  for row in (0, 1):
    drafter = dataclasses.replace(
      mixed,
      reference=mixed.reference[row : row + 1],
      shifts=mixed.shifts[row : row + 1],
    )
    one = run(
      target,
      drafter,
      prompts[row : row + 1],
      lengths=LENGTHS[row : row + 1],
      shape=ONE_SIZE,
    )
    np.testing.assert_array_equal(one.tokens[0], plain[row])


def test_sampled_output_is_that_of_plain_sampling(
  target, prompts, make_drafter
):
  sampler = models.TopP(top_p=0.9, temperature=1.5)
  key = jax.random.key(7)
  expected = models.generate(
    target,
    prompts,
    max_new_tokens=NEW,
    lengths=LENGTHS,
    sampler=sampler,
    rng_key=key,
  )
  assert len(np.unique(expected)) > 10  # it does sample
  rng = np.random.default_rng(1)
  right = make_drafter(0)
  reference = jnp.asarray(absolute(prompts, LENGTHS, expected))
  for shifts in (np.zeros(1), rng.integers(0, 3, (BATCH, 48)), np.full(1, 5)):
    drafter = dataclasses.replace(
      right,
      reference=reference,
      shifts=jnp.broadcast_to(jnp.asarray(shifts, jnp.int32), (BATCH, 48)),
    )
    result = run(
      target,
      drafter,
      prompts,
      sampler=sampler,
      rng_key=key,
      eos_id=None,
      log_trees=True,
      shape=ONE_SIZE,
    )
    np.testing.assert_array_equal(result.tokens, expected)
  # A row's own key is what one key stands for.
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(BATCH))
  result = run(
    target,
    drafter,
    prompts,
    sampler=sampler,
    rng_key=keys,
    eos_id=None,
    log_trees=True,
    shape=ONE_SIZE,
  )
  np.testing.assert_array_equal(result.tokens, expected)
  check_tree_log(result.log)


def check_tree_log(log):
  trees, steps = log.trees, int(log.num_steps)
  accept, took = log.column("accept_len"), log.column("num_emitted") > 0
  path = np.asarray(trees.path)[:steps]
  np.testing.assert_array_equal((path >= 0).sum(-1)[took], accept[took] + 1)
  assert (path[~took] == -1).all()
  for step, row in np.argwhere(took):
    nodes = path[step, row, : accept[step, row] + 1].astype(int)
    parents = np.asarray(trees.parents)[step, row]
    depths = np.asarray(trees.depths)[step, row]
    np.testing.assert_array_equal(parents[nodes[1:]], nodes[:-1])
    np.testing.assert_array_equal(depths[nodes], np.arange(len(nodes)))
    assert nodes[-1] == log.column("terminal_rank")[step, row]


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="older compilers copy the cache"
)
@pytest.mark.optimised
def test_no_step_copies_a_cache(target, prompts):
  session = speculative.prepare(
    target,
    speculative.SmallDecoder(model=target),
    prompts[:1],
    max_new_tokens=NEW,
    shape=speculative.TreeShape(width=2, base_depth=1, buckets=(1, 3)),
    capacity=50,
  )
  compiled = engine.decode.lower(
    session.target,
    session.drafter,
    session.policy,
    session.state,
    jnp.int32(1),
    settings=session.settings,
  ).compile()
  # Buffers are [1, 2, 50, 8]; a copy of one would be an instruction like
  # "%copy.7 = f32[1,2,50,8]{3,2,1,0} copy(%x)".
  text = compiled.as_text()
  assert "f32[1,2,50,8]" in text
  copies = [
    line
    for line in text.splitlines()
    if re.search(r"= f32\[1,2,50,8\]\S* (copy|transpose)\(", line)
  ]
  assert not copies
  # All of the state but a few scalars is updated where it lies.
  memory = compiled.memory_analysis()
  state = sum(x.nbytes for x in jax.tree.leaves(session.state))
  assert memory.alias_size_in_bytes > 0.9 * state


def test_a_prompt_in_chunks(target, prompts, mixed):
  whole = speculative.prepare(
    target, mixed, prompts, max_new_tokens=NEW, lengths=LENGTHS, shape=SHAPE
  )
  parts = speculative.prepare(
    target,
    mixed,
    prompts,
    max_new_tokens=NEW,
    lengths=LENGTHS,
    shape=SHAPE,
    chunk=4,
  )
  np.testing.assert_array_equal(parts.state.tokens, whole.state.tokens)
  for ours, theirs in zip(
    parts.state.cache.to_cache().k, whole.state.cache.to_cache().k, strict=True
  ):
    for row, length in enumerate(LENGTHS):
      np.testing.assert_allclose(
        ours[row, :length], theirs[row, :length], atol=1e-5
      )


def test_bfloat16_differs_near_ties_only(target, prompts):
  low = models.Decoder(target.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  nnx.update(low, nnx.state(target))
  plain = np.asarray(
    models.generate(low, prompts, max_new_tokens=NEW, lengths=LENGTHS)
  )
  drafter = drafters_for_tests.ReferenceDrafter(
    reference=jnp.asarray(absolute(prompts, LENGTHS, plain)),
    shifts=jnp.zeros((BATCH, 48), jnp.int32),
    vocab_size=VOCAB,
  )
  result = run(low, drafter, prompts, eos_id=None, shape=ONE_SIZE)

  def mismatches(found):
    return speculative.first_mismatches(
      low, prompts, plain, found, lengths=LENGTHS
    )

  # The logits reach 2; one unit in the last place of bfloat16 is 0.008 there.
  assert all(m.gap < 0.05 for m in mismatches(result.tokens))
  # A real error is seen: the third token of a row is another one.
  wrong = plain.copy()
  wrong[1, 2:] = (wrong[1, 2:] + 1) % VOCAB
  (seen,) = mismatches(wrong)
  logits, _ = models.prefill(
    low, np.asarray([[*prompts[1, :1], *plain[1, :2]]])
  )
  expected = abs(logits[0, plain[1, 2]] - logits[0, wrong[1, 2]])
  assert (seen.row, seen.index) == (1, 2) and seen.gap > 0.05
  np.testing.assert_allclose(seen.gap, expected, atol=0.02)


def test_packed_rows_share_a_budget(target, prompts, plain, mixed):
  shape = dataclasses.replace(SHAPE, packed=(10, 24))
  result = run(target, mixed, prompts, shape=shape)
  np.testing.assert_array_equal(result.tokens, plain)
  asked = np.maximum(result.log.column("nodes"), 0).sum(axis=1)
  assert asked.max() <= 24 < BATCH * 13
  took = result.log.column("num_emitted") > 0
  assert (result.log.column("nodes")[took] >= 1).all()
  summary = speculative.summarize(result.log)
  assert summary["tokens_per_step"] > 1.5


def test_small_decoder_adapts_its_depth(target, other_model, prompts):
  shape = dataclasses.replace(SHAPE, max_depth=3, buckets=(13,))
  expected = models.generate(
    target, prompts, max_new_tokens=NEW, lengths=LENGTHS
  )
  policy = hetero([3, 3, 2, 2, 2, 2, 2, 1], [4, 12, 9, 9, 9, 6, 3, 0])
  seen = {}
  for name, model in (("same", target), ("other", other_model)):
    session = speculative.prepare(
      target,
      speculative.SmallDecoder(model=model),
      prompts,
      max_new_tokens=NEW,
      shape=shape,
      policy=dataclasses.replace(
        policy, thresholds=jnp.linspace(2.05, 2.19, 7).astype(jnp.float32)
      ),
      lengths=LENGTHS,
    ).run(2)
    known = np.asarray(session.state.lengths)
    tokens = absolute(prompts, LENGTHS, expected)[:, : known.max()]
    logits, _ = models.prefill(model, tokens, lengths=known)
    # The drafter knows the root too; its state is that of a fresh prefill.
    ours = session.state.drafter_state
    np.testing.assert_array_equal(ours.cache.lengths, known)
    np.testing.assert_allclose(ours.logits, logits, atol=1e-3)
    result = session.run().result()
    np.testing.assert_array_equal(result.tokens, expected)
    seen[name] = speculative.summarize(result.log)
  assert seen["same"]["tokens_per_step"] > seen["other"]["tokens_per_step"]
  assert len(seen["same"]["bins"]) > 1
  assert len(np.unique(session.state.log.column("draft_levels"))) > 1


def test_oracle_accepts_as_much_with_fewer_nodes(target, prompts, plain, mixed):
  oracle = speculative.Oracle.create(plain, LENGTHS, SHAPE)
  result = run(target, mixed, prompts, policy=oracle, shape=ONE_SIZE)
  np.testing.assert_array_equal(result.tokens, plain)
  best = speculative.summarize(result.log)
  full = speculative.summarize(run(target, mixed, prompts).log)
  assert best["tokens_per_step"] >= 0.9 * full["tokens_per_step"]
  assert best["verified"] < 0.6 * full["verified"]
  took = result.log.column("num_emitted") > 0
  spare = result.log.column("nodes") - 1 - result.log.column("terminal_rank")
  # None to spare, but where the reference goes on behind the end of a row.
  assert (spare[took] >= 0).all() and (spare[took] == 0).mean() > 0.9


@pytest.mark.parametrize("period", [4, 11])  # less than a block, and more
def test_gate_stops_a_drafter_that_does_not_pay(target, prompts, mixed, period):
  expected = models.generate(
    target, prompts, max_new_tokens=NEW, lengths=LENGTHS
  )
  # Right at first, then never again: every later draft is a probe.
  late = np.arange(48)[None, :] > LENGTHS[:, None] + 6
  drafter = dataclasses.replace(
    mixed,
    reference=jnp.asarray(absolute(prompts, LENGTHS, expected)),
    shifts=jnp.asarray(np.where(late, 5, 0), jnp.int32),
    needs_taps=True,
  )
  session = speculative.prepare(
    target,
    drafter,
    prompts,
    max_new_tokens=NEW,
    lengths=LENGTHS,
    policy=speculative.Gated(
      policy=speculative.Fixed(depth=4, nodes=12),
      step_cost=5.0,
      period=period,
      patience=0.5,
      most=1.0,
      decay=0.5,
    ),
    shape=ONE_SIZE,
    log_trees=True,
  )
  session.run(5).run(4)  # Both end amid a stretch.
  counts, taps = jax.tree.map(np.asarray, session.state.drafter_state)
  heard = np.asarray(session.state.lengths) - 1
  session.run()
  result = session.result()
  np.testing.assert_array_equal(result.tokens, expected)
  levels = np.max(result.log.column("draft_levels"), axis=1)
  assert levels[0] == 4 and (levels == 0).sum() >= period
  # A plain step adds a token to every row that is not done, and its tree is the
  # root.
  emitted = result.log.column("num_emitted")
  known = LENGTHS + np.cumsum(np.maximum(emitted, 0), axis=0)
  running = known - np.maximum(emitted, 0) < LENGTHS + NEW
  plain = levels == 0
  np.testing.assert_array_equal(emitted[plain], np.where(running, 1, -1)[plain])
  trees = jax.tree.map(
    lambda x: np.asarray(x)[: len(plain)][plain], result.log.trees
  )
  assert (trees.depths == np.where(np.arange(13) == 0, 0, -1)).all()
  assert (trees.path[..., 1:] == -1).all() and (trees.parents == 0).all()
  np.testing.assert_array_equal(trees.path[..., 0], running[plain] - 1)
  assert speculative.summarize(result.log)["buckets"].keys() == {1, 13}
  # Prompt, drafted and plain steps: the drafter had got every position's taps.
  assert (levels[:9] == 0).sum() >= 2
  np.testing.assert_array_equal(counts, heard)
  tokens = absolute(prompts, LENGTHS, expected)[:, : heard.max()]
  taps_of = jax.jit(
    models.Decoder.hidden_states_and_taps, static_argnames="taps"
  )
  _, _, fresh = taps_of(
    target, tokens, taps=models.tap_layers(target.config.num_layers)
  )
  for row, length in enumerate(heard):
    np.testing.assert_allclose(
      taps[row, :length], fresh[row, :length], atol=1e-4
    )


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(capacity=30), "^capacity must hold the prompt, the new tokens and w"),
    (dict(max_new_tokens=60), "^tokens and max_new_tokens must hold at most"),
    (dict(max_new_tokens=[1, 2]), "^max_new_tokens must be an integer >= 1"),
    (dict(max_new_tokens=0), "^max_new_tokens must be an integer >= 1"),
    (
      dict(shape=speculative.TreeShape(width=25, base_depth=2)),
      "^width must be at most the vocabulary",
    ),
    (
      dict(shape=dataclasses.replace(SHAPE, packed=(3,))),
      "^packed must leave room for the root of every row",
    ),
    (dict(sampler=models.Temperature()), "^rng_key must be given"),
    (
      dict(
        sampler=models.Temperature(),
        rng_key=jax.random.split(jax.random.key(0), 3),
      ),
      "^rng_key must be a key, or one for each row",
    ),
    (dict(stop=("a",)), "^detokenize must be given with stop"),
    (dict(steps_per_chunk=0), "^steps_per_chunk must be an integer >= 1"),
    (dict(eos_id=99), "^eos_id must be a token"),
    (
      dict(policy=speculative.Fixed(depth=5, nodes=3)),
      "^depth must be at most max_depth",
    ),
    (
      dict(policy=speculative.Fixed(depth=4, nodes=13)),
      "^nodes must fit in the largest bucket",
    ),
  ],
)
def test_bad_arguments(target, prompts, mixed, kwargs, message):
  with pytest.raises(ValueError, match=message):
    run(target, mixed, prompts, **kwargs)


def test_policy_of_another_drafter(target, other_model, prompts):
  drafter = speculative.SmallDecoder(model=other_model)
  policy = dataclasses.replace(
    hetero(**DEEP),
    drafter_hash=base.fingerprint(speculative.SmallDecoder(model=target)),
  )
  with pytest.raises(ValueError, match=r"^policy must be fitted for this"):
    run(target, drafter, prompts, policy=policy)
  again = speculative.SmallDecoder(model=target)
  assert base.fingerprint(again) == policy.drafter_hash


def test_drafter_of_another_vocabulary(target, prompts):
  config = dataclasses.replace(target.config, vocab_size=25)
  drafter = speculative.SmallDecoder(
    model=models.Decoder(config, rngs=nnx.Rngs(0))
  )
  with pytest.raises(ValueError, match=r"^drafter vocab_size must serve"):
    run(target, drafter, prompts)


@pytest.mark.parametrize(("depth", "drafted"), [(2, 2), (3, 4), (4, 4), (5, 5)])
def test_blocks_of_levels_give_the_same_trees(
  target, prompts, plain, depth, drafted
):
  """What is drafted past the depth asked for is in no tree with room for it.

  Three levels of two children each are 10 candidates for 12 nodes.
  """
  policy = hetero(depth=[depth] * 8, nodes=[12] * 8, width=2)
  shape = dataclasses.replace(ONE_SIZE, width=2, max_depth=5)
  one, two = (
    run(
      target,
      speculative.SmallDecoder(model=target),
      prompts,
      policy=policy,
      shape=dataclasses.replace(shape, level_block=block),
      log_trees=True,
    )
    for block in (1, 2)
  )
  np.testing.assert_array_equal(one.tokens, plain)
  np.testing.assert_array_equal(two.tokens, plain)
  for name in ("num_emitted", "nodes", "depth"):
    np.testing.assert_array_equal(one.log.column(name), two.log.column(name))
  jax.tree.map(np.testing.assert_array_equal, one.log.trees, two.log.trees)
  for result, levels in ((one, depth), (two, drafted)):
    column = result.log.column("draft_levels")[: int(result.log.num_steps)]
    assert set(np.asarray(column).max(axis=-1)) == {levels}
