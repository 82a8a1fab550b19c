# SPDX-License-Identifier: Apache-2.0
"""Tile sizes and schedules of the GPU kernels, and the measured choices."""

import dataclasses

from pallas_kernels import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardConfig:
  """Schedule of the Hopper forward kernel.

  Attributes:
    tile_kv: keys per pipeline step; divides block_kv.
    stages: key/value tiles in shared memory.
    q_slots: query tiles in shared memory; 2 loads the next while one is used.
    cluster: thread blocks that share each key and value load, if that many
      query heads share a list.
  """

  tile_kv: int = 128
  stages: int = 2
  q_slots: int = 1
  cluster: int = 1

  def __post_init__(self):
    for name in ("tile_kv", "stages", "q_slots"):
      checks.check_positive_int(name, getattr(self, name))


def forward_config(head_dim: int, block_q: int, block_kv: int) -> ForwardConfig:
  """The measured choice; see TUNING.md."""
  if head_dim == 256:
    return ForwardConfig(tile_kv=64, stages=2, q_slots=1)
  if head_dim == 64:
    return ForwardConfig(tile_kv=block_kv, stages=4, q_slots=2)
  # Clusters were measured with the widest tiles alone.
  cluster = 2 if block_q == block_kv == 128 else 1
  return ForwardConfig(tile_kv=block_kv, stages=2, q_slots=2, cluster=cluster)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardConfig:
  """Schedule of the Hopper backward kernels.

  Attributes:
    tile_kv: keys per pipeline step of dq; divides block_kv.
    stages_dq: key/value tiles in shared memory.
    stages_dkv: query tiles (64 rows) in shared memory of the kernel of dk, dv.
  """

  tile_kv: int = 128
  stages_dq: int = 2
  stages_dkv: int = 2

  def __post_init__(self):
    for field in dataclasses.fields(self):
      checks.check_positive_int(field.name, getattr(self, field.name))


def backward_config(
  head_dim: int, block_q: int, block_kv: int
) -> BackwardConfig:
  """The measured choice; see TUNING.md."""
  del head_dim, block_q
  return BackwardConfig(tile_kv=block_kv)
