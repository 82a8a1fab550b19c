# SPDX-License-Identifier: Apache-2.0
"""Control-variate terms that a chain gives away while it runs.

For a test function F with Poisson solution G on the reference Gaussian, a step
from x with proposal y and acceptance probability alpha gives three terms of
mean zero under the target:

  "poisson"  -alpha (G(y) - G(x))        by detailed balance
  "static"   G(y) - E[G(Y) | x]          given x
  "score"    minus the score term of F   by integration by parts

The signs make the coefficients (1, 1) on the first two, or 1 on the last
alone, exact where the target is the reference Gaussian. Everything speaks of
the state *before* accept/reject; after it, the first term would be biased.

Source: Alexopoulos, Dellaportas, Titsias, arXiv 2506.21511, for the first two;
Mira, Solgi, Imparato (2013), zero-variance MCMC, for the last and for
`polynomial_terms`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unisparse_jax.mcmc import (
  accumulators,
  base,
  batch_sums,
  checks,
  estimates,
  poisson,
  white_coordinates,
)
from unisparse_jax.mcmc import preconditioner as preconditioners

POISSON, STATIC, SCORE = 0, 1, 2
TERM_NAMES = ("poisson", "static", "score")
# Coefficients that are exact on the reference Gaussian, by the terms used.
TWO_TERMS = estimates.Candidate(terms=(POISSON, STATIC), cv_coef=(1.0, 1.0))


def _same(vector):
  return vector


class ControlVariates(NamedTuple):
  """The terms of a set of test functions, for `base.run_chains`.

  Attributes:
    functions: of `poisson`.
    num_terms: for each function.
    collector: takes a `poisson.Reference` as its parameter, and optionally
      other functions that differ from these in arrays alone: one compiled
      program serves all that are given to it so.
    values: x -> F of all functions, [num_functions].
    to_x: raveled position -> x.
    term_fn: (info, reference) -> `accumulators.Terms` of one step.
  """

  functions: tuple
  num_terms: int
  collector: base.Collector
  values: Callable
  term_fn: Callable
  to_x: Callable = _same

  def init(
    self,
    positions: Any,
    *,
    functions: tuple | None = None,
    products_of_terms: bool = False,
    num_folds: int | None = None,
  ) -> accumulators.Accumulator:
    """Empty accumulators of many chains.

    Args:
      positions: pytree, leaves [num_chains, ...]: where the chains start.
      functions: that the collector will be given, if any.
      products_of_terms: see `accumulators.init`; only the coefficients
        `estimates.LEAST_SQUARES` need them, at three times the cost.
      num_folds: see `accumulators.init`; default 1 for several chains, of
        which none can then give an estimate alone, and 2 for one.
    """
    if functions is None:
      centres = _values_of_chains(self.values, self.to_x, positions)
    else:
      centres = _given_values_of_chains(self.to_x, functions, positions)
    if num_folds is None:
      num_folds = 1 if centres.shape[0] > 1 else accumulators.NUM_FOLDS
    return accumulators.init_chains(
      centres,
      self.num_terms,
      products_of_terms=products_of_terms,
      num_folds=num_folds,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values_of_chains(values, to_x, positions):
  return jax.vmap(lambda p: values(to_x(base.ravel(p)[0])))(positions)


@functools.partial(jax.jit, static_argnums=0)
def _given_values_of_chains(to_x, functions, positions):
  return jax.vmap(lambda p: _values(functions, to_x(base.ravel(p)[0])))(
    positions
  )


def _values(functions, x):
  return jnp.concatenate([f.value(x) for f in functions])


def poisson_terms(
  functions: Any,
  *,
  score: bool = True,
  covariance_fn: Callable | None = None,
  precond_grad_fn: Callable | None = None,
  coordinates: white_coordinates.Coordinates | None = None,
) -> ControlVariates:
  """Terms of test functions for a Gaussian-invariant sampler.

  Args:
    functions: one or several of `poisson`.
    score: whether the score term is used; it needs gradients, and a target
      without boundary whose density falls off at infinity.
    covariance_fn: (info, reference) -> covariance of the proposal given x;
      default that of a kernel with the constant preconditioner
      reference.covariance.
    precond_grad_fn: (info, reference) -> reference.covariance times the
      gradient at x; default info.precond_grad, for such a kernel.
    coordinates: of the chain, where it samples z of `white_coordinates`, with
      I as its preconditioner unless the two functions above are given, which
      then return what is of z. Functions and reference are of x all the same,
      reference.covariance that of `coordinates`. Four products with the root
      for each step.

  Returns:
    The terms. Make them once: the loop is compiled for each value anew.

  Raises:
    ValueError: a function whose Poisson solution is unknown.
  """
  functions = poisson.check_functions(functions)
  covariance_fn = covariance_fn or constant_covariance
  precond_grad_fn = precond_grad_fn or (lambda info, _: info.precond_grad)
  structure = jax.tree.structure(functions)
  shapes = list(map(jnp.shape, jax.tree.leaves(functions)))
  num_terms = 3 if score else 2

  def values(x):
    return _values(functions, x)

  def chosen(given):
    if not given:
      return functions
    (others,) = given
    same = jax.tree.structure(others) == structure
    checks.require(
      same and list(map(jnp.shape, jax.tree.leaves(others))) == shapes,
      "functions",
      "differ in arrays alone, and not in their shapes, from those that the "
      "terms were made for",
      others,
      str(functions),
    )
    return others

  def read(info, reference):
    reference = cast(reference, info.position_prev.dtype)
    to_x, inner = _same, reference
    if coordinates is not None:
      to_x = coordinates.position
      white = preconditioners.Diagonal(jnp.ones_like(reference.mean))
      inner = reference._replace(covariance=white)
    covariance = covariance_fn(info, inner)
    grad = precond_grad_fn(info, inner) if score else None
    if coordinates is not None:
      grad = coordinates.root(grad) if score else None
      if covariance_fn is constant_covariance:
        covariance = covariance_fn(info, reference)
      else:
        covariance = preconditioners.Within(coordinates, covariance)
    return batch_sums.Step(
      before=to_x(info.position_prev),
      proposal=to_x(info.proposal),
      proposal_mean=to_x(info.proposal_mean),
      acceptance_rate=info.acceptance_rate,
      covariance=covariance,
      precond_grad=grad,
      reference=reference,
    )

  def term_fn(info, reference):
    step = read(info, reference)
    rows = zip(*(step.rows(f) for f in functions), strict=True)
    values, *terms = map(jnp.concatenate, rows)
    return accumulators.Terms(values, jnp.stack(terms))

  def open_batch(accumulator, batch_size, reference, *given):
    functions_ = chosen(given)
    (num_functions,) = jax.eval_shape(values, reference.mean).shape
    checks.check_shape(
      "carry",
      accumulator.centre,
      ("1 + num_terms", "num_functions"),
      (1 + num_terms, num_functions),
    )
    return batch_sums.open_batch(accumulator, batch_size, functions_, reference)

  def update(batch, state, info, reference, *given):
    del state
    return batch_sums.add(batch, chosen(given), read(info, reference))

  def flush(batch):
    # Other functions differ in arrays, which the end of a batch does not need.
    return batch_sums.close_batch(batch, functions)

  collector = base.Collector(update, flush, open_batch)
  to_x = _same if coordinates is None else coordinates.position
  return ControlVariates(functions, num_terms, collector, values, term_fn, to_x)


def constant_covariance(info: Any, reference: poisson.Reference) -> Any:
  """Proposal covariance of a kernel with the reference's preconditioner."""
  del info
  return preconditioners.Scaled(reference.covariance, reference.noise_scale)


def cast(reference: poisson.Reference, dtype: Any) -> poisson.Reference:
  """The reference with all numbers in one dtype."""
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), reference)


def candidates(
  num_terms: int, method: str = estimates.BATCH_MEANS
) -> dict[str, estimates.Candidate]:
  """Ways to control a mean with these terms, for `estimates.choose`.

  Args:
    num_terms: 2, or 3 with the score.
    method: how coefficients are estimated, one of `estimates.METHODS`.
  """
  found = {
    "two_fixed": TWO_TERMS,
    "two": estimates.Candidate(terms=(POISSON, STATIC), cv_coef=method),
  }
  if num_terms == 3:
    found |= {
      "score": estimates.Candidate(terms=(SCORE,), cv_coef=method),
      "all": estimates.Candidate(
        terms=(POISSON, STATIC, SCORE), cv_coef=method
      ),
    }
  return found


def polynomial_terms(
  functions: Any,
  dim: int,
  *,
  order: int = 1,
  grad_fn: Callable | None = None,
) -> ControlVariates:
  """Zero-variance polynomial control variates, the baseline of the field.

  All functions share the terms g_j (order 1) and also x_i g_j + delta_ij
  (order 2), g the preconditioned gradient; the accumulator is joint, see
  `chain_data.split_shared`. Exact for linear (quadratic) F on any Gaussian.

  Args:
    functions: of `poisson`; only their values are used.
    dim: coordinates.
    order: 1 or 2.
    grad_fn: (info, reference) -> gradient at x in any fixed linear coordinates;
      default info.precond_grad.

  Returns:
    Terms whose `collector` takes a `poisson.Reference`.

  Raises:
    ValueError: an order other than 1 and 2.
  """
  functions = poisson.check_functions(functions)
  checks.require(order in (1, 2), "order", "be 1 or 2", order)
  grad_fn = grad_fn or (lambda info, _: info.precond_grad)
  upper, lower = jnp.triu_indices(dim)

  def values(x):
    return jnp.concatenate([f.value(x) for f in functions])

  def term_fn(info, reference):
    x = info.position_prev
    reference = cast(reference, x.dtype)
    grad = grad_fn(info, reference)
    rows = [values(x), grad]
    if order == 2:
      centred = x - reference.mean
      entries = reference.covariance.entries(upper, lower)
      both = centred[upper] * grad[lower] + centred[lower] * grad[upper]
      rows.append(0.5 * both + entries)
    rows = jnp.concatenate(rows)[:, None]
    return accumulators.Terms(rows[0], rows[1:])

  def first(x):
    return values(x)[:1]

  num_values = jax.eval_shape(values, jnp.zeros((dim,))).shape[0]
  num_terms = num_values - 1 + dim + (len(upper) if order == 2 else 0)
  return ControlVariates(
    functions, num_terms, accumulators.collector(term_fn), first, term_fn
  )


def plain_terms(function: Callable) -> Callable:
  """Terms of the plain mean alone: (info) -> Terms without control variates.

  Args:
    function: vector -> F, [num_functions].
  """

  def term_fn(info):
    values: Float[Array, " num_functions"] = function(info.position_prev)
    none = jnp.zeros((0, values.shape[0]), values.dtype)
    return accumulators.Terms(values, none)

  return term_fn
