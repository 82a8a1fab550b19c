# SPDX-License-Identifier: Apache-2.0
"""Which measurement of a frontier comes next, if time is dear.

Answers cost most. For each pattern and length a search over its budgets, which
must be listed from sparse to full, finds the sparsest that keeps the dense
score, and only that point's layers and times are measured. It starts where the
length before ended, looks beside it, then bisects. Layers and times of the
other points come last.

Bisection takes scores to rise with the budget. With few prompts they do not
always (results/frontier_study_h200.jsonl: UniSparse at 16K 89.6% at 0.8, 87.8%
at 0.9), so what it finds is the sparsest of the budgets that were asked, and a
sparser one that was not may keep the score too: `search=False` asks all.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import rich.console

from experiments import long_context
from experiments.prefill import (
  frontier_config,
  long_context_config,
  long_context_run,
)

_DENSE = long_context_config.DENSE
_ORDER = ("answers", "next_token", "attention_time", "prefill", "layers")
Step = long_context_run.Step


def measure(
  config: long_context_config.LongContextConfig,
  sweeps: Sequence[frontier_config.Sweep],
  share: float,
  workdir: str,
  console: rich.console.Console,
):
  """Takes measurement after measurement until none is left, or no time.

  A measurement that fails is told of and left out: a pattern that one back end
  refuses must not cost the others theirs.

  Args:
    config: the settings of the run.
    sweeps: its patterns, the most wanted first.
    share: of the dense score that counts as kept.
    workdir: folder of the run.
    console: where progress is printed.

  Returns:
    All records of the run, and its folder.
  """
  run = long_context.MeasuredRun(config, workdir)
  search = Search(config, sweeps, share, run.model_config.num_layers)
  for record in run.found():
    search.add(record)
  count, length = 0, None
  while (step := search.next_step()) is not None:
    if run.time_is_up():
      console.print("time is up: some measurements are left")
      break
    if config.scan_layers and step.length != length:
      length = step.length
      run.measurer.programs.ahead(length)
    count += 1
    try:
      values = run.take(step)
    except Exception as error:
      reason = f"{type(error).__name__}: {str(error)[:200]}"
      console.print(f"[{count}] {step}: {reason}", markup=False)
      search.give_up(step)
      continue
    search.add({**vars(step), **values})
    long_context.print_step(console, str(count), step, values)
  return run.found(), run.path


class Search:
  """What is known, and what is therefore asked next.

  Args:
    config: the settings of the run.
    sweeps: its patterns, the most wanted first.
    share: of the dense score that counts as kept.
    num_layers: of the model.
  """

  def __init__(
    self,
    config: long_context_config.LongContextConfig,
    sweeps: Sequence[frontier_config.Sweep],
    share: float,
    num_layers: int,
  ):
    self._config, self._sweeps, self._share = config, sweeps, share
    self._quality_layers = config.quality_layers or tuple(range(num_layers))
    self._known: dict[tuple, dict] = {}
    self._failed: set[tuple] = set()  # (pattern, length)

  def add(self, record: dict):
    """Takes in a record."""
    self._known[long_context_run.key(record)] = record

  def give_up(self, step: Step):
    """Asks nothing more of a pattern at a length."""
    self._failed.add((step.pattern, step.length))

  def next_step(self) -> Step | None:
    """The most wanted measurement that is missing; None if none is."""
    return next(iter(self._missing()), None)

  def matched(self, sweep: frontier_config.Sweep, length: int) -> str | None:
    """Label of a sweep's sparsest point that keeps the score, if found."""
    points = self._alive(sweep, length)
    kept = [p for p in points if self._keeps(p, length)]
    return kept[0] if kept else None

  def _missing(self) -> Iterable[Step]:
    for length in self._config.lengths:
      reference = self._config.reference_measure
      if (_DENSE, length) in self._failed:
        continue
      yield from self._of(_DENSE, length, ("answers",))
      # Answers of all patterns first: programs compile beside them, and a clock
      # waits for those.
      for sweep in self._sweeps:
        point = self._to_try(sweep, length)
        if point is not None:
          yield from self._of(point, length, ("answers",))
          return  # what comes next depends on them
      # So that its times stand beside the others'.
      yield from self._of(_DENSE, length, (*reference, "attention_time"))
      for sweep in self._sweeps:
        points = self._alive(sweep, length)
        if points and "answers" in sweep.measure:
          # Where no budget keeps the score, the fullest stands for it.
          point = self.matched(sweep, length) or points[-1]
          yield from self._of(point, length, sweep.measure)
    yield from self._rest(self._config.lengths, with_answers=True)
    # Such as the oracle, whose selection costs more than dense attention.
    yield from self._rest(sorted(self._config.lengths), with_answers=False)

  def _rest(self, lengths, *, with_answers) -> Iterable[Step]:
    """Layers and times of all points."""
    for length in lengths:
      for sweep in self._sweeps:
        if ("answers" in sweep.measure) != with_answers:
          continue
        kinds = [m for m in sweep.measure if m not in ("answers", "prefill")]
        for point in self._alive(sweep, length):
          yield from self._of(point, length, kinds)

  def _to_try(self, sweep, length) -> str | None:
    """The point whose answers are missing and wanted; None: all is known."""
    if "answers" not in sweep.measure:
      return None  # drawn at all its budgets, with the rest
    points = self._alive(sweep, length)
    low, high = -1, len(points)
    for index, point in enumerate(points):
      keeps = self._keeps(point, length)
      if keeps is None:
        continue
      if keeps:
        high = min(high, index)
      elif index < high:
        low = index
    if high - low <= 1:
      return None
    guess = self._guess(sweep, length, points)
    if low == -1 and high == len(points):
      return points[guess]
    if low == -1 and high == guess:
      return points[guess - 1]
    if high == len(points) and low == guess:
      return points[guess + 1]
    return points[(low + high) // 2]

  def _guess(self, sweep, length, points) -> int:
    """Where another length ended, the one measured last first."""
    done = self._config.lengths[: self._config.lengths.index(length)]
    for other in reversed(done):
      found = self.matched(sweep, other)
      if found in points:
        return points.index(found)
    return len(points) // 2

  def _keeps(self, point, length) -> bool | None:
    """Whether a point keeps the dense score; None: its answers are missing."""
    scores = []
    for label in (point, _DENSE):
      keys = [("answers", label, length, task) for task in self._config.tasks]
      if any(key not in self._known for key in keys):
        return None
      scores.append(np.mean([self._known[key]["score"] for key in keys]))
    return bool(scores[0] >= self._share * scores[1])

  def _alive(self, sweep, length) -> list[str]:
    return [p for p in sweep.points if (p, length) not in self._failed]

  def _of(self, label, length, kinds) -> Iterable[Step]:
    items = {
      "answers": self._config.tasks,
      "layers": self._quality_layers,
      "attention_time": self._config.timed_layers,
    }
    for kind in _ORDER:
      if kind not in kinds or (label, length) in self._failed:
        continue
      for item in items.get(kind, ("",)):
        step = Step(kind=kind, pattern=label, length=length, item=str(item))
        if step.key not in self._known:
          yield step
