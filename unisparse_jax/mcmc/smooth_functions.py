# SPDX-License-Identifier: Apache-2.0
"""Test functions of all coordinates whose Gaussian smoothing is known.

`poisson.Ridge` serves functions of t.x. Others, such as products of three
coordinates, say what their mean under N(mean, covariance) is:

    def cubic(mean, covariance):  # x_0^2 x_1
      (variance,) = covariance.entries(jnp.array([0]), jnp.array([0]))
      (both,) = covariance.entries(jnp.array([0]), jnp.array([1]))
      square = mean[0] ** 2 + variance
      return (square * mean[1] + 2 * mean[0] * both)[None]

    terms = control_variates.poisson_terms(smooth_functions.Smooth(cubic))
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisparse_jax.mcmc import checks
from unisparse_jax.mcmc import preconditioner as preconditioners


class Sum(NamedTuple):
  """first + second, for what smoothings ask of a covariance."""

  first: Any
  second: Any

  def diagonal(self) -> Float[Array, " dim"]:
    """A_ii."""
    return self.first.diagonal() + self.second.diagonal()

  def entries(
    self, rows: Int[Array, " pairs"], columns: Int[Array, " pairs"]
  ) -> Float[Array, " pairs"]:
    """A[rows, columns]."""
    return self.first.entries(rows, columns) + self.second.entries(
      rows, columns
    )

  def quadratic(
    self, directions: Float[Array, "num dim"]
  ) -> Float[Array, " num"]:
    """t^T A t for every row t of `directions`."""
    return self.first.quadratic(directions) + self.second.quadratic(directions)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Smooth:
  """F by its smoothing; the family has the methods that `poisson` describes.

  The solution is cut after `num_terms` terms of its series beside F itself;
  the rest is of order rho^num_terms. There is no score term: it is 0.

  Attributes:
    smooth: (mean, covariance) -> E F(X), X ~ N(mean, covariance),
      [num_functions]; F itself where the covariance is 0. The covariance has
      `diagonal`, `entries` and `quadratic`, see `Sum`.
    num_terms: terms of the series, >= 0.
  """

  smooth: Callable
  num_terms: int = 20

  def __post_init__(self):
    checks.require(
      callable(self.smooth),
      "smooth",
      "be a function (mean, covariance) -> smoothed values",
      self.smooth,
      "the Gaussian smoothing of F: without it no Poisson solution is known",
    )
    checks.require(self.num_terms >= 0, "num_terms", "be >= 0", self.num_terms)

  def value(self, x):
    return self.smooth(x, preconditioners.Diagonal(jnp.zeros_like(x)))

  def solution(self, x, reference):
    none = preconditioners.Diagonal(jnp.zeros_like(x))
    return self._series(x, none, reference)

  def expected(self, mean, covariance, reference):
    return self._series(mean, covariance, reference)

  def _series(self, mean, covariance, reference):
    total = self.smooth(mean, covariance)
    power = jnp.ones_like(reference.rho)
    # Few terms in a row and not a batch of them: a covariance is no array.
    for _ in range(self.num_terms):
      power = power * reference.rho
      wide = Sum(
        preconditioners.Scaled(covariance, power**2),
        preconditioners.Scaled(reference.covariance, 1 - power**2),
      )
      centre = reference.mean + power * (mean - reference.mean)
      total = total + self.smooth(centre, wide)
    return total

  def score(self, x, precond_grad, reference):
    del precond_grad, reference
    return jnp.zeros_like(self.value(x))
