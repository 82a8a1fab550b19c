# SPDX-License-Identifier: Apache-2.0
"""Training of a draft head on texts that its target wrote.

The target runs in the same step as the head, so no feature is ever stored.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from unisparse_jax import attention, models, records
from unisparse_jax.speculative import eagle_head, head_loss
from unisparse_jax.training import checkpoints as checkpoints_lib
from unisparse_jax.training import config as config_lib
from unisparse_jax.training import (
  head_batches,
  head_config,
  metrics,
  optimizer,
  own_texts,
  signals,
)

_LOG = logging.getLogger(__name__)
_STEPS_AHEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadResult:
  """What `train_head` returns.

  Attributes:
    head: float32 parameters, computing in `config.dtype`.
    step: steps done in all.
    reason: "finished", "max_seconds" or the name of a signal.
    seconds: wall-clock time of this call.
    evaluation: see `head_loss.summarise`, on held-out rows; by group.
  """

  head: eagle_head.EagleHead
  step: int
  reason: str
  seconds: float
  evaluation: Mapping[str, Any]


def train_head(
  config: head_config.HeadTrainConfig,
  target: models.Decoder,
  groups: Mapping[str, own_texts.TextGroup],
  workdir: pathlib.Path | str,
  *,
  head: eagle_head.EagleHead | None = None,
  settings: Mapping[str, Any] | None = None,
  show_progress: bool = True,
) -> HeadResult:
  """Trains a draft head, or goes on where the run in `workdir` stopped.

  Args:
    config: see HeadTrainConfig; its RUN_CONTROL_FIELDS may change on resuming.
    target: the decoder; it stays as it is.
    groups: what the target wrote.
    workdir: gets run.json, metrics.jsonl, tensorboard/ and checkpoints/.
    head: where to start; default `EagleHead.from_target`.
    settings: more that identifies the run.
    show_progress: whether to show a bar or log lines.

  Raises:
    ValueError: workdir belongs to another run; a group fills no batch.
    FloatingPointError: the loss is not finite.
  """
  workdir = records.claim_workdir(
    workdir,
    {"train": config, "target": target.config, "settings": settings or {}},
    free=[f"train.{name}" for name in head_config.RUN_CONTROL_FIELDS],
  )
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopRequests())
    run = _Run(config, target, groups, workdir, head, show_progress, stack)
    return run.run(stop)


class _Run:
  """State of one call of `train_head`."""

  def __init__(
    self, config, target, groups, workdir, head, show_progress, stack
  ):
    self._opened = time.monotonic()
    self._started: float | None = None
    self._config, self._target = config, target
    self._batches = head_batches.Batches(groups, config)
    self._groups = groups
    if head is None:
      head = eagle_head.EagleHead.from_target(
        target,
        rngs=nnx.Rngs(config.seed),
        dtype=config_lib.DTYPES[config.dtype],
      )
    self._graphdef, params = nnx.split(head)
    params = nnx.to_pure_dict(params)
    # Steps donate what they are given; the caller's head stays whole.
    params = jax.tree.map(jnp.copy, params)
    self._optimizer = _make_optimizer(config, head.config.is_shared)
    self._state = {
      "params": params,
      "opt_state": jax.jit(self._optimizer.init)(params),
    }
    self._checkpoints = checkpoints_lib.Checkpoints(
      workdir / "checkpoints", keep=config.keep_checkpoints
    )
    stack.callback(self._checkpoints.close)
    self._step, self._spent = 0, 0.0
    if restored := self._checkpoints.restore(self._state):
      self._step = restored.step
      self._state = jax.device_put(restored.state)
      self._spent = restored.meta["share"]
    self._saved_step = self._step
    self._writer = metrics.MetricWriter(workdir, step=self._step)
    stack.callback(self._writer.close)
    self._progress = metrics.Progress(
      config.steps, step=self._step, enabled=show_progress
    )
    stack.callback(self._progress.close)
    loss = functools.partial(
      _loss,
      self._graphdef,
      num_unrolled=config.num_unrolled,
      decay=config.decay,
      top_k=config.top_k,
      attention_fn=attention.DenseAttention(implementation=config.attention),
    )
    # The target is an argument: closed over, it would be a constant.
    self._train_step = jax.jit(
      functools.partial(_step, loss, self._optimizer),
      donate_argnums=0,
      static_argnames="window",
    )
    self._evaluate_batch = jax.jit(
      lambda *args, window: loss(*args, window=window)[1],
      static_argnames="window",
    )
    # The slots that draft what the target wrote: often a small part of a row.
    self._windows = {
      name: group.longest + config.num_unrolled - 1
      for name, group in groups.items()
    }
    self._pending = collections.deque()
    self._sums: Any = None
    self._interval_start = time.monotonic()
    self._interval_tokens = 0

  def run(self, stop) -> HeadResult:
    config = self._config
    reason, first = "finished", self._step
    while self._step < config.steps:
      if stop.received:
        reason = stop.received
        break
      if self._share() >= 1.0 and self._step > first:
        reason = "max_seconds"
        break
      rate = self._learning_rate()
      name, batch = self._batches[self._step]
      self._state, sums = self._train_step(
        self._state,
        self._target,
        batch,
        np.float32(rate),
        window=self._windows[name],
      )
      self._step += 1
      self._pending.append((self._step, name, rate, sums))
      self._drain(_STEPS_AHEAD)
      if self._started is None:
        self._drain(0)
        self._started = self._interval_start = time.monotonic()
      if self._step % config.checkpoint_every == 0:
        self._save()
      if config.eval_every and self._step % config.eval_every == 0:
        self._evaluate()
    self._drain(0)
    self._save()
    evaluation = self._evaluate()
    self._checkpoints.wait()
    return HeadResult(
      head=self._head(),
      step=self._step,
      reason=reason,
      seconds=time.monotonic() - self._opened,
      evaluation=evaluation,
    )

  def _share(self) -> float:
    """Share of the run that is done, by steps or by time."""
    share = self._step / self._config.steps
    if self._config.max_seconds is None:
      return share
    if self._started is None:
      return max(share, self._spent)
    budget = self._config.max_seconds - (self._started - self._opened)
    spent = (time.monotonic() - self._started) / max(budget, 1e-6)
    return max(share, self._spent + (1.0 - self._spent) * spent)

  def _learning_rate(self) -> float:
    config = self._config
    warmup = max(1, round(config.steps * config.warmup_fraction))
    share = min(self._share(), 1.0)
    cosine = 0.5 * (1.0 + np.cos(np.pi * share))
    final = config.final_lr_fraction
    scale = final + (1.0 - final) * cosine
    return config.learning_rate * min(scale, (self._step + 1) / warmup)

  def _drain(self, ahead: int):
    while len(self._pending) > ahead:
      step, name, rate, sums = self._pending.popleft()
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
      if not np.all(np.isfinite(sums["loss"])):
        raise FloatingPointError(
          f"loss must stay finite; got {sums['loss']} at step {step}. The last "
          f"checkpoint is of step {self._saved_step}; lower learning_rate."
        )
      self._sums = (
        sums if self._sums is None else jax.tree.map(np.add, self._sums, sums)
      )
      group = self._groups[name]
      self._interval_tokens += group.row_len * self._batches.batch_size(name)
      if step % self._config.log_every == 0 or step == self._config.steps:
        self._log(step, rate)

  def _log(self, step: int, rate: float):
    seconds = max(time.monotonic() - self._interval_start, 1e-9)
    count = self._sums.pop("steps")
    line = {
      **_flat(head_loss.summarise(self._sums)),
      "grad_norm": float(self._sums["grad_norm"] / count),
      "learning_rate": rate,
      "tokens_per_s": self._interval_tokens / seconds,
    }
    self._writer.write("train", step, line)
    self._progress.note(
      f"head step {step}/{self._config.steps}  loss {line['loss_0']:.3f}  "
      f"accuracy {line['accuracy_0']:.1%} to "
      f"{line[f'accuracy_{self._config.num_unrolled - 1}']:.1%}  tau "
      f"{line['tau']:.2f}  ECE {line['ece']:.3f}  "
      f"tokens/s {line['tokens_per_s']:,.0f}"
    )
    self._sums = None
    self._interval_start, self._interval_tokens = time.monotonic(), 0

  def _save(self):
    if self._saved_step == self._step:
      return
    self._checkpoints.save(
      self._step, self._state, {"share": min(self._share(), 1.0)}
    )
    self._saved_step = self._step

  def _evaluate(self) -> dict[str, Any]:
    self._drain(0)
    result = {}
    for name in self._groups:
      total = None
      for batch in self._batches.held_out(name):
        sums = self._evaluate_batch(
          self._state["params"],
          self._target,
          batch,
          window=self._windows[name],
        )
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
      result[name] = head_loss.summarise(total)
      self._writer.write(f"eval_{name}", self._step, _flat(result[name]))
      self._progress.note(
        f"held out, {name}: tau {result[name]['tau']:.2f} on a chain of "
        f"{self._config.num_unrolled}, accuracy "
        + " ".join(f"{a:.3f}" for a in result[name]["accuracy"])
        + f", ECE {result[name]['ece']:.3f}"
      )
    self._interval_start, self._interval_tokens = time.monotonic(), 0
    return result

  def _head(self) -> eagle_head.EagleHead:
    params = jax.tree.map(jnp.copy, self._state["params"])
    return nnx.merge(self._graphdef, nnx.State(params))


def _loss(graphdef, params, target, batch, **settings):
  head = nnx.merge(graphdef, nnx.State(params))
  target = jax.lax.stop_gradient(target)
  hidden, _, taps = target.hidden_states_and_taps(
    batch["tokens"],
    taps=head.config.tap_layers,
    attention_fn=settings["attention_fn"],
  )
  return head_loss.unrolled_loss(
    head,
    batch["tokens"],
    jax.lax.stop_gradient(taps),
    jax.lax.stop_gradient(hidden),
    target.logits,
    batch["weights"],
    num_steps=settings["num_unrolled"],
    decay=settings["decay"],
    top_k=settings["top_k"],
    window=settings["window"],
    metric_rows=settings.get("metric_rows"),
    attention_fn=settings["attention_fn"],
  )


def _step(loss, transform, state, target, batch, rate, *, window):
  # A quarter of the rows tells how training goes.
  rows = -(-batch["tokens"].shape[0] // 4)
  loss = functools.partial(loss, window=window, metric_rows=rows)
  (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(
    state["params"], target, batch
  )
  updates, opt_state = transform.update(
    grads, state["opt_state"], state["params"]
  )
  updates = jax.tree.map(lambda u: u * rate, updates)
  params = optax.apply_updates(state["params"], updates)
  sums = {
    **sums,
    "grad_norm": optax.tree.norm(grads),
    "steps": jnp.float32(1.0),
  }
  return {"params": params, "opt_state": opt_state}, sums


def _make_optimizer(config, is_frozen) -> optax.GradientTransformation:
  """Clipping and AdamW at a learning rate of 1, but for frozen parts."""
  adamw = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      1.0,
      b1=config.adam_b1,
      b2=config.adam_b2,
      weight_decay=config.weight_decay,
      mask=optimizer.decay_mask,
    ),
  )

  def label(params):
    return {
      name: jax.tree.map(
        lambda _, name=name: "frozen" if is_frozen(name) else "trained", part
      )
      for name, part in params.items()
    }

  transform = optax.multi_transform(
    {"trained": adamw, "frozen": optax.set_to_zero()}, label
  )
  return optax.GradientTransformation(
    optimizer.standard_promotion(transform.init),
    optimizer.standard_promotion(transform.update),
  )


def _flat(summary: Mapping[str, Any]) -> dict[str, float]:
  """Lists spread out: accuracy_0, accuracy_1, ..."""
  flat = {}
  for name, value in summary.items():
    if isinstance(value, list):
      flat |= {f"{name}_{i}": x for i, x in enumerate(value)}
    else:
      flat[name] = value
  return flat
