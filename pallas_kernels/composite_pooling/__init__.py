# SPDX-License-Identifier: Apache-2.0
"""Means over neighbouring tokens and heads."""

from pallas_kernels.composite_pooling.api import (
  composite_pooling as composite_pooling,
)
