# SPDX-License-Identifier: Apache-2.0
"""The sampler experiments on their smoke configs."""

import os
import pathlib
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.sampling import mcmc_figures
from unisparse_jax import records

ROOT = pathlib.Path(__file__).parents[2]


def run(name, workdir):
  """Runs an experiment in a process of its own: it sets JAX's precision."""
  return subprocess.run(
    [
      sys.executable,
      "-m",
      f"experiments.{name}",
      f"--config=configs/{name}/smoke.py",
      f"--workdir={workdir}",
    ],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout


@pytest.mark.slow
def test_variance_reduction(tmp_path):
  out = run("variance_reduction", tmp_path)
  assert "cox:4" in out and "diabetes" in out
  found = records.read(tmp_path / "records.jsonl")
  assert [r["length"] for r in found] == [100, 200] * 3
  for record in found:
    chosen = record["methods"]["chosen"]["linear"]
    assert chosen["median"] > 1
    assert 0.4 < record["acceptance_rate"] < 0.99
  assert (tmp_path / "factors.png").stat().st_size > 1000
  assert (tmp_path / "calibration.png").stat().st_size > 1000


@pytest.mark.slow
def test_sampler_efficiency(tmp_path):
  out = run("sampler_efficiency", tmp_path)
  found = records.read(tmp_path / "records.jsonl")
  names = {(r["target"], r["sampler"]) for r in found}
  assert len(names) == len(found) == 5
  assert ("gp:diabetes:20", "mgrad_gaussian") in names
  assert all(r["min_ess_per_second"] > 0 for r in found)
  assert "cox:4" in out
  assert (tmp_path / "chains.png").stat().st_size > 1000


@pytest.mark.slow
def test_sampler_throughput(tmp_path):
  run("sampler_throughput", tmp_path)
  found = {r["kind"]: r for r in records.read(tmp_path / "records.jsonl")}
  assert set(found) == {
    "products",
    "products_padded",
    "gradient",
    "gi_mala",
    "gi_mala_linear",
    "gi_mala_linear_square",
    "nuts",
  }
  ours, nuts = found["gi_mala_linear"], found["nuts"]
  gap = np.array(ours["mean"]) - np.array(nuts["mean"])
  error = np.hypot(ours["mcse"], nuts["mcse"])
  assert np.max(np.abs(gap / error)) < 8  # of 16 chains of 10 steps


def test_autocorrelation():
  values = np.array([1.0, -1.0] * 50)
  found = mcmc_figures.autocorrelation(values)
  np.testing.assert_allclose(found[:3], [1, -0.99, 0.98])
  assert np.all(mcmc_figures.autocorrelation(np.ones(4)) == 0)
  assert not plt.get_fignums()
