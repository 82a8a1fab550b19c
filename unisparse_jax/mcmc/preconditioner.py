# SPDX-License-Identifier: Apache-2.0
"""Covariance-like linear maps A = root root^T, as pytrees.

The kind of map is part of the program; its numbers are not, so that a new
preconditioner of the same kind compiles nothing anew.
"""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unisparse_jax.mcmc import checks


class Preconditioner(Protocol):
  """What a sampler and a control variate need of a covariance-like map A."""

  def apply(self, vector: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """A vector."""
    ...

  def root(self, white: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """root white: has covariance A where white is standard normal."""
    ...

  def whiten(self, vector: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """root^-1 vector."""
    ...

  def diagonal(self) -> Float[Array, " dim"]:
    """A_ii."""
    ...

  def entries(
    self, rows: Int[Array, " pairs"], columns: Int[Array, " pairs"]
  ) -> Float[Array, " pairs"]:
    """A[rows, columns]."""
    ...

  def quadratic(
    self, directions: Float[Array, "num dim"]
  ) -> Float[Array, " num"]:
    """t^T A t for every row t of `directions`."""
    ...


class Diagonal(NamedTuple):
  """A = diag(variance)."""

  variance: Float[Array, " dim"]

  def apply(self, vector):
    return self.variance * vector

  def root(self, white):
    return jnp.sqrt(self.variance) * white

  def whiten(self, vector):
    return vector / jnp.sqrt(self.variance)

  def diagonal(self):
    return self.variance

  def entries(self, rows, columns):
    return jnp.where(rows == columns, self.variance[rows], 0)

  def quadratic(self, directions):
    return directions**2 @ self.variance

  def log_det_root(self):
    """log det of a root of A."""
    return 0.5 * jnp.sum(jnp.log(self.variance))


class Dense(NamedTuple):
  """A = matrix = factor factor^T, the factor lower triangular."""

  matrix: Float[Array, "dim dim"]
  factor: Float[Array, "dim dim"]

  def apply(self, vector):
    return self.matrix @ vector

  def root(self, white):
    return self.factor @ white

  def whiten(self, vector):
    return jax.scipy.linalg.solve_triangular(self.factor, vector, lower=True)

  def diagonal(self):
    return jnp.diagonal(self.matrix)

  def entries(self, rows, columns):
    return self.matrix[rows, columns]

  def quadratic(self, directions):
    return jnp.sum((directions @ self.matrix) * directions, axis=-1)

  def log_det_root(self):
    """log det of a root of A."""
    return jnp.sum(jnp.log(jnp.diagonal(self.factor)))


class Eigen(NamedTuple):
  """A = vectors diag(values) vectors^T, the vectors orthonormal columns.

  Keeps the digits of an ill-conditioned A: on a Gaussian of condition 1e6 in
  100 dimensions the log acceptance ratio vanishes to 6e-12, with `Dense` to
  1e-9 (float64).
  """

  vectors: Float[Array, "dim dim"]
  values: Float[Array, " dim"]

  def apply(self, vector):
    return self.vectors @ (self.values * (vector @ self.vectors))

  def root(self, white):
    return self.vectors @ (jnp.sqrt(self.values) * white)

  def whiten(self, vector):
    return (vector @ self.vectors) / jnp.sqrt(self.values)

  def diagonal(self):
    return self.vectors**2 @ self.values

  def entries(self, rows, columns):
    return (self.vectors[rows] * self.vectors[columns]) @ self.values

  def quadratic(self, directions):
    return (directions @ self.vectors) ** 2 @ self.values

  def log_det_root(self):
    """log det of a root of A."""
    return 0.5 * jnp.sum(jnp.log(self.values))


class LowRank(NamedTuple):
  """A = diag(scale) (I + vectors diag(values - 1) vectors^T) diag(scale).

  The vectors are orthonormal columns, few of them: O(dim rank) a product.
  """

  scale: Float[Array, " dim"]
  vectors: Float[Array, "dim rank"]
  values: Float[Array, " rank"]

  def _map(self, vector, values):
    inside = (values - 1) * (vector @ self.vectors)
    return vector + self.vectors @ inside

  def apply(self, vector):
    return self.scale * self._map(self.scale * vector, self.values)

  def root(self, white):
    return self.scale * self._map(white, jnp.sqrt(self.values))

  def whiten(self, vector):
    return self._map(vector / self.scale, 1 / jnp.sqrt(self.values))

  def diagonal(self):
    return self.scale**2 * (1 + self.vectors**2 @ (self.values - 1))

  def entries(self, rows, columns):
    both = self.vectors[rows] * self.vectors[columns]
    inside = both @ (self.values - 1)
    inside += (rows == columns).astype(inside.dtype)
    return self.scale[rows] * self.scale[columns] * inside

  def quadratic(self, directions):
    scaled = directions * self.scale[None]
    inside = (scaled @ self.vectors) ** 2 @ (self.values - 1)
    return jnp.sum(scaled**2, axis=-1) + inside


class InversePrecision(NamedTuple):
  """A = (factor factor^T)^-1, the lower factor of a precision matrix."""

  factor: Float[Array, "dim dim"]

  def apply(self, vector):
    return self.root(self.root_transposed(vector))

  def root(self, white):
    return jax.scipy.linalg.solve_triangular(
      self.factor, white, lower=True, trans=1
    )

  def root_transposed(self, vector):
    return jax.scipy.linalg.solve_triangular(self.factor, vector, lower=True)

  def whiten(self, vector):
    return vector @ self.factor

  def diagonal(self):
    return jnp.sum(self._inverse_factor() ** 2, axis=0)

  def entries(self, rows, columns):
    inverse = self._inverse_factor()
    return jnp.sum(inverse[:, rows] * inverse[:, columns], axis=0)

  def quadratic(self, directions):
    white = jax.scipy.linalg.solve_triangular(
      self.factor, directions.T, lower=True
    )
    return jnp.sum(white**2, axis=0)

  def log_det_root(self):
    """log det of a root of A."""
    return -jnp.sum(jnp.log(jnp.diagonal(self.factor)))

  def _inverse_factor(self):
    eye = jnp.eye(self.factor.shape[0], dtype=self.factor.dtype)
    return jax.scipy.linalg.solve_triangular(self.factor, eye, lower=True)


class Scaled(NamedTuple):
  """A = scale * base."""

  base: Any
  scale: Float[Array, ""]

  def apply(self, vector):
    return self.scale * self.base.apply(vector)

  def root(self, white):
    return jnp.sqrt(self.scale) * self.base.root(white)

  def whiten(self, vector):
    return self.base.whiten(vector) / jnp.sqrt(self.scale)

  def diagonal(self):
    return self.scale * self.base.diagonal()

  def entries(self, rows, columns):
    return self.scale * self.base.entries(rows, columns)

  def quadratic(self, directions):
    return self.scale * self.base.quadratic(directions)


class Within(NamedTuple):
  """A = root inner root^T, `inner` in coordinates whitened by `outer`."""

  outer: Any
  inner: Any

  def apply(self, vector):
    return self.outer.root(self.inner.apply(self._transposed(vector)))

  def root(self, white):
    return self.outer.root(self.inner.root(white))

  def whiten(self, vector):
    return self.inner.whiten(self.outer.whiten(vector))

  def diagonal(self):
    return jnp.sum(self._matrix() ** 2, axis=0)

  def entries(self, rows, columns):
    matrix = self._matrix()
    return jnp.sum(matrix[:, rows] * matrix[:, columns], axis=0)

  def quadratic(self, directions):
    return self.inner.quadratic(jax.vmap(self._transposed)(directions))

  def log_det_root(self):
    """log det of a root of A."""
    return self.outer.log_det_root() + self.inner.log_det_root()

  def _transposed(self, vector):
    return jax.linear_transpose(self.outer.root, vector)(vector)[0]

  def _matrix(self):  # transposed root of A
    like = jax.eval_shape(self.outer.diagonal)
    return jax.vmap(self.root)(jnp.eye(like.shape[0], dtype=like.dtype))


def identity(dim: int, dtype: Any = None) -> Diagonal:
  """A = I."""
  checks.check_positive_int("dim", dim)
  return Diagonal(jnp.ones((dim,), dtype))


def diagonal(variance: Any, dtype: Any = None) -> Diagonal:
  """A = diag(variance).

  Raises:
    ValueError: a variance that is not positive and finite.
  """
  variance = jnp.asarray(variance, dtype)
  checks.check_shape("preconditioner", variance, ("dim",), (None,))
  checks.check_open_interval("preconditioner", variance, 0, math.inf)
  return Diagonal(variance)


def dense(matrix: Any, dtype: Any = None) -> Dense:
  """A = matrix; O(dim^3) once.

  Raises:
    ValueError: not square, not finite, asymmetric or indefinite.
  """
  checks.check_covariance("preconditioner", matrix)
  matrix = jnp.asarray(matrix, dtype)
  return Dense(matrix, jnp.linalg.cholesky(matrix))


def eigen(matrix: Any, dtype: Any = None, *, floor: float = 0.0) -> Eigen:
  """A = matrix, by its eigenvectors; O(dim^3) once.

  Args:
    matrix: [dim, dim], symmetric.
    dtype: of the result.
    floor: eigenvalues below this share of the largest are raised to it, which
      makes a nearly singular matrix usable; 0 demands a definite one.

  Raises:
    ValueError: not square, not finite, asymmetric, or indefinite with no floor.
  """
  if floor == 0:
    checks.check_covariance("preconditioner", matrix)
  checks.check_shape(
    "preconditioner", matrix, ("dim", "dim"), (None, jnp.shape(matrix)[-1])
  )
  dtype = jnp.asarray(matrix, dtype).dtype
  # In float64 whatever the dtype: small eigenvalues need the digits.
  values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
  values = np.maximum(values, floor * values[-1])
  return Eigen(
    jnp.asarray(orthonormal(vectors), dtype), jnp.asarray(values, dtype)
  )


def orthonormal(
  vectors: Float[np.ndarray, "dim dim"],
) -> Float[np.ndarray, "dim dim"]:
  """Columns orthonormal to rounding, from eigenvectors of LAPACK.

  Those miss orthogonality by a few rounding errors each, which the root of the
  condition number multiplies: log acceptance ratios on a Gaussian of condition
  1e6 in 100 dimensions fell from 1.1e-11 to 7e-12. One Newton step of the polar
  factor, its small part computed apart.
  """
  excess = vectors.T @ vectors - np.eye(vectors.shape[0])
  return vectors - 0.5 * (vectors @ excess)


def low_rank(draws: Any, rank: int, dtype: Any = None) -> LowRank:
  """A from draws, with the covariance beyond the scales in a few directions.

  Args:
    draws: [num_draws, dim]; fewer draws than coordinates will do.
    rank: directions kept: variance farthest from 1 once scales are divided out.
    dtype: of the result.

  Raises:
    ValueError: a rank out of range, or a coordinate that does not vary.
  """
  draws = jnp.asarray(draws, dtype)
  checks.check_shape("draws", draws, ("num_draws", "dim"), (None, None))
  num_draws, dim = draws.shape
  checks.check_positive_int("rank", rank)
  largest = min(num_draws - 1, dim)
  checks.require(rank <= largest, "rank", f"be <= {largest}", rank)
  scale = jnp.std(draws, axis=0, ddof=1)
  checks.check_open_interval("scale of draws", scale, 0, math.inf)
  centred = (draws - draws.mean(0)[None]) / scale[None]
  _, singular, vectors = jnp.linalg.svd(centred, full_matrices=False)
  # Shrunk towards 1 as `adaptation` shrinks a covariance.
  values = (singular**2 + 5) / (num_draws + 4)
  kept = jnp.argsort(-jnp.abs(jnp.log(values)))[:rank]
  return LowRank(scale, vectors[kept].T, values[kept])


def check_size(preconditioner: Any, dim: int):
  """Checks that a preconditioner maps vectors of this length.

  Raises:
    ValueError: it does not, or is no preconditioner.
  """
  checks.require(
    hasattr(preconditioner, "apply") and hasattr(preconditioner, "root"),
    "preconditioner",
    "have apply and root",
    type(preconditioner).__name__,
    "the result of preconditioner.diagonal, dense or eigen",
  )
  size = jax.eval_shape(preconditioner.diagonal).shape
  checks.require(
    size == (dim,),
    "preconditioner",
    "have the size of position",
    f"one for {size[0] if size else size} coordinates",
    f"{dim} coordinates",
  )
