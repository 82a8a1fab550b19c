"""Lowering for GPUs and compiling for TPUs on machines that have neither."""

import functools
import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  SingleDeviceSharding,
  use_abstract_mesh,
)

# Compute capability, and a card that has it.
CARDS = {80: "NVIDIA A100", 89: "NVIDIA L4", 90: "NVIDIA H100"}
# Name for users, and the smallest topology that libtpu describes.
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install unisparse-jax[tpu]",
)


def _on(device_kind, platform):
  device = AbstractDevice(
    device_kind=device_kind, num_cores=1, platform=platform
  )
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lower_for_cuda(fn, shapes, capability):
  """StableHLO text of fn(*shapes, capability=...) for a card.

  Args:
    fn: a Triton back end with its settings bound.
    shapes: of its arrays, `jax.ShapeDtypeStruct`.
    capability: one of CARDS.
  """
  fn = functools.partial(fn, capability=capability)
  with _on(CARDS[capability], "gpu"):
    traced = jax.jit(fn).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def _tpu_device(tpu):
  # libtpu would ask a metadata server which machine it is on.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=TPUS[tpu]
  )
  return topology.devices[0]


def compile_for_tpu(fn, shapes, tpu):
  """fn(*shapes, compile_only=True) compiled for one chip of a TPU.

  Args:
    fn: a mosaic_tpu back end with its settings bound.
    shapes: of its arrays, `jax.ShapeDtypeStruct`.
    tpu: one of TPUS.
  """
  device = _tpu_device(tpu)
  placed = [
    jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=SingleDeviceSharding(device)
    )
    for x in shapes
  ]
  fn = functools.partial(fn, compile_only=True)
  with _on(device.device_kind, "tpu"):
    traced = jax.jit(fn).trace(*placed)
    return traced.lower(lowering_platforms=("tpu",)).compile()
