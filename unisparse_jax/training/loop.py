# SPDX-License-Identifier: Apache-2.0
"""The training loop: stages, metrics, checkpoints, budget, signals."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unisparse_jax import attention, models, records
from unisparse_jax.training import checkpoints as checkpoints_lib
from unisparse_jax.training import (
  clock,
  input_pipeline,
  metrics,
  optimizer,
  signals,
  train_step,
)
from unisparse_jax.training import config as config_lib

# Steps that may be under way on the device: enough to keep it busy, few enough
# for the clock and signals to mean something.
_STEPS_AHEAD = 2

Evaluate = Callable[[nnx.Module, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
  """What `train` returns.

  Attributes:
    model: float32 parameters, computing in `config.dtype`.
    step: steps done in all.
    finished: whether every stage is complete.
    reason: "finished", "max_seconds" or the name of a signal.
    seconds: wall-clock time of this call.
    evaluation: last result of `evaluate`, if it ran in this call.
  """

  model: nnx.Module
  step: int
  finished: bool
  reason: str
  seconds: float
  evaluation: Mapping[str, float] | None


def train(
  config: config_lib.TrainConfig,
  model_config: models.DecoderConfig,
  make_source: input_pipeline.SourceFactory,
  workdir: pathlib.Path | str,
  *,
  settings: Mapping[str, Any] | None = None,
  evaluate: Evaluate | None = None,
  attention_fn: Any = None,
  show_progress: bool = True,
  initial: models.Decoder | None = None,
) -> TrainResult:
  """Trains a decoder, or goes on where the run in `workdir` stopped.

  A run that was stopped anywhere, by SIGKILL too, ends with the same bits as
  one that was not: batches depend on the step only, and a checkpoint holds
  parameters, optimizer state, step and the input iterator's state.

  Args:
    config: see TrainConfig; its RUN_CONTROL_FIELDS may change on resuming.
    model_config: of the decoder; max_len must hold the longest stage.
    make_source: rows of each stage, see `input_pipeline.SourceFactory`.
    workdir: gets run.json, metrics.jsonl, tensorboard/ and checkpoints/.
    settings: of the data and of `initial`; part of the run's identity.
    evaluate: called with the model and the step; its numbers are written.
    attention_fn: default `attention.DenseAttention` with config.attention.
    show_progress: whether to show a bar or log lines.
    initial: weights to begin with; default: drawn from the seed.

  Returns:
    The model and how the call ended.

  Raises:
    ValueError: workdir belongs to another run; all checkpoints are damaged;
      a stage does not fit the model or the source.
    FloatingPointError: the loss is not finite. Checkpoints before it stay.
  """
  longest = max(stage.seq_len for stage in config.stages)
  if longest > model_config.max_len:
    raise ValueError(
      "seq_len of a stage must be <= max_len; got "
      f"seq_len={longest}, max_len={model_config.max_len}."
    )
  if initial is not None:
    check_initial(initial.config, model_config)
  start = time.monotonic()
  workdir = records.claim_workdir(
    workdir,
    {"model": model_config, "train": config, "settings": settings or {}},
    free=[f"train.{name}" for name in config_lib.RUN_CONTROL_FIELDS],
  )
  if attention_fn is None:
    attention_fn = attention.DenseAttention(implementation=config.attention)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopRequests())
    run = _Run(
      config,
      model_config,
      make_source,
      workdir,
      evaluate=evaluate,
      attention_fn=attention_fn,
      show_progress=show_progress,
      initial=initial,
      stack=stack,
    )
    return run.run(start, stop)


def check_initial(given: models.DecoderConfig, wanted: models.DecoderConfig):
  """Raises ValueError where `train` cannot begin with such a model's weights.

  Positions may be other ones: longer contexts are learnt so.

  Args:
    given: architecture of the weights.
    wanted: that of the model to train.
  """
  free = {"max_len": wanted.max_len, "rope_theta": wanted.rope_theta}
  if dataclasses.replace(given, **free) != wanted:
    raise ValueError(
      "initial must have the architecture of model_config, max_len and "
      f"rope_theta aside; got {given}; expected {wanted}."
    )


class _Run:
  """State of one call of `train`."""

  def __init__(
    self,
    config,
    model_config,
    make_source,
    workdir,
    *,
    evaluate,
    attention_fn,
    show_progress,
    initial,
    stack: contextlib.ExitStack,
  ):
    self._config = config
    self._evaluate = evaluate
    self._last_evaluation: tuple[int, Mapping[str, float]] | None = None
    model = models.Decoder(
      model_config,
      rngs=nnx.Rngs(config.seed),
      dtype=config_lib.DTYPES[config.dtype],
      param_dtype=jnp.float32,
    )
    self._graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    if initial is not None:
      params = jax.tree.map(
        lambda own, new: jnp.array(new, own.dtype),  # ours are donated
        params,
        nnx.to_pure_dict(nnx.state(initial)),
      )
    self._optimizer = optimizer.make_optimizer(config)
    self._schedule = optimizer.make_schedule(config)
    self._state = {
      "params": params,
      "opt_state": jax.jit(self._optimizer.init)(params),
    }
    self._checkpoints = checkpoints_lib.Checkpoints(
      workdir / "checkpoints", keep=config.keep_checkpoints
    )
    stack.callback(self._checkpoints.close)
    self._step = 0
    data_state = None
    if restored := self._checkpoints.restore(self._state):
      self._step = restored.step
      self._state = jax.device_put(restored.state)
      data_state = restored.meta["data"]
    self._saved_step = self._step
    self._writer = metrics.MetricWriter(workdir, step=self._step)
    stack.callback(self._writer.close)
    self._progress = metrics.Progress(
      config.total_steps, step=self._step, enabled=show_progress
    )
    stack.callback(self._progress.close)
    self._clock = clock.Clock(config, self._schedule)
    self._make_source = make_source
    self._batches: Any = None
    if self._step < config.total_steps:
      self._batches = input_pipeline.BatchIterator(
        config, make_source, step=self._step, state=data_state
      )
    self._batches_ahead: Any = None
    stack.callback(self._close_batches)
    self._train_step = jax.jit(
      train_step.make_train_step(
        self._graphdef,
        self._optimizer,
        attention_fn=attention_fn,
        z_loss=config.z_loss,
        remat=config.remat,
      ),
      donate_argnums=0,
    )
    # Of the stage that comes next, under way in a thread.
    self._ahead: concurrent.futures.Future | None = None
    self._compiler = concurrent.futures.ThreadPoolExecutor(1)
    stack.callback(self._compiler.shutdown, wait=False, cancel_futures=True)
    self._pending = collections.deque()  # (step, metric vector on the device)
    self._interval = metrics.Interval()
    self._rate = None  # tokens per second over the last interval

  def run(self, start: float, stop: signals.StopRequests) -> TrainResult:
    config = self._config
    compiled: Any = None
    stage_index = -1
    first = self._step
    reason = "finished"
    while self._step < config.total_steps:
      if stop.received:
        reason = stop.received
        break
      if (
        config.max_seconds is not None
        and not config.fit_budget
        and self._step > first  # every call gets on by a step at least
        and time.monotonic() - start > config.max_seconds
      ):
        reason = "max_seconds"
        break
      if config.fit_budget and self._leave_stage():
        continue
      batch = next(self._batches)
      if config.fit_budget:
        rate = self._clock.learning_rate(self._step)
        batch = {**batch, "update_scale": np.float32(rate)}
      if config.stage_of(self._step) != stage_index:
        stage_index = config.stage_of(self._step)
        compiled = self._compile(stage_index, batch)
      self._state, values = compiled(self._state, batch)
      self._step += 1
      self._clock.start()
      self._pending.append((self._step, values))
      self._drain(_STEPS_AHEAD)
      if self._step % config.checkpoint_every == 0:
        self._save()
      if config.eval_every and self._step % config.eval_every == 0:
        self._run_evaluation()
    finished = self._step >= config.total_steps
    self._drain(0)
    self._save()
    if finished:
      self._run_evaluation()
    self._checkpoints.wait()
    return TrainResult(
      model=self._model(),
      step=self._step,
      finished=finished,
      reason=reason,
      seconds=time.monotonic() - start,
      evaluation=self._last_evaluation and self._last_evaluation[1],
    )

  def _close_batches(self):
    for batches in (self._batches, self._batches_ahead):
      if batches is not None:
        batches.close()

  def _leave_stage(self) -> bool:
    """Jumps to the next stage's first step once this one's time is up."""
    config = self._config
    stage_index = config.stage_of(self._step)
    end = config.first_step(stage_index + 1)
    share = config.tokens_after(end) / config.total_tokens
    if self._clock.share() < share:
      return False
    self._progress.note(
      f"stage {stage_index} ends at step {self._step} of {end}: its time is up"
    )
    self._drain(0)
    self._batches.close()
    self._batches, self._batches_ahead = self._batches_ahead, None
    self._step = end
    if self._batches is None and end < config.total_steps:
      self._batches = input_pipeline.BatchIterator(
        config, self._make_source, step=end
      )
    return True

  def _compile(self, stage_index: int, batch):
    self._drain(0)
    stage = self._config.stages[stage_index]
    start = time.monotonic()
    if self._ahead is not None:
      compiled = self._ahead.result()
    else:
      compiled = self._train_step.lower(self._state, batch).compile()
    seconds = time.monotonic() - start
    self._progress.note(
      f"stage {stage_index}: {stage.steps} steps of {stage.batch_size} x "
      f"{stage.seq_len} tokens, compiled in {seconds:.1f} s"
    )
    self._ahead = None
    if self._config.fit_budget and stage_index + 1 < len(self._config.stages):
      # While this stage trains: a stage's share of the time is for training.
      self._ahead = self._compiler.submit(
        _compile_for,
        self._train_step,
        jax.tree.map(_shape, self._state),
        jax.tree.map(_shape, batch),
        self._config.stages[stage_index + 1],
      )
      # Its workers need a while to start, too.
      self._batches_ahead = input_pipeline.BatchIterator(
        self._config,
        self._make_source,
        step=self._config.first_step(stage_index + 1),
      )
      self._batches_ahead.start()
    self._interval = metrics.Interval()
    return compiled

  def _drain(self, ahead: int):
    """Takes in metrics of steps that are done; waits until <= ahead are not."""
    while len(self._pending) > ahead:
      step, values = self._pending.popleft()
      self._interval.add(np.asarray(values, np.float64))
      if not self._interval.finite:
        raise FloatingPointError(
          f"loss must stay finite; got loss={self._interval.last_loss} at step "
          f"{step}. The last checkpoint is of step {self._saved_step}; lower "
          "learning_rate or raise warmup_steps."
        )
      if step % self._config.log_every == 0 or step == self._config.total_steps:
        self._log(step)

  def _log(self, step: int):
    config = self._config
    stage_index = config.stage_of(step - 1)
    stage = config.stages[stage_index]
    tokens = self._interval.count * stage.tokens_per_step
    self._rate = tokens / max(self._interval.seconds(), 1e-9)
    left = config.total_tokens - config.tokens_after(step)
    line = {
      "stage": stage_index,
      "seq_len": stage.seq_len,
      "tokens": config.tokens_after(step),
      **self._interval.means(),
      "learning_rate": self._clock.learning_rate(step - 1),
      "tokens_per_s": self._rate,
      "seconds_left": left / self._rate,
    }
    self._writer.write("train", step, line)
    self._progress.show(step, line)
    self._interval = metrics.Interval()

  def _save(self):
    if self._saved_step == self._step:
      return
    self._drain(0)  # a step whose loss is not finite is never saved
    data_state = self._batches.get_state() if self._batches else None
    self._checkpoints.save(self._step, self._state, {"data": data_state})
    self._saved_step = self._step
    self._interval.restart_clock()

  def _run_evaluation(self):
    if self._evaluate is None:
      return
    if self._last_evaluation and self._last_evaluation[0] == self._step:
      return
    self._drain(0)
    start = time.monotonic()
    values = dict(self._evaluate(self._model(), self._step))
    self._last_evaluation = (self._step, values)
    self._writer.write(
      "eval", self._step, {**values, "seconds": time.monotonic() - start}
    )
    shown = "  ".join(
      f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
      for name, value in values.items()
    )
    self._progress.note(f"evaluation at step {self._step}: {shown}")
    self._interval.restart_clock()

  def _model(self) -> nnx.Module:
    # A copy: the step donates the arrays it is given.
    params = jax.tree.map(jnp.copy, self._state["params"])
    return nnx.merge(self._graphdef, nnx.State(params))


def _shape(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _compile_for(step, state, batch, stage: config_lib.Stage):
  """The compiled step for another stage's batches."""
  rows = (stage.batch_size, stage.seq_len + 1)
  batch = {
    name: jax.ShapeDtypeStruct(rows, x.dtype) if x.ndim == 2 else x
    for name, x in batch.items()
  }
  return step.lower(state, batch).compile()
