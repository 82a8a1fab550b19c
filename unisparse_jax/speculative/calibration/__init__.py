# SPDX-License-Identifier: Apache-2.0
"""From logged trees to a policy: replay, bins, costs, search, artefact."""

from unisparse_jax.speculative.calibration.artefact import Artefact as Artefact
from unisparse_jax.speculative.calibration.artefact import Table as Table
from unisparse_jax.speculative.calibration.artefact import load as load
from unisparse_jax.speculative.calibration.artefact import (
  rule_table as rule_table,
)
from unisparse_jax.speculative.calibration.artefact import save as save
from unisparse_jax.speculative.calibration.costs import StepCosts as StepCosts
from unisparse_jax.speculative.calibration.costs import fit_costs as fit_costs
from unisparse_jax.speculative.calibration.partition import NUM_BINS as NUM_BINS
from unisparse_jax.speculative.calibration.partition import bin_of as bin_of
from unisparse_jax.speculative.calibration.partition import (
  fit_thresholds as fit_thresholds,
)
from unisparse_jax.speculative.calibration.replay import (
  StepRecords as StepRecords,
)
from unisparse_jax.speculative.calibration.search import Arms as Arms
from unisparse_jax.speculative.calibration.search import Choice as Choice
from unisparse_jax.speculative.calibration.search import by_bin as by_bin
from unisparse_jax.speculative.calibration.search import evaluate as evaluate
from unisparse_jax.speculative.calibration.search import (
  fewest_nodes as fewest_nodes,
)
from unisparse_jax.speculative.calibration.search import fixed as fixed
from unisparse_jax.speculative.calibration.search import oracle as oracle
