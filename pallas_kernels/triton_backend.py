# SPDX-License-Identifier: Apache-2.0
"""What the Triton back ends share: the target they compile for, and the call.

JAX deprecates its Triton back end in favour of Mosaic GPU, whose kernels here
need a Hopper card; notebooks in the cloud give A100 and L4 too. On a T4 (7.5)
Triton emits no matrix instructions any more: compiled for it, these kernels run
scalar products and spill up to 2 KiB a thread, so such cards are left to XLA.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError as error:  # a JAX that has dropped Triton
  plgpu = None
  _MISSING = str(error)

OLDEST = 80  # compute capability 8.0: A100


def target(capability: int | None, interpret: bool) -> int:
  """Compute capability to compile for, as 10 * major + minor.

  Args:
    capability: a given one, or None to ask the default device.
    interpret: whether the kernel is interpreted, which needs no device.

  Returns:
    The capability.

  Raises:
    NotImplementedError: no Triton in this JAX, no NVIDIA GPU, too old a one.
  """
  if plgpu is None:
    raise NotImplementedError(
      f"triton needs a JAX with pallas.triton; got {jax.__version__} "
      f'({_MISSING}). Use implementation="xla".'
    )
  if capability is None:
    if interpret:
      return 80
    found = device.nvidia_compute_capability()
    if found is None:
      raise NotImplementedError(
        f"triton needs an NVIDIA GPU; got {jax.devices()[0].device_kind}. "
        'Use implementation="xla".'
      )
    capability = 10 * found[0] + found[1]
  if capability < OLDEST:
    raise NotImplementedError(
      f"triton needs compute capability >= 8.0; got {capability / 10}. "
      'Use implementation="xla".'
    )
  return capability


def serves() -> bool:
  """Whether the default device runs these kernels."""
  try:
    target(None, interpret=False)
  except NotImplementedError:
    return False
  return True


def check_head_dim(head_dim: int, *, instead: str):
  """Refuses heads whose channels are no dimension of a tile."""
  if not (16 <= head_dim <= 256 and is_power_of_two(head_dim)):
    raise NotImplementedError(
      "triton needs head_dim to be a power of two from 16 to 256; got "
      f'head_dim={head_dim}. Use implementation="{instead}".'
    )


def call(kernel, *, num_warps, num_stages, interpret, name, **settings):
  """`pl.pallas_call` on whole arrays, compiled by Triton."""
  assert plgpu is not None, "target() comes first"
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return pl.pallas_call(
    kernel,
    compiler_params=params,
    interpret=interpret,
    name=name,
    **settings,
  )


def is_power_of_two(value: int) -> bool:
  return value > 0 and value & (value - 1) == 0


def pad_axis(x, axis: int, size: int):
  """Zeros at the end of an axis up to `size`; x itself if it is long enough."""
  missing = size - x.shape[axis]
  if missing <= 0:
    return x
  return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def largest_tile(limit: int, *sizes: int) -> int:
  """The largest power of two that divides all sizes, at most `limit`."""
  common = math.gcd(*sizes)
  return min(limit, common & -common)


def dot(a, b, *, b_axis: int = 0, exact: bool = False):
  """a [m, k] times b [k, n] (or, with b_axis=1, b [n, k]), in float32.

  exact: float32 operands keep all their bits; else TensorFloat-32.
  """
  precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
  if a.dtype != jnp.float32:
    precision = None
  return lax.dot_general(
    a,
    b,
    (((1,), (b_axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
