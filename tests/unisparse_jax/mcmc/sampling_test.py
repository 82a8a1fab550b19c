# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.mcmc import forced
from unisparse_jax.mcmc import (
  base,
  control_variates,
  estimates,
  gi_mala,
  poisson,
  preconditioner,
  sampling,
  summary,
)

VARIATES = control_variates.poisson_terms(poisson.Linear())
STEP = base.bind(gi_mala.build_kernel(), forced.curved)


def arguments(seed=0, num_steps=200, step_size=0.8):
  a = preconditioner.identity(2)
  start = jnp.zeros((3, 2))
  gamma = jnp.float32(step_size)
  return dict(
    rng_key=jax.random.key(seed),
    step=STEP,
    state=jax.jit(jax.vmap(lambda x: gi_mala.init(x, forced.curved)))(start),
    num_steps=num_steps,
    parameters=(gamma, a),
    collector=VARIATES.collector,
    carry=VARIATES.init(start),
    collector_parameters=(poisson.Reference(gamma, jnp.zeros(2), a),),
    batch_size=10,
  )


def check_same(a, b):
  np.testing.assert_array_equal(a.state.position, b.state.position)
  jax.tree.map(np.testing.assert_array_equal, a.carry, b.carry)
  np.testing.assert_array_equal(a.stats.num_steps, b.stats.num_steps)
  np.testing.assert_array_equal(a.stats.num_accepted, b.stats.num_accepted)
  np.testing.assert_allclose(
    a.stats.acceptance_rate, b.stats.acceptance_rate, rtol=1e-5
  )


def test_chunks_are_the_whole_run(monkeypatch):
  whole = base.run_chains(**arguments())
  shown = []
  move = sampling._Bar.move

  def watched(self, done, stats):
    move(self, done, stats)
    shown.append((done, self._progress.tasks[0].description))

  monkeypatch.setattr(sampling._Bar, "move", watched)
  check_same(sampling.sample(**arguments(), progress=True), whole)
  rate = float(np.mean(whole.stats.acceptance_rate))
  assert shown[-1] == (200, f"acceptance {rate:.3f}")
  assert len(shown) > 1


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
  whole = base.run_chains(**arguments())
  calls = []
  run_chains = base.run_chains

  def dying(*args, **kwargs):
    calls.append(args[3])
    if len(calls) == 3:
      raise KeyboardInterrupt
    return run_chains(*args, **kwargs)

  settings = dict(checkpoint_dir=tmp_path / "run", checkpoint_seconds=0.0)
  monkeypatch.setattr(base, "run_chains", dying)
  with pytest.raises(KeyboardInterrupt):
    sampling.sample(**arguments(), **settings)
  monkeypatch.setattr(base, "run_chains", run_chains)
  done = sum(calls[:2])
  assert 0 < done < 200
  seen = []

  def watching(*args, **kwargs):
    seen.append(args[3])
    return run_chains(*args, **kwargs)

  monkeypatch.setattr(base, "run_chains", watching)
  check_same(sampling.sample(**arguments(), **settings), whole)
  assert sum(seen) == 200 - done
  # A finished run is only read.
  check_same(sampling.sample(**arguments(), **settings), whole)
  assert sum(seen) == 200 - done
  for other in (dict(seed=1), dict(num_steps=300), dict(step_size=0.9)):
    with pytest.raises(ValueError, match=r"checkpoint_dir must be new"):
      sampling.sample(**arguments(**other), **settings)


def test_summary_and_arviz():
  run = base.run_chains(
    **arguments(num_steps=100),
    trace=lambda state, info: (state.position, info.acceptance_rate),
  )
  result = estimates.estimate(run.carry)
  rows = summary.summary(result, ["first", "second"])
  assert list(rows) == ["first", "second"]
  assert set(rows["first"]) == set(summary.COLUMNS)
  np.testing.assert_allclose(
    rows["first"]["factor"],
    (rows["first"]["mcse_plain"] / rows["first"]["mcse_controlled"]) ** 2,
  )
  table = summary.table(result)
  assert table.row_count == 2 and len(table.columns) == 8
  positions, rates = run.trace
  tree = summary.to_datatree(
    result,
    ["first", "second"],
    posterior={"x": positions},
    sample_stats={"acceptance_rate": rates},
  )
  assert tree["posterior"]["x"].shape == (3, 100, 2)
  assert tree["posterior"]["x"].dims[:2] == ("chain", "draw")
  np.testing.assert_array_equal(
    tree["posterior"]["x"].values[2, 5], positions[5, 2]
  )
  assert tree["sample_stats"]["acceptance_rate"].shape == (3, 100)
  np.testing.assert_allclose(
    tree["controlled"]["mcse_controlled"].sel(function="second"),
    result.mcse[1],
  )
  with pytest.raises(ValueError, match=r"names must be different, one for"):
    summary.summary(result, ["first"])


def test_functions_without_a_solution_are_refused():
  with pytest.raises(ValueError, match=r"functions must have a known Poisson"):
    control_variates.poisson_terms(lambda x: x**3)
  with pytest.raises(ValueError, match=r"smooth must be a function"):
    poisson.Ridge(np.eye(2), None)
  with pytest.raises(ValueError, match=r"order must be 1 or 2"):
    control_variates.polynomial_terms(poisson.Linear(), 2, order=3)
