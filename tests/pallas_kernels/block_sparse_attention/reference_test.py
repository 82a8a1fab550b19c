# SPDX-License-Identifier: Apache-2.0
from tests.pallas_kernels.block_sparse_attention import suite


class TestReference(suite.BlockSparseAttentionSuite):
  implementation = "reference"

  # The suite's gradient tests compare with this back end: nothing to learn.
  test_gradients_match_reference = None
  test_gradient_tolerance_sees_one_dropped_block = None
