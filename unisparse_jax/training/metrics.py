# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: JSON lines, TensorBoard events, terminal progress."""

import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX

from unisparse_jax.training import train_step

_LOG = logging.getLogger(__name__)


class MetricWriter:
  """Writes one JSON line and one set of TensorBoard scalars per call.

  Opened at step s, it drops what an earlier process wrote after step s, so a
  resumed run has every step once.

  Args:
    workdir: gets `metrics.jsonl` and `tensorboard/`.
    step: steps done so far.
  """

  def __init__(self, workdir: pathlib.Path, *, step: int):
    self._path = workdir / "metrics.jsonl"
    _drop_after(self._path, step)
    self._file = self._path.open("a", encoding="utf-8")
    self._events = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"),
      purge_step=step + 1 if step else None,
      write_to_disk=True,
    )

  def write(self, kind: str, step: int, values: Mapping[str, Any]):
    """Writes `values`; numbers also go to TensorBoard as kind/name."""
    line = json.dumps({"kind": kind, "step": step, **values})
    self._file.write(line + "\n")
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, int | float) and not isinstance(value, bool):
        self._events.add_scalar(f"{kind}/{name}", value, step)

  def close(self):
    """Flushes both."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    self._events.close()


def read_metrics(path: pathlib.Path | str) -> list[dict[str, Any]]:
  """Lines of a metrics file; a truncated last line is left out."""
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  records = []
  for number, line in enumerate(lines):
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines) - 1:
        break
      raise ValueError(
        f"{path} must hold one JSON object per line; got line {number + 1}: "
        f"{line[:80]!r}."
      ) from error
  return records


class Interval:
  """Sums of the steps since the last line of metrics."""

  def __init__(self):
    self.count = 0
    self._sums = np.zeros(len(train_step.METRIC_NAMES))
    self._start = time.monotonic()
    self._paused = 0.0
    self._last = self._start
    self.finite = True
    self.last_loss = float("nan")

  def add(self, values: np.ndarray):
    """Adds one step: a vector in the order of METRIC_NAMES."""
    self.count += 1
    self._sums += values
    self._last = time.monotonic()
    named = dict(zip(train_step.METRIC_NAMES, values, strict=True))
    with np.errstate(invalid="ignore"):  # inf / inf
      self.last_loss = float(named["loss_sum"] / max(named["weight_sum"], 1e-6))
    self.finite = bool(np.all(np.isfinite(values)))

  def restart_clock(self):
    """Leaves the time since the last step out of the rate."""
    now = time.monotonic()
    self._paused += now - self._last
    self._last = now

  def seconds(self) -> float:
    """Time spent on the steps."""
    return self._last - self._start - self._paused

  def means(self) -> dict[str, float | None]:
    """Nats per token and rates; None where no such token was seen."""
    s = dict(zip(train_step.METRIC_NAMES, self._sums, strict=True))

    def ratio(numerator, denominator):
      return float(numerator / denominator) if denominator else None

    return {
      "loss": ratio(s["loss_sum"], s["weight_sum"]),
      "code_loss": ratio(s["code_loss_sum"], s["code_count"]),
      "answer_loss": ratio(s["answer_loss_sum"], s["answer_count"]),
      "answer_accuracy": ratio(s["answer_correct"], s["answer_count"]),
      "lse_rms": float(np.sqrt(s["lse_sq_mean"] / self.count)),
      "grad_norm": float(s["grad_norm"] / self.count),
    }


class Progress:
  """Shows steps, rate and time left: a bar on a terminal, else log lines.

  Args:
    total_steps: of the whole run.
    step: steps done so far.
    enabled: False shows nothing.
  """

  def __init__(self, total_steps: int, *, step: int, enabled: bool = True):
    self._total = total_steps
    self._bar = None
    self._lines = enabled
    if enabled and sys.stderr.isatty():
      self._bar, self._task = _make_bar(total_steps, step)
      self._bar.start()

  def show(self, step: int, values: Mapping[str, Any]):
    """Updates the display with the metrics written at `step`."""
    text = _summary(values)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=text)
    elif self._lines:
      _LOG.info("step %d/%d  %s", step, self._total, text)

  def note(self, text: str):
    """Shows one line above the bar."""
    if self._bar is not None:
      self._bar.console.print(text)
    elif self._lines:
      _LOG.info("%s", text)

  def close(self):
    """Leaves the terminal clean."""
    if self._bar is not None:
      self._bar.stop()


def format_seconds(seconds: float) -> str:
  """ "1h02m", "3m05s" or "7s"."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  if seconds >= 60:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds}s"


def _summary(values: Mapping[str, Any]) -> str:
  parts = [f"stage {values['stage']} ({values['seq_len']} tokens)"]
  for name, label, form in (
    ("loss", "loss", "{:.3f}"),
    ("code_loss", "code", "{:.3f}"),
    ("answer_accuracy", "answers", "{:.1%}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
  ):
    if values.get(name) is not None:
      parts.append(f"{label} {form.format(values[name])}")
  if values.get("seconds_left") is not None:
    parts.append(f"left {format_seconds(values['seconds_left'])}")
  return "  ".join(parts)


def _make_bar(total_steps: int, step: int):
  from rich import progress  # Only where a terminal shows it.

  bar = progress.Progress(
    progress.TextColumn("training"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[text]}"),
  )
  return bar, bar.add_task("", total=total_steps, completed=step, text="")


def _drop_after(path: pathlib.Path, step: int):
  if not path.exists():
    return
  kept = [r for r in read_metrics(path) if r["step"] <= step]
  temporary = path.with_suffix(".tmp")
  temporary.write_text(
    "".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8"
  )
  os.replace(temporary, path)
