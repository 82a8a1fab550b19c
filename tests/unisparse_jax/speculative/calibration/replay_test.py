# SPDX-License-Identifier: Apache-2.0
"""Replayed trees against trees that are built and walked node by node."""

import types

import numpy as np
import pytest

from tests.unisparse_jax.speculative.calibration import made_up
from unisparse_jax.speculative import calibration


def walked(records, parents, i, depth, nodes):
  """Tokens of a step, by keeping nodes one by one and walking the path."""
  kept = []
  for node in range(1, records.depths.shape[1]):
    if 0 < records.depths[i, node] <= depth and len(kept) < nodes:
      kept.append(node)
  tokens = 1
  for level in range(1, records.max_depth + 1):
    node = records.path[i, level]
    if node <= 0 or node not in kept:
      break
    assert parents[i, node] in (0, *kept)
    tokens += 1
  return tokens, 1 + len(kept)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("nodes", [0, 1, 3, 12])
def test_replay_equals_a_walk(depth, nodes):
  records, parents = made_up.random_records()
  tokens = records.tokens(depth, nodes)
  sizes = records.num_nodes(depth, nodes)
  for i in range(len(records)):
    assert (tokens[i], sizes[i]) == walked(records, parents, i, depth, nodes)


def test_the_whole_tree_is_what_was_logged():
  records, _ = made_up.random_records(seed=1)
  np.testing.assert_array_equal(
    records.tokens(records.max_depth, records.max_nodes),
    1 + records.accept_len,
  )
  none = records.accept_len == 0
  assert none.any()
  np.testing.assert_array_equal(records.terminal_rank[none], records.max_nodes)


def test_more_nodes_never_accept_less():
  records, _ = made_up.random_records(seed=2)
  for depth in range(1, 5):
    tokens = np.stack([records.tokens(depth, n) for n in range(13)])
    assert np.all(np.diff(tokens, axis=0) >= 0)


def test_reads_a_step_log():
  records, _ = made_up.random_records(n=6)
  depths = records.depths.reshape(3, 2, -1)
  path = records.path.reshape(3, 2, -1)
  columns = {
    "num_emitted": np.array([[1, 2], [3, -1], [1, -1]]),
    "entropy": np.arange(6.0).reshape(3, 2),
    "score": -np.arange(6.0).reshape(3, 2),
  }
  log = types.SimpleNamespace(
    trees=types.SimpleNamespace(
      depths=np.concatenate([depths, depths]),  # room that was not used
      path=np.concatenate([path, path]),
    ),
    column=columns.__getitem__,
  )
  found = calibration.StepRecords.from_log(log, groups=[5, 6], first_request=10)
  np.testing.assert_array_equal(found.request, [10, 11, 10, 10])
  np.testing.assert_array_equal(found.group, [5, 6, 5, 5])
  np.testing.assert_array_equal(found.order, [0, 0, 1, 2])
  np.testing.assert_array_equal(found.entropy, [0, 1, 2, 4])
  np.testing.assert_array_equal(found.path, path.reshape(6, -1)[[0, 1, 2, 4]])
  log.trees = None
  with pytest.raises(ValueError, match="log must hold trees"):
    calibration.StepRecords.from_log(log, groups=[5, 6])
