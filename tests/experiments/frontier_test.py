# SPDX-License-Identifier: Apache-2.0
import json
import types

import pytest

from configs.frontier import default, smoke, threshold
from experiments import (
  frontier,
  frontier_config,
  frontier_figures,
  long_context_config,
  long_context_run,
)
from unisparse_jax import models


@pytest.fixture
def run_main(monkeypatch, model_folder, in_process):
  def run(workdir, **overrides):
    config = smoke.get_config()
    config.model = str(model_folder)
    with config.unlocked():
      config.update(overrides)
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
      monkeypatch.setattr(frontier, name, types.SimpleNamespace(value=value))
    frontier.main(["frontier"])

  return run


def test_writes_records_a_table_and_a_report(run_main, tmp_path, capsys):
  workdir = tmp_path / "run"
  sweep = dict(
    label="blocks",
    method="random_blocks",
    budget="density",
    values=(0.3, 1.0),
    block_q=64,
    block_kv=64,
    measure=("next_token", "layers"),
  )
  run_main(workdir, sweeps=(sweep,), lengths=(320,), tasks=())
  report = workdir / "report.html"
  assert capsys.readouterr().out.strip().endswith(f"Report: {report}")
  text = report.read_text()
  assert "Quality against cost, 320 tokens" in text
  assert "blocks 0.3" in text and "blocks 1.0" in text
  matched = json.loads((workdir / "matched.json").read_text())
  assert matched == [{"length": 320, "pattern": "blocks"}]  # no scores taken


def test_a_sweep_becomes_one_pattern_a_budget():
  config, sweeps, share = frontier_config.parse(smoke.get_config())
  assert share == 0.99
  assert [entry.label for entry in config.entries] == [
    "unisparse 0.6",
    "unisparse 0.9",
    "random 0.3",
    "streaming",
  ]
  assert config.entry("unisparse 0.6").pattern(0).top_p == 0.6
  assert config.entry("unisparse 0.6").pattern(0).block_q == 64
  assert config.entry("random 0.3").measure == ("next_token", "layers")
  assert sweeps[0].points == {"unisparse 0.6": 0.6, "unisparse 0.9": 0.9}


@pytest.mark.parametrize("module", [default, smoke, threshold])
def test_configs_are_valid(module):
  config, sweeps, _ = frontier_config.parse(module.get_config())
  shipped = models.load_hf_config(
    long_context_config.model_folder(config.model)
  )
  config.check_model(shipped)
  steps = long_context_run.plan(config, shipped.num_layers)
  assert len({step.key for step in steps}) == len(steps)
  assert len(config.entries) == sum(len(sweep.points) for sweep in sweeps)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(sweeps=()), r"sweeps must not be empty"),
    (dict(matched_share=1.5), r"matched_share must be in"),
    (
      dict(sweeps=(dict(label="", method="dense"),)),
      r"label must not be empty",
    ),
    (
      dict(sweeps=(dict(label="a", method="dense", budget="top_p"),)),
      r"values must be given if and only if budget is",
    ),
    (
      dict(sweeps=(dict(label="a", method="dense", depth=1),)),
      r"patterns\[0\].*'depth'",
    ),
    (dict(sweeps=(1,)), r"sweeps\[0\] must be a mapping"),
  ],
)
def test_bad_settings_are_named(change, message):
  values = smoke.get_config().to_dict() | change
  with pytest.raises(ValueError, match=message):
    frontier_config.parse(values)


def test_matched_is_the_fastest_budget_that_keeps_the_score():
  sweeps = (
    frontier_config.Sweep(
      label="a", method="unisparse", budget="top_p", values=(0.8, 0.9, 0.95)
    ),
    frontier_config.Sweep(label="b", method="streaming"),
  )

  def row(pattern, score, ms):
    return {
      "length": 64,
      "pattern": pattern,
      "relative_score": score,
      "total_ms": ms,
      "select_ms": ms / 4,
      "nominal_density": 0.5,
    }

  rows = [
    row("dense", 1.0, 10.0),
    row("a 0.8", 0.9, 1.0),
    row("a 0.9", 0.995, 3.0),
    row("a 0.95", 1.0, 2.0),  # denser, yet measured faster
    row("b", 0.5, 0.1),
  ]
  first, second = frontier_figures.matched(rows, sweeps, 0.99)
  assert first["budget"] == 0.95
  assert first["select_share"] == pytest.approx(0.25)
  assert "budget" not in second
  table = frontier_figures.matched_table([first, second], 0.99)
  assert table.row_count == 2
