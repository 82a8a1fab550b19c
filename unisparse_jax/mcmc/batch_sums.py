# SPDX-License-Identifier: Apache-2.0
"""Sums over the steps of a batch, from which all rows of it are known.

What control variates cost is to read and write what is summed in every step,
hardly the arithmetic. The rows of x_j and x_j^2 are linear in nine numbers of a
step, each made of one or two vectors:

  x - c                     (x - c)^2                      (x^2 - d)^2
  alpha (x - y)             alpha (x - y) (x + y - 2 m)
  y - E y                   (y - E y) (y + E y - 2 m) - S
  A grad                    (x - m) A grad + diag A

(m and A of the reference, S the diagonal of the proposal's covariance, c and d
the accumulator's centres.) So those are summed, and the rows made of them once
a batch. Summing the eight rows and two squares themselves took 17.9 us of a
step of 262 us (CPU, 100 chains of 31 coefficients, float64, batches of 50
steps); these nine take 12 to 14, of which 9 are the sums and the rest is the
beginning and the end of a batch. (Without S and diag A, without the centres or
without the choice in `Step.taken`: 0 to 0.3 us less. Bodies of 4 steps in place
of 2: 1 us more.)

Functions of other families, and products of rows, are summed as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unisparse_jax.mcmc import accumulators, poisson


class Step(NamedTuple):
  """What the rows of one step are made of; vectors of one dtype.

  Attributes:
    before: the state before accept/reject.
    proposal: the point drawn.
    proposal_mean: of its distribution.
    acceptance_rate: probability of accepting it.
    covariance: of the proposal's distribution.
    precond_grad: reference.covariance times the gradient before; None where
      there is no score term.
    reference: of the run.
  """

  before: Float[Array, " dim"]
  proposal: Float[Array, " dim"]
  proposal_mean: Float[Array, " dim"]
  acceptance_rate: Float[Array, ""]
  covariance: Any
  precond_grad: Any
  reference: poisson.Reference

  def rows(self, function: Any) -> list[Float[Array, " num_functions"]]:
    """F, then its terms."""
    there = function.solution(self.proposal, self.reference)
    moved = function.solution(self.before, self.reference) - there
    expected = function.expected(
      self.proposal_mean, self.covariance, self.reference
    )
    rows = [function.value(self.before), self.taken(moved), there - expected]
    if self.precond_grad is not None:
      rows.append(
        -function.score(self.before, self.precond_grad, self.reference)
      )
    return rows

  def taken(self, moved: Float[Array, " num"]) -> Float[Array, " num"]:
    """moved times the acceptance rate."""
    # G may overflow at a proposal that cannot be accepted, and NaN * 0 is NaN:
    # the zero is chosen after the product.
    alpha = self.acceptance_rate
    return jnp.where(alpha > 0, alpha * moved, 0)


class OpenBatch(NamedTuple):
  """A batch in the making.

  Attributes:
    accumulator: of the batches before.
    count: steps of this batch.
    step_size: of the reference.
    mean: of the reference.
    sums: by the names of `_numbers`.
  """

  accumulator: accumulators.Accumulator
  count: Int[Array, ""]
  step_size: Float[Array, ""]
  mean: Float[Array, " dim"]
  sums: dict[str, Array]


def open_batch(
  accumulator: accumulators.Accumulator,
  count: int,
  functions: tuple,
  reference: poisson.Reference,
) -> OpenBatch:
  """An empty batch.

  Args:
    accumulator: whose current batch is empty.
    count: steps that will be added, all of them before `close_batch`.
    functions: of `poisson`.
    reference: of the run.
  """
  mean = reference.mean
  has_score = accumulator.centre.shape[0] > 3
  like = Step(
    before=mean,
    proposal=mean,
    proposal_mean=mean,
    acceptance_rate=jnp.ones((), mean.dtype),
    covariance=reference.covariance,
    precond_grad=mean if has_score else None,
    reference=reference,
  )
  shapes = jax.eval_shape(lambda: _numbers(accumulator, functions, like))
  none = {k: jnp.zeros(x.shape, x.dtype) for k, x in shapes.items()}
  count_ = jnp.asarray(count, accumulator.batch_count.dtype)
  return OpenBatch(accumulator, count_, reference.step_size, mean, none)


def add(batch: OpenBatch, functions: tuple, step: Step) -> OpenBatch:
  """Adds one step."""
  found = _numbers(batch.accumulator, functions, step)
  sums = {name: batch.sums[name] + found[name] for name in batch.sums}
  return batch._replace(sums=sums)


def close_batch(batch: OpenBatch, functions: tuple) -> accumulators.Accumulator:
  """The accumulator with this batch, all of whose steps were added."""
  accumulator, sums = batch.accumulator, batch.sums
  num_rows = accumulator.centre.shape[0]
  kept = accumulator.batch_products.shape[0]
  centres = _centres(accumulator, functions, batch.mean)
  rows, products = [], []  # [family][row] and [family][pair of rows]
  for number, function in enumerate(functions):
    if kept > 1 or type(function) not in _RIGID:
      rows.append([sums[f"{number}.{i}"] for i in range(num_rows)])
      products.append([sums[f"{number}.{i}.{j}"] for i, j in _pairs(kept)])
      continue
    lead = _lead(functions, number)
    own = {
      k.removeprefix(lead): x for k, x in sums.items() if k.startswith(lead)
    }
    if isinstance(function, poisson.Linear):
      rows.append(_rows_of_means(own, batch, num_rows))
      products.append([own["xx"]])
    else:
      both = centres[lead], centres[f"{number}.d"]
      rows.append(_rows_of_squares(own, batch, function, both, num_rows))
      products.append([own["squares"]])
  where = np.zeros((kept, kept), np.int32)
  where[np.triu_indices(kept)] = np.arange(kept * (kept + 1) // 2)
  where = np.maximum(where, where.T)

  def joined(parts):  # [family][row] -> [row, functions]
    return jnp.stack([jnp.concatenate(x) for x in zip(*parts, strict=True)])

  # Control variates have means near 0 and are summed as they are.
  centre = accumulator.centre.at[1:].set(0)
  return accumulators.flush(
    accumulator._replace(
      centre=centre,
      batch_count=batch.count,
      batch_sum=joined(rows),
      batch_products=joined(products)[where],
    )
  )


# Families whose rows are made of shared numbers.
_RIGID = (poisson.Linear, poisson.Square)


def _pairs(kept):
  return [(i, j) for i in range(kept) for j in range(i, kept)]


def _lead(functions, number):
  """Prefix of the numbers that this family shares with others."""
  coordinates = functions[number].coordinates
  for first, function in enumerate(functions):
    if type(function) in _RIGID and function.coordinates == coordinates:
      return f"{first}."
  raise AssertionError("a family shares numbers with itself at least")


def _centres(accumulator, functions, mean):
  """Of every family's x, by `_lead`, and of its function, "NUMBER.d"."""
  sizes = [jax.eval_shape(f.value, mean).shape[0] for f in functions]
  ends = np.cumsum(sizes)[:-1].tolist()
  found = {}
  for number, own in enumerate(jnp.split(accumulator.centre[0], ends)):
    function = functions[number]
    found[f"{number}.d"] = own
    if type(function) in _RIGID:
      is_linear = isinstance(function, poisson.Linear)
      centre = own if is_linear else function.take(mean).astype(own.dtype)
      lead = _lead(functions, number)
      if is_linear or lead not in found:
        found[lead] = centre
  return found


def _numbers(accumulator, functions, step):
  """What is summed, of one step, by name."""
  kept = accumulator.batch_products.shape[0]
  centres = _centres(accumulator, functions, step.reference.mean)
  found = {}
  for number, function in enumerate(functions):
    d = centres[f"{number}.d"]
    if kept > 1 or type(function) not in _RIGID:
      rows = [row.astype(d.dtype) for row in step.rows(function)]
      rows[0] -= d
      found |= {f"{number}.{i}": row for i, row in enumerate(rows)}
      found |= {f"{number}.{i}.{j}": rows[i] * rows[j] for i, j in _pairs(kept)}
      continue
    lead = _lead(functions, number)
    own = _numbers_of_means(step, function, centres[lead])
    if isinstance(function, poisson.Square):
      own |= _numbers_of_squares(step, function, d)
    found |= {f"{lead}{name}": x.astype(d.dtype) for name, x in own.items()}
  return found


def _numbers_of_means(step, function, centre):
  x, y = function.take(step.before), function.take(step.proposal)
  gap = x.astype(centre.dtype) - centre
  found = {
    "x": gap,
    "xx": gap**2,
    "move": step.taken(x - y),
    "noise": y - function.take(step.proposal_mean),
  }
  if step.precond_grad is not None:
    found["grad"] = function.take(step.precond_grad)
  return found


def _numbers_of_squares(step, function, centre):
  take = function.take
  x, y, mean = map(take, (step.before, step.proposal, step.proposal_mean))
  twice = 2 * take(step.reference.mean)
  variance = take(step.covariance.diagonal())
  found = {
    "squares": (x.astype(centre.dtype) ** 2 - centre) ** 2,
    "moves": step.taken((x - y) * (x + y - twice)),
    "noises": (y - mean) * (y + mean - twice) - variance,
  }
  if step.precond_grad is not None:
    diagonal = take(step.reference.covariance.diagonal())
    along = (x - take(step.reference.mean)) * take(step.precond_grad)
    found["grads"] = along + diagonal
  return found


def _rows_of_means(sums, batch, num_rows):
  per_step_size = 1 / batch.step_size.astype(sums["x"].dtype)
  rows = [sums["x"], sums["move"] * per_step_size]
  rows.append(sums["noise"] * per_step_size)
  return rows if num_rows == 3 else [*rows, -sums["grad"]]


def _rows_of_squares(sums, batch, function, centres, num_rows):
  c, d = centres
  step_size = batch.step_size.astype(d.dtype)
  mean = function.take(batch.mean).astype(d.dtype)
  slope, bend = 2 * mean / step_size, 1 / (step_size * (2 - step_size))
  count = batch.count.astype(d.dtype)
  rows = [
    sums["xx"] + 2 * c * sums["x"] + count * (c**2 - d),
    bend * sums["moves"] + slope * sums["move"],
    bend * sums["noises"] + slope * sums["noise"],
  ]
  if num_rows == 3:
    return rows
  return [*rows, -(sums["grads"] + 2 * mean * sums["grad"])]
