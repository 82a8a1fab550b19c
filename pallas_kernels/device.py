# SPDX-License-Identifier: Apache-2.0
"""Questions about the device that back ends ask before they serve a call."""

import jax

_HOPPER = (9, 0)
_H100_MULTIPROCESSORS = 132  # of the H100 and H200 SXM


def nvidia_compute_capability() -> tuple[int, int] | None:
  """(major, minor) of the default device; None if it is no NVIDIA GPU."""
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", None)
  if device.platform not in ("gpu", "cuda") or not capability:
    return None
  try:
    major, minor = str(capability).split(".")
    return int(major), int(minor)
  except ValueError:
    return None  # AMD names its generations otherwise


def is_hopper() -> bool:
  """Whether the default device has TMA and wgmma (compute capability 9.0)."""
  return nvidia_compute_capability() == _HOPPER


def num_multiprocessors() -> int:
  """Multiprocessors of the default device; an H100's where JAX cannot say."""
  count = getattr(jax.devices()[0], "core_count", None)
  if nvidia_compute_capability() is None or not count:
    return _H100_MULTIPROCESSORS
  return int(count)
