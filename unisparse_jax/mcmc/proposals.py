# SPDX-License-Identifier: Apache-2.0
"""Distributions that an independent sampler can propose from.

A `Proposal` draws a vector and knows its normalised log-density; that is all
that the sampler needs. All but `FunctionProposal` are pytrees of arrays, so a
compiled program takes another fit of the same shape without compiling again.

`expectations.expectation` gives E_q F in closed form for Gaussians, Student-t
distributions, Gaussian mixtures and mixtures of those.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks

_LOG_2PI = math.log(2 * math.pi)


class Proposal(Protocol):
  """What `independent_metropolis` asks of a proposal distribution."""

  def sample(self, rng_key: Any) -> Float[Array, " dim"]:
    """One draw."""
    ...

  def logdensity(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    """Log-density, normalised where E_q F or a marginal likelihood is used."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
  """N(mean, chol chol^T); `gaussian` builds and checks one.

  Attributes:
    mean: [dim].
    chol: [dim, dim], lower triangular.
    inverse_chol: [dim, dim], its inverse: a product is faster than a solve
      for thousands of draws.
  """

  mean: Float[Array, "..."]
  chol: Float[Array, "..."]
  inverse_chol: Float[Array, "..."]

  @property
  def dim(self) -> int:
    return self.mean.shape[-1]

  def covariance(self) -> Float[Array, "dim dim"]:
    return self.chol @ self.chol.T

  def sample(self, rng_key: Any) -> Float[Array, " dim"]:
    noise = jax.random.normal(rng_key, (self.dim,), self.mean.dtype)
    return self.mean + self.chol @ noise

  def logdensity(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    return -0.5 * (squared_norm(self, position) + self.dim * _LOG_2PI) - (
      log_det_chol(self)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StudentT:
  """Multivariate Student-t; `student_t` builds and checks one.

  Attributes:
    base: location and scale matrix, as the Gaussian of infinite `dof` has them.
    dof: degrees of freedom, static; the covariance is scale * dof / (dof - 2).
  """

  base: Gaussian
  dof: float = dataclasses.field(metadata={"static": True})

  @property
  def dim(self) -> int:
    return self.base.dim

  def sample(self, rng_key: Any) -> Float[Array, " dim"]:
    key_normal, key_chi2 = jax.random.split(rng_key)
    precision = self._chi_squared(key_chi2) / self.dof
    offset = self.base.sample(key_normal) - self.base.mean
    return self.base.mean + offset / jnp.sqrt(precision)

  def _chi_squared(self, rng_key: Any) -> Float[Array, ""]:
    dtype = self.base.mean.dtype
    if self.dof == int(self.dof) and self.dof <= 64:
      # A gamma draw is a rejection loop, slow to compile and under vmap.
      normal = jax.random.normal(rng_key, (int(self.dof),), dtype)
      return jnp.sum(jnp.square(normal))
    return 2 * jax.random.gamma(rng_key, self.dof / 2, dtype=dtype)

  def logdensity(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    half, dim = self.dof / 2, self.dim
    constant = math.lgamma(half + dim / 2) - math.lgamma(half)
    constant = constant - dim / 2 * math.log(self.dof * math.pi)
    tail = jnp.log1p(squared_norm(self.base, position) / self.dof)
    return constant - log_det_chol(self.base) - (half + dim / 2) * tail


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
  """sum_k weight_k N(mean_k, chol_k chol_k^T); built by `gaussian_mixture`.

  Attributes:
    log_weights: [num_components], of sum 1 after exp.
    components: Gaussians with a leading axis, [num_components, ...].
  """

  log_weights: Float[Array, " num_components"]
  components: Gaussian

  @property
  def dim(self) -> int:
    return self.components.dim

  @property
  def num_components(self) -> int:
    return self.log_weights.shape[0]

  def sample(self, rng_key: Any) -> Float[Array, " dim"]:
    key_component, key_draw = jax.random.split(rng_key)
    chosen = jax.random.categorical(key_component, self.log_weights)
    component = jax.tree.map(lambda x: x[chosen], self.components)
    return component.sample(key_draw)

  def component_logdensities(
    self, position: Float[Array, " dim"]
  ) -> Float[Array, " num_components"]:
    """Log of weight times density of every component."""
    densities = jax.vmap(Gaussian.logdensity, in_axes=(0, None))(
      self.components, position
    )
    return self.log_weights + densities

  def logdensity(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(self.component_logdensities(position))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
  """A mixture of a few proposals of any kind; built by `mixture`.

  Attributes:
    log_weights: [num_parts], of sum 1 after exp.
    parts: the proposals. A draw costs one draw of each.
  """

  log_weights: Float[Array, " num_parts"]
  parts: tuple[Any, ...]

  @property
  def dim(self) -> int:
    return self.parts[0].dim

  def sample(self, rng_key: Any) -> Float[Array, " dim"]:
    key_part, *keys = jax.random.split(rng_key, len(self.parts) + 1)
    chosen = jax.random.categorical(key_part, self.log_weights)
    draws = [p.sample(k) for p, k in zip(self.parts, keys, strict=True)]
    return jnp.stack(draws)[chosen]

  def logdensity(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    densities = jnp.stack([part.logdensity(position) for part in self.parts])
    return jax.nn.logsumexp(self.log_weights + densities)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionProposal:
  """Any distribution, as two functions: flows, other libraries.

  Attributes:
    parameters: pytree of arrays that both functions take first.
    sample_fn: (parameters, rng_key) -> [dim].
    logdensity_fn: (parameters, position) -> scalar, normalised.
  """

  parameters: Any
  sample_fn: Callable = dataclasses.field(metadata={"static": True})
  logdensity_fn: Callable = dataclasses.field(metadata={"static": True})

  def sample(self, rng_key: Any) -> Float[Array, " dim"]:
    return self.sample_fn(self.parameters, rng_key)

  def logdensity(self, position: Float[Array, " dim"]) -> Float[Array, ""]:
    return self.logdensity_fn(self.parameters, position)


def gaussian(
  mean: Float[Array, " dim"], covariance: Float[Array, "dim dim"]
) -> Gaussian:
  """A Gaussian from its moments.

  Raises:
    ValueError: shapes disagree, or the covariance is not positive definite.
  """
  mean, covariance = jnp.asarray(mean), jnp.asarray(covariance)
  checks.check_shape("mean", mean, ("dim",), (None,))
  checks.check_shape("covariance", covariance, ("dim", "dim"), mean.shape * 2)
  checks.check_covariance("covariance", covariance)
  return gaussian_from_chol(mean, jnp.linalg.cholesky(covariance))


@jax.jit
def gaussian_from_chol(
  mean: Float[Array, " dim"], chol: Float[Array, "dim dim"]
) -> Gaussian:
  """A Gaussian from a lower Cholesky factor, which is not checked."""
  eye = jnp.eye(mean.shape[-1], dtype=chol.dtype)
  inverse = jax.scipy.linalg.solve_triangular(chol, eye, lower=True)
  return Gaussian(mean, chol, inverse)


def student_t(
  location: Float[Array, " dim"], scale: Float[Array, "dim dim"], dof: float
) -> StudentT:
  """A multivariate Student-t; `scale` is not its covariance.

  Raises:
    ValueError: dof is not positive, or as in `gaussian`.
  """
  checks.check_open_interval("dof", dof, 0.0, float("inf"))
  return StudentT(gaussian(location, scale), float(dof))


def gaussian_mixture(
  weights: Float[Array, " num_components"],
  means: Float[Array, "num_components dim"],
  covariances: Float[Array, "num_components dim dim"],
) -> GaussianMixture:
  """A mixture of Gaussians from weights (of any positive sum) and moments.

  Raises:
    ValueError: shapes disagree, a weight is not positive, or a covariance is
      not positive definite.
  """
  weights, means = jnp.asarray(weights), jnp.asarray(means)
  covariances = jnp.asarray(covariances)
  checks.check_shape("means", means, ("num_components", "dim"), (None, None))
  num_components, dim = means.shape
  checks.check_shape("weights", weights, ("num_components",), (num_components,))
  checks.check_shape(
    "covariances",
    covariances,
    ("num_components", "dim", "dim"),
    (num_components, dim, dim),
  )
  checks.check_open_interval("weights", weights, 0.0, float("inf"))
  for covariance in covariances:
    checks.check_covariance("covariances", covariance)
  components = jax.vmap(gaussian_from_chol)(
    means, jnp.linalg.cholesky(covariances)
  )
  return GaussianMixture(jnp.log(weights / jnp.sum(weights)), components)


def mixture(weights: Sequence[float], parts: Sequence[Any]) -> Mixture:
  """A mixture of proposals of any kind.

  Raises:
    ValueError: no part, or weights that do not fit them.
  """
  parts = tuple(parts)
  checks.require(bool(parts), "parts", "hold a proposal", parts)
  shares = jnp.asarray(weights)
  checks.check_shape("weights", shares, ("num_parts",), (len(parts),))
  checks.check_open_interval("weights", shares, 0.0, float("inf"))
  return Mixture(jnp.log(shares / jnp.sum(shares)), parts)


def defensive(
  proposal: Any, *, weight: float = 0.05, dof: float = 5.0, inflation: float = 2
) -> Mixture:
  """(1 - weight) proposal + weight Student-t: bounds pi/q in the tails.

  Args:
    proposal: `Gaussian` or `GaussianMixture`.
    weight: of the heavy part, in (0, 1).
    dof: of the heavy part. With a target whose tails are no heavier than
      |x|^-(dof + dim) the weights are bounded and the chain is uniformly
      ergodic.
    inflation: scale of the heavy part over the covariance of `proposal`.

  Raises:
    ValueError: weight outside (0, 1), dof or inflation not positive, or a
      proposal whose moments are not known.
  """
  checks.check_open_interval("weight", weight, 0.0, 1.0)
  checks.check_open_interval("inflation", inflation, 0.0, float("inf"))
  checks.check_open_interval("dof", dof, 0.0, float("inf"))
  mean, covariance = moments(proposal)
  chol = jnp.linalg.cholesky(covariance * inflation)
  heavy = StudentT(gaussian_from_chol(mean, chol), float(dof))
  weights = jnp.asarray([1 - weight, weight], mean.dtype)
  return Mixture(jnp.log(weights), (proposal, heavy))


def moments(
  proposal: Any,
) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
  """Mean and covariance of a proposal for which they are known.

  Raises:
    ValueError: they are not.
  """
  if isinstance(proposal, Gaussian):
    return proposal.mean, proposal.covariance()
  if isinstance(proposal, StudentT):
    dof = proposal.dof
    checks.require(dof > 2, "dof", "be > 2 for a covariance", dof)
    return proposal.base.mean, proposal.base.covariance() * (dof / (dof - 2))
  if isinstance(proposal, GaussianMixture):
    components = proposal.components
    means = components.mean
    covariances = jax.vmap(Gaussian.covariance)(components)
  elif isinstance(proposal, Mixture):
    parts = [moments(part) for part in proposal.parts]
    means = jnp.stack([mean for mean, _ in parts])
    covariances = jnp.stack([covariance for _, covariance in parts])
  else:
    raise ValueError(
      "proposal must have known moments; got "
      f"proposal={type(proposal).__name__}; expected Gaussian, StudentT, "
      "GaussianMixture or a Mixture of those."
    )
  weights = jnp.exp(proposal.log_weights)
  mean = weights @ means
  offsets = means - mean[None]
  between = jnp.einsum("k,ki,kj->ij", weights, offsets, offsets)
  return mean, jnp.einsum("k,kij->ij", weights, covariances) + between


def squared_norm(
  part: Gaussian, position: Float[Array, " dim"]
) -> Float[Array, ""]:
  """(x - mean)^T covariance^-1 (x - mean)."""
  return jnp.sum(jnp.square(part.inverse_chol @ (position - part.mean)))


def log_det_chol(part: Gaussian) -> Float[Array, ""]:
  return jnp.sum(jnp.log(jnp.diagonal(part.chol)))


def from_distrax(distribution: Any) -> FunctionProposal:
  """A `distrax` distribution over vectors, [dim]."""
  return FunctionProposal(
    (),
    lambda _, rng_key: distribution.sample(seed=rng_key),
    lambda _, position: distribution.log_prob(position),
  )


def from_numpyro(distribution: Any) -> FunctionProposal:
  """A NumPyro distribution with event shape [dim], or a FlowJAX one.

  Both call `sample(rng_key)` and `log_prob(position)`.
  """
  return FunctionProposal(
    (),
    lambda _, rng_key: distribution.sample(rng_key),
    lambda _, position: distribution.log_prob(position),
  )


from_flowjax = from_numpyro
