# SPDX-License-Identifier: Apache-2.0
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs.calibrate_answers import default, smoke
from experiments import calibrate_answers
from experiments.prefill import (
  calibrate_answers_loss,
  calibrate_answers_search,
  long_context_config,
)
from unisparse_jax import attention, data, models, records
from unisparse_jax.data import sources

TINY = dict(
  lengths=(320,),
  budgets=(0.01, 40.0),
  tolerances=(50.0,),
  settings=dict(over_queries="max", head_group=None, block_q=32, block_kv=32),
)


def make_config(**overrides):
  config = smoke.get_config()
  with config.unlocked():
    config.update(overrides)
  return config


@pytest.fixture
def run_main(monkeypatch, model_folder, in_process):
  def run(workdir, **overrides):
    config = make_config(model=str(model_folder), **overrides)
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
      holder = types.SimpleNamespace(value=value)
      monkeypatch.setattr(calibrate_answers, name, holder)
    calibrate_answers.main(["calibrate_answers"])

  return run


def test_writes_a_calibration_and_measures_nothing_twice(
  run_main, tmp_path, model_folder
):
  run_main(tmp_path, **TINY)
  found = attention.load_calibration(
    tmp_path / "calibration_50.json",
    model_sha256=long_context_config.weights_hash(model_folder),
  )
  # Chosen on other modules than those that answers are scored on.
  names = data.CodeCorpus(tmp_path / "training_code", "train").file_names
  held_out = {s.name for s in sources.find_sources() if s.held_out}
  assert names and not held_out & set(names)
  # Within 50 nats anything goes: the sparsest.
  assert all(p.min_score == (40.0, 40.0) for p in found.patterns())
  rows = records.read(tmp_path / "records.jsonl")
  run_main(tmp_path, **TINY)
  assert len(records.read(tmp_path / "records.jsonl")) == len(rows)
  evidence = found.evidence["lengths"]["320"]
  assert 0.0 < evidence["density"] < 1.0


def test_loss_of_full_masks_is_that_of_dense_attention(model_folder):
  config = calibrate_answers_search.parse(
    make_config(model=str(model_folder), **TINY)
  )
  model = models.load_hf(model_folder, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  vocab_size = model.config.vocab_size
  tokens = jnp.asarray(rng.integers(0, vocab_size, (1, 200)), jnp.int32)
  answers = jnp.asarray(rng.integers(0, vocab_size, (1, 5)), jnp.int32)
  prompts = calibrate_answers_loss.Prompts(
    tokens=tokens,
    lengths=jnp.asarray([190], jnp.int32),
    answers=answers,
    is_answer=jnp.asarray([[True] * 4 + [False]]),
  )
  shape = (model.config.num_layers, model.config.num_kv_heads)
  everything = calibrate_answers_search.Choice.keep_all(*shape)
  measure = calibrate_answers_loss.make_loss(model, config)
  measured = measure(prompts, everything)
  logits, _ = model(jnp.concatenate([tokens[:, :190], answers], axis=1))
  log_p = np.asarray(logits[0, 189:193], np.float64)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  expected = -log_p[np.arange(4), np.asarray(answers)[0, :4]].sum()
  np.testing.assert_allclose(measured["loss"], expected, rtol=2e-5)
  np.testing.assert_array_equal(measured["density"], 1.0)
  # And a head that keeps little moves it.
  one = everything.but(0, 0, 0, 1e6)
  changed = measure(prompts, one)
  assert abs(changed["loss"] - measured["loss"]) > 1e-4
  assert changed["density"][0][0] < 1.0 == changed["density"][0][1]


def test_a_head_that_nothing_depends_on_gets_the_sparsest_mask():
  config = calibrate_answers_search.parse(
    make_config(budgets=(0.5, 2.0, 8.0), scorer_cost=(0.0, 0.2))
  )
  density = np.broadcast_to([0.5, 0.2, 0.1], (2, 2, 2, 3)).copy()
  growth = np.zeros((2, 2, 2, 3))
  # Layer 0, head 1 needs a full mask by the first scorer, not by the second.
  growth[0, 1, 0] = [0.0, 5.0, 50.0]
  choice = calibrate_answers_search.choose(config, density, growth, 1.0)
  np.testing.assert_array_equal(choice.budget, [[8.0, 0.5], [8.0, 8.0]])
  np.testing.assert_array_equal(choice.scorer, 0)
  # A cheap second scorer takes over in that layer.
  cheap = calibrate_answers_search.parse(
    make_config(budgets=(0.5, 2.0, 8.0), scorer_cost=(0.0, 0.01))
  )
  choice = calibrate_answers_search.choose(cheap, density, growth, 1.0)
  np.testing.assert_array_equal(choice.budget, 8.0)
  np.testing.assert_array_equal(choice.scorer, [1, 0])
  # Where loss is worth nothing, all are sparse.
  choice = calibrate_answers_search.choose(config, density, growth, 0.0)
  np.testing.assert_array_equal(choice.budget, 8.0)


@pytest.mark.parametrize(
  "overrides, message",
  [
    (dict(tolerances=(0.0,)), r"tolerances must be above 0; got tolerances="),
    (dict(budgets=(2.0, 1.0)), r"budgets must go from full to sparse"),
    (dict(scorer_cost=(0.1, 0.2, 0.3)), r"scorer_cost must have one value for"),
    (dict(tasks=("niah",)), r"tasks must be a known name"),
    (dict(scorers=(dict(window_q=3),) * 2), r"window_q must divide block_q"),
    (dict(sample=1), r"got .*sample"),
  ],
)
def test_bad_settings(overrides, message):
  with pytest.raises(ValueError, match=message):
    calibrate_answers_search.parse(make_config(**overrides))


def test_default_config_is_valid():
  calibrate_answers_search.parse(default.get_config())


def test_the_shipped_calibration_is_for_the_shipped_weights():
  folder = long_context_config.model_folder("pylib_12m")
  found = attention.load_calibration(
    folder / "sparse_attention.json",
    model_sha256=long_context_config.weights_hash(folder),
  )
  config = long_context_config.LongContextConfig(
    model="pylib_12m",
    patterns=(dict(label="ours", method="calibrated"),),
    lengths=(8192,),
  )
  assert config.entry("ours").patterns == found.patterns()
