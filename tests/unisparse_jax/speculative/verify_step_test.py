# SPDX-License-Identifier: Apache-2.0
"""How the rows of a packed batch share what is verified."""

import types

import jax.numpy as jnp
import numpy as np

from unisparse_jax.speculative import verify_step

# By row, root first; row 1's drafts are the surer ones.
SCORES = np.asarray(
  [
    [0.0, -1.0, -1.5, -2.0, -2.5, -3.0],
    [0.0, -0.1, -0.2, -0.3, -0.4, -0.5],
    [0.0, -1.1, -1.6, -2.1, -2.6, -3.1],
  ],
  np.float32,
)


def share(left, budget, wanted=(6, 6, 6)):
  nodes = verify_step._share(
    types.SimpleNamespace(scores=jnp.asarray(SCORES)),
    jnp.asarray(wanted, jnp.int32),
    jnp.asarray(left, jnp.int32),
    budget,
  )
  return np.asarray(nodes).tolist()


def test_the_best_nodes_of_all_rows_are_kept():
  # Three roots, row 1's five, then -1, -1.1, -1.5.
  assert share([9, 9, 9], 8) == [1, 6, 1]
  assert share([9, 9, 9], 11) == [3, 6, 2]
  assert share([9, 9, 9], 18) == [6, 6, 6]
  assert share([9, 9, 9], 11, wanted=(6, 2, 6)) == [5, 2, 4]


def test_a_row_with_more_left_gets_more():
  # Row 0 has e times as much left as the others: its scores gain 1.
  assert share([272, 100, 100], 9) == [3, 5, 1]
  # ... and a row that is nearly done gets next to nothing.
  assert share([100, 1, 100], 9) == [4, 1, 4]


def test_a_finished_row_gets_none_and_every_other_its_root():
  assert share([9, 0, 9], 9) == [5, 0, 4]
  assert share([1000, 1, 1], 8) == [6, 1, 1]
