from tests.pallas_kernels.block_sparse_attention import suite


class TestReference(suite.BlockSparseAttentionSuite):
  implementation = "reference"

  # The suite's gradient test compares with this back end: nothing to learn.
  test_gradients_match_reference = None
