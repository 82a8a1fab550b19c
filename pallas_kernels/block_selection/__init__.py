# SPDX-License-Identifier: Apache-2.0
"""Block scores to the lists of blocks that attention walks."""

from pallas_kernels.block_selection.api import (
  block_selection as block_selection,
)
