# SPDX-License-Identifier: Apache-2.0
"""Runs that stop, in every way, end like a run that did not."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tests.unisparse_jax.training import tiny_run
from unisparse_jax import training

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = pytest.mark.optimised


def params_of(result: training.TrainResult):
  return nnx.to_pure_dict(nnx.split(result.model)[1])


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def run_program(workdir, death, step=0):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "tests.unisparse_jax.training.tiny_run",
      str(workdir),
      death,
      str(step),
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.slow
def test_killed_anywhere_gives_the_same_bits(whole, tmp_path):
  workdir = tmp_path / "run"
  # Between two steps, of which one is not in a checkpoint.
  assert run_program(workdir, "evaluate", 5).returncode == -signal.SIGKILL
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4"]
  # While the checkpoint of step 8, where the stage ends, is being written.
  assert run_program(workdir, "save", 8).returncode == -signal.SIGKILL
  result = tiny_run.train(
    workdir, evaluate=lambda model, step: {}, eval_every=1
  )
  assert result.finished
  assert result.step == 15
  assert_same_bits(params_of(result), params_of(whole[1]))

  lines = training.read_metrics(workdir / "metrics.jsonl")
  for kind, steps in (
    ("train", [2, 4, 6, 8, 10, 12, 14, 15]),
    ("eval", list(range(1, 16))),
  ):
    assert [line["step"] for line in lines if line["kind"] == kind] == steps


def test_sigterm_and_the_budget_stop_cleanly(whole, tmp_path):
  workdir = tmp_path / "run"
  first = tiny_run.train(workdir, max_seconds=1e-6)
  assert (first.step, first.finished, first.reason) == (1, False, "max_seconds")
  assert (workdir / "checkpoints" / "1").is_dir()

  handler = signal.getsignal(signal.SIGTERM)

  def ask_to_stop(model, step):
    if step == 9:
      os.kill(os.getpid(), signal.SIGTERM)
    return {}

  second = tiny_run.train(workdir, evaluate=ask_to_stop, eval_every=1)
  assert (second.step, second.finished, second.reason) == (9, False, "SIGTERM")
  assert (workdir / "checkpoints" / "9").is_dir()
  assert signal.getsignal(signal.SIGTERM) is handler
  third = tiny_run.train(workdir)
  assert (third.finished, third.reason) == (True, "finished")
  assert_same_bits(params_of(third), params_of(whole[1]))


def test_a_finished_run_is_not_trained_again(whole):
  workdir, result = whole
  before = (workdir / "metrics.jsonl").read_text()
  again = tiny_run.train(workdir)
  assert again.finished
  assert_same_bits(params_of(again), params_of(result))
  assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_workers_change_no_bit_and_may_change_in_number(whole, tmp_path):
  workdir = tmp_path / "run"
  assert tiny_run.train(workdir, num_workers=2, max_seconds=1e-6).step == 1
  result = tiny_run.train(workdir, num_workers=1)
  assert_same_bits(params_of(result), params_of(whole[1]))


def copy_with_damage(workdir, target, steps):
  shutil.copytree(workdir, target)
  for step in steps:
    folder = target / "checkpoints" / str(step) / "state"
    largest = max(
      (p for p in folder.rglob("*") if p.is_file()),
      key=lambda p: p.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  return target


def test_truncated_checkpoint_falls_back_with_a_warning(whole, tmp_path):
  workdir = copy_with_damage(whole[0], tmp_path / "run", [15])
  with pytest.warns(RuntimeWarning, match="checkpoint 15 .* from step 12"):
    result = tiny_run.train(workdir)
  assert_same_bits(params_of(result), params_of(whole[1]))
  assert [p.name for p in (workdir / "damaged").iterdir()] == ["15"]
  assert (workdir / "checkpoints" / "15").is_dir()


def test_no_readable_checkpoint_is_an_error(whole, tmp_path):
  workdir = copy_with_damage(whole[0], tmp_path / "run", [12, 15])
  before = sorted(str(p) for p in workdir.rglob("*"))
  metrics = (workdir / "metrics.jsonl").read_bytes()
  with pytest.raises(ValueError, match="at least one readable checkpoint"):
    tiny_run.train(workdir)
  assert sorted(str(p) for p in workdir.rglob("*")) == before
  assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_workdir_of_another_run_is_refused(whole):
  workdir, _ = whole
  before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  with pytest.raises(ValueError) as raised:
    tiny_run.train(workdir, learning_rate=2e-2)
  assert f"workdir={workdir}" in str(raised.value)
  assert "train.learning_rate is 0.01 there and 0.02" in str(raised.value)
  after = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  assert after == before


def test_run_file_holds_every_setting(whole):
  settings = json.loads((whole[0] / "run.json").read_text())
  assert settings["model"]["embed_dim"] == 16
  assert settings["train"]["stages"][1]["seq_len"] == 32
