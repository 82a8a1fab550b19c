# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.training import tiny_run
from unisparse_jax import training
from unisparse_jax.training import optimizer


def make_config(**changes):
  settings = dict(
    stages=(
      training.Stage(seq_len=8, batch_size=1, steps=60),
      training.Stage(seq_len=16, batch_size=1, steps=40),
    ),
    learning_rate=2.0,
    warmup_steps=10,
    final_lr_fraction=0.1,
  )
  return training.TrainConfig(**(settings | changes))


def rates(config):
  schedule = optimizer.make_schedule(config)
  return [float(schedule(jnp.int32(i))) for i in range(config.total_steps)]


def test_cosine_runs_over_all_stages():
  lr = rates(make_config())
  np.testing.assert_allclose(lr[:10], 0.2 * np.arange(1, 11), rtol=1e-5)
  expected = 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi * np.arange(90) / 90))
  np.testing.assert_allclose(lr[10:], expected, rtol=1e-4)


def test_wsd_is_flat_then_falls_linearly():
  lr = rates(make_config(schedule="wsd", decay_fraction=0.2))
  np.testing.assert_allclose(lr[9:81], 2.0, rtol=1e-6)
  expected = 2.0 - 1.8 * np.arange(20) / 20
  np.testing.assert_allclose(lr[80:], expected, rtol=1e-5)


def test_no_warmup():
  assert rates(make_config(warmup_steps=0))[0] == 2.0


def make_params():
  key = jax.random.key(0)
  return {
    "embed": {"embedding": jax.random.normal(key, (8, 4))},
    "layer": {
      "kernel": jax.random.normal(key, (4, 6)),
      "scale": jnp.ones(4),
    },
  }


def test_muon_takes_the_matrices_of_the_blocks_only():
  assert optimizer.muon_labels(make_params()) == {
    "embed": {"embedding": "adamw"},
    "layer": {"kernel": "muon", "scale": "adamw"},
  }


def update(config, params, grads):
  transform = optimizer.make_optimizer(config)
  updates, _ = transform.update(grads, transform.init(params), params)
  return updates


def test_muon_update_is_orthogonal_and_as_large_as_adamws():
  config = make_config(
    optimizer="muon", weight_decay=0.0, warmup_steps=0, learning_rate=1.0
  )
  params = make_params()
  grads = jax.tree.map(lambda x: 1e-3 * jnp.sin(1 + 7 * x), params)
  kernel = np.asarray(update(config, params, grads)["layer"]["kernel"])
  singular = np.linalg.svd(kernel, compute_uv=False)
  # Newton-Schulz leaves singular values within 0.7 and 1.2 of the target.
  target = 0.2 * np.sqrt(6)
  assert np.all(singular > 0.6 * target)
  assert np.all(singular < 1.3 * target)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_spares_vectors(name):
  config = make_config(optimizer=name, warmup_steps=0, learning_rate=1.0)
  params = make_params()
  grads = jax.tree.map(jnp.zeros_like, params)
  updates = update(config, params, grads)
  for x, u in (
    (params["embed"]["embedding"], updates["embed"]["embedding"]),
    (params["layer"]["kernel"], updates["layer"]["kernel"]),
  ):
    np.testing.assert_allclose(u, -0.1 * x, rtol=1e-5)
  assert not np.any(updates["layer"]["scale"])


def test_large_gradients_are_clipped():
  # The first moment after one step shows what came through.
  config = make_config()
  params = make_params()
  grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
  transform = optimizer.make_optimizer(config)
  _, state = transform.update(grads, transform.init(params), params)
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if ".mu" in jax.tree_util.keystr(path)
  ]
  norm = np.sqrt(sum(float(jnp.sum(jnp.square(m))) for m in moments))
  np.testing.assert_allclose(norm, (1 - config.adam_b1) * 1.0, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stages": ()}, "stages must be a non-empty tuple"),
    ({"stages": ((8, 1, 60),)}, "stages must hold Stage values"),
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
    ({"learning_rate": 0.0}, "> 0; got learning_rate=0.0"),
    ({"decay_fraction": 1.5}, ">? ?.*<= 1; got decay_fraction=1.5"),
    ({"adam_b2": 1.0}, "< 1; got adam_b2=1.0"),
    ({"schedule": "linear"}, r"one of \('cosine', 'wsd'\).*'linear'"),
    ({"optimizer": "sgd"}, "optimizer must be one of"),
    ({"dtype": "float16"}, "dtype must be one of"),
    ({"attention": "flash"}, "attention must be one of"),
    ({"checkpoint_every": 0}, "checkpoint_every must be an integer >= 1"),
    ({"num_workers": True}, "num_workers must be an integer >= 0"),
    ({"max_seconds": -1.0}, "max_seconds must be a finite number > 0"),
    ({"warmup_steps": 100}, "warmup_steps=100, total_steps=100"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)


def test_bad_stage_is_named():
  with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
    training.Stage(seq_len=8, batch_size=0, steps=1)


def test_counting_steps_and_tokens():
  config = tiny_run.make_config()
  assert [config.stage_of(step) for step in (0, 7, 8, 14)] == [0, 0, 1, 1]
  assert [config.tokens_after(step) for step in (0, 1, 8, 9, 15)] == [
    0,
    64,
    512,
    576,
    960,
  ]
  assert config.total_tokens == 960


def test_run_control_fields_are_fields():
  names = {field.name for field in dataclasses.fields(training.TrainConfig)}
  assert set(training.RUN_CONTROL_FIELDS) <= names
