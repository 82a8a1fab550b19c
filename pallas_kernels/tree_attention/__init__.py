# SPDX-License-Identifier: Apache-2.0
"""Attention from a few new tokens to a cache and to one another."""

from pallas_kernels.tree_attention.api import tree_attention as tree_attention
