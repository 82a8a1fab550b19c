# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding whose output is that of plain decoding."""

from unisparse_jax.speculative.policy import Fixed as Fixed
from unisparse_jax.speculative.policy import HeteroSpec as HeteroSpec
from unisparse_jax.speculative.policy import Policy as Policy
from unisparse_jax.speculative.tree import DraftTree as DraftTree
from unisparse_jax.speculative.tree import Pool as Pool
from unisparse_jax.speculative.tree import TreeShape as TreeShape
