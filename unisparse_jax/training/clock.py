# SPDX-License-Identifier: Apache-2.0
"""How far a run is, by steps or by time."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from unisparse_jax.training import config as config_lib


class Clock:
  """How far a run is, by tokens and, with `fit_budget`, by time."""

  def __init__(self, config: config_lib.TrainConfig, schedule):
    self._config = config
    # All at once: asking the device at every step would wait for the steps
    # that are under way.
    steps = jnp.arange(config.total_steps, dtype=jnp.int32)
    self._rates = np.asarray(jax.vmap(schedule)(steps), np.float64)
    self._opened = time.monotonic()
    self._started: float | None = None

  def start(self):
    """Called after each step: time counts from the end of the first."""
    if self._started is None:
      self._started = time.monotonic()

  def share(self) -> float:
    """Share of the time budget that is used up, from 0; 0 without one."""
    config = self._config
    if not config.fit_budget or self._started is None:
      return 0.0
    assert config.max_seconds is not None, "checked by TrainConfig"
    budget = config.max_seconds - (self._started - self._opened)
    return (time.monotonic() - self._started) / max(budget, 1e-6)

  def learning_rate(self, step: int) -> float:
    """Of a step, counted from 0; the warm-up goes by steps alone."""
    config = self._config
    due = step
    if step >= config.warmup_steps:
      due = max(step, int(min(self.share(), 1.0) * config.total_steps))
    return float(self._rates[min(due, config.total_steps - 1)])
