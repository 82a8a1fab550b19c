# SPDX-License-Identifier: Apache-2.0
"""Settings of the attention-speed experiment."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.frame import flags_and_configs
from pallas_kernels import checks
from unisparse_jax.attention import dense

JAX_PEERS = ("cudnn", "attention_mgpu", "tokamax", "xla_dense")
TORCH_PEERS = ("torch_flash2", "torch_cudnn", "torch_flex")
DENSE = ("cudnn", "attention_mgpu", "tokamax", "torch_flash2", "torch_cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One size, at several densities.

  Attributes:
    length: tokens, of queries and of keys.
    head_dim: of queries, keys and values.
    densities: share of the causal blocks that each row keeps.
    backward: whether to time gradients too.
    peers: names among `JAX_PEERS` and `TORCH_PEERS` to time beside ours.
    selection: whether to time the choice of blocks.
    selected_densities: densities at which `Config.attended` is timed with its
      selection, in one call; its top_p is searched for each.
    columns: single keys that each mask head attends, timed apart; 0: none.
  """

  length: int
  head_dim: int = 128
  densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
  backward: bool = False
  peers: tuple[str, ...] = JAX_PEERS[:3] + TORCH_PEERS
  selection: bool = False
  selected_densities: tuple[float, ...] = ()
  columns: int = 0

  def __post_init__(self):
    checks.check_positive_int("length", self.length)
    checks.check_positive_int("head_dim", self.head_dim)
    checks.check_non_negative_int("columns", self.columns)
    for density in (*self.densities, *self.selected_densities):
      checks.check_fraction("density", density)
    for peer in self.peers:
      checks.check_choice("peer", peer, JAX_PEERS + TORCH_PEERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The whole run.

  Attributes:
    cases: sizes, in the order in which they run.
    num_heads: query heads.
    num_kv_heads: key and value heads.
    num_mask_heads: block lists; the query heads of one share it.
    block: queries and keys of a block.
    dtype: of the arrays; `attention_mgpu` always gets float16.
    implementation: back end of ours.
    repeats: timed groups of calls; the median is reported.
    group_ms: least length of a group, by an estimate from its first call.
    seed: of arrays and lists.
    selectors: settings of `make_pattern`, with its name under "method".
    attended: likewise one pattern with a `top_p` and `block_scores`.
    torch_timeout_s: of the process that runs the PyTorch peers.
    captured: folder of `experiments.capture_attention`; "": none. What it holds
      is timed with `captured_patterns`, after the cases.
    captured_patterns: as `LongContextConfig.patterns`.
    captured_model: whose attention that is.
    captured_dense: the dense peer, an implementation of `DenseAttention`.
    matched: matched.json of `experiments.frontier`, whose patterns are timed at
      the budgets that kept the score; "": none.
  """

  cases: tuple[Case, ...]
  num_heads: int = 32
  num_kv_heads: int = 8
  num_mask_heads: int = 8
  block: int = 128
  dtype: str = "bfloat16"
  implementation: str = "mosaic_gpu"
  repeats: int = 5
  group_ms: float = 40.0
  seed: int = 0
  selectors: tuple[dict[str, Any], ...] = ()
  attended: Mapping = dataclasses.field(
    default_factory=lambda: {"method": "unisparse"}
  )
  torch_timeout_s: int = 240
  captured: str = ""
  captured_patterns: tuple = ()
  captured_model: str = "pylib_12m"
  captured_dense: str = "cudnn"
  matched: str = ""

  def __post_init__(self):
    for name in ("num_heads", "num_kv_heads", "num_mask_heads", "block"):
      checks.check_positive_int(name, getattr(self, name))
    checks.check_divides(
      "num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads
    )
    checks.check_divides(
      "num_mask_heads", self.num_mask_heads, "num_heads", self.num_heads
    )
    checks.check_positive_int("repeats", self.repeats)
    checks.check_choice(
      "captured_dense", self.captured_dense, dense.IMPLEMENTATIONS
    )
    for case in self.cases:
      checks.check_divides("block", self.block, "length", case.length)


def parse(config: Any) -> Config:
  """The config file's content as a checked dataclass."""
  return flags_and_configs.to_dataclass(Config, config, name="config")
