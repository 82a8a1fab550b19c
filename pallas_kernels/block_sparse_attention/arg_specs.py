# SPDX-License-Identifier: Apache-2.0
"""Sizes of real models, for the tests that lower and the tables of tuning."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """Heads of one attention layer."""

  num_heads: int
  num_kv_heads: int
  head_dim: int


MODELS = {
  "llama3_8b": ArgSpec(num_heads=32, num_kv_heads=8, head_dim=128),
  "llama3_70b": ArgSpec(num_heads=64, num_kv_heads=8, head_dim=128),
  "qwen2_5_7b": ArgSpec(num_heads=28, num_kv_heads=4, head_dim=128),
  "qwen3_0_6b": ArgSpec(num_heads=16, num_kv_heads=8, head_dim=128),
  "llama3_2_1b": ArgSpec(num_heads=32, num_kv_heads=8, head_dim=64),
  "gemma2_9b": ArgSpec(num_heads=16, num_kv_heads=8, head_dim=256),
  "pylib_12m": ArgSpec(num_heads=6, num_kv_heads=2, head_dim=64),
}
