# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedule and gradient transformation of a run."""

import functools

import jax
import optax
from optax import contrib

from unisparse_jax.training import config as config_lib

# Scales Muon's updates to the root mean square of AdamW's, so that both take
# one learning rate. Source: Liu et al., 2025, arXiv 2502.16982, section 2.2.
_MUON_RMS = 0.2


def make_schedule(config: config_lib.TrainConfig) -> optax.Schedule:
  """Learning rate of step 0, 1, ... over the steps of all stages."""
  peak = config.learning_rate
  final = peak * config.final_lr_fraction
  warmup = config.warmup_steps
  total = config.total_steps
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(
      peak, total - warmup, alpha=config.final_lr_fraction
    )
  else:
    decay = max(1, min(total - warmup, round(total * config.decay_fraction)))
    after = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final, decay),
      ],
      [total - warmup - decay],
    )
  if not warmup:
    return standard_promotion(after)
  # Step 0 already moves: the warm-up starts at peak / warmup, not at 0.
  ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
  return standard_promotion(optax.join_schedules([ramp, after], [warmup]))


def make_optimizer(
  config: config_lib.TrainConfig,
) -> optax.GradientTransformation:
  """Clipping, then AdamW or Muon, with the schedule inside.

  With `fit_budget` the learning rate inside is 1: `train_step` scales updates.
  """
  schedule = 1.0 if config.fit_budget else make_schedule(config)
  if config.optimizer == "adamw":
    update = optax.adamw(
      schedule,
      b1=config.adam_b1,
      b2=config.adam_b2,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    )
  else:
    update = optax.partition(
      {
        "muon": contrib.muon(
          schedule,
          beta=config.muon_beta,
          weight_decay=config.weight_decay,
          consistent_rms=_MUON_RMS,
        ),
        "adamw": optax.adamw(
          schedule,
          b1=config.adam_b1,
          b2=config.adam_b2,
          weight_decay=config.weight_decay,
          mask=decay_mask,
        ),
      },
      muon_labels,
    )
  chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
  return optax.GradientTransformation(
    standard_promotion(chain.init), standard_promotion(chain.update)
  )


def standard_promotion(fn):
  """optax mixes dtypes freely: its code cannot run under strict promotion."""

  @functools.wraps(fn)
  def wrapped(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):
      return fn(*args, **kwargs)

  return wrapped


def decay_mask(params):
  """True for the arrays that weight decay shrinks: two or more axes."""
  return jax.tree.map(lambda x: x.ndim >= 2, params)


def muon_labels(params):
  """ "muon" for two-axis arrays outside embedding and head, else "adamw"."""

  def label(path, x):
    names = "/".join(str(getattr(key, "key", key)) for key in path).lower()
    in_and_out = any(word in names for word in ("embed", "lm_head", "unembed"))
    return "muon" if x.ndim == 2 and not in_and_out else "adamw"

  return jax.tree_util.tree_map_with_path(label, params)
