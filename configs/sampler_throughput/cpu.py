# SPDX-License-Identifier: Apache-2.0
"""100 chains: what control variates cost on a CPU.

Run:     XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0
           python -m experiments.sampler_throughput
           --config=configs/sampler_throughput/cpu.py --workdir=out/speed
Device:  2 CPU cores, about a minute.
Expect:  results/sampler_throughput_cpu.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "breast_cancer"
  config.num_chains = 100
  config.num_steps = 200
  config.batch_size = 100
  config.nuts_steps = 100
  config.repeats = 25
  config.dtype = "float64"
  return config
