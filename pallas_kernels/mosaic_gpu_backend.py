# SPDX-License-Identifier: Apache-2.0
"""What the Hopper back ends share: late imports, layouts, parameters."""

import inspect
import math

import jax
import jax.numpy as jnp

from pallas_kernels import device

LOG2_E = math.log2(math.e)
ROWS = 64  # rows of one warpgroup's products
LOADER_REGISTERS = 24
_TILE_ROWS = 8  # rows of a swizzled tile in shared memory


def check_hopper():
  """Raises NotImplementedError unless the default device is a Hopper GPU."""
  if not device.is_hopper():
    raise NotImplementedError(
      "mosaic_gpu needs an NVIDIA GPU of compute capability 9.0 (Hopper); got "
      f"device={jax.devices()[0].device_kind!r}."
    )


def pallas():
  """The Pallas modules; imported late because their names change."""
  try:
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    needed = (
      plgpu.LoweringSemantics.Warpgroup,
      plgpu.wgmma_accumulator_load,
      plgpu.kernel,
    )
    del needed
  except (ImportError, AttributeError) as error:
    raise NotImplementedError(
      f"mosaic_gpu needs Pallas as of JAX 0.10.2; got jax {jax.__version__}: "
      f"{error}."
    ) from error
  return pl, plgpu


def transforms(plgpu):
  """Layout in shared memory that the matrix units read without conflicts."""
  return (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def compiler_params(plgpu):
  """Explicit, because the default of `lowering_semantics` has changed."""
  return plgpu.CompilerParams(
    approx_math=True,
    reduction_scratch_bytes=0,  # row reductions stay inside a warp
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
  )


def load(ref, layout):
  """Shared memory to registers; JAX 0.10 wants an index."""
  _, plgpu = pallas()
  index = inspect.signature(plgpu.load).parameters.get("idx")
  is_needed = index is not None and index.default is inspect.Parameter.empty
  args = ((),) if is_needed else ()
  return plgpu.load(ref, *args, layout=layout)


def pad_length(x, least):
  """Pads axis 1: a copy takes rows by 8, and never more than there are."""
  missing = max(least, -(-x.shape[1] // _TILE_ROWS) * _TILE_ROWS) - x.shape[1]
  if not missing:
    return x
  return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
