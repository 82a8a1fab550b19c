# SPDX-License-Identifier: Apache-2.0
"""Kernels of attention, decoding and a likelihood: arrays in, arrays out.

Each op is a folder with one public function; `implementation=` names the
back end and the file that holds it.
"""

from pallas_kernels.block_selection import block_selection as block_selection
from pallas_kernels.block_sparse_attention import (
  block_sparse_attention as block_sparse_attention,
)
from pallas_kernels.cache_append import cache_append as cache_append
from pallas_kernels.column_score_sampling import (
  column_score_sampling as column_score_sampling,
)
from pallas_kernels.composite_pooling import (
  composite_pooling as composite_pooling,
)
from pallas_kernels.composite_scores import composite_scores as composite_scores
from pallas_kernels.head_rotation import head_rotation as head_rotation
from pallas_kernels.logistic_likelihood import (
  logistic_likelihood as logistic_likelihood,
)
from pallas_kernels.top_log_probs import top_log_probs as top_log_probs
from pallas_kernels.tree_attention import tree_attention as tree_attention
