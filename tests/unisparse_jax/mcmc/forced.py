# SPDX-License-Identifier: Apache-2.0
"""Samplers with their noise given: any pair of points can be visited."""

from unittest import mock

import jax
import jax.numpy as jnp


def step(kernel, state, white, *arguments):
  """One step of `kernel` whose standard normal noise is `white`.

  Returns:
    (state, info); the coin is that of key 0.
  """
  with mock.patch.object(
    jax.random, "normal", lambda key, shape=(), dtype=float: white
  ):
    return kernel(jax.random.key(0), state, *arguments)


def skewed(x):
  """A skewed log-density whose curvature is at least 1/2."""
  return jnp.sum(x - jnp.exp(x) - x**2 / 4)


def curved(x):
  """A log-concave density that is no product and no Gaussian."""
  return -jnp.sum(jnp.logaddexp(x, -x)) - 0.3 * jnp.sum(x) ** 2 + 0.4 * x[0]
