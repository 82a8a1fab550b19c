# SPDX-License-Identifier: Apache-2.0
"""Softmax of a few sampled queries, summed over them by key."""

from pallas_kernels.column_score_sampling.api import (
  column_score_sampling as column_score_sampling,
)
