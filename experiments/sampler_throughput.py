# SPDX-License-Identifier: Apache-2.0
"""Thousands of chains at once: gradients per second, what control variates
cost, and the error of posterior means per second beside NUTS.
"""

import jax
import jax.numpy as jnp
import rich.console
from absl import app

from experiments import (
  flags_and_configs,
  mcmc_problems,
  sampler_throughput_run,
)
from unisparse_jax import records

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings = flags_and_configs.to_dataclass(
    sampler_throughput_run.Settings, _CONFIG.value, name="config"
  )
  jax.config.update("jax_enable_x64", settings.dtype == "float64")
  jax.config.update("jax_default_matmul_precision", settings.precision)
  workdir = records.claim_workdir(_WORKDIR.value, settings)
  flags_and_configs.start_jax(workdir)
  file = workdir / "records.jsonl"
  writer = records.RecordWriter(file, settings)
  problem = mcmc_problems.make(settings.target, jnp.dtype(settings.dtype))
  console = rich.console.Console(width=140)
  for measured in sampler_throughput_run.measure(problem, settings):
    writer.write(**measured)
    console.print(
      {k: v for k, v in measured.items() if not isinstance(v, list)}
    )


if __name__ == "__main__":
  flags_and_configs.run(main)
