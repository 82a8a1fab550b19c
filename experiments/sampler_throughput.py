# SPDX-License-Identifier: Apache-2.0
"""Thousands of chains at once: gradients per second, what control variates
cost, and the error of posterior means per second beside NUTS.

Your own data: --config.target=FILE.csv, a table of numbers with a header whose
last column is the label, 0 or 1.
"""

import jax
import rich.console
from absl import app

from experiments.frame import flags_and_configs
from experiments.sampling import mcmc_runs, sampler_throughput_run

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings, run = mcmc_runs.begin(
    sampler_throughput_run.Settings, _CONFIG.value, _WORKDIR.value
  )
  jax.config.update("jax_default_matmul_precision", settings.precision)
  console = rich.console.Console(width=140)
  for measured in sampler_throughput_run.measure(settings):
    run.writer.write(**measured)
    console.print(
      {k: v for k, v in measured.items() if not isinstance(v, list)}
    )


if __name__ == "__main__":
  flags_and_configs.run(main)
