# SPDX-License-Identifier: Apache-2.0
"""Test functions and their Poisson solutions on a Gaussian.

On N(mean, covariance) a Gaussian-invariant kernel P with step_size moves like
the autoregression y - mean = rho (x - mean) + noise, rho = 1 - step_size. It
multiplies a Hermite polynomial of degree k by rho^k, so that solutions G of
P G - G = -(F - pi(F)) are known in closed form, up to a constant:

  x_j                 x_j / (1 - rho)
  (x_i - m_i)(x_j - m_j)   the same / (1 - rho^2)
  F in general        sum_{k >= 0} (P^k F - pi(F))

Each family below has the same three methods besides `value`:

- solution(x, reference): G(x);
- expected(mean, covariance, reference): E G(Y) for Y ~ N(mean, covariance);
- score(x, precond_grad, reference): a term of mean zero by integration by
  parts, such that F + score is constant on the reference Gaussian where the
  family says so; `precond_grad` is reference.covariance times the gradient.

Families are pytrees. What is an array in them, directions and thresholds, may
change from call to call of one compiled program; the rest is part of it.

Source: the linear and indicator rows are those of Alexopoulos, Dellaportas,
Titsias, arXiv 2506.21511; the others follow from Mehler's formula.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks


class Reference(NamedTuple):
  """The Gaussian for which solutions are exact, and the kernel's step_size.

  Fixed during a run: nothing here may depend on the state.

  Attributes:
    step_size: of the kernel, in (0, 2).
    mean: [dim].
    covariance: a preconditioner; that of the kernel where it is constant.
  """

  step_size: Float[Array, ""]
  mean: Float[Array, " dim"]
  covariance: Any

  @property
  def rho(self):
    return 1 - self.step_size

  @property
  def noise_scale(self):
    return self.step_size * (2 - self.step_size)

  # Reciprocals: a compiler divides every coordinate of every chain otherwise,
  # and division was most of what control variates cost.

  @property
  def per_step_size(self):
    return 1 / self.step_size

  @property
  def per_noise_scale(self):
    return 1 / self.noise_scale


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Linear:
  """F = x_j for the chosen coordinates; exact with one term each.

  Attributes:
    coordinates: which; None for all.
  """

  coordinates: tuple[int, ...] | None = None

  def take(self, vector):
    """The chosen coordinates."""
    return _take(vector, self.coordinates)

  def value(self, x):
    return self.take(x)

  def solution(self, x, reference):
    return self.value(x) * reference.per_step_size

  def expected(self, mean, covariance, reference):
    del covariance
    return self.value(mean) * reference.per_step_size

  def score(self, x, precond_grad, reference):
    del x, reference
    return self.value(precond_grad)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Square:
  """F = x_j^2 for the chosen coordinates.

  Attributes:
    coordinates: which; None for all.
  """

  coordinates: tuple[int, ...] | None = None

  def take(self, vector):
    """The chosen coordinates."""
    return _take(vector, self.coordinates)

  def value(self, x):
    return self.take(x) ** 2

  def solution(self, x, reference):
    return self._solve(x, reference, 0)

  def expected(self, mean, covariance, reference):
    return self._solve(mean, reference, covariance.diagonal())

  def _solve(self, x, reference, variance):
    # Up to the constant 2 mean^2 / step_size, in the fewest operations.
    centred = x - reference.mean
    slope = 2 * reference.per_step_size * reference.mean
    solution = centred * (centred * reference.per_noise_scale + slope)
    return self.take(solution + variance * reference.per_noise_scale)

  def score(self, x, precond_grad, reference):
    # (x + mean): the part of the mean makes it exact on the reference.
    term = (x + reference.mean) * precond_grad
    return self.take(term + reference.covariance.diagonal())


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Product:
  """F = x_i x_j for pairs (i, j).

  Attributes:
    pairs: of coordinates.
  """

  pairs: tuple[tuple[int, int], ...]

  def _both(self, x):
    i, j = self._indices()
    return x[i], x[j]

  def _indices(self):
    i, j = np.asarray(self.pairs, np.int32).reshape(-1, 2).T
    return jnp.asarray(i), jnp.asarray(j)

  def value(self, x):
    a, b = self._both(x)
    return a * b

  def solution(self, x, reference):
    return self._solve(x, reference, 0)

  def expected(self, mean, covariance, reference):
    return self._solve(mean, reference, covariance.entries(*self._indices()))

  def _solve(self, x, reference, covariance):
    (a, b), (m, n) = self._both(x), self._both(reference.mean)
    linear = (m * b + n * a) * reference.per_step_size
    square = ((a - m) * (b - n) + covariance) * reference.per_noise_scale
    return square + linear

  def score(self, x, precond_grad, reference):
    (a, b), (s, t) = self._both(x), self._both(precond_grad)
    m, n = self._both(reference.mean)
    entries = reference.covariance.entries(*self._indices())
    return 0.5 * ((a + m) * t + (b + n) * s) + entries


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Ridge:
  """F = phi(t . x) where a Gaussian smoothing of phi is known.

  The solution is cut after `num_terms` terms of its series beside F itself;
  the rest is of order rho^num_terms.

  Attributes:
    directions: t for each function, [num_functions, dim].
    smooth: (mean, variance, *arguments) -> E phi(N(mean, variance)),
      elementwise on [num_functions]; phi itself at variance 0.
    num_terms: terms of the series, >= 0.
    slope: phi' on [num_functions], where it exists: the score term is then
      phi(t . x) t . A grad + phi'(t . x) t . A t, else t . A grad. Neither
      makes F + score constant.
    arguments: arrays that `smooth` takes.
  """

  directions: Float[Array | np.ndarray, "num_functions dim"]
  smooth: Callable
  num_terms: int = 5
  slope: Callable | None = None
  arguments: tuple = ()

  def __post_init__(self):
    checks.check_shape(
      "directions", self.directions, ("num_functions", "dim"), (None, None)
    )
    checks.require(
      callable(self.smooth),
      "smooth",
      "be a function (mean, variance) -> smoothed values",
      self.smooth,
      "the Gaussian smoothing of phi: without it no Poisson solution is known",
    )
    checks.require(self.num_terms >= 0, "num_terms", "be >= 0", self.num_terms)

  def tree_flatten(self):
    fixed = (self.smooth, self.num_terms, self.slope)
    return (self.directions, self.arguments), fixed

  @classmethod
  def tree_unflatten(cls, fixed, arrays):
    new = object.__new__(cls)  # Not checked: JAX fills trees with anything.
    names = ("directions", "arguments", "smooth", "num_terms", "slope")
    for name, value in zip(names, (*arrays, *fixed), strict=True):
      object.__setattr__(new, name, value)
    return new

  def _smooth(self, mean, variance):
    more = [jnp.asarray(x, mean.dtype) for x in self.arguments]
    return self.smooth(mean, variance, *more)

  def _project(self, x):
    return jnp.asarray(self.directions, x.dtype) @ x

  def value(self, x):
    mean = self._project(x)
    return self._smooth(mean, jnp.zeros_like(mean))

  def solution(self, x, reference):
    mean = self._project(x)
    return self._series(mean, jnp.zeros_like(mean), reference)

  def expected(self, mean, covariance, reference):
    directions = jnp.asarray(self.directions, mean.dtype)
    variance = covariance.quadratic(directions)
    return self._series(self._project(mean), variance, reference)

  def _series(self, mean, variance, reference):
    centre = self._project(reference.mean)
    directions = jnp.asarray(self.directions, mean.dtype)
    wide = reference.covariance.quadratic(directions)
    # The first term has no smoothing by the reference, to the last bit.
    first = self._smooth(mean, variance)
    if self.num_terms == 0:
      return first

    def term(power):
      spread = power**2 * variance + (1 - power**2) * wide
      return self._smooth(centre + power * (mean - centre), spread)

    numbers = jnp.arange(1, self.num_terms + 1, dtype=mean.dtype)
    # rho may be negative: its sign and size apart, for a real power.
    sign = jnp.where(reference.rho < 0, 1 - 2 * (numbers % 2), 1)
    powers = sign * jnp.abs(reference.rho) ** numbers
    return first + jnp.sum(jax.vmap(term)(powers), axis=0)

  def score(self, x, precond_grad, reference):
    along = self._project(precond_grad)
    if self.slope is None:
      return along
    directions = jnp.asarray(self.directions, x.dtype)
    width = reference.covariance.quadratic(directions)
    return self.value(x) * along + self.slope(self._project(x)) * width


def exponential(directions: Any, *, num_terms: int = 20) -> Ridge:
  """F = exp(t . x) for every row t of `directions`, [num_functions, dim]."""
  return Ridge(
    np.asarray(directions), _smooth_exp, num_terms=num_terms, slope=jnp.exp
  )


def indicator(
  dim: int,
  coordinates: Sequence[int],
  thresholds: Sequence[float],
  *,
  num_terms: int = 5,
) -> Ridge:
  """F = 1(x_j > b) for each pair of a coordinate j and a threshold b."""
  checks.require(
    len(coordinates) == len(thresholds) > 0,
    "thresholds",
    "have one number for each coordinate",
    len(thresholds),
    f"{len(coordinates)}",
  )
  directions = np.zeros((len(coordinates), dim))
  directions[np.arange(len(coordinates)), list(coordinates)] = 1
  return Ridge(
    directions,
    _smooth_step,
    num_terms=num_terms,
    arguments=(np.array(thresholds, np.float64),),
  )


def check_functions(functions: Any) -> tuple:
  """A tuple of test functions.

  Raises:
    ValueError: one whose Poisson solution is unknown.
  """
  functions = (
    tuple(functions) if isinstance(functions, list | tuple) else (functions,)
  )
  checks.require(bool(functions), "functions", "not be empty", functions)
  for function in functions:
    known = all(
      hasattr(function, name) for name in ("value", "solution", "expected")
    )
    checks.require(
      known,
      "functions",
      "have a known Poisson solution",
      function,
      "poisson.Linear, Square, Product, exponential, indicator, or Ridge or "
      "smooth_functions.Smooth with the function's Gaussian smoothing",
    )
  return functions


def _take(x, coordinates):
  return x if coordinates is None else x[jnp.asarray(coordinates, jnp.int32)]


def _smooth_exp(mean, variance):
  return jnp.exp(mean + 0.5 * variance)


def _smooth_step(mean, variance, bound):
  gap = mean - bound
  sd = jnp.sqrt(jnp.where(variance > 0, variance, 1))
  smoothed = jax.scipy.special.ndtr(gap / sd)
  return jnp.where(variance > 0, smoothed, (gap > 0).astype(mean.dtype))
