# SPDX-License-Identifier: Apache-2.0
import base64
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import ml_collections
import numpy as np
import pytest

from configs.long_context import default, demo, smoke
from experiments import long_context
from experiments.frame import html_page
from experiments.prefill import (
  figures,
  long_context_config,
  long_context_masks,
  long_context_run,
  long_context_summary,
)
from unisparse_jax import models, records

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run_main(monkeypatch, model_folder, in_process):
  """Runs main in this process, on a few held-out modules."""

  def run(workdir, **overrides):
    config = smoke.get_config()
    config.model = str(model_folder)
    with config.unlocked():
      config.update(overrides)
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
      holder = types.SimpleNamespace(value=value)
      monkeypatch.setattr(long_context, name, holder)
    long_context.main(["long_context"])

  return run


@pytest.mark.slow
def test_measures_resumes_and_reports(run_main, tmp_path, capsys, monkeypatch):
  workdir = tmp_path / "run"
  measure = long_context_run.Measurer.measure
  calls = []

  def stop_at_the_ninth(self, step):
    calls.append(step.key)
    if len(calls) == 9:
      raise KeyboardInterrupt
    return measure(self, step)

  monkeypatch.setattr(long_context_run.Measurer, "measure", stop_at_the_ninth)
  with pytest.raises(KeyboardInterrupt):
    run_main(workdir)
  run_main(workdir)
  written = records.read(workdir / "records.jsonl")
  keys = [long_context_run.key(record) for record in written]
  assert len(set(keys)) == len(keys) == len(calls) - 1
  assert calls[8] == calls[9]  # only the one that was cut off is taken again

  kinds = {record["kind"] for record in written}
  assert kinds == {*long_context_config.MEASURES, "masks"}
  assert written[0]["settings"]["model_sha256"]
  output = capsys.readouterr().out
  report = workdir / "report.html"
  assert output.strip().splitlines()[-1] == f"Report: {report}"
  assert "unisparse 0.9 · 768" in output

  text = report.read_text()
  pictures = re.findall(r"src='data:image/png;base64,([^']+)'", text)
  assert len(pictures) == 5
  for picture in pictures:
    assert base64.b64decode(picture).startswith(b"\x89PNG")
  for title in (
    "Quality against density",
    "Time of one layer&#x27;s attention",
    "Time to the first token",
    "Score by task, 768 tokens",
    "Masks over the true attention, 768 tokens",
    "Environment",
  ):
    assert title in text
  assert not re.search(r"(src|href)='(?!data:)", text)  # self-contained

  before = (workdir / "records.jsonl").read_bytes()
  report.unlink()
  count = len(calls)
  run_main(workdir)  # nothing is left to measure; the report comes back
  assert len(calls) == count
  assert (workdir / "records.jsonl").read_bytes() == before
  assert report.exists()
  with pytest.raises(ValueError, match=r"samples is 1 there and 2 here"):
    run_main(workdir, samples=2)
  assert (workdir / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"colour": 1}, r"config must.*unknown \['colour'\]"),
    ({"model": "nowhere"}, r"config\.model must.*got model='nowhere'"),
    ({"lengths": (4096,)}, r"lengths must not exceed.*4096.*<= 1024"),
    ({"lengths": (100,)}, r"lengths must hold an answer.*100"),
    ({"lengths": (-1,)}, r"lengths must be"),
    ({"lengths": ()}, r"lengths must not be empty"),
    ({"tasks": ("niah",)}, r"tasks must be.*niah"),
    ({"tasks": ("vt", "vt")}, r"tasks must name nothing twice"),
    ({"samples": 0}, r"samples must be"),
    ({"seed": -1}, r"seed must be"),
    ({"timed_layers": (2,)}, r"timed_layers must be layers.*0 to 1"),
    ({"mask_label": "other"}, r"mask_label must be.*'other'"),
    ({"implementation": "cuda"}, r"implementation must be.*'cuda'"),
    ({"dtype": "int8"}, r"dtype must be.*'int8'"),
  ],
)
def test_bad_settings_are_named(run_main, tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    run_main(tmp_path / "run", **overrides)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (
      {"label": "a", "method": "none"},
      r"patterns\[0\]: pattern must be.*'none'",
    ),
    ({"label": "a", "method": "unisparse", "p": 1}, r"patterns\[0\].*'p'"),
    (
      {"label": "a", "method": "unisparse", "top_p": float("nan")},
      r"patterns\[0\]: top_p must be in \(0, 1\]",
    ),
    ({"method": "dense"}, r"patterns\[0\] must name its label"),
    ({"label": "dense", "method": "dense"}, r"label must not be that of a"),
    (
      {"label": "a", "method": "dense", "measure": ("speed",)},
      r"measure must be.*'speed'",
    ),
  ],
)
def test_bad_patterns_are_named(run_main, tmp_path, entry, message):
  with pytest.raises(ValueError, match=message):
    run_main(tmp_path / "run", patterns=(ml_collections.ConfigDict(entry),))
  assert not (tmp_path / "run").exists()


def test_labels_stand_once():
  config = smoke.get_config()
  config.patterns = (config.patterns[0], config.patterns[0])
  with pytest.raises(ValueError, match="patterns must have one label each"):
    long_context_config.parse(config)


def test_a_foreign_workdir_is_left_alone(run_main, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="workdir must be empty"):
    run_main(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("module", [default, demo, smoke])
def test_configs_are_valid(module):
  config = long_context_config.parse(module.get_config())
  shipped = models.DecoderConfig(
    vocab_size=4096,
    num_layers=8,
    embed_dim=384,
    mlp_dim=768,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_len=32_768,
  )
  config.check_model(shipped)
  steps = long_context_run.plan(config, shipped.num_layers)
  assert len({step.key for step in steps}) == len(steps)
  for length in config.lengths:
    for task in config.tasks:
      answers = [s.pattern for s in steps if s.length == length]
      assert answers[0] == "dense", task  # the reference comes first


def test_summary_compares_with_the_dense_rows():
  def record(kind, pattern, item="", **values):
    key = {"kind": kind, "pattern": pattern, "length": 64, "item": item}
    return key | values

  times = {"select_ms": 1.0, "attend_ms": 2.0, "peak_bytes": 2**20}
  rows = long_context_summary.summarise(
    [
      record("answers", "dense", "vt", score=1.0),
      record("answers", "dense", "cwe", score=0.6),
      record("answers", "a", "vt", score=0.5),
      record("answers", "a", "cwe", score=0.3),
      record("attention_time", "dense", "0", total_ms=12.0, **times),
      record("attention_time", "jax.nn", "0", total_ms=30.0, **times),
      record("attention_time", "a", "0", total_ms=2.0, **times),
      record("attention_time", "a", "1", total_ms=4.0, **times),
    ]
  )
  jax_nn, dense, ours = rows
  assert dense["pattern"] == "dense"
  assert dense["score"] == pytest.approx(0.8)
  assert ours["relative_score"] == pytest.approx(0.5)
  assert ours["faster_than_dense"] == pytest.approx(4.0)
  assert ours["faster_than_jax_nn"] == pytest.approx(10.0)
  assert jax_nn["attention_mib"] == 1.0
  assert "recall" not in ours


def test_a_dense_score_of_zero_has_no_ratio():
  key = {"kind": "answers", "length": 64, "item": "vt", "score": 0.0}
  rows = long_context_summary.summarise(
    [key | {"pattern": "dense"}, key | {"pattern": "a"}]
  )
  assert "relative_score" not in rows[1]


def test_text_of_a_model_cannot_break_the_report():
  assert html_page.escape("<b>'\"") == "&lt;b&gt;&#x27;&quot;"


def test_heads_that_behave_differently_are_chosen():
  blocks = 16
  uniform = np.tril(np.ones((blocks, blocks)))
  sink = 0.01 * uniform
  sink[:, 0] += 1.0
  local = 0.01 * uniform + np.eye(blocks)
  few = 0.01 * uniform
  few[8:, 4] += 1.0
  heads = np.stack([uniform, few, uniform, sink, local])
  heads /= heads.sum(-1, keepdims=True)
  chosen = long_context_masks.different_heads(heads, range(5))
  assert chosen[:2] == [4, 3]
  assert chosen[2] in (0, 2)
  assert chosen[3] == 1
  # Head 3 shares its mask with head 4: the others come before it.
  assert 3 not in long_context_masks.different_heads(heads, [0, 1, 2, 4, 4])


def test_the_outline_of_one_block_has_four_sides():
  mask = np.zeros((3, 4), bool)
  mask[1, 2] = True
  sides = {tuple(sorted(s)) for s in figures.outline(mask)}
  assert sides == {
    ((1.5, 0.5), (2.5, 0.5)),
    ((1.5, 1.5), (2.5, 1.5)),
    ((1.5, 0.5), (1.5, 1.5)),
    ((2.5, 0.5), (2.5, 1.5)),
  }
  assert not figures.outline(np.zeros((2, 2), bool))


def test_flags():
  def run_program(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "experiments.long_context", *arguments],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      timeout=60,
    )

  shown = run_program("--help").stdout
  assert "--workdir" in shown
  assert "goes on where an earlier one stopped" in shown
  missing = run_program("--config=configs/long_context/smoke.py")
  assert missing.returncode
  assert "--workdir" in missing.stderr


def test_records_are_plain_json(tmp_path):
  config = long_context_config.parse(smoke.get_config())
  (tmp_path / "model.safetensors").write_bytes(b"1")
  first = long_context_config.identity(config, tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"2")
  second = long_context_config.identity(config, tmp_path)
  assert first["model_sha256"] != second["model_sha256"]
  assert json.loads(json.dumps(records.to_json(first)))["samples"] == 1
