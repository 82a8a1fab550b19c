# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step as a function of depth and bucket, as measured."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCosts:
  """Milliseconds of one step of a batch.

  time = fixed_ms + draft_ms * levels + verify_ms[bucket]; a step that does not
  draft takes plain_ms.

  Attributes:
    batch: rows.
    buckets: nodes that verification is compiled for, root included: of the
      largest row, or of all rows together if `packed`.
    fixed_ms: of a step that drafts: choosing, committing, the head's own pass.
    draft_ms: of one more level of drafting.
    verify_ms: of each bucket; with fixed_ms, only their sum is measured, so
      the smallest bucket's is that of plain decoding.
    plain_ms: of plain decoding, per token.
    packed: whether verification packs the nodes of all rows.
  """

  batch: int
  buckets: tuple[int, ...]
  fixed_ms: float
  draft_ms: float
  verify_ms: tuple[float, ...]
  plain_ms: float
  packed: bool = False

  def __post_init__(self):
    if len(self.buckets) != len(self.verify_ms):
      raise ValueError(
        "verify_ms must have a time for each bucket; got "
        f"verify_ms={self.verify_ms}, buckets={self.buckets}."
      )
    values = (self.fixed_ms, self.draft_ms, self.plain_ms, *self.verify_ms)
    if not np.all(np.isfinite(values)) or min(values) < 0:
      raise ValueError(f"times must be finite and >= 0; got {values}.")

  def step_ms(self, levels, nodes) -> np.ndarray:
    """Milliseconds of steps in which all rows do the same.

    Args:
      levels: drafted.
      nodes: draft nodes of every row, root not counted.
    """
    nodes = np.asarray(nodes) + 1
    return self._ms(levels, nodes * self.batch if self.packed else nodes)

  def batch_ms(self, levels: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Milliseconds of steps in which rows differ.

    Args:
      levels: int [n, batch], wanted by each row.
      nodes: int [n, batch], draft nodes of each row, root not counted.

    Returns:
      float64 [n].
    """
    combined = np.sum if self.packed else np.max
    return self._ms(levels.max(axis=1), combined(nodes + 1, axis=1))

  def _ms(self, levels, size) -> np.ndarray:
    index = np.searchsorted(self.buckets, size)
    if self.packed:  # The engine keeps the best nodes that fit.
      index = np.minimum(index, len(self.buckets) - 1)
    elif np.any(index >= len(self.buckets)):
      raise ValueError(
        "nodes must fit the buckets beside the root; got "
        f"{np.max(size) - 1}, buckets={self.buckets}."
      )
    verify = np.asarray(self.verify_ms)[index]
    return self.fixed_ms + self.draft_ms * np.asarray(levels) + verify


def fit_costs(
  measurements: Sequence[tuple[int, int, float]],
  *,
  batch: int,
  buckets: Sequence[int],
  plain_ms: float,
  packed: bool = False,
) -> StepCosts:
  """Least squares over timed fixed policies, no time below 0.

  Args:
    measurements: (levels, bucket, milliseconds a step) of each; at least two
      different numbers of levels, and every bucket.
    batch: rows.
    buckets: as compiled.
    plain_ms: of plain decoding, per token.
    packed: see `StepCosts`.

  Raises:
    ValueError: a bucket was not measured, or only one number of levels.
  """
  from scipy import optimize  # Needed at calibration time only.

  buckets = tuple(buckets)
  seen = {bucket for _, bucket, _ in measurements}
  levels = {level for level, _, _ in measurements}
  if seen != set(buckets) or len(levels) < 2:
    raise ValueError(
      "measurements must cover every bucket and two numbers of levels; got "
      f"buckets {sorted(seen)} of {buckets}, levels {sorted(levels)}."
    )
  rows = np.zeros((len(measurements), 1 + len(buckets)))
  times = np.zeros(len(measurements))
  for row, (level, bucket, time_ms) in enumerate(measurements):
    rows[row, 0] = level
    rows[row, 1 + buckets.index(bucket)] = 1.0
    times[row] = time_ms
  # Relative errors: a slow bucket must not drown the fast ones.
  solution, _ = optimize.nnls(rows / times[:, None], np.ones(len(times)))
  draft_ms, at_bucket = float(solution[0]), np.maximum.accumulate(solution[1:])
  fixed = max(float(at_bucket[0]) - plain_ms, 0.0)
  return StepCosts(
    batch=batch,
    buckets=buckets,
    fixed_ms=fixed,
    draft_ms=draft_ms,
    verify_ms=tuple(float(x) - fixed for x in at_bucket),
    plain_ms=float(plain_ms),
    packed=packed,
  )


def from_mapping(values: Mapping) -> StepCosts:
  """What `dataclasses.asdict` made, read back from JSON."""
  return StepCosts(
    **{
      **values,
      "buckets": tuple(values["buckets"]),
      "verify_ms": tuple(values["verify_ms"]),
    }
  )
