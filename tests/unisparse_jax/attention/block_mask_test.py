# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from unisparse_jax import attention


def grid(causal=True, *, q_len=10, kv_len=12, block_q=4, block_kv=4, **where):
  q = jnp.zeros((1, q_len, 2, 8))
  k = jnp.zeros((1, kv_len, 2, 8))
  return attention.BlockGrid.create(
    q, k, block_q=block_q, block_kv=block_kv, causal=causal, **where
  )


def test_admissible_and_diagonal_are_these_matrices():
  g = grid(q_offset=2)
  np.testing.assert_array_equal(
    g.admissible()[0], [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
  )
  np.testing.assert_array_equal(
    g.diagonal()[0], [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
  )
  np.testing.assert_array_equal(
    g.local(1)[0], [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
  )
  np.testing.assert_array_equal(
    grid(False, kv_len=12, q_offset=0).admissible()[0], np.ones((3, 3))
  )
  short = grid(False, q_len=4, kv_len=12)
  short = attention.BlockGrid.create(
    jnp.zeros((1, 4, 2, 8)),
    jnp.zeros((1, 12, 2, 8)),
    block_q=4,
    block_kv=4,
    causal=False,
    kv_len=8,
  )
  np.testing.assert_array_equal(short.admissible()[0], [[1, 1, 0]])


def test_lists_are_descending_and_round_trip():
  rng = np.random.default_rng(0)
  kept = jnp.asarray(rng.random((1, 2, 3, 3)) < 0.6)
  g = grid(False)
  mask = attention.BlockMask.from_dense(g, kept)
  np.testing.assert_array_equal(mask.to_dense(), kept)
  for row in np.ndindex(1, 2, 3):
    live = np.asarray(mask.kv_block_indices[row])[
      : int(mask.num_kv_blocks[row])
    ]
    assert (np.diff(live) < 0).all()


def test_unreachable_blocks_are_left_out():
  g = grid(q_len=12)
  mask = attention.BlockMask.from_dense(g, jnp.ones((1, 1, 3, 3), bool))
  np.testing.assert_array_equal(mask.to_dense()[0, 0], np.tril(np.ones((3, 3))))
  assert float(attention.metrics.density(mask)[0, 0]) == 1.0


def test_full_lists_drop_the_oldest_and_say_so():
  g = grid(q_len=12)
  mask = attention.BlockMask.from_dense(
    g, jnp.ones((1, 1, 3, 3), bool), max_blocks=2
  )
  np.testing.assert_array_equal(
    mask.to_dense()[0, 0], [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
  )
  assert int(mask.num_dropped[0, 0]) == 1


def test_union_and_intersection():
  rng = np.random.default_rng(0)
  g = grid(False)
  a = jnp.asarray(rng.random((1, 2, 3, 3)) < 0.5)
  b = jnp.asarray(rng.random((1, 1, 3, 3)) < 0.5)
  mask_a, mask_b = (attention.BlockMask.from_dense(g, x) for x in (a, b))
  np.testing.assert_array_equal(mask_a.union(mask_b).to_dense(), a | b)
  np.testing.assert_array_equal(mask_b.intersection(mask_a).to_dense(), a & b)


def test_union_of_columns():
  g = grid(False)
  empty = jnp.zeros((1, 2, 3, 3), bool)
  first, second = np.zeros((2, 1, 2, 12), bool)
  first[..., [1, 5]] = True
  second[..., [5, 7]] = True
  masks = [
    attention.BlockMask.from_dense(
      g, empty, columns=attention.ColumnSet.from_dense(jnp.asarray(x), 4)
    )
    for x in (first, second)
  ]
  columns = masks[0].union(masks[1]).columns
  np.testing.assert_array_equal(columns.to_dense(12), first | second)
  with pytest.raises(ValueError, match=r"columns of self must be None"):
    masks[0].intersection(masks[1])


def test_masks_of_other_sizes_do_not_combine():
  a = attention.BlockMask.full(grid())
  b = attention.BlockMask.full(grid(q_len=8))
  with pytest.raises(ValueError, match=r"other.q_len must be that of"):
    a.union(b)


def test_a_mask_passes_through_jit_and_vmap_free_code():
  g = grid()
  mask = attention.BlockMask.full(g)
  again = jax.jit(lambda m: m)(mask)
  assert again.grid.block_q == g.block_q
  np.testing.assert_array_equal(again.to_dense(), mask.to_dense())


def test_nominal_density_counts_pairs():
  q, k, _ = helpers.make_qkv(q_len=50, kv_len=70)
  rng = np.random.default_rng(0)
  g = attention.BlockGrid.create(
    q, k, block_q=16, block_kv=8, q_offset=15, kv_len=66
  )
  columns = jnp.asarray(rng.random((1, 2, 70)) < 0.2)
  mask = attention.BlockMask.from_dense(
    g,
    jnp.asarray(rng.random((1, 2, 4, 9)) < 0.4),
    columns=attention.ColumnSet.from_dense(columns, 30),
  )
  query, key = np.arange(50)[:, None], np.arange(70)[None, :]
  visible = (key <= query + 15) & (key < 66)
  listed = np.asarray(mask.to_dense())[0]
  for head in range(2):
    by_block = listed[head][query // 16, key // 8]
    kept = (by_block | np.asarray(columns)[0, head]) & visible
    np.testing.assert_allclose(
      attention.metrics.nominal_density(mask)[0, head],
      kept.sum() / visible.sum(),
      rtol=1e-6,
    )
