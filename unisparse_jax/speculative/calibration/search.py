# SPDX-License-Identifier: Apache-2.0
"""Depth and size together, by tokens per millisecond in a replay.

Maximising sum(tokens) / sum(time) over a table is a ratio: with a rate r, the
best arm of each bin maximises tokens - r * time, and r becomes the ratio that
those arms reach (Dinkelbach, 1967). For more than one row a step takes as long
as its deepest and its largest row; coordinates are then improved one by one on
simulated batches.

Source: HeteroSpec v1 (2025), section 3.4, for what is chosen; its later version
names a coordinated choice of both without telling how.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unisparse_jax.speculative.calibration import costs as costs_lib
from unisparse_jax.speculative.calibration import replay

Arm = tuple[int, int]  # levels, draft nodes without the root
_ROUNDS = 20
_PER_NODE = 1e-4  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arms:
  """What every choice of depth and size brings at every logged step.

  Attributes:
    arms: the choices; (0, 0) is a step that does not draft.
    tokens: float32 [n, num_arms].
    base_depth: levels that are drafted before a choice is made.
  """

  arms: tuple[Arm, ...]
  tokens: np.ndarray
  base_depth: int

  @classmethod
  def of(
    cls,
    records: replay.StepRecords,
    *,
    depths: Sequence[int],
    nodes: Sequence[int],
    base_depth: int,
  ) -> "Arms":
    """Every depth with every number of nodes.

    Raises:
      ValueError: more than the logged trees hold.
    """
    if max(depths) > records.max_depth or max(nodes) > records.max_nodes:
      raise ValueError(
        "depths and nodes must be at most those of the log; got "
        f"{max(depths)} and {max(nodes)}; expected at most {records.max_depth} "
        f"and {records.max_nodes}."
      )
    arms = tuple((d, n) for d in sorted(depths) for n in sorted(nodes))
    tokens = np.stack([records.tokens(d, n) for d, n in arms], axis=1)
    return cls(
      arms=arms, tokens=tokens.astype(np.float32), base_depth=base_depth
    )

  def times(self, costs: costs_lib.StepCosts) -> np.ndarray:
    """float64 [num_arms], milliseconds of a step in which all rows agree."""
    levels = np.maximum([d for d, _ in self.arms], self.base_depth)
    return costs.step_ms(levels, [n for _, n in self.arms])

  def served(self, costs: costs_lib.StepCosts) -> np.ndarray:
    """int [num_arms], the arm that a row gets when all rows ask for this one.

    Where rows share the nodes of a packed batch, one of as many as each row's
    part of them. It gets more where the others' drafts are poorer: a log of
    other batches does not tell how much.
    """
    if not costs.packed:
      return np.arange(len(self.arms))
    most = costs.buckets[-1] // costs.batch - 1
    index = {arm: i for i, arm in enumerate(self.arms)}
    sizes = sorted({n for _, n in self.arms})
    return np.array(
      [
        index[d, max(m for m in sizes if m <= max(min(n, most), sizes[0]))]
        for d, n in self.arms
      ]
    )

  def within(self, costs: costs_lib.StepCosts) -> "Arms":
    """The same arms with what they bring in such a batch, see `served`."""
    tokens = self.tokens[:, self.served(costs)] + self.preference(costs)
    return dataclasses.replace(self, tokens=tokens)

  def preference(self, costs: costs_lib.StepCosts) -> np.ndarray:
    """float32 [num_arms], tokens, that decides between arms `served` alike.

    Of rows that share nodes, one that asks for more gets what others leave.
    """
    nodes = np.array([n for _, n in self.arms], np.float32)
    return nodes * np.float32(_PER_NODE if costs.packed else 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """Arms chosen by bin, and what they bring.

  Attributes:
    depth: int [num_bins].
    nodes: int [num_bins], root not counted.
    rate: tokens per millisecond of a row.
    tokens_per_step: bonus included.
    step_ms: of a step of the batch.
  """

  depth: np.ndarray
  nodes: np.ndarray
  rate: float
  tokens_per_step: float
  step_ms: float


def fixed(arms: Arms, costs: costs_lib.StepCosts) -> Choice:
  """The best single arm."""
  times = arms.times(costs)
  tokens = arms.tokens.mean(axis=0)
  best = int(np.argmax(tokens / times))
  return _choice(arms, [best], tokens[best], times[best])


def oracle(arms: Arms, costs: costs_lib.StepCosts) -> Choice:
  """The best arm of every step in hindsight, each row alone: a bound."""
  times = arms.times(costs)
  rate = float(np.max(arms.tokens.mean(axis=0) / times))
  picked = np.zeros(len(arms.tokens), np.int64)
  for _ in range(_ROUNDS):
    picked = np.argmax(arms.tokens - rate * times[None, :], axis=1)
    tokens = np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
    new = float(tokens / times[picked].mean())
    if new <= rate * (1 + 1e-9):
      break
    rate = new
  tokens = np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
  return _choice(arms, picked, tokens, times[picked].mean())


def by_bin(
  arms: Arms,
  bins: np.ndarray,
  costs: costs_lib.StepCosts,
  *,
  num_bins: int,
  seed: int = 0,
) -> Choice:
  """The best arm of each bin.

  Args:
    arms: of the steps.
    bins: int [n], bin of each step.
    costs: of the batch that is optimised for.
    num_bins: a bin without steps gets the best single arm.
    seed: of the simulated batches.
  """
  times = arms.times(costs)
  counts, sums = _totals(arms, bins, num_bins)
  single = int(np.argmax(arms.tokens.mean(axis=0) / times))
  table = np.full(num_bins, single)
  rate = float(arms.tokens[:, single].mean() / times[single])
  for _ in range(_ROUNDS):
    gain = sums - rate * counts[:, None] * times[None, :]
    table = np.where(counts > 0, np.argmax(gain, axis=1), single)
    tokens = sums[np.arange(num_bins), table].sum()
    new = float(tokens / (counts * times[table]).sum())
    if new <= rate * (1 + 1e-9):
      break
    rate = new
  if costs.batch > 1:
    table = _improve(arms, bins, costs, table, single, counts, seed)
  return evaluate(arms, bins, costs, table, seed=seed)


def fewest_nodes(
  arms: Arms,
  bins: np.ndarray,
  costs: costs_lib.StepCosts,
  *,
  num_bins: int,
  least_tokens: float,
  depth: np.ndarray | None = None,
) -> Choice:
  """The arm of each bin, for the fewest verified tokens that are enough.

  Maximises tokens - price * (nodes + 1), with the highest price at which the
  steps still bring `least_tokens` in the mean.

  Args:
    arms: of the steps.
    bins: int [n], bin of each step.
    costs: of the batch that the result is evaluated for.
    num_bins: a bin without steps gets what is best without bins.
    least_tokens: per step, bonus included; where no table brings them, the one
      that brings most.
    depth: int [num_bins], the levels of each bin; None: any.
  """
  sizes = np.array([n for _, n in arms.arms]) + 1.0
  levels = np.array([d for d, _ in arms.arms])
  counts, sums = _totals(arms, bins, num_bins)
  allowed = True if depth is None else levels == np.asarray(depth)[:, None]

  def table_at(price):
    gain = sums - price * counts[:, None] * sizes[None, :]
    gain = np.where(counts[:, None] > 0, gain, gain.sum(axis=0))
    return np.argmax(np.where(allowed, gain, -np.inf), axis=1)

  def tokens(table):
    return sums[np.arange(num_bins), table].sum() / counts.sum()

  low, high = 0.0, float(arms.tokens.max())  # at `high` no node is worth it
  for _ in range(60):
    middle = (low + high) / 2.0
    if tokens(table_at(middle)) >= least_tokens:
      low = middle
    else:
      high = middle
  return evaluate(arms, bins, costs, table_at(low))


def _totals(arms, bins, num_bins) -> tuple[np.ndarray, np.ndarray]:
  """Steps of each bin, and what every arm brings in them: [bins, arms]."""
  counts = np.bincount(bins, minlength=num_bins).astype(np.float64)
  sums = np.stack(
    [
      np.bincount(bins, weights=arms.tokens[:, a], minlength=num_bins)
      for a in range(len(arms.arms))
    ],
    axis=1,
  )
  return counts, sums


def evaluate(
  arms: Arms,
  bins: np.ndarray,
  costs: costs_lib.StepCosts,
  table: np.ndarray,
  *,
  seed: int = 0,
) -> Choice:
  """What a table of arm indices brings on these steps, in batches."""
  groups = _batches(len(bins), costs.batch, seed)
  tokens, step_ms = _simulate(arms, costs, table[bins], groups)
  return _choice(arms, table, tokens, step_ms)


def _choice(arms, indices, tokens, step_ms) -> Choice:
  return Choice(
    depth=np.array([arms.arms[i][0] for i in indices]),
    nodes=np.array([arms.arms[i][1] for i in indices]),
    rate=float(tokens / step_ms),
    tokens_per_step=float(tokens),
    step_ms=float(step_ms),
  )


def _batches(n: int, batch: int, seed: int) -> np.ndarray:
  """int [num_batches, batch], steps that happen together; some twice."""
  rng = np.random.default_rng(seed)
  # Enough that the largest row of a batch is seen often.
  order = np.concatenate(
    [rng.permutation(n) for _ in range(1 if batch < 8 else 2)]
  )
  order = np.resize(order, -(-len(order) // batch) * batch)
  return order.reshape(-1, batch)


def _simulate(arms, costs, picked, groups) -> tuple[float, float]:
  """Mean tokens of a row and mean time of a step, all rows waiting."""
  levels = np.maximum([d for d, _ in arms.arms], arms.base_depth)
  nodes = np.array([n for _, n in arms.arms])
  tokens = np.take_along_axis(arms.tokens, picked[:, None], 1)[:, 0]
  of_group = picked[groups]
  time_ms = costs.batch_ms(levels[of_group], nodes[of_group])
  return float(tokens[groups].mean()), float(time_ms.mean())


def _improve(arms, bins, costs, table, single, counts, seed) -> np.ndarray:
  groups = _batches(len(bins), costs.batch, seed)

  def rate_of(candidate):
    tokens, time_ms = _simulate(arms, costs, candidate[bins], groups)
    return tokens / time_ms

  # A batch waits for its slowest row, so the best single arm is often hard to
  # beat: start from the better one.
  everywhere = np.full_like(table, single)
  rates = [rate_of(np.full_like(table, arm)) for arm in range(len(arms.arms))]
  everywhere[:] = int(np.argmax(rates))
  table = max((table, everywhere), key=rate_of)
  best = rate_of(table)
  for _ in range(3):
    changed = False
    for index in np.flatnonzero(counts > 0):
      for arm in range(len(arms.arms)):
        candidate = table.copy()
        candidate[index] = arm
        rate = rate_of(candidate)
        if rate > best * (1 + 1e-9):
          table, best, changed = candidate, rate, True
    if not changed:
      break
  return table
