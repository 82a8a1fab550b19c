# SPDX-License-Identifier: Apache-2.0
"""The head drafts with a cache what it computes unrolled in training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import attention, models, speculative
from unisparse_jax.speculative import (
  eagle_head,
  engine,
  head_loss,
  policy,
  tree,
)
from unisparse_jax.speculative.drafters import base, by_level, eagle

CONFIG = models.DecoderConfig(
  vocab_size=48,
  num_layers=3,
  embed_dim=32,
  mlp_dim=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_len=64,
)
DENSE = attention.DenseAttention(implementation="xla")


def make(**flags):
  target = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
  config = eagle_head.EagleHeadConfig(
    target=CONFIG, tap_layers=models.tap_layers(3), **flags
  )
  head = eagle_head.EagleHead.from_target(
    target, config=config, rngs=nnx.Rngs(1)
  )
  # Larger weights: what is attended to must show in the logits.
  graphdef, state = nnx.split(head)
  state = jax.tree.map(lambda x: x * 4.0 if x.ndim == 2 else x, state)
  return target, nnx.merge(graphdef, state)


@jax.jit
def make_taps(target, tokens):
  taps = models.tap_layers(CONFIG.num_layers)
  return target.hidden_states_and_taps(tokens, taps=taps, attention_fn=DENSE)[2]


@functools.partial(jax.jit, static_argnames="is_prefill")
def extend(drafter, target, state, given, is_prefill):
  return drafter.extend(
    target, state, given, is_prefill=is_prefill, attention_fn=DENSE
  )


@functools.partial(jax.jit, static_argnames="num_steps")
def unrolled_logits(head, tokens, taps, num_steps):
  """[num_steps, batch, seq_len, vocab] by the training code."""
  features, firsts, later, out = head.fused(taps), (), [], []
  for step in range(num_steps):
    y, k, v = head_loss.layer_step(
      head, tokens, features, firsts, later, step, DENSE
    )
    if step == 0:
      firsts = (k, v)
    else:
      later.append((k, v))
    out.append(head.logits(y))
    features = head.feedback(y)
  return jnp.stack(out)


def committed(tokens, taps, start, counts, n):
  """The protocol's view of tokens[start : start + n]."""

  def part(x, offset):
    index = jnp.clip(
      start[:, None] + offset + jnp.arange(n)[None, :], 0, x.shape[1] - 1
    )
    return jax.vmap(lambda row, i: row[i])(x, index)

  return base.Committed(
    tokens=part(tokens, 0),
    next_tokens=part(tokens, 1),
    start=start,
    counts=counts,
    taps=part(taps, 0),
  )


def test_drafting_equals_the_training_unroll():
  num_steps = 3
  target, head = make(norm_before_fusion=True, feed_back_normed=True)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 48, (2, 24)), jnp.int32)
  taps = make_taps(target, tokens)
  expected = unrolled_logits(head, tokens, taps, num_steps)

  # Prompts of 7 and 9 tokens, then 3 and 2 accepted ones (of 4 slots).
  drafter = eagle.Eagle(head=head)
  prompt, extra = jnp.array([7, 9]), jnp.array([3, 2])
  state = drafter.init(target, batch=2, capacity=24)
  state = extend(
    drafter,
    target,
    state,
    committed(tokens, taps, jnp.zeros(2, jnp.int32), prompt, 9),
    True,
  )
  state = extend(
    drafter, target, state, committed(tokens, taps, prompt, extra, 4), False
  )
  done = prompt + extra
  np.testing.assert_array_equal(state.lengths, done)
  unchanged = extend(
    drafter,
    target,
    state,
    committed(tokens, taps, done, jnp.zeros(2, jnp.int32), 4),
    False,
  )
  for old, new in zip(
    jax.tree.leaves(state), jax.tree.leaves(unchanged), strict=True
  ):
    np.testing.assert_array_equal(old, new)

  # Follow the written tokens as the only path of a width-2 tree.
  shape = tree.TreeShape(width=2, base_depth=num_steps, buckets=(1, 8))
  context = base.Context(
    tokens=tokens,
    lengths=done + 1,
    active=jnp.ones(2, bool),
    step=jnp.int32(0),
  )
  rows = jnp.arange(2)
  wanted, _ = base.top_children(expected[0][rows, done - 1], 2)
  got, _, scratch = drafter.start(target, state, context, shape)
  np.testing.assert_array_equal(got, wanted)
  slots = shape.num_slots
  grow = jax.jit(lambda *a: drafter.grow(target, state, *a, shape))
  for step in range(1, num_steps):
    level = jnp.int32(step)
    chain = (jnp.arange(slots) < step * 2) & (jnp.arange(slots) % 2 == 0)
    frontier = _frontier(tokens, done, step, level, chain)
    got, log_probs, scratch = grow(scratch, frontier)
    wanted_logits = expected[step][rows, done - 1]
    wanted, wanted_log_probs = base.top_children(wanted_logits, 2)
    np.testing.assert_array_equal(got[:, 0], wanted)
    np.testing.assert_allclose(log_probs[:, 0], wanted_log_probs, atol=2e-5)


def _frontier(tokens, done, step, level, chain):
  token = jnp.take_along_axis(tokens, (done + step)[:, None], axis=1)
  zeros = jnp.zeros((2, 2), jnp.float32)
  return by_level.Frontier(
    tokens=jnp.concatenate([token, token], axis=1),
    scores=zeros,
    log_prob=zeros,
    entropy=zeros,
    last_log_prob=zeros,
    pool_index=jnp.zeros((2, 2), jnp.int32),
    parent_slot=jnp.zeros((2, 2), jnp.int32),
    visible=jnp.broadcast_to(chain, (2, 2, chain.shape[0])),
    positions=done + step,
    level=level,
  )


def test_a_shifted_position_would_show():
  target, head = make()
  tokens = jnp.asarray(np.arange(20)[None] % 48, jnp.int32)
  taps = make_taps(target, tokens)
  expected = unrolled_logits(head, tokens, taps, 1)
  drafter = eagle.Eagle(head=head)
  state = drafter.init(target, batch=1, capacity=20)
  given = committed(tokens, taps, jnp.zeros(1, jnp.int32), jnp.array([8]), 8)
  for wrong in (
    dataclasses.replace(given, next_tokens=given.tokens),
    dataclasses.replace(given, counts=jnp.array([7])),
  ):
    state_wrong = extend(drafter, target, state, wrong, True)
    difference = head.logits(state_wrong.out)[0] - expected[0, 0, 7]
    assert float(jnp.abs(difference).max()) > 1e-2


def test_drafts_by_level_under_jit():
  target, head = make()
  drafter = eagle.Eagle(head=head)
  shape = tree.TreeShape(width=3, base_depth=2, max_depth=3, buckets=(1, 8))
  drafter.check(target, shape)
  tokens = jnp.asarray(np.arange(16)[None] % 48, jnp.int32)
  taps = make_taps(target, tokens)
  state = extend(
    drafter,
    target,
    drafter.init(target, batch=1, capacity=32),
    committed(tokens, taps, jnp.zeros(1, jnp.int32), jnp.array([10]), 12),
    True,
  )
  context = base.Context(
    tokens=tokens,
    lengths=jnp.array([11]),
    active=jnp.ones(1, bool),
    step=jnp.int32(0),
  )

  @jax.jit
  def draft(drafter, state, fixed):
    return drafter.draft(
      target, state, context, shape=shape, policy=fixed, policy_state=()
    )

  made = draft(drafter, state, policy.Fixed(depth=3, nodes=7))
  assert int(made.levels) == 3
  built = tree.build(context.root_tokens, made.pool, max_nodes=8, max_depth=3)
  assert bool(built.valid.all())
  assert float(made.entropy[0]) > 0


def test_names_what_does_not_fit():
  target, head = make()
  drafter = eagle.Eagle(head=head)
  with pytest.raises(ValueError, match="width must be at most the draft"):
    drafter.check(target, tree.TreeShape(width=49, buckets=(1, 8)))
  other = models.Decoder(
    dataclasses.replace(CONFIG, embed_dim=16), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="drafter must be made for a target"):
    drafter.check(other, tree.TreeShape(buckets=(1, 8)))
  with pytest.raises(ValueError, match="tap_layers must be layers"):
    eagle_head.EagleHeadConfig(target=CONFIG, tap_layers=(0, 1, 4))


def test_settings_by_layer_are_the_targets_alone():
  target, head = make()
  windows = attention.SparseAttention(
    pattern=attention.Streaming(num_sink=8, num_local=8, block_q=8, block_kv=8)
  )
  layered = attention.LayeredAttention(layers=(DENSE, windows, DENSE))
  tokens = np.random.default_rng(0).integers(0, 48, (1, 24))
  plain = models.generate(
    target, tokens, max_new_tokens=8, attention_fn=layered
  )
  result = speculative.generate(
    target, eagle.Eagle(head=head), tokens, max_new_tokens=8,
    shape=tree.TreeShape(width=2, base_depth=2, buckets=(1, 4)),
    attention_fn=layered,
  )  # fmt: skip
  np.testing.assert_array_equal(result.tokens, plain)
  with pytest.raises(ValueError, match="layers must be one attention for each"):
    speculative.generate(
      target, eagle.Eagle(head=head), tokens, max_new_tokens=8,
      attention_fn=attention.LayeredAttention(layers=(DENSE,)),
    )  # fmt: skip


def test_a_table_without_nodes_drafts_nothing():
  target, head = make()
  tokens = np.random.default_rng(1).integers(0, 48, (2, 9))
  plain = models.generate(target, tokens, max_new_tokens=20)
  table = policy.HeteroSpec.create(
    thresholds=np.full(7, np.inf), depth=[2] * 8, nodes=[0] * 8,
    base_depth=2, width=2, declines=True,
  )  # fmt: skip

  def generate():
    return speculative.generate(
      target, eagle.Eagle(head=head), tokens, max_new_tokens=20,
      shape=tree.TreeShape(width=2, base_depth=2, buckets=(1, 4)),
      policy=table,
    )  # fmt: skip

  result = generate()
  np.testing.assert_array_equal(result.tokens, plain)
  programs = engine.decode._cache_size()
  generate()
  assert engine.decode._cache_size() == programs
  assert int(result.log.num_steps) == 19
  assert not np.any(result.log.column("draft_levels"))
  with pytest.raises(ValueError, match="declines must be False for a table"):
    policy.HeteroSpec.create(
      thresholds=np.full(7, np.inf), depth=[2] * 8, nodes=[1] * 8,
      base_depth=2, width=2, declines=True,
    )  # fmt: skip
