# SPDX-License-Identifier: Apache-2.0
"""Streaming moments of test functions and of their control-variate terms.

One step of a chain contributes, for each of `num_functions` test functions,
the value F(x) and `num_terms` control-variate terms. They are the rows of one
array [1 + num_terms, num_functions]: row 0 is F, the others are the terms. No
chain is stored: an accumulator holds means and centred products of these rows
over steps and over batch means. Two accumulators of disjoint steps merge into
the accumulator of all of them, whatever their order.

Numbers are float64 where JAX has it enabled. Otherwise they are float32: sums
run about a centre close to the mean for one batch only, and batches are merged
with compensated addition, so that a run of any length loses no digits to its
length.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisparse_jax.mcmc import base, checks

NUM_FOLDS = 2


class Terms(NamedTuple):
  """What one step contributes; see the module's docstring.

  Attributes:
    values: F at the state before the step.
    control_variates: zero-mean terms; an estimate is
      mean(values) - sum_j cv_coef[j] * mean(control_variates[j]).
  """

  values: Float[Array, " num_functions"]
  control_variates: Float[Array, "num_terms num_functions"]


class Moments(NamedTuple):
  """Count, mean and centred sums of products of rows.

  Attributes:
    count: observations.
    mean: of each row; add `mean_low` for all digits.
    mean_low: what `mean` lost to rounding.
    products: sum of (row_i - mean_i) (row_j - mean_j).
    products_low: what `products` lost to rounding.
  """

  count: Float[Array, ""]
  mean: Float[Array, "rows num_functions"]
  mean_low: Float[Array, "rows num_functions"]
  products: Float[Array, "kept_rows kept_rows num_functions"]
  products_low: Float[Array, "kept_rows kept_rows num_functions"]


class Accumulator(NamedTuple):
  """Moments of one chain; leaves get a leading axis for many.

  Attributes:
    centre: about which the current batch is summed.
    batch_count: steps in the current batch.
    batch_sum: sum of rows about the centre in it.
    batch_products: sum of products of rows about the centre in it.
    num_batches: finished batches.
    steps: moments over the steps of finished batches.
    batches: moments over the means of finished batches, [num_folds, ...]:
      batch i is in fold i % num_folds. All batches must be of one size.
  """

  centre: Float[Array, "rows num_functions"]
  batch_count: Int[Array, ""]
  batch_sum: Float[Array, "rows num_functions"]
  batch_products: Float[Array, "kept_rows kept_rows num_functions"]
  num_batches: Int[Array, ""]
  steps: Moments
  batches: Moments


def dtype() -> jnp.dtype:
  """float64 where it is enabled, else float32."""
  return jnp.dtype(jnp.result_type(float))


def init(
  centre: Float[Array, " num_functions"],
  num_terms: int,
  *,
  products_of_terms: bool = True,
  num_folds: int = NUM_FOLDS,
) -> Accumulator:
  """An empty accumulator.

  Args:
    centre: rough means of the test functions, such as their values at the
      chain's start; only the digits of the first batch depend on it.
    num_terms: control-variate terms for each function.
    products_of_terms: whether products over steps are kept for all rows, which
      least-squares coefficients need, or for F alone, which saves memory
      traffic with thousands of chains. Batch means always have all.
    num_folds: of batch means; estimates from several chains need 1, those from
      one chain 2.

  Returns:
    The accumulator of one chain.

  Raises:
    ValueError: num_terms < 0, num_folds < 1, or a centre that is no vector.
  """
  checks.check_positive_int("num_folds", num_folds)
  checks.check_shape("centre", centre, ("num_functions",), (None,))
  checks.require(num_terms >= 0, "num_terms", "be >= 0", num_terms)
  centre = jnp.asarray(centre).astype(dtype())
  terms = jnp.zeros((num_terms, centre.shape[0]), dtype())
  centre = jnp.concatenate([centre[None], terms])
  rows, num_functions = centre.shape
  kept = rows if products_of_terms else 1
  no_batches = empty_moments(rows, rows, num_functions)
  return Accumulator(
    centre=centre,
    batch_count=jnp.zeros((), jnp.int32),
    batch_sum=jnp.zeros_like(centre),
    batch_products=jnp.zeros((kept, kept, num_functions), dtype()),
    num_batches=jnp.zeros((), jnp.int32),
    steps=empty_moments(rows, kept, num_functions),
    batches=jax.tree.map(lambda x: jnp.stack([x] * num_folds), no_batches),
  )


def init_chains(
  centres: Float[Array, "num_chains num_functions"],
  num_terms: int,
  *,
  products_of_terms: bool = True,
  num_folds: int = NUM_FOLDS,
) -> Accumulator:
  """`init` for many chains; leaves [num_chains, ...]."""
  checks.check_shape(
    "centres", centres, ("num_chains", "num_functions"), (None, None)
  )
  return _init_chains(centres, num_terms, products_of_terms, num_folds)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _init_chains(centres, num_terms, products_of_terms, num_folds):
  def one(centre):
    return init(
      centre,
      num_terms,
      products_of_terms=products_of_terms,
      num_folds=num_folds,
    )

  return jax.vmap(one)(centres)


def update(accumulator: Accumulator, terms: Terms) -> Accumulator:
  """Adds one step to the current batch."""
  rows = jnp.concatenate([terms.values[None], terms.control_variates])
  rows = rows.astype(dtype()) - accumulator.centre
  kept = rows[: accumulator.batch_products.shape[0]]
  products = kept[:, None] * kept[None]
  return accumulator._replace(
    batch_count=accumulator.batch_count + 1,
    batch_sum=accumulator.batch_sum + rows,
    batch_products=accumulator.batch_products + products,
  )


def flush(accumulator: Accumulator) -> Accumulator:
  """Ends the current batch; without steps in it, nothing changes."""
  count = accumulator.batch_count.astype(dtype())
  shift = accumulator.batch_sum / jnp.maximum(count, 1)
  kept = shift[: accumulator.batch_products.shape[0]]
  products = accumulator.batch_products - count * kept[:, None] * kept[None]
  mean = accumulator.centre + shift
  # What the rounding of the sum above lost; in float64 nothing is made of it.
  mean_low = jnp.zeros_like(mean)
  if mean.dtype != jnp.float64:
    mean_low = shift - (mean - accumulator.centre)
  # Exact without the choices of `merge_moments`: means of nothing are 0, and a
  # batch of no steps has weight 0.
  steps = _merged(
    accumulator.steps,
    Moments(count, mean, mean_low, products, jnp.zeros_like(products)),
  )
  num_folds = accumulator.batches.count.shape[0]
  fold = accumulator.num_batches % num_folds
  one = jnp.where(count > 0, jnp.ones((), dtype()), 0)
  batches = jax.vmap(
    lambda moments, number: _merge_one(
      moments, jnp.where(fold == number, one, 0), mean, mean_low
    )
  )(accumulator.batches, jnp.arange(num_folds, dtype=jnp.int32))
  return Accumulator(
    centre=jnp.where(count > 0, steps.mean, accumulator.centre),
    batch_count=jnp.zeros_like(accumulator.batch_count),
    batch_sum=jnp.zeros_like(accumulator.batch_sum),
    batch_products=jnp.zeros_like(accumulator.batch_products),
    num_batches=accumulator.num_batches + (count > 0).astype(jnp.int32),
    steps=steps,
    batches=batches,
  )


def merge(a: Accumulator, b: Accumulator) -> Accumulator:
  """The accumulator of the finished batches of both; flush before.

  Batches must be of one size. Steps of an unfinished batch are dropped.
  """
  steps = merge_moments(a.steps, b.steps)
  return Accumulator(
    centre=steps.mean,
    batch_count=jnp.zeros_like(a.batch_count),
    batch_sum=jnp.zeros_like(a.batch_sum),
    batch_products=jnp.zeros_like(a.batch_products),
    num_batches=a.num_batches + b.num_batches,
    steps=steps,
    batches=jax.vmap(merge_moments)(a.batches, b.batches),
  )


def collector(term_fn: Any) -> base.Collector:
  """The collector of `base.run_chains` for one set of terms.

  Args:
    term_fn: (info, *parameters) -> Terms of the step just taken.

  Returns:
    A collector whose carry is an `Accumulator`. Make it once and keep it: the
    loop is compiled for each collector anew.
  """

  def update_carry(accumulator, state, info, *parameters):
    del state
    return update(accumulator, term_fn(info, *parameters))

  return base.Collector(update_carry, flush)


def empty_moments(rows: int, kept_rows: int, num_functions: int) -> Moments:
  """Moments of nothing."""
  mean = jnp.zeros((rows, num_functions), dtype())
  products = jnp.zeros((kept_rows, kept_rows, num_functions), dtype())
  return Moments(jnp.zeros((), dtype()), mean, mean, products, products)


def merge_moments(a: Moments, b: Moments) -> Moments:
  """Moments of the observations of both.

  Source: Chan, Golub, LeVeque (1979), updating formulae for sample variances;
  additions are compensated by the exact error of a rounded sum (Knuth).
  """
  # An empty side must leave the other bit for bit as it was.
  return jax.tree.map(
    lambda x, y, both: jnp.where(
      b.count == 0, x, jnp.where(a.count == 0, y, both)
    ),
    a,
    b,
    _merged(a, b),
  )


def _merged(a, b):
  count = a.count + b.count
  share = b.count / jnp.maximum(count, 1)
  delta = (b.mean - a.mean) + (b.mean_low - a.mean_low)
  mean, mean_low = _add(a.mean, share * delta, a.mean_low)
  kept = delta[: a.products.shape[0]]
  between = (a.count * share) * kept[:, None] * kept[None]
  products, products_low = _add(
    a.products, b.products + between, a.products_low + b.products_low
  )
  return Moments(count, mean, mean_low, products, products_low)


def _merge_one(moments, weight, mean, mean_low):
  """`merge_moments` with one observation, or with none where weight is 0."""
  count = moments.count + weight
  share = weight / jnp.maximum(count, 1)
  delta = (mean - moments.mean) + (mean_low - moments.mean_low)
  delta = jnp.where(weight > 0, delta, 0)
  scaled = moments.count * share * delta
  # Once for each row, not once for each pair of rows.
  delta, scaled = jax.lax.optimization_barrier((delta, scaled))
  new_mean, new_low = _add(moments.mean, share * delta, moments.mean_low)
  products, products_low = _add(
    moments.products, scaled[:, None] * delta[None], moments.products_low
  )
  return Moments(count, new_mean, new_low, products, products_low)


def reduce_chains(moments: Moments) -> Moments:
  """Moments over the observations of all chains; drops the leading axis."""

  def part(start, stop):
    return jax.tree.map(lambda x: x[start:stop], moments)

  num_chains = moments.count.shape[0]
  while num_chains > 1:
    half = num_chains // 2
    paired = jax.vmap(merge_moments)(part(0, half), part(half, 2 * half))
    rest = part(2 * half, num_chains)
    moments = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), paired, rest)
    num_chains = moments.count.shape[0]
  return jax.tree.map(lambda x: x[0], moments)


def _add(a, b, low):
  """a + b with the rounding error added to `low`, where it matters."""
  total = a + b
  if total.dtype == jnp.float64:
    return total, low
  part = total - a
  error = (a - (total - part)) + (b - part)
  return total, low + error
