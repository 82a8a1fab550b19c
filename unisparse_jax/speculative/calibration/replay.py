# SPDX-License-Identifier: Apache-2.0
"""What other depths and sizes would have accepted, from logged trees alone.

A smaller tree of the same step is a prefix of the logged node list; a shallower
one is that list without its deeper nodes, in the same order. So one run with
the largest tree answers for every smaller one, step by step. What a replay
cannot know is that a shorter step would have begun the next one elsewhere.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecords:
  """Steps of rows that were decoding, one after the other.

  Attributes:
    entropy: float32 [n], cumulative top-K entropy of the best path.
    score: float32 [n], log-probability of that path under the drafter.
    depths: int8 [n, max_nodes], depth of each node by score, root first; -1
      for none.
    path: int16 [n, max_depth + 1], accepted node of each depth, -1 for none.
    request: int32 [n], which request a step belongs to.
    order: int32 [n], the step's number within its request.
    group: int32 [n], any label of the request, such as its domain.
  """

  entropy: np.ndarray
  score: np.ndarray
  depths: np.ndarray
  path: np.ndarray
  request: np.ndarray
  order: np.ndarray
  group: np.ndarray

  @classmethod
  def from_log(
    cls, log: Any, *, groups: Sequence[int], first_request: int = 0
  ) -> "StepRecords":
    """Takes the active steps out of a `statistics.StepLog` with trees.

    Args:
      log: of one call of `generate`.
      groups: label of each row.
      first_request: number of the call's first row.

    Raises:
      ValueError: the log has no trees.
    """
    if log.trees is None:
      raise ValueError(
        "log must hold trees; got log.trees=None. Use log_trees=True."
      )
    emitted = log.column("num_emitted")  # [steps, batch]
    steps = emitted.shape[0]
    step, row = np.nonzero(emitted > 0)
    take = functools.partial(_take, steps, step, row)
    return cls(
      entropy=log.column("entropy")[step, row].astype(np.float32),
      score=log.column("score")[step, row].astype(np.float32),
      depths=take(log.trees.depths).astype(np.int8),
      path=take(log.trees.path).astype(np.int16),
      request=(row + first_request).astype(np.int32),
      order=step.astype(np.int32),
      group=np.asarray(groups, np.int32)[row],
    )

  @classmethod
  def concatenate(cls, parts: Sequence["StepRecords"]) -> "StepRecords":
    """All steps of several calls."""
    return cls(
      **{
        field.name: np.concatenate([getattr(p, field.name) for p in parts])
        for field in dataclasses.fields(cls)
      }
    )

  def __len__(self) -> int:
    return len(self.entropy)

  def take(self, index: np.ndarray) -> "StepRecords":
    """The steps of an index or mask."""
    return type(self)(
      **{
        field.name: getattr(self, field.name)[index]
        for field in dataclasses.fields(self)
      }
    )

  @property
  def max_depth(self) -> int:
    """Deepest level of the logged trees."""
    return self.path.shape[1] - 1

  @property
  def max_nodes(self) -> int:
    """Draft nodes of the logged trees, root not counted."""
    return self.depths.shape[1] - 1

  @functools.cached_property
  def accept_len(self) -> np.ndarray:
    """int32 [n], accepted draft tokens of the logged trees."""
    return np.sum(self.path[:, 1:] > 0, axis=1, dtype=np.int32)

  @functools.cached_property
  def terminal_rank(self) -> np.ndarray:
    """int32 [n], index of the deepest accepted node; max_nodes for none."""
    last = np.max(self.path, axis=1).astype(np.int32)
    return np.where(self.accept_len > 0, last, self.max_nodes)

  def ranks(self, depth: int) -> np.ndarray:
    """Rank of each accepted node in the tree cut at `depth`.

    Returns:
      int32 [n, max_depth], rank of the accepted node of depth 1, 2, ... among
      nodes that are at most `depth` deep, from 1; a huge number for none.
    """
    return self._ranks[depth]

  @functools.cached_property
  def _ranks(self) -> dict[int, np.ndarray]:
    never = np.iinfo(np.int32).max
    nodes = np.maximum(self.path[:, 1:], 0).astype(np.int64)
    accepted = self.path[:, 1:] > 0
    levels = np.arange(1, self.max_depth + 1)
    result = {}
    for depth in range(1, self.max_depth + 1):
      kept = (self.depths > 0) & (self.depths <= depth)
      rank = np.cumsum(kept, axis=1, dtype=np.int32)
      of_path = np.take_along_axis(rank, nodes, axis=1)
      valid = accepted & (levels <= depth)
      result[depth] = np.where(valid, of_path, never)
    return result

  def tokens(self, depth: int, nodes: int) -> np.ndarray:
    """int32 [n], tokens that a step brings, bonus included.

    Args:
      depth: deepest level kept, 1 to max_depth.
      nodes: draft nodes verified, root not counted; 0: none.
    """
    if nodes == 0:
      return np.ones(len(self), np.int32)
    return 1 + np.sum(self.ranks(depth) <= nodes, axis=1, dtype=np.int32)

  def num_nodes(self, depth: int, nodes: int) -> np.ndarray:
    """int32 [n], nodes that are verified, root included: trees may be small."""
    kept = (self.depths > 0) & (self.depths <= depth)
    return 1 + np.minimum(np.sum(kept, axis=1, dtype=np.int32), nodes)


def _take(steps: int, step, row, array) -> np.ndarray:
  return np.asarray(array)[:steps][step, row]
