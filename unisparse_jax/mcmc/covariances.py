# SPDX-License-Identifier: Apache-2.0
"""Prior covariances U diag(values) U^T, U orthonormal, in products with U only.

A vector is raveled; grids are in C order. Memory: `Dense` dim^2, `Kronecker`
the sum of the squared sides, `Circulant` dim.
"""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks, preconditioner


class Covariance(Protocol):
  """What `gi_latent_gaussian` needs of a prior covariance."""

  @property
  def values(self) -> Float[Array, " dim"]:
    """Eigenvalues, raveled."""
    ...

  def to_eigen(self, vector: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """U^T vector."""
    ...

  def from_eigen(self, vector: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """U vector."""
    ...

  def diagonal_of(self, values: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Diagonal of U diag(values) U^T."""
    ...


class Dense(NamedTuple):
  """Any covariance, by its eigenvectors."""

  vectors: Float[Array, "dim dim"]
  values: Float[Array, " dim"]

  def to_eigen(self, vector):
    return vector @ self.vectors

  def from_eigen(self, vector):
    return self.vectors @ vector

  def diagonal_of(self, values):
    return self.vectors**2 @ values


class Kronecker(NamedTuple):
  """first (x) second: a separable covariance on a grid."""

  first: Dense
  second: Dense

  @property
  def values(self):
    return jnp.outer(self.first.values, self.second.values).ravel()

  def _grid(self, vector):
    return vector.reshape(
      self.first.values.shape[0], self.second.values.shape[0]
    )

  def to_eigen(self, vector):
    grid = self._grid(vector)
    return (self.first.vectors.T @ grid @ self.second.vectors).ravel()

  def from_eigen(self, vector):
    grid = self._grid(vector)
    return (self.first.vectors @ grid @ self.second.vectors.T).ravel()

  def diagonal_of(self, values):
    grid = self._grid(values)
    squares = self.first.vectors**2 @ grid @ (self.second.vectors**2).T
    return squares.ravel()


class Circulant(NamedTuple):
  """A stationary covariance on a torus; U is the real Hartley transform.

  Attributes:
    spectrum: eigenvalues on the grid of frequencies.
  """

  spectrum: Float[Array, "rows columns"]

  @property
  def values(self):
    return self.spectrum.ravel()

  def _hartley(self, vector):
    # cos + sin of the phase: real, symmetric, and its own inverse. It
    # diagonalises every real even kernel, whose frequencies k and -k agree. The
    # transform of a real vector at -k is the conjugate of that at k, so that
    # half of it is enough (128 x 128, CPU, float64: 61 us in place of 75).
    columns = self.spectrum.shape[1]
    half = jnp.fft.rfft2(vector.reshape(self.spectrum.shape))
    direct = half.real - half.imag
    mirrored = (half.real + half.imag)[:, 1 : (columns + 1) // 2]
    mirrored = jnp.roll(mirrored[::-1, ::-1], 1, axis=0)
    scale = 1 / math.sqrt(self.spectrum.size)
    return (jnp.concatenate([direct, mirrored], axis=1) * scale).ravel()

  def to_eigen(self, vector):
    return self._hartley(vector)

  def from_eigen(self, vector):
    return self._hartley(vector)

  def diagonal_of(self, values):
    # The two sines of k and -k cancel: all positions are alike.
    return jnp.full_like(values, jnp.mean(values))


class InverseShifted(NamedTuple):
  """A = (covariance^-1 + shift I)^-1, without the inverse of anything."""

  covariance: Any
  shift: Float[Array, ""]

  @property
  def values(self):
    values = self.covariance.values
    return values / (1 + self.shift * values)

  def apply(self, vector):
    inside = self.values * self.covariance.to_eigen(vector)
    return self.covariance.from_eigen(inside)

  def root(self, white):
    return self.covariance.from_eigen(jnp.sqrt(self.values) * white)

  def whiten(self, vector):
    return self.covariance.to_eigen(vector) / jnp.sqrt(self.values)

  def diagonal(self):
    return self.covariance.diagonal_of(self.values)

  def entries(self, rows, columns):
    def one(row, column):
      unit = jnp.zeros_like(self.values).at[column].set(1)
      return self.apply(unit)[row]

    return jax.vmap(one)(rows, columns)

  def quadratic(self, directions):
    white = jax.vmap(self.covariance.to_eigen)(directions)
    return white**2 @ self.values


def dense(matrix: Any, *, floor: float = 1e-10, dtype: Any = None) -> Dense:
  """Factors a covariance once, O(dim^3).

  Args:
    matrix: [dim, dim], symmetric; eigenvalues below `floor` of the largest are
      raised to it, so that a nearly singular kernel matrix is usable.
    floor: see matrix.
    dtype: of the result; the factors are computed in float64.

  Raises:
    ValueError: not square, not finite or not symmetric.
  """
  matrix = np.asarray(matrix, np.float64)
  checks.check_shape(
    "covariance", matrix, ("dim", "dim"), (None, matrix.shape[-1])
  )
  checks.require(
    bool(np.all(np.isfinite(matrix)))
    and bool(np.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-12)),
    "covariance",
    "be finite and symmetric",
    "a matrix that is not",
    "use (C + C^T) / 2",
  )
  values, vectors = np.linalg.eigh(matrix)
  vectors = preconditioner.orthonormal(vectors)
  checks.require(
    values[-1] > 0 and values[0] > -1e-6 * values[-1],
    "covariance",
    "have no negative eigenvalue beyond rounding",
    f"a matrix with lowest eigenvalue {values[0]:.3g}",
  )
  values = np.maximum(values, floor * values[-1])
  return Dense(jnp.asarray(vectors, dtype), jnp.asarray(values, dtype))


def kronecker(
  first: Any, second: Any, *, floor: float = 1e-10, dtype: Any = None
) -> Kronecker:
  """first (x) second from their matrices; O(side^3) once for each side."""
  return Kronecker(
    dense(first, floor=floor, dtype=dtype),
    dense(second, floor=floor, dtype=dtype),
  )


def circulant(
  rows: int,
  columns: int,
  kernel: Any,
  *,
  floor: float = 1e-10,
  dtype: Any = None,
) -> Circulant:
  """A stationary covariance on a torus of rows x columns cells.

  A grid of half the sides inside the torus has exactly the covariance
  kernel(distance): the torus embeds the Toeplitz matrix of the grid.

  Args:
    rows: of the torus; with columns 1, a torus in one dimension.
    columns: of the torus.
    kernel: (row distance, column distance in cells) -> covariance, on arrays.
    floor: smallest eigenvalue kept, relative to the largest.
    dtype: of the result.

  Raises:
    ValueError: eigenvalues below zero beyond 1e-6 of the largest: the torus is
      too small for the kernel's range.
  """
  checks.check_positive_int("rows", rows)
  checks.check_positive_int("columns", columns)
  i, j = np.arange(rows), np.arange(columns)
  first = np.asarray(
    kernel(np.minimum(i, rows - i)[:, None], np.minimum(j, columns - j)[None]),
    np.float64,
  )
  spectrum = np.fft.fft2(np.broadcast_to(first, (rows, columns))).real
  largest = float(spectrum.max())
  checks.require(
    float(spectrum.min()) >= -1e-6 * largest,
    "kernel",
    "have a spectrum without negative values on this torus",
    f"a lowest eigenvalue of {spectrum.min():.3g}, largest {largest:.3g}",
    "a larger torus",
  )
  return Circulant(jnp.asarray(np.maximum(spectrum, floor * largest), dtype))
