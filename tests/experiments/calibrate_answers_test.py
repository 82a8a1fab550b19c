# SPDX-License-Identifier: Apache-2.0
import pathlib
import shutil
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import rich.console
from flax import nnx

from configs.calibrate_answers import default, smoke, study, top_p
from experiments import calibrate_answers
from experiments.prefill import (
  calibrate_answers_loss,
  calibrate_answers_search,
  calibrate_search,
  long_context_config,
)
from unisparse_jax import attention, data, models, records
from unisparse_jax.data import sources

THRESHOLD = "unisparse_threshold"
TINY = dict(
  lengths=(320,),
  budgets=(0.01, 40.0),
  tolerances=(50.0,),
  settings=dict(over_queries="max", head_group=None, block_q=32, block_kv=32),
)


def make_config(**overrides):
  # Whole settings: an update would join theirs with those of the file.
  return ml_collections.ConfigDict(smoke.get_config().to_dict() | overrides)


@pytest.fixture
def run_main(monkeypatch, model_folder, in_process):
  def run(workdir, **overrides):
    config = make_config(**{"model": str(model_folder), **overrides})
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


def replayed(name):
  """Losses by length and choice from a record under results/."""
  rows = records.read(
    pathlib.Path(__file__).parents[2] / f"results/{name}.jsonl"
  )
  known = {(r["length"], r["choice"]): r for r in rows}
  return lambda length, choice: known[length, choice.key]


@pytest.mark.parametrize(
  ("name", "config", "num_layers", "num_heads", "density"),
  [
    ("calibrate_answers_h100", default.get_config(), 8, 2, (0.21, 0.19)),
    ("calibrate_answers_study_h100", study.get_config(), 8, 2, (0.22,)),
  ],
)
def test_recorded_losses_lead_to_the_same_choice(
  name, config, num_layers, num_heads, density
):
  config.max_seconds = None
  config = calibrate_answers_search.parse(config)
  losses = replayed(name)  # KeyError for a choice that was not measured
  everything = calibrate_answers_search.Choice.keep_all(num_layers, num_heads)
  console = rich.console.Console(quiet=True)
  table = calibrate_answers.one_by_one(config, losses, everything, console)
  choices = calibrate_answers_search.frontier(config, *table)
  chosen = calibrate_answers.sparsest(config, losses, choices, everything, 0.2)
  assert chosen is not None
  choice, evidence = chosen
  found = [row["density"] for row in evidence["lengths"].values()]
  np.testing.assert_allclose(found, density, atol=0.005)
  if name == "calibrate_answers_h100":
    shipped = attention.load_calibration(
      long_context_config.model_folder("pylib_12m") / "sparse_attention.json"
    )
    assert list(config.layer_settings(choice)) == [
      {**layer, "min_score": tuple(layer["min_score"])}
      for layer in shipped.layers
    ]


def half_deaf(model_folder, folder, share):
  """A model that hears only the first heads of each layer, but loudly.

  It is sure of its answers, so whatever changes them costs.

  Args:
    model_folder: of another model.
    folder: where it goes.
    share: of the heads of each layer that are heard.

  Returns:
    The folder.
  """
  model = models.load_hf(model_folder, dtype=jnp.float32)
  for block, heard in zip(model.layers, share, strict=True):
    kernel = block.attention.o_proj.kernel
    rows = int(heard * kernel.shape[0])
    kernel[...] = kernel[...].at[:rows].multiply(40.0).at[rows:].set(0.0)
  model.norm.scale[...] = 1e4 * model.norm.scale[...]
  models.save_hf(model, folder)
  shutil.copy(model_folder / "tokenizer.json", folder)
  return folder


@pytest.mark.parametrize(
  ("method", "settings"),
  [
    ("unisparse", dict(window_q=8, window_kv=8)),
    ("xattention", dict(stride=8)),
  ],
)
def test_heads_that_the_answer_depends_on_get_more(
  run_main, tmp_path, model_folder, method, settings
):
  folder = half_deaf(model_folder, tmp_path / "model", (0.5, 0.5))
  run_main(
    tmp_path / "run",
    model=str(folder),
    method=method,
    lengths=(320,),
    settings=dict(block_q=32, block_kv=32, num_sink_blocks=0, **settings),
    scorers=({},),
    scorer_cost=(0.0,),
    budgets=(0.98, 0.05),
    samples=8,  # with one, its answer may hang on nothing
    compare_single=True,
    tolerances=(1e-3,),
  )
  found = attention.load_calibration(
    tmp_path / "run/calibration_0.001.json",
    model_sha256=long_context_config.weights_hash(folder),
  )
  for pattern in found.patterns():
    half = len(pattern.top_p) // 2
    assert pattern.top_p[half:] == (0.05,) * half
    # Of the query heads of one key head a layer may spare some.
    assert max(pattern.top_p[:half]) == 0.98
  # And the sparse budget for all heads costs far more than it may.
  (single,) = [r for r in found.evidence["single"] if r["budget"] == 0.05]
  assert single["lengths"]["320"]["growth"] > 1.0


BY_LAYER = (
  dict(num_sink=32, num_local=256),
  dict(num_sink=32, num_local=32),
)


def test_a_layer_that_the_answer_depends_on_gets_more(
  run_main, tmp_path, model_folder
):
  folder = half_deaf(model_folder, tmp_path / "model", (1.0, 0.0))
  run_main(
    tmp_path / "run",
    model=str(folder),
    method="streaming",
    lengths=(320,),
    settings=dict(block_q=16, block_kv=16, num_sink=0),
    scorers=(dict(num_local=1), dict(num_local=320)),
    scorer_cost=(0.0, 0.0),
    budgets=(),
    samples=8,
    tolerances=(1e-3,),
  )
  found = attention.load_calibration(tmp_path / "run/calibration_0.001.json")
  assert [layer["num_local"] for layer in found.layers] == [320, 1]


@pytest.mark.parametrize(
  ("method", "scorers", "budgets", "chosen"),
  [
    ("unisparse", ({}, dict(window_q=8, window_kv=8)), (0.9, 0.2), (0.9, 0.2)),
    ("sample_attention_v1", ({},), (0.9, 0.2), (0.9, 0.2, 0.9, 0.2)),
    ("streaming", BY_LAYER, (), (0.0,)),
  ],
)
def test_the_plug_in_has_the_loss_that_was_measured(
  tmp_path, model_folder, method, scorers, budgets, chosen
):
  config = calibrate_answers_search.parse(
    make_config(
      **TINY
      | dict(
        method=method,
        settings=dict(block_q=32, block_kv=32),
        scorers=scorers,
        scorer_cost=(0.0,) * len(scorers),
        budgets=budgets,
      )
    )
  )
  model = models.load_hf(model_folder, dtype=jnp.float32)
  prompts = make_prompts(model)
  shape = (model.config.num_layers, config.num_mask_heads(model.config))
  assert shape == (2, len(chosen))
  everything = calibrate_answers_search.Choice.keep_all(*shape, config.full)
  choice = calibrate_answers_search.Choice(
    scorer=np.asarray([0, len(scorers) - 1]),
    budget=np.asarray([chosen, chosen[::-1]], np.float32),
    full=config.full,
  )
  measure = calibrate_answers_loss.make_loss(model, config)
  measured, base = measure(prompts, choice), measure(prompts, everything)
  np.testing.assert_allclose(base["density"], 1.0, rtol=1e-6)
  path = tmp_path / "calibration.json"
  written = attention.Calibration(
    pattern=method,
    settings=dict(config.settings),
    layers=config.layer_settings(choice),
    model_sha256="",
    target={},
  )
  records.write_json(path, written.to_json())
  plug_in = attention.load_calibration(path).attention()
  for attend, expected in (
    (plug_in, measured),
    (attention.DenseAttention(implementation="xla"), base),
  ):
    loss = answer_loss(answer_logits(model, prompts, attend), prompts)
    np.testing.assert_allclose(expected["loss"], loss, rtol=2e-5)
  assert abs(measured["loss"] - base["loss"]) > 1e-4
  # Each layer and head has the budget that it was given.
  density = np.asarray(measured["density"])
  if budgets:
    order = np.asarray(chosen) == 0.9
    assert density[0, order].min() > density[0, ~order].max()
    assert density[1, order[::-1]].min() > density[1, ~order[::-1]].max()
  else:
    assert density[0, 0] > density[1, 0]


def make_prompts(model):
  """One prompt of 190 random tokens in 200, and an answer of 4."""
  rng = np.random.default_rng(0)
  vocab_size = model.config.vocab_size
  tokens = jnp.asarray(rng.integers(0, vocab_size, (1, 200)), jnp.int32)
  answers = jnp.asarray(rng.integers(0, vocab_size, (1, 5)), jnp.int32)
  return calibrate_answers_loss.Prompts(
    tokens=tokens,
    lengths=jnp.asarray([190], jnp.int32),
    answers=answers,
    is_answer=jnp.asarray([[True] * 4 + [False]]),
  )


def answer_logits(model, prompts, attend):
  """[4, vocab_size]: a prefill by `attend`, then the answer, densely."""

  @nnx.jit
  def run(model, tokens, lengths, answers):
    cache = models.KVCache.init(
      model.config, batch=1, capacity=205, dtype=model.dtype
    )
    first, cache = model(
      tokens,
      cache=cache,
      attention_fn=attend,
      lengths=lengths,
      logits_for="last",
      cache_is_empty=True,
    )
    rest, _ = model(answers[:, :3], cache=cache)
    return jnp.concatenate([first, rest[0]])

  return run(model, prompts.tokens, prompts.lengths, prompts.answers)


def answer_loss(logits, prompts):
  """Nats of the answer by logits [4, vocab_size]."""
  log_p = np.asarray(logits, np.float64)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  return -log_p[np.arange(4), np.asarray(prompts.answers)[0, :4]].sum()


def test_loss_of_full_masks_is_that_of_dense_attention(model_folder):
  config = calibrate_answers_search.parse(
    make_config(model=str(model_folder), **TINY)
  )
  model = models.load_hf(model_folder, dtype=jnp.float32)
  prompts = make_prompts(model)
  shape = (model.config.num_layers, model.config.num_kv_heads)
  everything = calibrate_answers_search.Choice.keep_all(*shape)
  measure = calibrate_answers_loss.make_loss(model, config)
  measured = measure(prompts, everything)
  text = jnp.concatenate([prompts.tokens[:, :190], prompts.answers], axis=1)
  expected = answer_loss(model(text)[0][0, 189:193], prompts)
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
    (
      dict(method="unisparse", settings={}),
      r"budgets must go from full.*top_p that fall",
    ),
    (dict(budgets=()), r"budgets must not be empty"),
    (dict(budgets=(0.0, 1.0)), r"budgets must go from full to sparse"),
    (dict(method="streaming"), r"setting of streaming must be a known name"),
    (
      dict(method="streaming", settings={}, scorers=({},), scorer_cost=(0.0,)),
      r"budgets must be empty for streaming, which has no budget by head",
    ),
    (
      dict(
        method="minference",
        settings={},
        scorers=({},),
        scorer_cost=(0.0,),
        budgets=(),
        max_seconds=1.0,
      ),
      r"max_seconds must be None for minference",
    ),
    (
      dict(
        method="unisparse",
        settings={},
        scorers=({}, dict(top_k=3)),
        scorer_cost=(0.0, 0.0),
      ),
      r"scorers must all have a budget by head or all have none",
    ),
  ],
)
def test_bad_settings(overrides, message):
  with pytest.raises(ValueError, match=message):
    calibrate_answers_search.parse(make_config(**overrides))


@pytest.mark.parametrize(
  "config",
  [
    default.get_config(),
    *map(top_p.get_config, sorted({*calibrate_search.BUDGETS} - {THRESHOLD})),
  ],
  ids=lambda config: config.get("method", THRESHOLD),
)
def test_configs_are_valid(config):
  parsed = calibrate_answers_search.parse(config)
  assert parsed.budget_name == calibrate_search.BUDGETS[parsed.method]


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
