# SPDX-License-Identifier: Apache-2.0
"""When independent Metropolis with control variates beats independent draws.

Measures posterior means of several models, and marginal likelihoods under
conflict with the prior, by independent Metropolis with fixed and adapted
proposals, and by its peers: independent draws, importance sampling with the
same proposal and the same control variate, NUTS, Pathfinder with Pareto-
smoothed weights, bridge sampling, stepping stones. Or, with `throughput`, how
fast a million proposals are. Writes WORKDIR/records.jsonl, a line a
measurement; the same command goes on where an earlier one stopped.
"""

import dataclasses
import time

import jax
from absl import app

from experiments.frame import flags_and_configs, runs
from experiments.sampling import (
  imh_evidence,
  imh_posteriors,
  imh_tables,
  imh_targets,
  imh_throughput,
)

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posterior:
  """One posterior of the config; see `imh_posteriors.measure`."""

  name: str
  fits: tuple[dict, ...]
  peers: tuple[str, ...] = ("snis", "pathfinder")
  num_draws: int = 4_000
  num_replicates: int = 200
  nuts_draws: int = 1_000
  nuts_chains: int = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
  """Marginal likelihoods of the config; see `imh_evidence`."""

  problems: tuple[imh_evidence.Problem, ...]
  mixture_steps: tuple[float | None, ...] = (None, 2.0, 0.5)
  num_evaluations: int = 100_000
  num_replicates: int = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The whole config."""

  seed: int = 0
  posteriors: tuple[Posterior, ...] = ()
  evidence: Evidence | None = None
  throughput: imh_throughput.Throughput | None = None


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings = flags_and_configs.to_dataclass(
    Settings, _CONFIG.value, name="config"
  )
  run = runs.begin(_WORKDIR.value, settings)
  with jax.enable_x64(settings.throughput is None):
    measure(settings, run)
  imh_tables.show(run.found())


def measure(settings: Settings, run: runs.Run):
  """Takes what is not recorded yet."""
  # A case is done when its last record is there: they are written together.
  done = {(record["kind"], record["case"]) for record in run.found()}

  def take(kind, case, rows):
    if (kind, case) in done:
      return
    began = time.perf_counter()
    rows = list(rows())
    seconds = time.perf_counter() - began
    for method, label, values in rows:
      run.writer.write(
        kind=kind, case=case, method=method, fit=label, **values,
        case_seconds=seconds,
      )  # fmt: skip
    print(f"{kind} {case}: {seconds:.1f} s", flush=True)

  for one in settings.posteriors:
    options = dataclasses.asdict(one)
    name = options.pop("name")
    take(
      "posterior",
      name,
      lambda name=name, options=options: imh_posteriors.measure(
        imh_targets.make(name), seed=settings.seed, **options
      ),
    )
  if settings.evidence is not None:
    options = {
      field.name: getattr(settings.evidence, field.name)
      for field in dataclasses.fields(Evidence)
    }
    for problem in options.pop("problems"):
      take(
        "evidence",
        problem.name,
        lambda problem=problem: imh_evidence.measure(problem, **options),
      )
  if settings.throughput is not None:
    take(
      "throughput",
      settings.throughput.implementation,
      lambda: imh_throughput.measure(settings.throughput),
    )


if __name__ == "__main__":
  flags_and_configs.run(main)
