# SPDX-License-Identifier: Apache-2.0
"""The chain of ops, on any back end, chooses what a sort of exact scores does.

And the UniSparse pattern, which is that chain, too.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_selection import api as selection_api
from pallas_kernels.block_selection import triton as selection_triton
from pallas_kernels.composite_scores import api as scores_api
from pallas_kernels.composite_scores import mosaic_tpu as scores_tpu
from pallas_kernels.composite_scores import triton as scores_triton
from tests import helpers
from unisparse_jax.attention import block_mask, scoring
from unisparse_jax.attention.patterns import (
  flexprefill,
  unisparse,
  unisparse_threshold,
  xattention,
)

# settings of the pattern, lengths, positions
CASES = {
  "top_p": (dict(top_p=0.9), (512, 512), dict()),
  "room": (
    dict(top_p=0.95, max_blocks=3, num_local_blocks=1),
    (512, 512),
    dict(),
  ),
  "top_k": (dict(top_k=4, head_group=1), (300, 500), dict(q_offset=200)),
  "ragged": (
    dict(top_p=0.8, head_group=4),
    (200, 480),
    dict(q_offset=(280, 17), kv_len=(480, 217)),
  ),
  "bidirectional": (dict(top_p=0.7), (300, 420), dict(causal=False)),
}


def make_case(name):
  settings, (q_len, kv_len), positions = CASES[name]
  batch = 2 if name == "ragged" else 1
  q, k, _ = helpers.make_qkv(
    batch=batch, q_len=q_len, kv_len=kv_len, num_heads=4, head_dim=32
  )
  # Stretches of tokens alike, so that composites differ.
  shift = jax.random.normal(jax.random.key(1), (1, 16, 1, 32))
  shift = jnp.repeat(shift, 32, axis=1)
  q, k = q + shift[:, :q_len], k + 3.0 * shift[:, :kv_len]
  pattern = unisparse.UniSparse(
    block_q=64, block_kv=32, window_q=16, window_kv=8, **settings
  )
  positions = {
    name: jnp.asarray(value, jnp.int32) if name != "causal" else value
    for name, value in positions.items()
  }
  return pattern, q, k, positions


def by_ops(
  pattern, q, k, *, causal=True, q_offset=0, kv_len=None, score, choose
):
  """The pattern's selection by the three ops of `pallas_kernels`."""
  kv_len = k.shape[1] if kv_len is None else kv_len
  per_kv_head = q.shape[2] // k.shape[2]
  group = pattern.head_group or per_kv_head
  q_means, q_counts = pallas_kernels.composite_pooling(
    q, window=pattern.window_q, head_group=group
  )
  k_means, k_counts = pallas_kernels.composite_pooling(
    k,
    window=pattern.window_kv,
    head_group=max(1, group // per_kv_head),
    length=kv_len,
  )
  scores = score(
    q_means,
    k_means,
    q_counts,
    k_counts,
    window_q=pattern.window_q,
    window_kv=pattern.window_kv,
    block_q=pattern.block_q,
    block_kv=pattern.block_kv,
    causal=causal,
    q_offset=q_offset,
    scale=q.shape[-1] ** -0.5,
  )
  return choose(
    scores,
    q_len=q.shape[1],
    kv_len=kv_len,
    block_q=pattern.block_q,
    block_kv=pattern.block_kv,
    causal=causal,
    q_offset=q_offset,
    top_p=pattern.top_p if pattern.top_k is None else None,
    top_k=pattern.top_k,
    num_sink_blocks=pattern.num_sink_blocks if causal else 0,
    num_local_blocks=pattern.num_local_blocks if causal else 0,
    max_blocks=pattern.max_blocks,
  )


def by_sort(pattern, q, k, *, causal=True, q_offset=0, kv_len=None):
  """The pattern's selection from the reference scores, by a full sort."""
  grid = block_mask.BlockGrid.create(
    q,
    k,
    block_q=pattern.block_q,
    block_kv=pattern.block_kv,
    causal=causal,
    q_offset=q_offset,
    kv_len=kv_len,
  )
  q_means, q_counts, k_means, k_counts = pattern._composites(q, k, grid)
  scores = pallas_kernels.composite_scores(
    q_means,
    k_means,
    q_counts,
    k_counts,
    window_q=pattern.window_q,
    window_kv=pattern.window_kv,
    block_q=pattern.block_q,
    block_kv=pattern.block_kv,
    causal=causal,
    q_offset=q_offset,
    implementation="reference",
  )
  return scoring.select_blocks(
    grid,
    scores,
    scoring.forced_blocks(
      grid,
      num_sink_blocks=pattern.num_sink_blocks if causal else 0,
      num_local_blocks=pattern.num_local_blocks if causal else 0,
    ),
    top_p=pattern.top_p if pattern.top_k is None else None,
    top_k=pattern.top_k,
    max_blocks=pattern.max_blocks,
  )


def interpreted(op, table, back_end):
  """A public op whose named back end runs in an interpreter."""

  def run(*args, **kwargs):
    name = "interpreted"
    table[name] = functools.partial(back_end, interpret=True)
    try:
      return op(*args, **kwargs, implementation=name)
    finally:
      del table[name]

  return run


def back_ends(name):
  scores = functools.partial(interpreted, pallas_kernels.composite_scores)
  xla_scores = functools.partial(
    pallas_kernels.composite_scores, implementation="xla"
  )
  xla_choice = functools.partial(
    pallas_kernels.block_selection, implementation="xla"
  )
  return {
    "xla": (xla_scores, xla_choice),
    "triton": (
      scores(scores_api.IMPLEMENTATIONS, scores_triton.composite_scores),
      interpreted(
        pallas_kernels.block_selection,
        selection_api.IMPLEMENTATIONS,
        selection_triton.block_selection,
      ),
    ),
    "mosaic_tpu": (
      scores(scores_api.IMPLEMENTATIONS, scores_tpu.composite_scores),
      xla_choice,
    ),
  }[name]


@pytest.mark.parametrize(
  ("implementation", "name"),
  [
    *[("xla", name) for name in CASES],
    ("triton", "ragged"),
    ("mosaic_tpu", "ragged"),
  ],
)
def test_ops_choose_what_the_pattern_chooses(implementation, name):
  pattern, q, k, positions = make_case(name)
  score, choose = back_ends(implementation)
  offsets = {n: v for n, v in positions.items() if n != "causal"}
  statics = {n: v for n, v in positions.items() if n == "causal"}

  @jax.jit
  def run(q, k, offsets):
    mask = pattern.select(q, k, **offsets, **statics)
    expected = by_sort(pattern, q, k, **offsets, **statics)
    lists = by_ops(
      pattern, q, k, **offsets, **statics, score=score, choose=choose
    )
    return mask, expected, lists

  mask, expected, (indices, counts, selected) = run(q, k, offsets)
  jax.tree.map(np.testing.assert_array_equal, mask, expected)
  assert 0 < float(counts.mean()) < indices.shape[-1]
  np.testing.assert_array_equal(np.asarray(counts), mask.num_kv_blocks)
  np.testing.assert_array_equal(np.asarray(indices), mask.kv_block_indices)
  np.testing.assert_array_equal(
    np.asarray((selected - counts).sum(-1)), mask.num_dropped
  )


def sorts(select):
  """The lines of a lowered selection that name a sort's operands."""
  q = jax.ShapeDtypeStruct((1, 4096, 4, 32), jnp.float32)
  k = jax.ShapeDtypeStruct((1, 4096, 2, 32), jnp.float32)
  text = jax.jit(select).lower(q, k).as_text()
  return re.findall(r"stablehlo\.sort.*?\}\) : \((.*?)\) ->", text, re.DOTALL)


@pytest.mark.parametrize(
  "settings",
  [dict(), dict(max_blocks=4, num_local_blocks=2), dict(top_k=8)],
)
def test_unisparse_selects_without_a_sort(settings):
  pattern = unisparse.UniSparse(**settings)
  assert not sorts(pattern.select)
  # It would be seen.
  assert sorts(functools.partial(by_sort, pattern))


@pytest.mark.parametrize("over_queries", ["mean", "max"])
def test_a_threshold_selects_without_a_sort(over_queries):
  pattern = unisparse_threshold.UniSparseThreshold(over_queries=over_queries)
  assert not sorts(pattern.select)


def test_flexprefill_sorts_no_long_head_and_no_keys(monkeypatch):
  assert "tensor<1x4x1024xf32>" in sorts(flexprefill.FlexPrefill().select)
  monkeypatch.setattr(scoring, "_SORT_BELOW", 1024)
  # Blocks by column and by slash.
  assert set(sorts(flexprefill.FlexPrefill().select)) == {"tensor<1x4x32xf32>"}


def test_xattention_by_its_kernel_scores_as_by_xla(monkeypatch):
  q, k, _ = helpers.make_qkv(batch=2, q_len=90, kv_len=200)
  pattern = xattention.XAttention(stride=4, block_q=32, block_kv=16)
  kv_len = jnp.asarray([200, 150], jnp.int32)
  # Past its length nothing may be read as a number.
  k = k.at[1, 150:].set(jnp.nan)
  grid = block_mask.BlockGrid.create(
    q, k, block_q=32, block_kv=16, q_offset=110, kv_len=kv_len
  )
  expected = pattern.block_scores(q, k, grid)
  np.testing.assert_allclose(expected.sum(-1), 1.0, atol=1e-5)
  by_kernel, _ = back_ends("triton")
  monkeypatch.setattr(pallas_kernels, "composite_scores", by_kernel)
  monkeypatch.setattr(
    scores_triton, "_long_tile_sizes", lambda *_: (16, 16, 4, 1)
  )
  scores = pattern.block_scores(q, k, grid)
  np.testing.assert_allclose(scores, expected, atol=1e-6)
