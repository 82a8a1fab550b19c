# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood and gradient of logistic regression, for many chains."""

from pallas_kernels.logistic_likelihood.api import (
  differentiable as differentiable,
)
from pallas_kernels.logistic_likelihood.api import (
  log_likelihood as log_likelihood,
)
from pallas_kernels.logistic_likelihood.api import (
  logistic_likelihood as logistic_likelihood,
)
