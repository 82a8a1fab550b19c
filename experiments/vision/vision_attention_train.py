# SPDX-License-Identifier: Apache-2.0
"""Trains the video reader, and goes on where an earlier run stopped."""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.vision import vision_attention_config as config_lib
from experiments.vision import vision_attention_data as data_lib
from experiments.vision import vision_attention_model as model_lib
from unisparse_jax import records, training

_CLIP_NORM = 1.0
_ADAM_B2 = 0.98
_LINES_EVERY = 25  # steps


def train(
  config: config_lib.VisionConfig,
  digits: data_lib.Digits,
  workdir: pathlib.Path,
  writer: records.RecordWriter,
  log=print,
) -> dict[str, Any]:
  """Weights of the trained reader.

  A batch depends on the seed and the step alone, so a run that was interrupted
  ends as one that was not.

  Args:
    config: the settings.
    digits: those to train on.
    workdir: checkpoints go to workdir/train.
    writer: of the records, one each 25 steps of kind "train".
    log: takes a line of text.

  Returns:
    Nested dict of float32 arrays.
  """
  settings = config.train
  graphdef, state = nnx.split(
    model_lib.make(config.model, config.video, seed=config.seed)
  )
  params = nnx.to_pure_dict(state)
  optimizer = make_optimizer(settings)
  state = {"params": params, "opt_state": jax.jit(optimizer.init)(params)}
  checkpoints = training.Checkpoints(workdir / "train" / "checkpoints")
  try:
    step = 0
    if restored := checkpoints.restore(state):
      step, state = restored.step, jax.device_put(restored.state)
    advance = jax.jit(
      functools.partial(_advance, graphdef, optimizer), donate_argnums=0
    )
    start, first = time.perf_counter(), step
    while step < settings.total_steps:
      phase = settings.phase(step)
      videos = data_lib.draw(
        np.random.default_rng([config.seed, step]),
        digits,
        config.video,
        batch=phase.batch,
        num_frames=phase.num_frames,
        num_questions=phase.num_questions,
      )
      state, measured = advance(state, vars(videos))
      step += 1
      is_last = step == settings.total_steps
      if step % _LINES_EVERY == 0 or is_last:
        found = {name: float(x) for name, x in measured.items()}
        seconds = time.perf_counter() - start
        writer.write(
          kind="train",
          step=step,
          num_frames=phase.num_frames,
          seconds=seconds,
          steps_in_this_call=step - first,
          **found,
        )
        line = ", ".join(f"{name} {x:.3f}" for name, x in found.items())
        log(f"step {step} of {settings.total_steps}, {seconds:.0f} s: {line}")
      if step % settings.checkpoint_every == 0 or is_last:
        checkpoints.save(step, state, {})
    checkpoints.wait()
  finally:
    checkpoints.close()
  return jax.device_get(state["params"])


def make_optimizer(
  settings: config_lib.TrainConfig,
) -> optax.GradientTransformation:
  """AdamW after clipping, its rate a warm-up and a cosine."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    settings.learning_rate,
    settings.warmup_steps,
    max(settings.total_steps, settings.warmup_steps + 1),
    1e-2 * settings.learning_rate,
  )
  return optax.chain(
    optax.clip_by_global_norm(_CLIP_NORM),
    optax.adamw(schedule, b2=_ADAM_B2, weight_decay=settings.weight_decay),
  )


def accuracies(logits, answers, kinds) -> dict[str, jax.Array]:
  """Share of right answers, by kind of question; 0 where none was asked."""
  is_right = (logits.argmax(-1) == answers).astype(jnp.float32)
  shares = {}
  for index, kind in enumerate(data_lib.KINDS):
    of_kind = (kinds == index).astype(jnp.float32)
    shares[kind] = (is_right * of_kind).sum() / jnp.maximum(of_kind.sum(), 1.0)
  return shares


def _advance(graphdef, optimizer, state, videos):
  def loss_fn(params):
    model = nnx.merge(graphdef, nnx.State(params))
    memory = model.encode(videos["pixels"], videos["times"])
    logits = model.decode(
      memory,
      videos["examples"],
      videos["asked_times"],
      videos["asked_tiles"],
    )
    of_questions = optax.softmax_cross_entropy_with_integer_labels(
      logits, videos["answers"]
    ).mean()
    # Asked of every tile, digits are known after 50 steps; asked by the
    # questions alone, nothing was learnt in 200.
    of_tiles = optax.softmax_cross_entropy_with_integer_labels(
      model.name_tiles(memory), videos["tile_answers"]
    ).mean()
    shares = accuracies(logits, videos["answers"], videos["kinds"])
    return of_questions + of_tiles, {
      "question_loss": of_questions,
      "tile_loss": of_tiles,
      **shares,
    }

  # The library promotes inside, which a caller's strict mode would refuse.
  with jax.numpy_dtype_promotion("standard"):
    (_, measured), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      state["params"]
    )
    updates, opt_state = optimizer.update(
      gradients, state["opt_state"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
  return {"params": params, "opt_state": opt_state}, measured
