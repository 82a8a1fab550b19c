# SPDX-License-Identifier: Apache-2.0
"""Threshold search in place of a sort; runs inside kernels and outside.

The bits of a float32, as an integer with the lower 31 flipped for negative
values, are ordered as the values are. The blocks that a budget keeps are those
whose bits reach a threshold: the smallest one such that what lies strictly
above it, with the forced blocks, is still short of the budget. It is found bit
by bit. Blocks at the threshold itself are equal and enter by their number.
"""

import jax
import jax.numpy as jnp
from jax import lax

_NONE = 0x7FFFFFFF  # above the bits of every finite score


def keep_best(scores, candidates, forced, mass_budget, count_budget):
  """Which candidates are kept, the last axis being a row's blocks.

  In falling order of score, each candidate is kept if the mass of the forced
  blocks and of the candidates before it is below `mass_budget`, and their
  number below `count_budget`.

  Args:
    scores: float32 [rows, blocks], finite.
    candidates: bool [rows, blocks]; those neither forced nor inadmissible.
    forced: bool [rows, blocks].
    mass_budget: float32 [rows]; infinity for no bound.
    count_budget: int, or None for no bound.

  Returns:
    bool [rows, blocks].
  """
  bits = lax.bitcast_convert_type(scores + 0.0, jnp.int32)
  bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
  forced_mass = jnp.where(forced, scores, 0.0).sum(-1)
  forced_count = forced.astype(jnp.int32).sum(-1)

  def above(threshold):
    """Mass and number of the forced blocks and of those above a threshold."""
    is_above = candidates & (bits > threshold[:, None])
    mass = forced_mass + jnp.where(is_above, scores, 0.0).sum(-1)
    return mass, forced_count + is_above.astype(jnp.int32).sum(-1)

  def is_short(mass, count, mass_budget):
    short = mass < mass_budget
    return short if count_budget is None else short & (count < count_budget)

  def bisect(_, bounds):
    low, high = bounds  # short at high, not at low
    middle = (low & high) + ((low ^ high) >> 1)
    short = is_short(*above(middle), mass_budget)
    return jnp.where(short, low, middle), jnp.where(short, middle, high)

  # Scores of a softmax are not negative: one bit less to find.
  low = jnp.where(
    (candidates & (bits < 0)).astype(jnp.int32).sum(-1) > 0,
    jnp.int32(-0x80000000),
    jnp.int32(-1),
  )
  high = jnp.full(low.shape, _NONE, jnp.int32)
  _, threshold = lax.fori_loop(0, 32, bisect, (low, high))

  mass, count = above(threshold)
  tied = candidates & (bits == threshold[:, None])
  rank = lax.cumsum(tied.astype(jnp.int32), axis=1) - 1
  mass = mass[:, None] + rank.astype(jnp.float32) * jnp.where(tied, scores, 0.0)
  tied &= is_short(mass, count[:, None] + rank, mass_budget[:, None])
  return (candidates & (bits > threshold[:, None])) | tied


def keep(scores, admissible, forced, mass_budget, count_budget, room):
  """Kept blocks, bool [rows, blocks], and how many the budget asked for.

  Args:
    scores: float32 [rows, blocks], finite.
    admissible: bool [rows, blocks].
    forced: bool [rows, blocks], admissible ones.
    mass_budget: float32 [rows]; infinity for no bound.
    count_budget: int, or None for no bound.
    room: at most so many are kept, forced ones first.
  """
  candidates = admissible & ~forced
  kept = forced | keep_best(
    scores, candidates, forced, mass_budget, count_budget
  )
  num_selected = kept.astype(jnp.int32).sum(-1)
  if room < scores.shape[-1]:
    limit = room if count_budget is None else min(room, count_budget)
    rank = lax.cumsum(forced.astype(jnp.int32), axis=1)
    kept = keep_best(scores, candidates, forced, mass_budget, limit)
    kept |= forced & (rank <= room)
  return kept, num_selected


def slots(kept: jax.Array):
  """int32 [rows, blocks], a kept block's slot in descending order; counts."""
  number = kept.astype(jnp.int32)
  count = number.sum(-1)
  return count[:, None] - lax.cumsum(number, axis=1), count
