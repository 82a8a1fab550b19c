# SPDX-License-Identifier: Apache-2.0
"""Training-free sparse prefill attention.

    mask = UniSparse(top_p=0.95).select(q, k)
    out = sparse_attention(q, k, v, mask)

or, as a value that a model is given, `SparseAttention(pattern=UniSparse())`.
"""

from pallas_kernels.tree_attention import tree_attention as tree_attention
from unisparse_jax.attention import metrics as metrics
from unisparse_jax.attention.attention_fn import AttentionFn as AttentionFn
from unisparse_jax.attention.attention_fn import (
  DenseAttention as DenseAttention,
)
from unisparse_jax.attention.attention_fn import (
  SparseAttention as SparseAttention,
)
from unisparse_jax.attention.attention_fn import (
  as_flax_attention as as_flax_attention,
)
from unisparse_jax.attention.block_mask import BlockGrid as BlockGrid
from unisparse_jax.attention.block_mask import BlockMask as BlockMask
from unisparse_jax.attention.block_mask import ColumnSet as ColumnSet
from unisparse_jax.attention.budgets import (
  BudgetedAttention as BudgetedAttention,
)
from unisparse_jax.attention.budgets import LayerBudgets as LayerBudgets
from unisparse_jax.attention.budgets import budgeted as budgeted
from unisparse_jax.attention.dense import dense_attention as dense_attention
from unisparse_jax.attention.executor import merge as merge
from unisparse_jax.attention.executor import (
  sparse_attention as sparse_attention,
)
from unisparse_jax.attention.layered import Calibration as Calibration
from unisparse_jax.attention.layered import (
  LayeredAttention as LayeredAttention,
)
from unisparse_jax.attention.layered import for_layer as for_layer
from unisparse_jax.attention.layered import (
  load_calibration as load_calibration,
)
from unisparse_jax.attention.patterns.dense import Dense as Dense
from unisparse_jax.attention.patterns.flexprefill import (
  FlexPrefill as FlexPrefill,
)
from unisparse_jax.attention.patterns.minference import (
  MInference as MInference,
)
from unisparse_jax.attention.patterns.oracle import Oracle as Oracle
from unisparse_jax.attention.patterns.random_blocks import (
  RandomBlocks as RandomBlocks,
)
from unisparse_jax.attention.patterns.sample_attention import (
  SampleAttention as SampleAttention,
)
from unisparse_jax.attention.patterns.sample_attention import (
  SampleAttentionV1 as SampleAttentionV1,
)
from unisparse_jax.attention.patterns.streaming import Streaming as Streaming
from unisparse_jax.attention.patterns.unisparse import UniSparse as UniSparse
from unisparse_jax.attention.patterns.unisparse_threshold import (
  UniSparseThreshold as UniSparseThreshold,
)
from unisparse_jax.attention.patterns.xattention import (
  XAttention as XAttention,
)
from unisparse_jax.attention.selector import PATTERNS as PATTERNS
from unisparse_jax.attention.selector import Pattern as Pattern
from unisparse_jax.attention.selector import make_pattern as make_pattern
