# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from unisparse_jax import attention
from unisparse_jax.attention import budgets

BLOCKS = dict(block_q=16, block_kv=16)
WINDOWS = dict(window_q=8, window_kv=8, **BLOCKS)
BY_HEAD = (0.5, 0.9, 0.3, 0.8)
PATTERNS = (
  attention.make_pattern(
    "unisparse_threshold", min_score=(2.0, 0.7), head_group=2, **WINDOWS
  ),
  attention.make_pattern("xattention", top_p=BY_HEAD, **BLOCKS),
  attention.make_pattern("oracle", top_p=1.0, **BLOCKS),
  attention.make_pattern("flexprefill", top_p=BY_HEAD, min_budget=16, **BLOCKS),
  attention.make_pattern("sample_attention_v1", top_p=BY_HEAD, **BLOCKS),
  attention.make_pattern("random_blocks", density=0.4, **BLOCKS),
)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_a_traced_budget_selects_the_same(pattern):
  q, k, _ = helpers.make_qkv(q_len=90)

  @jax.jit
  def select(q, k, budget):
    return budgets.with_budget(template, budget).select(q, k)

  template, budget = budgets.split_budget(pattern)
  assert budget is not None
  assert hash(template) is not None
  expected = jax.jit(pattern.select)(q, k)
  found = select(q, k, jnp.asarray(budget))
  for name in ("kv_block_indices", "num_kv_blocks", "num_dropped"):
    np.testing.assert_array_equal(
      getattr(found, name), getattr(expected, name), err_msg=name
    )
  if expected.columns is not None:
    np.testing.assert_array_equal(
      found.columns.num_columns, expected.columns.num_columns
    )


def test_patterns_without_a_budget_stay_whole():
  for pattern in (
    attention.make_pattern("streaming"),
    attention.make_pattern("minference"),
    attention.make_pattern("unisparse", top_k=4),
  ):
    assert budgets.split_budget(pattern) == (pattern, None)


def test_templates_are_shared_across_budgets_and_layers():
  def layered(*limits):
    return attention.LayeredAttention(
      layers=tuple(
        attention.SparseAttention(
          pattern=attention.UniSparseThreshold(
            min_score=limit, head_group=2, **WINDOWS
          )
        )
        for limit in limits
      )
    )

  size = dict(num_layers=2, num_heads=4, num_kv_heads=2)
  first, first_budgets = attention.budgeted(layered(1.0, (2.0, 3.0)), **size)
  second, _ = attention.budgeted(layered(5.0, 6.0), **size)
  assert first == second
  assert len(first.templates) == 1
  np.testing.assert_array_equal(first_budgets.budget, [[1.0, 1.0], [2.0, 3.0]])


@pytest.mark.parametrize(
  ("attend", "message"),
  [
    (
      attention.SparseAttention(
        pattern=attention.UniSparse(top_p=(0.5, 0.5, 0.5), **BLOCKS)
      ),
      r"budget must have one value",
    ),
    (
      attention.LayeredAttention(layers=(attention.DenseAttention(),)),
      r"layers must be one attention for each layer",
    ),
  ],
)
def test_bad_attentions_are_named(attend, message):
  with pytest.raises(ValueError, match=message):
    attention.budgeted(attend, num_layers=2, num_heads=4, num_kv_heads=2)
