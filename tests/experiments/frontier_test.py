# SPDX-License-Identifier: Apache-2.0
import base64
import json
import re
import types

import pytest

from configs.frontier import default, smoke, threshold
from experiments import frontier, long_context
from experiments.prefill import (
  frontier_config,
  frontier_figures,
  long_context_config,
  long_context_run,
)
from unisparse_jax import models, records


def test_writes_a_table_and_a_report(monkeypatch, tmp_path, capsys):
  def measure_all(config, workdir, console):
    """Records as a run writes them, without the run."""
    folder = records.claim_workdir(workdir, {"model": config.model})
    writer = records.RecordWriter(
      folder / "records.jsonl", {"model": config.model, "dtype": "float32"}
    )
    labels = ["dense", *(entry.label for entry in config.entries)]
    for cost, label in enumerate(labels, start=1):
      key = dict(pattern=label, length=768)
      quality = dict.fromkeys(
        ("recall", "recall_p1", "cra", "relative_l1", "cosine"), 0.9
      )
      density = dict(density=0.1 * cost, nominal_density=0.09 * cost)
      times = dict(select_ms=0.5, attend_ms=cost, total_ms=cost, peak_bytes=9)
      answer = dict(scores=[1.0], texts=["1"], targets=[["1"]], score=1.0)
      writer.write(kind="answers", item="vt", **key, **answer)
      writer.write(
        kind="next_token", item="", kl=0.1 / cost, agreement=1, loss=1, **key
      )
      writer.write(kind="layers", item="0", **key, **quality, **density)
      writer.write(kind="attention_time", item="0", **key, **times)
    return records.read(folder / "records.jsonl"), folder

  monkeypatch.setattr(long_context, "measure_all", measure_all)
  workdir = tmp_path / "run"
  for name, value in (
    ("_CONFIG", smoke.get_config()),
    ("_WORKDIR", str(workdir)),
  ):
    monkeypatch.setattr(frontier, name, types.SimpleNamespace(value=value))
  frontier.main(["frontier"])
  report = workdir / "report.html"
  assert capsys.readouterr().out.strip().endswith(f"Report: {report}")
  text = report.read_text()
  assert "Quality against cost, 768 tokens" in text
  (picture,) = re.findall(r"src='data:image/png;base64,([^']+)'", text)
  assert base64.b64decode(picture).startswith(b"\x89PNG")
  for label in ("unisparse 0.6", "unisparse 0.9", "random 0.3", "streaming"):
    assert label in text
  matched = json.loads((workdir / "matched.json").read_text())
  assert [line["pattern"] for line in matched] == [
    "unisparse",
    "random",
    "streaming",
  ]
  assert matched[0]["budget"] == 0.6  # the faster of two that keep the score


def test_a_sweep_becomes_one_pattern_a_budget():
  frontier_settings = frontier_config.parse(smoke.get_config())
  config, sweeps = frontier_settings.run, frontier_settings.sweeps
  assert frontier_settings.share == 0.99
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
  frontier_settings = frontier_config.parse(module.get_config())
  config, sweeps = frontier_settings.run, frontier_settings.sweeps
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
    (dict(beside="nowhere"), r"beside must be a file of records.*'nowhere'"),
  ],
)
def test_bad_settings_are_named(change, message):
  values = smoke.get_config().to_dict() | change
  with pytest.raises(ValueError, match=message):
    frontier_config.parse(values)


def test_answers_and_layers_of_an_earlier_run_stand_beside(tmp_path, caplog):
  (tmp_path / "a.jsonl").touch()
  values = smoke.get_config().to_dict()
  config = frontier_config.parse(values | {"beside": str(tmp_path / "a.jsonl")})

  def write(name, label="unisparse 0.6", model_sha256="a"):
    patterns = [dict(p) for p in config.run.patterns]
    patterns[1]["top_p"] = 0.8  # the same label, another pattern
    settings = {"model_sha256": model_sha256, "patterns": patterns}
    writer = records.RecordWriter(tmp_path / name, settings)
    at = dict(length=768, pattern=label, item="")
    writer.write(kind="layers", nominal_density=0.3, **at)
    writer.write(kind="layers", density=0.3, rounded=True, **at)
    writer.write(kind="attention_time", total_ms=1.0, **at)
    return records.read(tmp_path / name)

  earlier = write("a.jsonl")
  settings = {"model_sha256": "a"}

  def own(pattern, kind="next_token", length=768):
    key = dict(kind=kind, pattern=pattern, length=length)
    return [{**key, "settings": settings}]

  found = own("unisparse 0.6")
  assert config.with_earlier(found) == [earlier[0], *found]
  for found in (
    own("unisparse 0.6", "layers"),  # measured anew
    own("random 0.3"),
    own("unisparse 0.6", length=512),
  ):
    assert config.with_earlier(found) == found
  (tmp_path / "a.jsonl").unlink()
  write("a.jsonl", "unisparse 0.9")
  found = own("unisparse 0.9")
  assert config.with_earlier(found) == found  # other settings
  assert not caplog.records
  (tmp_path / "a.jsonl").unlink()
  write("a.jsonl", model_sha256="b")
  found = own("unisparse 0.6")
  assert config.with_earlier(found) == found
  assert "of another model: b" in caplog.text


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
