# SPDX-License-Identifier: Apache-2.0
"""Settings by head from what each head's attention shows on a few texts."""

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels import checks

RULES = ("equal_recall", "equal_slope", "lowered_steps", "fewest_blocks")
_PRICES = np.geomspace(1e-4, 1e4, 2000)


def choose_budgets(
  density: Float[np.ndarray, "num_heads num_budgets"],
  recall: Float[np.ndarray, "num_heads num_budgets"],
  target: float,
  rule: str = "equal_recall",
) -> Int[np.ndarray, " num_heads"]:
  """Which of the tried budgets each head gets.

  Args:
    density: kept share of the blocks, by head and budget.
    recall: kept share of the dense softmax.
    target: recall aimed at, in (0, 1].
    rule: "equal_recall": each head's sparsest budget that reaches the target,
      else the budget of highest recall. "equal_slope": budgets whose mean
      recall reaches the target at the least mean density: those that maximise
      recall - price * density in every head at one price. "lowered_steps": as
      `lower_steps` finds them, after the number of steps that is sparsest among
      those whose mean recall reaches the target; budgets must stand in the
      order of the steps. "fewest_blocks": the least mean density of all
      settings whose mean recall reaches the target, see `fewest_blocks`.

  Returns:
    Index of a budget, by head.

  Raises:
    ValueError: shapes disagree, or a setting is off.
  """
  checks.check_choice("rule", rule, RULES)
  checks.check_fraction("target", target)
  density, recall = np.asarray(density), np.asarray(recall)
  checks.check_shape(
    "recall", recall, ("num_heads", "num_budgets"), density.shape
  )
  heads = np.arange(len(density))
  if rule == "lowered_steps":
    total, steps = lower_steps(recall)
    by_count = density[heads, steps].mean(1)
    reached = total >= (target - 1e-9) * len(density)
    # None may reach it: then what holds most.
    if not reached.any():
      return steps[np.argmax(total)]
    return steps[np.argmin(np.where(reached, by_count, np.inf))]
  if rule == "fewest_blocks":
    return fewest_blocks(density, recall, target)
  if rule == "equal_recall":
    best = recall >= recall.max(1, keepdims=True)
    reached = np.where(
      (recall >= target).any(1)[:, None], recall >= target, best
    )
    return np.argmin(np.where(reached, density, np.inf), axis=1)
  # The fullest choice, for a target that none reaches.
  chosen = np.argmax(recall - 1e-9 * density, axis=1)
  for price in _PRICES:  # rising: sparser and sparser
    index = np.argmax(recall - price * density, axis=1)
    if recall[heads, index].mean() < target:
      break
    chosen = index
  return chosen


def lower_steps(
  performance: Float[np.ndarray, "num_heads num_budgets"],
) -> tuple[
  Float[np.ndarray, " num_counts"], Int[np.ndarray, "num_counts num_heads"]
]:
  """Where to lower thresholds by so many steps in all, at the least loss.

  XAttention's search fills a table D[h, m], the best performance of the first
  h heads after exactly m steps among them. Here the performance is a sum over
  the heads, so that the table is exact:
  D[h, m] = max over s of D[h - 1, m - s] + performance[h, s].

  Args:
    performance: of each head after 0, 1, ... steps, such as its recall.

  Returns:
    The best sum after 0, 1, ... num_heads * (num_budgets - 1) steps, and the
    steps of each head that reach it; among equals the fewest of later heads.

  Source: XAttention (arXiv 2503.16428), section 2.3. Differs from it in: the
    paper evaluates the model for each entry, whose choices then depend on one
    another, and lets a head be lowered once in a pass over the heads, by
    D[h, m] = max(D[h - 1, m], performance of one step from D[h - 1, m - 1]);
    1,000 steps on 1,024 heads from 0.9 on, by a tenth each, are its mean of
    0.8.
  """
  performance = np.asarray(performance, np.float64)
  checks.require(
    performance.ndim == 2 and performance.size > 0,
    "performance",
    "have shape [num_heads, num_budgets]",
    performance.shape,
  )
  num_heads, num_budgets = performance.shape
  num_counts = num_heads * (num_budgets - 1) + 1
  best = np.full(num_counts, -np.inf)
  best[0] = 0.0
  last = np.zeros((num_heads, num_counts), np.int64)
  for head in range(num_heads):
    tried = np.full((num_budgets, num_counts), -np.inf)
    for step in range(num_budgets):
      tried[step, step:] = best[: num_counts - step] + performance[head, step]
    last[head] = tried.argmax(0)
    best = tried.max(0)
  steps = np.zeros((num_counts, num_heads), np.int64)
  count = np.arange(num_counts)
  for head in reversed(range(num_heads)):
    steps[:, head] = last[head, count]
    count = count - steps[:, head]
  return best, steps


def fewest_blocks(
  density: Float[np.ndarray, "num_heads num_budgets"],
  recall: Float[np.ndarray, "num_heads num_budgets"],
  target: float,
  *,
  num_levels: int = 2000,
) -> Int[np.ndarray, " num_heads"]:
  """Budgets of least mean density whose mean recall reaches a target.

  A table as of `lower_steps`, but of what matters: D[h, r] is the least density
  of the first h heads when they lose at most r units of recall,
  D[h, r] = min over budgets s of D[h - 1, r - loss[h, s]] + density[h, s],
  the losses rounded up to units, so that the target is kept.

  Args:
    density: kept share of the blocks, by head and budget.
    recall: kept share of the dense softmax.
    target: mean recall aimed at.
    num_levels: units in the loss that the target allows.

  Returns:
    Index of a budget, by head; where the target is out of reach, those of
    highest recall.
  """
  density, recall = np.asarray(density), np.asarray(recall)
  heads = np.arange(len(density))
  # The highest recall of each head, at the least density.
  fullest = np.argmax(recall - 1e-9 * density, axis=1)
  loss = recall[heads, fullest][:, None] - recall
  allowed = recall[heads, fullest].sum() - target * len(density)
  if allowed < 0.0:
    return fullest
  unit = max(allowed, 1e-12) / num_levels
  # A head's own fullest budget may differ from the highest by the 1e-9 above.
  units = np.maximum(np.ceil(loss / unit - 1e-6), 0.0)
  units = np.minimum(units, num_levels + 1).astype(np.int64)
  least = np.zeros(num_levels + 1)
  chosen = np.zeros((len(density), num_levels + 1), np.int64)
  for head in heads:
    tried = np.full((density.shape[1], num_levels + 1), np.inf)
    for budget, lost in enumerate(units[head]):
      if lost <= num_levels:
        tried[budget, lost:] = (
          least[: num_levels + 1 - lost] + density[head, budget]
        )
    chosen[head], least = tried.argmin(0), tried.min(0)
  index, left = np.zeros(len(density), np.int64), num_levels
  for head in reversed(heads):
    index[head] = chosen[head, left]
    left -= units[head, index[head]]
  return index


def xattention_threshold(
  estimated: Float[np.ndarray, "num_heads num_q_blocks num_kv_blocks"],
  true_mass: Float[np.ndarray, "num_heads num_q_blocks num_kv_blocks"],
  share: float = 0.9,
) -> Float[np.ndarray, " num_heads"]:
  """Threshold of each head as XAttention's released profiler finds it.

  In each row the fewest blocks that hold `share` of the true mass are needed.
  All blocks that score at least as the lowest of them are kept; the threshold
  is the share of the scores that this keeps over all rows.

  Args:
    estimated: scores of the blocks, rows sum to 1; 0 where out of reach.
    true_mass: dense softmax mass, rows sum to 1.
    share: of each row's true mass.

  Returns:
    In (0, 1], by head.

  Source: XAttention (arXiv 2503.16428), released code. The paper's own search
  is `lower_steps`.
  """
  checks.check_fraction("share", share)
  estimated, true_mass = np.asarray(estimated), np.asarray(true_mass)
  checks.check_shape(
    "estimated",
    estimated,
    ("num_heads", "num_q_blocks", "num_kv_blocks"),
    true_mass.shape,
  )
  order = np.argsort(-true_mass, axis=-1, kind="stable")
  mass = np.take_along_axis(true_mass, order, axis=-1)
  needed = np.cumsum(mass, axis=-1) - mass < share * mass.sum(-1, keepdims=True)
  scores = np.take_along_axis(estimated, order, axis=-1)
  lowest = np.where(needed, scores, np.inf).min(-1, keepdims=True)
  kept = np.where(estimated >= lowest, estimated, 0.0).sum((1, 2))
  return np.clip(kept / estimated.sum((1, 2)), 1e-6, 1.0)
