# SPDX-License-Identifier: Apache-2.0
"""Attention over the listed key/value blocks of each query block."""

from pallas_kernels.block_sparse_attention.api import (
  block_sparse_attention as block_sparse_attention,
)
