# SPDX-License-Identifier: Apache-2.0
"""Contract of block_selection, run once for each back end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

# name: batch, heads, q_len, kv_len, blocks, valid keys, q_offset, settings
CASES = {
  "causal": (2, 2, 512, 512, (32, 32), None, 0, dict(num_sink_blocks=1)),
  "ragged": (
    *(2, 3, 200, 333, (32, 16), (333, 90), (133, 20)),
    dict(num_sink_blocks=2, num_local_blocks=1),
  ),
  "bidirectional": (1, 2, 70, 300, (16, 16), 290, 0, dict(causal=False)),
}
BUDGETS = {
  "half": dict(top_p=0.5),
  "most": dict(top_p=0.95),
  "all": dict(top_p=1.0),
  "five": dict(top_k=5),
  "no_room": dict(top_p=0.9, max_blocks=3),
}


def make_case(name, budget, seed=0):
  """Scores that sum to 1 over a row's admissible blocks, and settings."""
  batch, heads, q_len, kv_len, (block_q, block_kv), valid, offset, rest = CASES[
    name
  ]
  rng = np.random.default_rng(seed)
  num_q, num_kv = -(-q_len // block_q), -(-kv_len // block_kv)
  scores = np.exp(2.0 * rng.standard_normal((batch, heads, num_q, num_kv)))
  settings = dict(
    q_len=q_len,
    kv_len=jnp.asarray(kv_len if valid is None else valid, jnp.int32),
    q_offset=jnp.asarray(offset, jnp.int32),
    block_q=block_q,
    block_kv=block_kv,
    **rest,
    **BUDGETS[budget],
  )
  for row in np.ndindex(scores.shape[:3]):
    admissible, _ = admissible_and_forced(settings, row, num_kv)
    scores[row] *= admissible / max(scores[row][admissible].sum(), 1e-30)
  return jnp.asarray(scores, jnp.float32), settings


def admissible_and_forced(settings, row, num_kv):
  """From the definition, query by query."""
  b, _, i = row
  valid = np.ravel(settings["kv_len"])[-1 if b else 0]
  offset = np.ravel(settings["q_offset"])[-1 if b else 0]
  queries = np.arange(settings["block_q"]) + i * settings["block_q"]
  queries = queries[queries < settings["q_len"]] + offset
  causal = settings.get("causal", True)
  size = settings["block_kv"]
  local = settings.get("num_local_blocks", 0)
  admissible = np.zeros(num_kv, bool)
  forced = np.zeros(num_kv, bool)
  for block in range(num_kv):
    keys = np.arange(block * size, (block + 1) * size)
    keys = keys[keys < valid]
    admissible[block] = keys.size and (
      not causal or keys.min() <= queries.max()
    )
    forced[block] = block < settings.get("num_sink_blocks", 0)
    if causal or local:
      own = np.arange(block * size, (block + 1 + local) * size)
      forced[block] |= np.isin(queries, own).any()
  return admissible, forced & admissible


def expected_blocks(scores, settings, row):
  """The kept blocks of a row, in the order in which they are taken."""
  admissible, forced = admissible_and_forced(settings, row, scores.shape[-1])
  blocks = [int(j) for j in np.flatnonzero(forced)]
  mass = float(scores[row][forced].astype(np.float64).sum())
  others = [int(j) for j in np.flatnonzero(admissible & ~forced)]
  for j in sorted(others, key=lambda j: (-scores[row][j], j)):
    if "top_k" in settings:
      enough = len(blocks) >= settings["top_k"]
    else:
      enough = settings["top_p"] < 1.0 and mass >= settings["top_p"]
    if enough:
      break
    blocks.append(j)
    mass += float(scores[row][j])
  return blocks


class BlockSelectionSuite:
  """Every back end must pass it; a subclass names its `implementation`."""

  implementation: str

  def run(self, scores, settings):
    op = functools.partial(
      pallas_kernels.block_selection,
      **settings,
      implementation=self.implementation,
    )
    return [np.asarray(x) for x in jax.jit(op)(scores)]

  def check(self, scores, settings):
    indices, counts, num_selected = self.run(scores, settings)
    room = min(settings.get("max_blocks", 1 << 30), scores.shape[-1])
    assert indices.shape == (*scores.shape[:3], room)
    scores = np.asarray(scores)
    for row in np.ndindex(scores.shape[:3]):
      expected = expected_blocks(scores, settings, row)
      assert num_selected[row] == len(expected)
      kept = sorted(expected[:room], reverse=True)
      assert counts[row] == len(kept)
      assert indices[row].tolist() == kept + [0] * (room - len(kept))

  @pytest.mark.parametrize(
    ("name", "budget"),
    [
      *[("ragged", budget) for budget in BUDGETS],
      ("causal", "most"),
      ("bidirectional", "no_room"),
    ],
  )
  def test_matches_definition(self, name, budget):
    self.check(*make_case(name, budget))

  def test_equal_scores_take_the_lower_block(self):
    scores, settings = make_case("bidirectional", "half")
    scores = jnp.full_like(scores, 0.0625).at[..., 16:].set(0.0)
    self.check(scores, dict(settings, max_blocks=2))
    settings.pop("top_p")
    self.check(scores, dict(settings, top_k=3))

  def test_one_share_for_each_head(self):
    scores, settings = make_case("ragged", "half")
    shares = [0.5, 1.0, 0.9]
    settings["top_p"] = jnp.asarray(shares, jnp.float32)
    together = self.run(scores, settings)
    for head, share in enumerate(shares):
      alone = self.run(scores, dict(settings, top_p=share))
      for some, every in zip(together, alone, strict=True):
        np.testing.assert_array_equal(some[:, head], every[:, head])

  def test_any_scores_with_top_k(self):
    scores, settings = make_case("ragged", "five")
    self.check(jnp.log(scores + 1e-3), settings)

  def test_row_of_one_block(self):
    scores, settings = make_case("causal", "most")
    peaked = jnp.zeros_like(scores).at[..., 0].set(1.0)
    self.check(peaked, dict(settings, num_sink_blocks=0))

  def test_suite_sees_one_wrong_block(self):
    scores, settings = make_case("causal", "most")
    wrong = scores.at[0, 0, -1].set(scores[0, 0, -1, ::-1])
    indices, counts, _ = self.run(wrong, settings)
    right, right_counts, _ = self.run(scores, settings)
    assert (indices != right).any() or (counts != right_counts).any()


class BriefSuite(BlockSelectionSuite):
  """Fewer cases, for the reference and what a CPU interprets slowly."""

  @pytest.mark.parametrize(
    ("budget", "name"),
    [
      ("most", "ragged"),
      ("no_room", "bidirectional"),
    ],
  )
  def test_matches_definition(self, name, budget):
    super().test_matches_definition(name, budget)

  # The cases above see this too.
  test_suite_sees_one_wrong_block = None

  test_any_scores_with_top_k = None
