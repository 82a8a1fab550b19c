# SPDX-License-Identifier: Apache-2.0
"""Batches of a target's own texts, by random access."""

import functools
from collections.abc import Mapping

import numpy as np

from unisparse_jax.training import head_config, own_texts


class Batches:
  """Which rows each step takes; a function of the seed and the step alone."""

  def __init__(
    self,
    groups: Mapping[str, own_texts.TextGroup],
    config: head_config.HeadTrainConfig,
  ):
    self._groups, self._config = dict(groups), config
    self._orders = {}
    self._held_out = {}
    shares = {}
    for number, (name, group) in enumerate(self._groups.items()):
      size = self.batch_size(name)
      rng = np.random.default_rng([config.seed, number])
      order = rng.permutation(group.num_rows)
      held_out = round(group.num_rows * config.held_out)
      train = order[held_out:]
      if len(train) < size:
        raise ValueError(
          f"texts of {name} must fill a batch of {size} rows; got "
          f"{len(train)} rows. Write more, or lower batch_tokens."
        )
      # With few rows, evaluation takes what training takes.
      self._held_out[name] = order[:held_out] if held_out else train
      self._orders[name] = train
      shares[name] = len(train) / size
    total = sum(shares.values())
    self._shares = {name: share / total for name, share in shares.items()}

  def batch_size(self, name: str) -> int:
    """Rows of a batch of a group."""
    row_len = self._groups[name].row_len
    return max(1, self._config.batch_tokens // row_len)

  @functools.cached_property
  def plan(self) -> list[tuple[str, int]]:
    """Group of each step, and how many of its batches came before."""
    due = dict.fromkeys(self._shares, 0.0)
    taken = dict.fromkeys(self._shares, 0)
    plan = []
    for _ in range(self._config.steps):
      for name, share in self._shares.items():
        due[name] += share
      name = max(due, key=lambda name: due[name])
      due[name] -= 1.0
      plan.append((name, taken[name]))
      taken[name] += 1
    return plan

  def __getitem__(self, step: int) -> tuple[str, dict[str, np.ndarray]]:
    """Group and batch of a step."""
    name, index = self.plan[step]
    size, order = self.batch_size(name), self._orders[name]
    per_epoch = len(order) // size
    epoch, index = divmod(index, per_epoch)
    rng = np.random.default_rng([self._config.seed, 7, epoch])
    rows = rng.permutation(order)[index * size : (index + 1) * size]
    return name, self._groups[name].take(rows)

  def held_out(self, name: str):
    """Batches for evaluation; the last one is filled up by repetition."""
    size, rows = self.batch_size(name), self._held_out[name]
    for start in range(0, len(rows), size)[: self._config.eval_batches]:
      yield self._groups[name].take(np.resize(rows[start : start + size], size))
