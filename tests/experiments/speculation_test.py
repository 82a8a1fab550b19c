# SPDX-License-Identifier: Apache-2.0
"""Head, calibration and measurement, one after the other, on a tiny model."""

import dataclasses
import types

import numpy as np
import pytest
from flax import nnx

from configs.speculative_speedup import (
  default,
  pylib_12m,
  pylib_12m_long,
  smoke,
)
from configs.train_draft_head import default as head_default
from configs.train_draft_head import pylib_12m as head_pylib
from configs.train_draft_head import smoke as head_smoke
from experiments import (
  calibrate_speculation,
  speculative_speedup,
  train_draft_head,
)
from experiments.decoding import (
  speculation_config,
  speculation_summary,
  speculative_speedup_run,
)
from experiments.frame import flags_and_configs
from experiments.training import own_text_data
from unisparse_jax import data, models, records, training
from unisparse_jax.speculative import calibration, eagle_head, head_files


def run(monkeypatch, module, config, workdir):
  for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
    monkeypatch.setattr(module, name, types.SimpleNamespace(value=value))
  module.main(["main"])


def make_head(model_folder, folder, seed):
  target = models.load_hf(model_folder)
  head = eagle_head.EagleHead.from_target(target, rngs=nnx.Rngs(seed))
  return head_files.save_head(head, folder)


def small(model_folder, tmp_path):
  config = smoke.get_config()
  config.target = str(model_folder)
  config.head = str(make_head(model_folder, tmp_path / "head", 0))
  config.artefact = str(tmp_path / "policy.json")
  config.corpus = str(tmp_path / "corpus")
  config.packed = ()
  config.shape = dict(width=2, base_depth=1, max_depth=2, buckets=(1, 4))
  config.combined_shape = dict(
    width=2, base_depth=1, max_depth=4, buckets=(1, 4)
  )
  config.combined_nodes = 3
  config.fixed_depth = 2
  config.fixed_nodes = 3
  config.domains = ("tables",)
  config.batches = (1,)
  config.temperatures = (0.0,)
  config.methods = ("plain", "fixed", "heterospec", "fixed_same", "combined")
  config.few = ()
  config.few_at = ()
  config.exact_prompts = 0
  config.long_prompts = ()
  config.compile_threads = 2
  config.calibration.update(
    prompts=2, batch_size=1, temperatures=(0.0,), new_tokens=24, alpha=2
  )
  return config


@pytest.mark.slow
def test_calibrates_measures_and_resumes(
  model_folder, in_process, monkeypatch, tmp_path
):
  config = small(model_folder, tmp_path)
  tokenizer = data.Tokenizer.load(model_folder / "tokenizer.json")
  data.build_cache(config.corpus, tokenizer, num_processes=1)
  run(monkeypatch, calibrate_speculation, config, tmp_path / "calibration")
  artefact = calibration.load(config.artefact)
  assert {t.name for t in artefact.tables} == {
    *("rule", "joint", "thrifty", "fixed_best"),
  }
  assert artefact.about["requests"] == 2
  found = records.read(tmp_path / "calibration" / "records.jsonl")
  policies = {r["policy"]: r for r in found if r["kind"] == "replay"}
  assert policies["oracle"]["speedup"] >= policies["joint"]["speedup"] - 1e-9

  workdir = tmp_path / "speedup"
  config.max_seconds = 0.0
  run(monkeypatch, speculative_speedup, config, workdir)
  assert not (workdir / "records.jsonl").exists()
  config.max_seconds = None
  run(monkeypatch, speculative_speedup, config, workdir)
  lines = records.read(workdir / "records.jsonl")
  assert [r["method"] for r in lines] == list(config.methods)
  assert all(r["mismatched_rows"] == 0 for r in lines)
  by_method = {r["method"]: r for r in lines}
  assert "first_gaps" not in by_method["fixed"]
  assert by_method["plain"]["tokens_per_call"] == 1.0
  fixed = by_method["fixed"]
  assert fixed["nodes_per_call"] <= 4
  assert fixed["calls"] <= by_method["plain"]["calls"]
  assert sum(fixed["accept_histogram"]) == fixed["calls"]
  text = (workdir / "report.html").read_text()
  assert "Tokens per call" in text
  run(monkeypatch, speculative_speedup, config, workdir)
  assert len(records.read(workdir / "records.jsonl")) == len(lines)

  # An artefact that lacks a policy, then one of another head.
  fewer = dataclasses.replace(
    artefact, tables=tuple(t for t in artefact.tables if t.name != "thrifty")
  )
  calibration.save(fewer, config.artefact)
  config.methods = (*config.methods, "thrifty")
  with pytest.raises(
    ValueError, match=r"^name must be a table of the artefact"
  ):
    run(monkeypatch, speculative_speedup, config, tmp_path / "lacking")
  assert not (tmp_path / "lacking" / "records.jsonl").exists()
  config.head = str(make_head(model_folder, tmp_path / "other", 1))
  with pytest.raises(ValueError, match="artefact must be fitted for this"):
    run(monkeypatch, speculative_speedup, config, tmp_path / "third")


@pytest.mark.slow
def test_trains_a_head(model_folder, in_process, monkeypatch, tmp_path):
  config = head_smoke.get_config()
  config.target = str(model_folder)
  group = dict(config.texts.groups[0])
  group |= dict(domains=("tables", "word_problems"), new_tokens=8)
  config.texts.groups = (group,)
  config.train.update(steps=2, batch_tokens=80, num_unrolled=1)
  workdir = tmp_path / "head"
  run(monkeypatch, train_draft_head, config, workdir)
  written = (workdir / "texts" / "short.npz").stat().st_mtime_ns
  target = models.load_hf(model_folder)
  head = head_files.load_head(workdir / "head", target)
  assert head.config.tap_layers == models.tap_layers(2)
  lines = training.read_metrics(workdir / "train" / "metrics.jsonl")
  assert [r["step"] for r in lines if r["kind"] == "train"] == [2]
  with pytest.raises(ValueError, match=r"train\.seed is absent there and"):
    config.train.seed = 1
    run(monkeypatch, train_draft_head, config, workdir)
  assert (workdir / "texts" / "short.npz").stat().st_mtime_ns == written


def test_the_configs_are_well_formed():
  for module in (default, pylib_12m, pylib_12m_long, smoke):
    config = speculation_config.parse(module.get_config())
    steps = speculative_speedup_run.plan(config)
    assert len({step.key for step in steps}) == len(steps)
    methods = [s.method for s in steps if s.kind == "speed"]
    if "fixed_same" in methods:
      assert methods.index("heterospec") < methods.index("fixed_same")
    for batch in config.batches:
      assert config.shape_for(batch).max_nodes == config.shape.max_nodes
      fixed = config.fixed_shape_for(batch)
      assert fixed.base_depth == fixed.max_depth == config.fixed_depth
      assert len(fixed.buckets) == 1 and len(fixed.packed) <= 1
      assert config.fixed_nodes < fixed.max_nodes <= config.shape.max_nodes
  for module in (head_default, head_pylib, head_smoke):
    values = module.get_config()
    flags_and_configs.to_dataclass(
      training.HeadTrainConfig, values.train, name="config.train"
    )
    for group in values.texts.groups:
      flags_and_configs.to_dataclass(
        own_text_data.GroupConfig, group, name="group"
      )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("plain", "medusa")}, "methods must be a known name"),
    ({"batches": (1, 128)}, "batches must be at most the prompts"),
    ({"fixed_nodes": 64}, "fixed_depth and fixed_nodes must fit"),
    (
      {"combined_shape": {"width": 4, "base_depth": 6, "buckets": (1, 64)}},
      "combined_shape must have the width of shape",
    ),
    ({"short_prompt": 2048}, "short_prompt must be at most prompt_len"),
    ({"packed": ((16, 8),)}, "packed must leave room for the root"),
  ],
)
def test_bad_settings_are_named(changes, message):
  config = default.get_config()
  with config.unlocked():
    config.update(changes)
  with pytest.raises(ValueError, match=message):
    speculation_config.parse(config)


def test_speed_ups_are_per_domain():
  base = dict(
    kind="speed", batch=1, temperature=0.0, rows=1, calls=10, written=10,
    mismatched_rows=0, nodes_per_token=1.0, tokens_per_call=1.0,
    nodes_per_call=1.0,
  )  # fmt: skip
  made = [
    base | dict(method=m, domain=d, tokens_per_s=s)
    for m, d, s in (
      ("plain", "code", 100.0), ("plain", "docs", 200.0),
      ("fixed", "code", 300.0), ("fixed", "docs", 200.0),
      ("heterospec", "code", 330.0), ("heterospec", "docs", 210.0),
    )
  ]  # fmt: skip
  rows = speculation_summary.summarise(made)
  mean = {r["method"]: r for r in rows if r["domain"] == "mean"}
  assert mean["fixed"]["speedup"] == pytest.approx(2.0)
  assert mean["fixed"]["least_speedup"] == pytest.approx(1.0)
  assert mean["heterospec"]["over_fixed"] == pytest.approx(0.075)
  assert np.isclose(mean["heterospec"]["tokens_per_s"], 270.0)


def test_gaps_are_those_of_the_rows_that_differ(model_folder, tmp_path):
  config = small(model_folder, tmp_path)
  config.methods = ("plain",)
  measurer = speculative_speedup_run.Measurer(
    speculation_config.parse(config), tmp_path, []
  )
  prompt = np.arange(3, 11, dtype=np.int32)[None]
  wanted = np.full((1, 4), 7, np.int32)
  found = wanted.copy()
  found[0, 2] = 9
  call = types.SimpleNamespace(tokens=found)
  gaps = measurer._gaps(
    [call, types.SimpleNamespace(tokens=wanted)],
    [wanted, wanted],
    [(prompt, np.array([8], np.int32))] * 2,
    "float32",
  )
  model = models.load_hf(model_folder)
  known = np.concatenate([prompt[0], [7, 7]])[None]
  logits = model(np.asarray(known))[0][0, -1]
  assert gaps == [pytest.approx(abs(float(logits[7] - logits[9])), abs=1e-4)]
