# SPDX-License-Identifier: Apache-2.0
"""Targets in white coordinates: what float32 needs on ill-conditioned ones."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks, preconditioner, targets


class Coordinates(NamedTuple):
  """x = centre + matrix @ z.

  Attributes:
    centre: of x.
    matrix: root of a covariance of x, so that z is nearly white.
  """

  centre: Float[Array, " dim"]
  matrix: Float[Array, "dim dim"]

  def position(self, white: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """x."""
    return self.centre + self.matrix @ white

  def root(self, white: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """matrix @ white: the x of a difference of two z."""
    return self.matrix @ white

  def diagonal(self) -> Float[Array, " dim"]:
    """Of matrix @ matrix^T."""
    return jnp.sum(self.matrix**2, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WhiteTarget:
  """A target in white coordinates z; see `whitened`.

  Attributes:
    name: of the target.
    dim: length of the vectors.
    logdensity_fn: z -> unnormalised log-density, nats.
    start: z of `coordinates.centre`: zeros.
    coordinates: from z to x.
    preconditioner: covariance of x, for `poisson.Reference`.
    sample: (rng_key, num_draws) -> exact draws of z, or None.
  """

  name: str
  dim: int
  logdensity_fn: Callable
  start: Float[Array, " dim"]
  coordinates: Coordinates
  preconditioner: preconditioner.Eigen
  sample: Callable | None = None


def whitened(target: targets.Target, mean: Any, covariance: Any) -> WhiteTarget:
  """The target in coordinates in which N(mean, covariance) is white.

  For chains in float32 on an ill-conditioned target. Where the log-density is
  given in x, its gradient has no digits for the wide directions: on a Gaussian
  of condition 1e6 in 100 dimensions log acceptance ratios are off by 2e-3, in
  any sampler that uses it. Here data and precision are multiplied by the root
  in float64 beforehand, and the ratios vanish to 1.7e-5, as at condition 1.

  Sample z with `preconditioner.identity`; `control_variates.poisson_terms(...,
  coordinates=white.coordinates)` with a reference in x (this mean and
  `white.preconditioner`) gives controlled means of functions of x.

  Args:
    target: with `along`: `targets.gaussian`, `targets.logistic_regression`, or
      a `targets.Target` with one of yours.
    mean: of x, [dim].
    covariance: of x, [dim, dim], such as that of `laplace`.

  Returns:
    The target of z.

  Raises:
    ValueError: no `along`, or a mean or covariance of another size, or a
      covariance that is none.
  """
  along = target.along
  checks.require(
    along is not None,
    "target",
    "give its log-density in other coordinates",
    target.name,
    "targets.Target(along=...)",
  )
  assert along is not None  # For type checkers.
  dim, dtype = target.dim, target.start.dtype
  mean64 = np.asarray(mean, np.float64)
  covariance64 = np.asarray(covariance, np.float64)
  checks.check_shape("mean", mean64, ("dim",), (dim,))
  checks.check_shape("covariance", covariance64, ("dim", "dim"), (dim, dim))
  checks.check_covariance("covariance", covariance64)
  value, vector = np.linalg.eigh(covariance64)
  vector = preconditioner.orthonormal(vector)
  root = vector * np.sqrt(value)
  centre = jnp.asarray(mean64, dtype)
  sample = None
  if target.sample is not None:
    back = jnp.asarray((vector / np.sqrt(value)).T, dtype)
    sample = _white_draws(target.sample, centre, back)
  return WhiteTarget(
    name=target.name,
    dim=dim,
    logdensity_fn=along(mean64, root),
    start=jnp.zeros((dim,), dtype),
    coordinates=Coordinates(centre, jnp.asarray(root, dtype)),
    preconditioner=preconditioner.Eigen(
      jnp.asarray(vector, dtype), jnp.asarray(value, dtype)
    ),
    sample=sample,
  )


def _white_draws(sample, centre, back):
  def draws(rng_key, num_draws):
    return (sample(rng_key, num_draws) - centre[None]) @ back.T

  return draws
