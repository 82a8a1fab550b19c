# SPDX-License-Identifier: Apache-2.0
"""Functions F whose mean under a Gaussian is known in closed form.

`expectation(functional, proposal)` is E_q F, the number that makes a control
variate of F(y) - E_q F. A functional is a pytree: called on a position [dim] it
gives [num_functions].

For q = N(m, S):

    Linear       B x                     B m
    Quadratic    x^T B x                 m^T B m + tr(B S)
    Exponential  exp(t.x)                exp(t.m + t^T S t / 2)
    NormalCdf    Phi(a.x + b)            Phi((a.m + b) / sqrt(1 + a^T S a))
    Tail         1(a.x > b)              Phi((a.m - b) / sqrt(a^T S a))
    Likelihood   N(y; X x, s^2 I) / c    N(y; X m, X S X^T + s^2 I) / c

Mixtures follow by linearity, and for a Student-t the linear, the quadratic and
the tail rows have their own forms. For any other pair use `monte_carlo`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks, proposals

Values = Float[Array, " num_functions"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
  """F(x) = matrix x; matrix [num_functions, dim]."""

  matrix: Float[Array, "num_functions dim"]

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return self.matrix @ position

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    return self.matrix @ part.mean

  def under_student_t(self, part: proposals.StudentT) -> Values:
    _require_dof(part, 1)
    return self.matrix @ part.base.mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
  """F_p(x) = x^T matrices[p] x; matrices [num_functions, dim, dim]."""

  matrices: Float[Array, "num_functions dim dim"]

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return jnp.einsum("pij,i,j->p", self.matrices, position, position)

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    trace = jnp.einsum("pij,ij->p", self.matrices, part.covariance())
    return self(part.mean) + trace

  def under_student_t(self, part: proposals.StudentT) -> Values:
    _require_dof(part, 2)
    _, covariance = proposals.moments(part)
    trace = jnp.einsum("pij,ij->p", self.matrices, covariance)
    return self(part.base.mean) + trace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Squares:
  """F(x) = x * x, [dim]: the diagonal case of `Quadratic`, without its cost."""

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return jnp.square(position)

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    return jnp.square(part.mean) + jnp.sum(jnp.square(part.chol), axis=1)

  def under_student_t(self, part: proposals.StudentT) -> Values:
    _require_dof(part, 2)
    _, covariance = proposals.moments(part)
    return jnp.square(part.base.mean) + jnp.diagonal(covariance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exponential:
  """F_p(x) = exp(rates[p] . x); rates [num_functions, dim].

  A Student-t has no finite exponential moment: ValueError.
  """

  rates: Float[Array, "num_functions dim"]

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return jnp.exp(self.rates @ position)

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    spread = jnp.sum(jnp.square(self.rates @ part.chol), axis=1)
    return jnp.exp(self.rates @ part.mean + spread / 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormalCdf:
  """F_p(x) = Phi(slopes[p] . x + offsets[p]): probit predictions."""

  slopes: Float[Array, "num_functions dim"]
  offsets: Float[Array, " num_functions"]

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return jax.scipy.special.ndtr(self.slopes @ position + self.offsets)

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    spread = jnp.sum(jnp.square(self.slopes @ part.chol), axis=1)
    centre = self.slopes @ part.mean + self.offsets
    return jax.scipy.special.ndtr(centre / jnp.sqrt(1 + spread))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
  """F_p(x) = 1(slopes[p] . x > thresholds[p])."""

  slopes: Float[Array, "num_functions dim"]
  thresholds: Float[Array, " num_functions"]

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    is_above = self.slopes @ position > self.thresholds
    return is_above.astype(position.dtype)

  def _standardised(self, part: proposals.Gaussian) -> Values:
    spread = jnp.sum(jnp.square(self.slopes @ part.chol), axis=1)
    return (self.slopes @ part.mean - self.thresholds) / jnp.sqrt(spread)

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    return jax.scipy.special.ndtr(self._standardised(part))

  def under_student_t(self, part: proposals.StudentT) -> Values:
    # P(t < z) = 1 - I(dof / (dof + z^2); dof / 2, 1 / 2) / 2 for z > 0
    z, dof = self._standardised(part.base), part.dof
    argument = dof / (dof + jnp.square(z))
    half = (
      jax.scipy.special.betainc(
        jnp.full_like(z, dof / 2), jnp.full_like(z, 0.5), argument
      )
      / 2
    )
    return jnp.where(z > 0, 1 - half, half)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Likelihood:
  """F(x) = N(response; design x, noise_sd^2 I) / exp(log_scale), [1].

  Its mean under a prior is the marginal likelihood over exp(log_scale); choose
  log_scale near the answer, so that no number underflows.

  Attributes:
    design: [num_data, dim].
    response: [num_data].
    noise_sd: scalar.
    log_scale: scalar, nats.
  """

  design: Float[Array, "num_data dim"]
  response: Float[Array, " num_data"]
  noise_sd: Float[Array, ""]
  log_scale: Float[Array, ""]

  def log_value(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    """log F(x)."""
    residual = (self.response - self.design @ position) / self.noise_sd
    size = residual.shape[0]
    constant = size * (0.5 * np.log(2 * np.pi) + jnp.log(self.noise_sd))
    return -0.5 * jnp.sum(jnp.square(residual)) - constant - self.log_scale

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return jnp.exp(self.log_value(position))[None]

  def log_under_gaussian(self, part: proposals.Gaussian) -> Float[Array, ""]:
    """log E_q F, through dim x dim matrices alone."""
    # With x = m + L z and A = X L / s: the integral over z is Gaussian.
    scaled = self.design @ part.chol / self.noise_sd
    residual = (self.response - self.design @ part.mean) / self.noise_sd
    eye = jnp.eye(part.dim, dtype=scaled.dtype)
    chol = jnp.linalg.cholesky(eye + scaled.T @ scaled)
    pulled = jax.scipy.linalg.solve_triangular(
      chol, scaled.T @ residual, lower=True
    )
    explained = 0.5 * jnp.sum(jnp.square(pulled))
    log_det = jnp.sum(jnp.log(jnp.diagonal(chol)))
    return self.log_value(part.mean) + explained - log_det

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    return jnp.exp(self.log_under_gaussian(part))[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
  """The values of several functionals, one after the other."""

  parts: tuple[Any, ...]

  def __call__(self, position: Float[Array, " dim"]) -> Values:
    return jnp.concatenate([part(position) for part in self.parts])

  def under_gaussian(self, part: proposals.Gaussian) -> Values:
    return jnp.concatenate([f.under_gaussian(part) for f in self.parts])

  def under_student_t(self, part: proposals.StudentT) -> Values:
    return jnp.concatenate([_under_student_t(f, part) for f in self.parts])


def coordinates(dim: int, dtype: Any = None) -> Linear:
  """F(x) = x; dtype as jnp.eye has it."""
  checks.check_positive_int("dim", dim)
  return Linear(jnp.eye(dim, dtype=dtype))


def means_and_squares(dim: int, dtype: Any = None) -> Stacked:
  """F(x) = (x, x * x), [2 dim]."""
  return Stacked((coordinates(dim, dtype), Squares()))


def expectation(functional: Any, proposal: Any) -> Values:
  """E_q F in closed form.

  Args:
    functional: one of this module, or any callable with `under_gaussian` (and
      `under_student_t`).
    proposal: `Gaussian`, `StudentT`, `GaussianMixture` or a `Mixture` of those.

  Raises:
    ValueError: no closed form is known for the pair, or it is infinite.
  """
  if isinstance(proposal, proposals.Mixture):
    values = [expectation(functional, part) for part in proposal.parts]
    return jnp.exp(proposal.log_weights) @ jnp.stack(values)
  if isinstance(proposal, proposals.StudentT):
    return _under_student_t(functional, proposal)
  is_gaussian = isinstance(proposal, proposals.Gaussian)
  if is_gaussian or isinstance(proposal, proposals.GaussianMixture):
    if not hasattr(functional, "under_gaussian"):
      raise _unknown(functional, proposal)
    if is_gaussian:
      return functional.under_gaussian(proposal)
    values = jax.vmap(functional.under_gaussian)(proposal.components)
    return jnp.exp(proposal.log_weights) @ values
  raise _unknown(functional, proposal)


def monte_carlo(
  rng_key: Any,
  functional: Callable,
  proposal: Any,
  num_draws: int,
  *,
  batch_size: int = 10_000,
) -> tuple[Values, Values]:
  """E_q F from draws of q, where no closed form is known, such as for a flow.

  The draws cost no evaluation of the target. The error stays in the estimate:
  a controlled mean then has variance + (th2 * standard error)^2.

  Args:
    rng_key: split into one key a batch.
    functional: position -> [num_functions].
    proposal: to draw from.
    num_draws: a multiple of batch_size.
    batch_size: draws held at once.

  Returns:
    The mean and its standard error, both [num_functions].

  Raises:
    ValueError: num_draws is no multiple of batch_size.
  """
  checks.check_positive_int("num_draws", num_draws)
  checks.check_positive_int("batch_size", batch_size)
  checks.require(
    num_draws % batch_size == 0,
    "num_draws",
    "be a multiple of batch_size",
    num_draws,
    f"num_draws % {batch_size} == 0",
  )

  def one_batch(key):
    keys = jax.random.split(key, batch_size)
    values = jax.vmap(lambda k: functional(proposal.sample(k)))(keys)
    mean = jnp.mean(values, axis=0)
    return mean, jnp.mean(jnp.square(values - mean[None]), axis=0)

  keys = jax.random.split(rng_key, num_draws // batch_size)
  means, variances = jax.lax.map(one_batch, keys)
  mean = jnp.mean(means, axis=0)
  variance = jnp.mean(variances, axis=0)
  variance = variance + jnp.mean(jnp.square(means - mean[None]), axis=0)
  return mean, jnp.sqrt(variance / num_draws)


def _under_student_t(functional: Any, part: proposals.StudentT) -> Values:
  if not hasattr(functional, "under_student_t"):
    raise _unknown(functional, part)
  return functional.under_student_t(part)


def _require_dof(part: proposals.StudentT, order: int):
  rule = f"be > {order} for a moment of that order"
  checks.require(part.dof > order, "dof", rule, part.dof)


def _unknown(functional: Any, proposal: Any) -> ValueError:
  return ValueError(
    "functional must have a known mean under the proposal; got "
    f"functional={type(functional).__name__}, "
    f"proposal={type(proposal).__name__}; expected a pair of the table of "
    "expectations. Use flows.expectation for a flow, else "
    "expectations.monte_carlo, or theta = (1, 0)."
  )
