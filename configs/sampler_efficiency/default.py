# SPDX-License-Identifier: Apache-2.0
"""All samplers on logistic, Gaussian process and Cox posteriors.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/default.py --workdir=out/ess
Device:  2 CPU cores, about 10 minutes; 2 GiB.
Expect:  results/sampler_efficiency_cpu.jsonl.
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
      repeats=5,
    ),
    dict(
      target="gp:diabetes:442",
      samplers=(*_LATENT, "nuts_laplace"),
      repeats=3,
    ),
    dict(
      target="cox:64",
      samplers=(
        "gi_latent_gaussian",
        "elliptical_slice",
        "pcn",
        "mala",
        "nuts",
      ),
      warm_up=500,
      num_steps=500,
      repeats=2,
    ),
  )
  return config
