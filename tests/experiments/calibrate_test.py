# SPDX-License-Identifier: Apache-2.0
import types

import jax
import numpy as np
import pytest

from configs.calibrate import default, minference, smoke, xattention_steps
from experiments import calibrate
from experiments.prefill import calibrate_search, long_context_config
from tests import helpers
from unisparse_jax import attention, records
from unisparse_jax.attention import calibration


@pytest.fixture
def run_main(monkeypatch, model_folder, in_process):
  def run(workdir, **overrides):
    config = smoke.get_config()
    config.model = str(model_folder)
    with config.unlocked():
      config.update(overrides)
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
      monkeypatch.setattr(calibrate, name, types.SimpleNamespace(value=value))
    calibrate.main(["calibrate"])

  return run


def test_writes_a_file_that_the_plug_in_loads(run_main, tmp_path, model_folder):
  workdir = tmp_path / "run"
  overrides = dict(length=256, dense_lengths=(128,), budgets=(0.5, 0.9))
  run_main(workdir, **overrides)
  found = attention.load_calibration(
    workdir / "calibration.json",
    model_sha256=long_context_config.weights_hash(model_folder),
  )
  assert len(found.layers) == 2
  assert all(len(p.top_p) == 2 for p in found.patterns())  # one a key head
  assert set(found.evidence["dense_below_ms"]) == {"128"}
  assert found.dense_below in (0, 129)
  rows = records.read(workdir / "records.jsonl")
  assert [(r["text"], r["layer"]) for r in rows] == [("code", 0), ("code", 1)]
  # The choice follows from what was recorded.
  for row, layer in zip(rows, found.layers, strict=True):
    index = calibration.choose_budgets(row["density"], row["recall"], 0.9)
    assert layer["top_p"] == [(0.5, 0.9)[i] for i in index]
  run_main(workdir, **overrides)  # nothing is measured again
  assert len(records.read(workdir / "records.jsonl")) == 2

  # The long-context experiment takes the file as a pattern.
  entry = dict(
    label="found",
    method="calibrated",
    file=str(workdir / "calibration.json"),
  )
  config = long_context_config.LongContextConfig(
    model=str(model_folder), patterns=(entry,), lengths=(64,)
  )
  fn = config.attention_fn("found")
  assert isinstance(fn, attention.LayeredAttention)
  assert config.entry("found").pattern(1) == found.patterns()[1]
  identity = long_context_config.identity(config, model_folder)
  assert len(identity["found sha256"]) == 16
  bad = dict(patterns=(entry | {"file": "nowhere.json"},), lengths=(64,))
  with pytest.raises(ValueError, match=r"patterns\[0\].*nowhere\.json"):
    long_context_config.LongContextConfig(model="m", **bad)


def test_rules_are_compared_on_text_that_none_of_them_saw(run_main, tmp_path):
  workdir = tmp_path / "run"
  budgets = (0.9, 0.7, 0.4)
  run_main(
    workdir,
    method="xattention",
    settings=dict(block_q=64, block_kv=64, stride=16),
    rule="lowered_steps",
    compare_rules=True,
    target_recall=0.85,
    length=128,
    dense_lengths=(),
    budgets=budgets,
  )
  found = attention.load_calibration(workdir / "calibration.json")
  rows = records.read(workdir / "records.jsonl")
  assert {r["text"] for r in rows} == {"code", "niah_single_1"}
  by_text = {
    text: {
      name: np.concatenate([r[name] for r in rows if r["text"] == text])
      for name in ("density", "recall")
    }
    for text in ("code", "niah_single_1")
  }
  # The choice is made on the texts alone.
  index = calibration.choose_budgets(
    **by_text["code"], target=0.85, rule="lowered_steps"
  )
  chosen = [budget for layer in found.layers for budget in layer["top_p"]]
  assert chosen == [budgets[i] for i in index]
  compared = found.evidence["rules"]
  assert len(compared) == len(calibration.RULES) + len(budgets)
  (row,) = [r for r in compared if r["rule"] == "lowered_steps"]
  heads = np.arange(len(index))
  test = by_text["niah_single_1"]["recall"][heads, index].mean()
  assert row["test_recall"] == pytest.approx(test)
  assert row["budget"] == pytest.approx(np.mean(chosen))


@pytest.mark.parametrize(
  "module", [default, minference, smoke, xattention_steps]
)
def test_configs_are_valid(module):
  calibrate_search.parse(module.get_config())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(method="streaming"), r"method must be a known name"),
    (dict(rule="best"), r"rule must be a known name"),
    (dict(rule="minference_error"), r"rule must fit the method"),
    (dict(method="minference"), r"rule must fit the method"),
    (dict(rule="xattention_profiler"), r"rule must fit the method"),
    (dict(budgets=(0.5,)), r"budgets must hold 2"),
    (dict(rule="lowered_steps"), r"budgets must fall"),
    (dict(compare_rules=True), r"compare_rules must be asked for"),
    (dict(budgets=(0.5, 2.0)), r"top_p must be in"),
    (dict(texts=("prose",)), r"texts must be a known name"),
    (dict(texts=()), r"texts must not be empty"),
    (dict(length=100, dense_lengths=()), r"block must divide length"),
    (dict(dense_lengths=(512, 256)), r"dense_lengths must rise"),
    (dict(dense_lengths=(4096,)), r"dense_lengths must rise and not exceed"),
    (dict(target_recall=0.0), r"target_recall must be in"),
  ],
)
def test_bad_settings_are_named(change, message):
  values = smoke.get_config().to_dict() | change
  with pytest.raises(ValueError, match=message):
    calibrate_search.parse(values)


def search(method, rule, **settings):
  values = smoke.get_config().to_dict()
  values |= dict(method=method, rule=rule, length=128, dense_lengths=())
  values["settings"] = dict(block_q=8, block_kv=8, **settings)
  return calibrate_search.parse(values)


def test_recall_of_a_mask_is_that_of_the_metrics():
  q, k, _ = helpers.make_qkv(q_len=128)
  for pattern in (
    attention.UniSparse(top_p=0.6, block_q=32, block_kv=32),
    attention.MInference(
      heads=(("vertical_slash", 5, 9),), num_near_slashes=4, min_columns=2
    ),
  ):
    density, recall = calibrate_search.density_and_recall(pattern, q, k)
    mask = jax.jit(pattern.select)(q, k)
    recalls = jax.jit(attention.metrics.recall)(q, k, mask)
    expected = np.asarray(recalls)[0].mean(0)
    expected = expected.reshape(len(density), -1).mean(1)
    np.testing.assert_allclose(recall, expected, atol=1e-5)


def test_minferences_searches_take_the_candidate_that_keeps_more():
  q, k, v = helpers.make_qkv(q_len=128)
  for rule in calibrate_search.SEARCHES:
    config = search("minference", rule)
    config = calibrate_search.CalibrateConfig(
      **vars(config)
      | dict(candidates=(("a_shape", 1, 1), ("a_shape", 128, 128)))
    )
    scores = calibrate_search.measure(config, q, k, v)["scores"]
    assert scores.shape == (4, 2)
    assert (scores[:, 1] > scores[:, 0]).all()
    found = [dict(text="code", layer=0, scores=scores)]
    (layer,) = calibrate_search.choose(config, found, 1)
    assert layer["heads"] == (("a_shape", 128, 128),) * 4


def test_xattentions_profiler_reads_the_patterns_own_scores():
  q, k, v = helpers.make_qkv(q_len=128)
  q = 4.0 * q
  config = search("xattention", "xattention_profiler", stride=8)
  thresholds = calibrate_search.measure(config, q, k, v)["thresholds"]
  pattern = config.make_pattern()
  grid = attention.BlockGrid.create(q, k, block_q=8, block_kv=8)
  scores = jax.jit(pattern.block_scores)(q, k, grid)[0]
  mass = jax.jit(attention.metrics.block_mass)(q, k, grid)[0]
  expected = calibration.xattention_threshold(scores, mass, 0.9)
  np.testing.assert_allclose(thresholds, expected, rtol=1e-5)
  found = [dict(text="code", layer=0, thresholds=thresholds)]
  (layer,) = calibrate_search.choose(config, found, 1)
  np.testing.assert_allclose(layer["top_p"], thresholds, atol=1e-6)
