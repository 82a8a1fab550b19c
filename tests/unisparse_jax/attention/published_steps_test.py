# SPDX-License-Identifier: Apache-2.0
"""Every method against its published steps in NumPy: the same blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.attention import numpy_patterns
from unisparse_jax import attention

HEADS, KV_HEADS, DIM, Q_LEN, CAPACITY = 4, 2, 16, 100, 190
# A chunk that ends its row, one that does not, a row of padding at its end.
OFFSETS, KV_LENS = (90, 31, 0), (190, 190, 57)
BLOCKS = dict(block_q=32, block_kv=16)
WIDE_KEYS = dict(block_q=16, block_kv=32)
MINFERENCE = dict(
  num_last=8, min_columns=3, min_slashes=4, num_near_slashes=5, **WIDE_KEYS
)
CASES = {
  "sample_attention": dict(
    top_p=0.5,
    slash_top_p=0.3,
    num_chunks=3,
    sample_rows=10,
    widen_slashes=False,
    **BLOCKS,
  ),
  "sample_attention wide": dict(
    top_p=(0.3, 0.5, 0.7, 0.1),
    slash_top_p=None,
    num_chunks=2,
    sample_rows=40,
    widen_slashes=True,
    **WIDE_KEYS,
  ),
  "sample_attention_v1": dict(
    top_p=0.6, sample_share=0.07, window_share=0.12, **BLOCKS
  ),
  "sample_attention_v1 wide": dict(
    top_p=(0.3, 0.5, 0.7, 0.9),
    sample_share=0.5,
    window_share=0.01,
    **WIDE_KEYS,
  ),
  "xattention": dict(top_p=0.5, stride=4, **BLOCKS),
  "xattention wide": dict(top_p=(0.3, 0.5, 0.7, 0.9), stride=8, **WIDE_KEYS),
  "flexprefill": dict(top_p=0.6, max_divergence=0.15, min_budget=10, **BLOCKS),
  "flexprefill wide": dict(
    top_p=(0.2, 0.5, 0.8, 1.0), max_divergence=0.0, min_budget=30, **WIDE_KEYS
  ),
  "minference": dict(
    heads=(
      ("a_shape", 10, 20),
      ("vertical_slash", 12, 9),
      ("block_sparse", 3, 0),
      ("vertical_slash", 2, 300),
    ),
    **MINFERENCE,
  ),
  "oracle": dict(top_p=0.5, head_group=1, **BLOCKS),
  "oracle wide": dict(top_p=(0.4, 0.7), head_group=2, **WIDE_KEYS),
  "unisparse": dict(
    top_p=0.5, window_q=8, window_kv=4, head_group=None, **BLOCKS
  ),
  "unisparse wide": dict(
    top_p=(0.3, 0.5, 0.7, 0.9),
    window_q=16,
    window_kv=8,
    head_group=1,
    **WIDE_KEYS,
  ),
  "unisparse_threshold": dict(
    min_score=(1.1, 0.9),
    over_queries="mean",
    window_q=8,
    window_kv=8,
    head_group=2,
    **BLOCKS,
  ),
  "unisparse_threshold max": dict(
    min_score=1.5,
    over_queries="max",
    window_q=4,
    window_kv=4,
    head_group=1,
    **WIDE_KEYS,
  ),
  "unisparse_threshold columns": dict(
    min_score=1.5,
    over_queries="mean",
    window_q=8,
    window_kv=8,
    head_group=2,
    num_columns=7,
    num_last=9,
    **BLOCKS,
  ),
  "streaming": dict(num_sink=20, num_local=33, **BLOCKS),
  "streaming wide": dict(num_sink=0, num_local=32, **WIDE_KEYS),
}
BIDIRECTIONAL = (
  "sample_attention",
  "sample_attention_v1",
  "xattention",
  "xattention wide",
  "oracle",
  "unisparse",
  "unisparse wide",
  "unisparse_threshold",
  "unisparse_threshold max",
  "streaming",
)
RUNS = [(case, True) for case in CASES]
RUNS += [(case, False) for case in BIDIRECTIONAL]
SEEDS = (0, 1, 2)


@functools.partial(jax.jit, static_argnames=("pattern", "causal"))
def select(pattern, q, k, q_offset, kv_len, *, causal):
  return pattern.select(q, k, causal=causal, q_offset=q_offset, kv_len=kv_len)


def draw(seed, batch=len(OFFSETS)):
  """Keys with some that are looked for, so that attention is peaked."""
  rng = np.random.default_rng(seed)
  q = rng.standard_normal((batch, Q_LEN, HEADS, DIM)) + 0.3
  k = rng.standard_normal((batch, CAPACITY, KV_HEADS, DIM))
  k[:, rng.choice(CAPACITY, 9, replace=False)] += 1.0
  return jnp.asarray(1.5 * q, jnp.float32), jnp.asarray(k, jnp.float32)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("case", "causal"), RUNS)
def test_blocks_are_those_of_the_published_steps(case, causal, seed):
  name, settings = case.split(" ")[0], dict(CASES[case])
  pattern = attention.make_pattern(name, **settings)
  q, k = draw(seed)
  offsets, kv_lens = (jnp.asarray(x, jnp.int32) for x in (OFFSETS, KV_LENS))
  mask = select(pattern, q, k, offsets, kv_lens, causal=causal)
  kept = np.repeat(
    np.asarray(mask.to_dense()), HEADS // mask.num_mask_heads, axis=1
  )
  columns = None
  if mask.columns is not None:
    columns = np.repeat(
      np.asarray(mask.columns.to_dense(CAPACITY)),
      HEADS // mask.num_mask_heads,
      axis=1,
    )
  block_q, block_kv = (settings.pop(x) for x in ("block_q", "block_kv"))
  densities, kinds = [], []
  for b, (offset, kv_len) in enumerate(zip(OFFSETS, KV_LENS, strict=True)):
    q_len, all_keys = Q_LEN, k[b, :kv_len]
    if causal:
      q_len = min(Q_LEN, kv_len - offset)
      kv_len = min(kv_len, offset + q_len)
    problem = numpy_patterns.Problem(
      *(q[b, :q_len], all_keys[:kv_len], offset, block_q, block_kv, causal),
      later=all_keys[kv_len:],
    )
    expected, expected_columns, *kind = getattr(numpy_patterns, name)(
      problem, **settings
    )
    found = kept[b, :, : problem.q_blocks]
    np.testing.assert_array_equal(found[..., : problem.kv_blocks], expected)
    assert not found[..., problem.kv_blocks :].any()
    if expected_columns is not None:
      assert columns is not None
      np.testing.assert_array_equal(columns[b, :, :kv_len], expected_columns)
      assert not columns[b, :, kv_len:].any()
    else:
      assert columns is None
    densities.append(float(expected.mean()))
    kinds += kind
  # Something was decided: neither nothing nor everything is kept.
  assert min(densities) < 0.8
  if case == "flexprefill":  # both kinds of head were met
    assert 0 < np.concatenate(kinds).sum() < np.concatenate(kinds).size


def test_the_comparison_sees_another_threshold():
  q, k = draw(seed=0)
  offsets, kv_lens = (jnp.asarray(x, jnp.int32) for x in (OFFSETS, KV_LENS))
  settings = CASES["xattention"] | dict(top_p=0.52)
  pattern = attention.XAttention(**settings)
  mask = select(pattern, q, k, offsets, kv_lens, causal=True)
  problem = numpy_patterns.Problem(q[0], k[0], 90, 32, 16)
  expected, _ = numpy_patterns.xattention(problem, top_p=0.5, stride=4)
  assert (np.asarray(mask.to_dense())[0] != expected).any()
