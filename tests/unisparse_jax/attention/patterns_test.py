# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import helpers
from unisparse_jax import attention
from unisparse_jax.attention import budgets

PATTERNS = {
  "dense": attention.Dense(block_q=32, block_kv=16),
  "unisparse": attention.UniSparse(
    top_p=0.7, window_q=8, window_kv=8, block_q=32, block_kv=16
  ),
  "unisparse_per_head": attention.UniSparse(
    top_p=0.6, window_q=4, window_kv=16, head_group=1, block_q=32, block_kv=16
  ),
  "unisparse_two_groups": attention.UniSparse(
    top_p=0.6, window_q=8, window_kv=8, head_group=6, block_q=32, block_kv=16
  ),
  "unisparse_top_k": attention.UniSparse(
    top_k=3, window_q=8, window_kv=8, block_q=16, block_kv=32
  ),
  "streaming": attention.Streaming(
    num_sink=20, num_local=30, block_q=32, block_kv=16
  ),
}


@functools.partial(jax.jit, static_argnames=("pattern", "causal"))
def select(pattern, q, k, *, causal=True, **where):
  """The mask, and what is read off it as booleans, in one program."""
  mask = pattern.select(q, k, causal=causal, **where)
  grid = mask.grid
  return mask, (mask.to_dense(), grid.admissible(), grid.diagonal())


def planted(seed=0, length=1024, block=64):
  """One head whose queries attend three planted key blocks, plus noise."""
  rng = np.random.default_rng(seed)
  num_blocks, dim = length // block, 32
  q = rng.standard_normal((length, dim))
  k = rng.standard_normal((length, dim))
  for i in range(num_blocks):
    for j in rng.choice(i + 1, min(3, i + 1), replace=False):
      direction = rng.standard_normal(dim)
      direction *= 5.5 / np.linalg.norm(direction)
      q[i * block : (i + 1) * block] += direction
      k[j * block : (j + 1) * block] += direction
  return tuple(jnp.asarray(x, jnp.float32)[None, :, None, :] for x in (q, k))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_invariants_of_every_mask(name, causal, chunked):
  q, k, _ = helpers.make_qkv(
    batch=2,
    q_len=100,
    kv_len=190 if chunked else 100,
    num_heads=12,
    num_kv_heads=4,
  )
  where = {}
  if chunked:
    where = dict(q_offset=jnp.asarray([90, 33]), kv_len=jnp.asarray([190, 133]))
  mask, dense = select(PATTERNS[name], q, k, causal=causal, **where)
  kept, admissible, diagonal = map(np.asarray, dense)
  admissible, diagonal = admissible[:, None], diagonal[:, None]
  assert not (kept & ~admissible).any()
  if causal:
    assert (kept | ~diagonal).all()
  if causal or name != "streaming":
    assert (kept.any(-1)).all()
  for row in np.ndindex(mask.num_kv_blocks.shape):
    live = np.asarray(mask.kv_block_indices[row])[
      : int(mask.num_kv_blocks[row])
    ]
    assert (np.diff(live) < 0).all()
  assert not mask.num_dropped.any()
  _, (again, *_) = select(PATTERNS[name], q, k, causal=causal, **where)
  np.testing.assert_array_equal(kept, again)


@pytest.mark.parametrize("causal", [True, False])
def test_everything_kept_is_dense_attention(causal):
  q, k, v = helpers.make_qkv(q_len=150)
  full = attention.UniSparse(top_p=1.0, block_q=32, block_kv=32)

  @jax.jit
  def attend(q, k, v):
    mask = full.select(q, k, causal=causal)
    out = attention.sparse_attention(q, k, v, mask)
    return out, attention.dense_attention(q, k, v, causal=causal)

  helpers.assert_same(*attend(q, k, v), 1e-6)


def test_composite_logit_is_the_mean_token_logit():
  q, k, _ = helpers.make_qkv(q_len=64, num_heads=6, num_kv_heads=2)
  pool = pallas_kernels.composite_pooling
  composites, _ = pool(q, window=8, head_group=3)
  keys, _ = pool(k, window=16)
  logits = jnp.einsum("buhd,bwhd->bhuw", composites, keys)
  token = jnp.einsum("bihgd,bjhd->bhgij", q.reshape(1, 64, 2, 3, 16), k)
  expected = token.reshape(1, 2, 3, 8, 8, 4, 16).mean((2, 4, 6))
  np.testing.assert_allclose(logits, expected, atol=2e-6)


def test_pooling_of_a_ragged_tail():
  x = jnp.arange(10, dtype=jnp.float32)[None, :, None, None]
  mean, count = pallas_kernels.composite_pooling(x, window=4, length=7)
  np.testing.assert_array_equal(mean[0, :, 0, 0], [1.5, 5.0, 0.0])
  np.testing.assert_array_equal(count[0], [4, 3, 0])


def test_block_scores_match_a_loop():
  q, k, _ = helpers.make_qkv(q_len=100, kv_len=120, num_heads=4, num_kv_heads=2)
  pattern = attention.UniSparse(
    window_q=8, window_kv=4, block_q=32, block_kv=16, head_group=2
  )
  grid = attention.BlockGrid.create(
    q, k, block_q=32, block_kv=16, q_offset=13, kv_len=110
  )
  scores = np.asarray(pattern.block_scores(q, k, grid))
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  expected = np.zeros((1, 2, 4, 8))
  for head in range(2):
    for i in range(4):
      starts = range(32 * i, min(32 * i + 32, 100), 8)
      sizes = [min(u + 8, 100) - u for u in starts]
      for u, size in zip(starts, sizes, strict=True):
        query = q[0, u : u + size, 2 * head : 2 * head + 2].mean((0, 1))
        last = 13 + u + 8 - 1 if u + 8 <= 100 else 13 + 99
        logit = np.full(30, -np.inf)
        for w in range(30):
          keys = k[0, 4 * w : min(4 * w + 4, 110), head]
          if len(keys) and 4 * w <= last:
            logit[w] = query @ keys.mean(0) / 4 + np.log(len(keys) / 4)
        p = np.exp(logit - logit.max())
        p /= p.sum()
        blocks = np.pad(p, (0, 2)).reshape(8, 4).sum(1)
        expected[0, head, i] += blocks * size / sum(sizes)
  np.testing.assert_allclose(scores, expected, atol=1e-6)
  np.testing.assert_allclose(scores.sum(-1), 1.0, atol=1e-5)


def test_strips_do_not_change_scores(monkeypatch):
  from pallas_kernels.composite_scores import xla

  q, k, _ = helpers.make_qkv(q_len=200)
  pattern = attention.UniSparse(
    window_q=8, window_kv=8, block_q=16, block_kv=16
  )
  grid = attention.BlockGrid.create(q, k, block_q=16, block_kv=16)
  whole = pattern.block_scores(q, k, grid)
  monkeypatch.setattr(xla, "_STRIP_ELEMENTS", 1)
  np.testing.assert_allclose(pattern.block_scores(q, k, grid), whole, atol=1e-6)


def test_planted_blocks_are_found():
  q, k = planted()
  pattern = attention.UniSparse(
    top_p=0.9, window_q=8, window_kv=8, block_q=64, block_kv=64
  )

  @jax.jit
  def measure(q, k):
    mask = pattern.select(q, k)
    return (
      attention.metrics.recall(q, k, mask)[0, :, 0],
      attention.metrics.density(mask)[0, 0],
      attention.metrics.block_mass(q, k, mask.grid)[0, 0, -1],
      pattern.block_scores(q, k, mask.grid)[0, 0, -1],
    )

  recall, density, mass, score = map(np.asarray, measure(q, k))
  by_row = recall.reshape(16, 64).mean(1)
  # Measured 0.902 and 0.705.
  assert float(recall.mean()) > 0.88 and float(by_row.min()) > 0.65
  assert density < 0.6
  # Ranking: blocks by score against blocks by true mass, last row.
  best, found = (set(np.argsort(-x)[:3]) for x in (mass, score))
  assert len(best & found) >= 2  # measured 2


def test_density_grows_with_top_p():
  q, k = planted()

  template, _ = budgets.split_budget(
    attention.UniSparse(top_p=0.5, block_q=64, block_kv=64)
  )

  @jax.jit
  def density(top_p):
    mask = budgets.with_budget(template, top_p).select(q, k)
    return attention.metrics.density(mask)[0, 0]

  densities = [
    float(density(jnp.float32(p))) for p in (0.3, 0.6, 0.9, 0.99, 1.0)
  ]
  assert densities == sorted(densities)
  assert densities[0] < densities[-2] and densities[-1] == 1.0


def test_top_k_counts_blocks():
  q, k, _ = helpers.make_qkv(q_len=256)
  mask, _ = select(attention.UniSparse(top_k=3, block_q=32, block_kv=32), q, k)
  np.testing.assert_array_equal(
    mask.num_kv_blocks[0, 0], [1, 2, 3, 3, 3, 3, 3, 3]
  )


def test_overflow_keeps_forced_and_best():
  q, k, _ = helpers.make_qkv(q_len=256)
  mask = attention.UniSparse(
    top_p=1.0, max_blocks=3, block_q=32, block_kv=32
  ).select(q, k)
  kept = np.asarray(mask.to_dense())[0, 0]
  assert (kept.sum(-1) == np.minimum(np.arange(8) + 1, 3)).all()
  assert kept[:, 0].all() and kept.diagonal().all()
  assert int(mask.num_dropped[0, 0]) == sum(range(1, 6))


def test_streaming_is_this_matrix():
  q, k, _ = helpers.make_qkv(q_len=96)
  mask = attention.Streaming(
    num_sink=1, num_local=16, block_q=16, block_kv=16
  ).select(q, k)
  np.testing.assert_array_equal(
    mask.to_dense()[0, 0],
    [
      [1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0],
      [1, 1, 1, 0, 0, 0],
      [1, 0, 1, 1, 0, 0],
      [1, 0, 0, 1, 1, 0],
      [1, 0, 0, 0, 1, 1],
    ],
  )


def test_a_bidirectional_window_has_two_sides():
  q, k, _ = helpers.make_qkv(q_len=80, kv_len=96)
  mask = attention.Streaming(
    num_sink=1, num_local=16, block_q=16, block_kv=16
  ).select(q, k, causal=False, kv_len=90)
  np.testing.assert_array_equal(
    mask.to_dense()[0, 0],
    [
      [1, 1, 0, 0, 0, 0],
      [1, 1, 1, 0, 0, 0],
      [1, 1, 1, 1, 0, 0],
      [1, 0, 1, 1, 1, 0],
      [1, 0, 0, 1, 1, 1],
    ],
  )


def test_select_and_attend_compile_once_a_shape():
  traces = []

  @jax.jit
  def run(q, k, v, offset):
    traces.append(1)
    mask = PATTERNS["unisparse"].select(q, k, q_offset=offset)
    return attention.sparse_attention(q, k, v, mask)

  for seed in range(3):
    q, k, v = helpers.make_qkv(q_len=64, kv_len=128, num_heads=4, seed=seed)
    run(q, k, v, jnp.int32(64 - seed))
  assert len(traces) == 1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(top_p=1.5), r"top_p must be in \(0, 1\]; got top_p=1.5"),
    (dict(top_p=0.0), r"top_p must"),
    (dict(top_p=float("nan")), r"top_p must be in \(0, 1\]; got top_p=nan"),
    (dict(window_q=24), r"window_q must divide block_q"),
    (dict(window_kv=0), r"window_kv must be an integer >= 1"),
    (dict(top_k=0), r"top_k must"),
    (dict(num_sink_blocks=-1), r"num_sink_blocks must be an integer >= 0"),
    (dict(window=8), r"setting of unisparse must be a known name"),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    attention.make_pattern("unisparse", **settings)


def test_unknown_pattern_lists_the_known():
  with pytest.raises(ValueError, match=r"pattern must.*'unisparse'"):
    attention.make_pattern("uniparse")


def test_head_group_that_splits_a_group_is_refused():
  q, k, _ = helpers.make_qkv(q_len=64, num_heads=12, num_kv_heads=4)
  with pytest.raises(ValueError, match=r"head_group must divide"):
    attention.UniSparse(head_group=5).select(q, k)
  with pytest.raises(ValueError, match=r"head_group must.*multiple of 3"):
    attention.UniSparse(head_group=2).select(q, k)
