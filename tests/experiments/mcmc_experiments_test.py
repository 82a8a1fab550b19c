# SPDX-License-Identifier: Apache-2.0
"""The sampler experiments on their smoke configs."""

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import gaussian_exactness
from experiments.frame import flags_and_configs
from experiments.sampling import (
  gaussian_exactness_run,
  mcmc_figures,
  mcmc_peers,
  mcmc_problems,
)
from unisparse_jax import mcmc, records

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
  for row in range(3):
    assert (tmp_path / f"chains_{row}.png").stat().st_size > 1000


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


def test_gaussian_exactness():
  for name in ("default", "smoke"):
    module = importlib.import_module(f"configs.gaussian_exactness.{name}")
    settings = flags_and_configs.to_dataclass(
      gaussian_exactness.Settings, module.get_config(), name="config"
    )
  found = []
  for row, limit in zip(settings.rows, (1e-4, 1e-11), strict=True):
    with jax.enable_x64(row.dtype == "float64"):
      (one,) = gaussian_exactness_run.measure(row, settings.seed)
    assert one["max_abs_log_ratio"] < limit
    assert one["max_relative_sd"] < limit < one["min_plain_relative_sd"]
    found.append({**dataclasses.asdict(row), **one})
  assert gaussian_exactness.table(found).row_count == 2
  for changes, message in (
    ({"sampler": "mala"}, r"sampler must be a known name.*'gi_mala'"),
    ({"dim": 1}, r"dim must be >= 2"),
    ({"sampler": "gi_latent_gaussian"}, r"coordinates must be 'x' for"),
  ):
    settings = {"sampler": "gi_mala", "dim": 2, **changes}
    with pytest.raises(ValueError, match=message):
      gaussian_exactness_run.Row(coordinates="white", **settings)


@pytest.mark.parametrize("name", ["gaussian:3:1e6", "student_t:5:2"])
def test_targets_without_data(name):
  with jax.enable_x64(True):
    problem = mcmc_problems.make(name, jnp.float64)
    start = problem.start(jax.random.key(0), 4)
    run = mcmc.run_chains(
      jax.random.key(1),
      problem.step,
      jax.vmap(problem.init)(start),
      100,
      parameters=(0.8, *problem.rest),
    )
    mala = mcmc_peers.make("mala", problem)
    moved, _ = mala.step(
      jax.random.key(2), mala.init(start[0]), jnp.float64(0.1)
    )
    assert mala.position(moved).shape == start[0].shape
  rate = float(np.mean(run.stats.acceptance_rate))
  is_gaussian = name.startswith("gaussian")
  assert rate > 1 - 1e-6 if is_gaussian else 0.3 < rate < 1


def test_autocorrelation():
  values = np.array([1.0, -1.0] * 50)
  found = mcmc_figures.autocorrelation(values)
  np.testing.assert_allclose(found[:3], [1, -0.99, 0.98])
  assert np.all(mcmc_figures.autocorrelation(np.ones(4)) == 0)
  assert not plt.get_fignums()
