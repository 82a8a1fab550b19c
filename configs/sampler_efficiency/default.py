# SPDX-License-Identifier: Apache-2.0
"""All samplers on logistic and Gaussian process posteriors, ten repeats.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/default.py --workdir=out/ess
Device:  2 CPU cores, about 10 minutes; 2 GiB; Cox processes are in
         latent.py and cox_long.py.
Expect:  results/sampler_efficiency_cpu.jsonl: on breast cancer MCLMC is ahead
         of the plain means of gi_mala (25,000 against 14,000 min ESS a CPU
         second), on the other two ours is ahead of all.
"""

import ml_collections

_LOGISTIC = (
  "gi_mala",
  "gi_rwm",
  "mala",
  "barker",
  "rmh",
  "hmc",
  "mclmc",
  "nuts",
)
_LATENT = (
  "gi_latent_gaussian",
  "mgrad_gaussian",
  "elliptical_slice",
  "pcn",
  "mala",
  "nuts",
)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  config.rows = (
    dict(target="breast_cancer", samplers=_LOGISTIC),
    dict(target="diabetes", samplers=_LOGISTIC),
    dict(
      target="gp:breast_cancer_mean:270",
      samplers=(*_LATENT, "nuts_laplace"),
    ),
  )
  return config
