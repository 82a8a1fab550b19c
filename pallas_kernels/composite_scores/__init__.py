# SPDX-License-Identifier: Apache-2.0
"""Attention between composite tokens, added up over blocks."""

from pallas_kernels.composite_scores.api import (
  composite_scores as composite_scores,
)
