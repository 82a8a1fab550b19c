# SPDX-License-Identifier: Apache-2.0
"""What the TPU back ends share: whether they can run, and the call."""

import jax
from jax.experimental import pallas as pl

try:
  from jax.experimental.pallas import tpu as pltpu

  # The kernels lean on these; a JAX without one of them cannot run them.
  _MISSING = [
    name
    for name in ("PrefetchScalarGridSpec", "CompilerParams", "make_async_copy")
    if not hasattr(pltpu, name)
  ]
except ImportError as error:
  pltpu = None
  _MISSING = [str(error)]


def check(compile_only: bool, interpret: bool):
  """Raises unless a TPU kernel can run here.

  Args:
    compile_only: lowered for a TPU that need not be present.
    interpret: run by Pallas' TPU interpreter, on any device.

  Raises:
    NotImplementedError: no TPU, or a JAX without what the kernels need.
  """
  if pltpu is None or _MISSING:
    raise NotImplementedError(
      f"mosaic_tpu needs another JAX; got {jax.__version__}, which lacks "
      f'{", ".join(_MISSING)}. Use implementation="xla".'
    )
  if not compile_only and not interpret and jax.default_backend() != "tpu":
    raise NotImplementedError(
      f"mosaic_tpu needs a TPU; got {jax.devices()[0].device_kind}. "
      'Use implementation="xla".'
    )


def call(
  kernel,
  *,
  num_scalar_prefetch,
  grid,
  in_specs,
  out_specs,
  out_shape,
  interpret,
  name,
  scratch_shapes=(),
  semantics=None,
  cost=None,
  vmem_limit_bytes=None,
):
  """`pl.pallas_call` with scalar prefetch, compiled by Mosaic for the TPU."""
  assert pltpu is not None, "check() comes first"
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=num_scalar_prefetch,
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch_shapes,
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=semantics or ("arbitrary",) * len(grid),
      vmem_limit_bytes=vmem_limit_bytes,
    ),
    cost_estimate=cost,
    interpret=pltpu.InterpretParams() if interpret else False,
    name=name,
  )
