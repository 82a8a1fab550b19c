# SPDX-License-Identifier: Apache-2.0
"""Lowering for GPUs and compiling for TPUs on machines that have neither."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  SingleDeviceSharding,
  use_abstract_mesh,
)

from pallas_kernels import checks

# Compute capability, and a card that has it.
CARDS = {80: "NVIDIA A100", 89: "NVIDIA L4", 90: "NVIDIA H100"}
# Name for users, and the smallest topology that libtpu describes.
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def has_libtpu() -> bool:
  """Whether the TPU compiler is here: `pip install unisparse-jax[tpu]`."""
  return importlib.util.find_spec("libtpu") is not None


def lower_for_cuda(
  fn: Callable[..., Any],
  shapes: Sequence[jax.ShapeDtypeStruct],
  capability: int,
) -> jax.stages.Lowered:
  """Lowers fn(*shapes, capability=capability) for an NVIDIA card.

  Args:
    fn: a "triton" back end with its settings bound.
    shapes: of its arrays.
    capability: compute capability as 10 * major + minor, one of CARDS.

  Returns:
    What JAX lowered; Triton itself compiles it only on a machine with a card.
  """
  checks.require(
    capability in CARDS, "capability", "be known", capability, str([*CARDS])
  )
  fn = functools.partial(fn, capability=capability)
  with _pretend(CARDS[capability], "gpu"):
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",))


def compile_for_tpu(
  fn: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct], tpu: str
) -> jax.stages.Compiled:
  """Compiles fn(*shapes, compile_only=True) for one chip of a TPU.

  Args:
    fn: a "mosaic_tpu" back end with its settings bound.
    shapes: of its arrays.
    tpu: one of TPUS.

  Returns:
    The program; its memory and cost analysis answer without the chip.

  Raises:
    NotImplementedError: libtpu is not installed.
  """
  checks.check_choice("tpu", tpu, TPUS)
  if not has_libtpu():
    raise NotImplementedError(
      "compile_for_tpu needs libtpu; got none installed. "
      "pip install unisparse-jax[tpu]."
    )
  device = _tpu_device(tpu)
  sharding = SingleDeviceSharding(device)
  placed = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes
  ]
  fn = functools.partial(fn, compile_only=True)
  with _pretend(device.device_kind, "tpu"):
    traced = jax.jit(fn).trace(*placed)
    return traced.lower(lowering_platforms=("tpu",)).compile()


@functools.cache
def _tpu_device(tpu):
  # libtpu would ask a metadata server which machine it is on, and would let
  # one process at a time load it.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=TPUS[tpu]
  )
  return topology.devices[0]


def _pretend(device_kind, platform):
  """A context in which Pallas takes a device for the one at hand."""
  device = AbstractDevice(
    device_kind=device_kind, num_cores=1, platform=platform
  )
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
