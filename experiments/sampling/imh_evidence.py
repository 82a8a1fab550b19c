# SPDX-License-Identifier: Apache-2.0
"""Marginal likelihood of linear regression under conflict with the prior.

pi is the prior p, not conjugate; q is a Gaussian or a mixture of Gaussians near
it; F is the likelihood L, so that E_q F is a closed-form marginal likelihood
and E_pi F the one that is wanted. Conflict puts L into the tail of p.

Student-t and Laplace priors are scale mixtures of Gaussians. On a grid of
scales that gives the truth, exact draws of prior, posterior and every power
posterior for the peers, and, with a few scales only, a mixture proposal.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from unisparse_jax.mcmc import (
  accumulators,
  estimates,
  expectations,
  independent_blocks,
  proposals,
)
from unisparse_jax.mcmc import independent_metropolis as sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A prior, data in conflict with it, and the answer.

  Attributes:
    prior: "student_t" with `dof`, or "laplace".
    dof: degrees of freedom of the Student-t.
    dim: coefficients; a multivariate Student-t, or one Laplace coefficient.
    conflict: distance of the data's coefficients from the prior's centre, in
      units of the prior's scale, along (1, ..., 1) / sqrt(dim).
    num_data: responses with unit noise.
    seed: of design and noise.
  """

  prior: str
  dof: float = 5.0
  dim: int = 3
  conflict: float = 0.0
  num_data: int = 20
  seed: int = 0

  @property
  def name(self) -> str:
    kind = f"t{self.dof:g}" if self.prior == "student_t" else self.prior
    return f"{kind}_dim{self.dim}_conflict{self.conflict:g}"

  def data(self) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(self.seed)
    design = rng.standard_normal((self.num_data, self.dim))
    coefficient = np.full(self.dim, self.conflict / np.sqrt(self.dim))
    noise = rng.standard_normal(self.num_data)
    return design, design @ coefficient + noise

  def scales(self, step: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Variances and weights of the Gaussians that make up the prior.

    The trapezoidal rule in the logarithm of the variance, whose integrand is
    analytic: its error falls exponentially in 1 / step.
    """
    # A Laplace prior's weights fall off like the variance itself.
    log_variance = np.arange(-30, 14, step)
    variance = np.exp(log_variance)
    if self.prior == "student_t":
      half = self.dof / 2  # variance is inverse gamma(half, half)
      log_weight = scipy.stats.invgamma(half, scale=half).logpdf(variance)
    else:  # Laplace of unit scale: variance is exponential of mean 2
      log_weight = scipy.stats.expon(scale=2).logpdf(variance)
    weight = np.exp(log_weight + log_variance)
    kept = weight > 1e-12 * weight.max()
    return variance[kept], weight[kept] / weight[kept].sum()

  def prior_logdensity(self, x):
    if self.prior == "student_t":
      half, dim = self.dof / 2, self.dim
      constant = scipy.special.gammaln(half + dim / 2)
      constant -= scipy.special.gammaln(half) + dim / 2 * np.log(
        self.dof * np.pi
      )
      norm = jnp.sum(jnp.square(x))
      return float(constant) - (half + dim / 2) * jnp.log1p(norm / self.dof)
    return -jnp.sum(jnp.abs(x)) - self.dim * float(np.log(2))

  def prior_draws(self, rng: np.random.Generator, shape) -> np.ndarray:
    if self.prior == "student_t":
      normal = rng.standard_normal((*shape, self.dim))
      return normal / np.sqrt(rng.chisquare(self.dof, (*shape, 1)) / self.dof)
    return rng.laplace(size=(*shape, self.dim))

  def power_posterior(self, beta: float, step: float = 0.02):
    """log of the integral of p L^beta, and a sampler of p L^beta."""
    design, response = self.data()
    variance, weight = self.scales(step)
    gram = beta * design.T @ design
    pull = beta * design.T @ response
    level = np.empty(len(variance))
    for i, v in enumerate(variance):
      precision = gram + np.eye(self.dim) / v
      _, log_det = np.linalg.slogdet(precision * v)
      level[i] = 0.5 * pull @ np.linalg.solve(precision, pull) - 0.5 * log_det
    constant = beta * (
      -0.5 * response @ response - 0.5 * self.num_data * np.log(2 * np.pi)
    )
    level += np.log(weight) + constant
    share = scipy.special.softmax(level)

    def draw(rng, num_draws):
      chosen = variance[rng.choice(len(variance), num_draws, p=share)]
      value, axes = np.linalg.eigh(gram)
      spread = 1 / (value[None] + 1 / chosen[:, None])
      mean = spread * (pull @ axes)[None]
      noise = rng.standard_normal(mean.shape) * np.sqrt(spread)
      return (mean + noise) @ axes.T

    return float(scipy.special.logsumexp(level)), draw

  def log_likelihood(self, x: np.ndarray) -> np.ndarray:
    design, response = self.data()
    residual = response - x @ design.T
    return -0.5 * (residual**2).sum(-1) - 0.5 * self.num_data * np.log(
      2 * np.pi
    )

  def prior_logpdf(self, x: np.ndarray) -> np.ndarray:
    if self.prior == "student_t":
      return scipy.stats.multivariate_t(
        np.zeros(self.dim), np.eye(self.dim), df=self.dof
      ).logpdf(x)
    return scipy.stats.laplace.logpdf(x).sum(-1)


def make_proposal(problem: Problem, step: float | None) -> Any:
  """A Gaussian of the prior's variance, or its mixture of scales."""
  eye = np.eye(problem.dim)
  if step is None:
    variance, weight = problem.scales()
    return proposals.gaussian(np.zeros(problem.dim), (weight @ variance) * eye)
  variance, weight = problem.scales(step)
  return proposals.gaussian_mixture(
    weight, np.zeros((len(weight), problem.dim)), variance[:, None, None] * eye
  )


def independent_metropolis(
  problem: Problem,
  step: float | None,
  num_evaluations: int,
  num_replicates: int,
  num_chains: int = 100,
) -> dict[str, np.ndarray]:
  """Z / exp(log Z) by every rule; [num_replicates] each.

  Chains start at draws of the prior, which is pi: no burn-in is needed.
  """
  truth, _ = problem.power_posterior(1.0)
  proposal = make_proposal(problem, step)
  design, response = map(jnp.asarray, problem.data())
  functional = expectations.Likelihood(
    design, response, jnp.ones(()), jnp.asarray(truth)
  )
  known = expectations.expectation(functional, proposal)
  total = num_replicates * num_chains
  rng = np.random.default_rng(problem.seed + 1)
  start = jnp.asarray(problem.prior_draws(rng, (total,)))
  state = jax.vmap(
    lambda x: sampler.init(x, problem.prior_logdensity, proposal)
  )(start)
  num_steps = num_evaluations // num_chains
  run = independent_blocks.run_chains(
    jax.random.key(problem.seed), problem.prior_logdensity, proposal, state,
    num_steps, functional=functional, expectation=known,
    block_size=max(1, num_steps // 10),
  )  # fmt: skip
  groups = jax.tree.map(
    lambda x: x.reshape(num_replicates, num_chains, *x.shape[1:]), run.carry
  )
  out: dict[str, Any] = {
    "im_fixed": [],
    "im_two_terms": [],
    "im_five_terms": [],
  }
  for i in range(num_replicates):
    one: accumulators.Accumulator = jax.tree.map(lambda x, i=i: x[i], groups)
    rules = {
      "im_fixed": (sampler.FIXED, sampler.BASIC),
      "im_two_terms": (estimates.LEAST_SQUARES, sampler.BASIC),
      "im_five_terms": (estimates.LEAST_SQUARES, None),
    }
    for name, (coef, numbers) in rules.items():
      out[name].append(estimates.estimate(one, coef, terms=numbers).mean[0])
  rate = float(jnp.mean(run.stats.acceptance_rate))
  return {k: np.array(v) for k, v in out.items()} | {
    "acceptance_rate": np.array(rate),
    "known": np.asarray(known),
  }


def peers(
  problem: Problem, num_evaluations: int, num_replicates: int
) -> dict[str, np.ndarray]:
  """The same by other estimators, each with as many evaluations of p L.

  Draws that the peers need are exact and independent, and cost nothing: more
  than a sampler would give them.
  """
  truth, posterior = problem.power_posterior(1.0)
  rng = np.random.default_rng(problem.seed + 2)
  out: dict[str, list] = {
    name: [] for name in ("crude", "importance", "bridge", "stepping_stone")
  }
  # A Gaussian fitted to the posterior, for importance sampling and bridges.
  pilot = posterior(rng, 20_000)
  fitted = scipy.stats.multivariate_normal(
    pilot.mean(0), np.atleast_2d(np.cov(pilot.T))
  )
  ladder = np.linspace(0, 1, 21) ** 5
  rungs = [problem.power_posterior(beta, step=0.1)[1] for beta in ladder[:-1]]

  def joint(x):
    return problem.log_likelihood(x) + problem.prior_logpdf(x) - truth

  for _ in range(num_replicates):
    x = problem.prior_draws(rng, (num_evaluations,))
    out["crude"].append(np.mean(np.exp(problem.log_likelihood(x) - truth)))
    x = fitted.rvs(num_evaluations, random_state=rng).reshape(-1, problem.dim)
    out["importance"].append(np.mean(np.exp(joint(x) - fitted.logpdf(x))))
    half = num_evaluations // 2
    x = x[:half]
    y = posterior(rng, half)
    out["bridge"].append(
      bridge(joint(y) - fitted.logpdf(y), joint(x) - fitted.logpdf(x))
    )
    each = num_evaluations // len(rungs)
    log_ratio = 0.0
    for low, high, rung in zip(ladder[:-1], ladder[1:], rungs, strict=True):
      level = (high - low) * problem.log_likelihood(rung(rng, each))
      log_ratio += scipy.special.logsumexp(level) - np.log(each)
    out["stepping_stone"].append(np.exp(log_ratio - truth))
  return {name: np.array(values) for name, values in out.items()}


def bridge(at_posterior: np.ndarray, at_proposal: np.ndarray) -> float:
  """Optimal bridge estimate of Z from log (p L / g) at draws of both.

  Source: Meng and Wong (1996), with the iteration of their section 3.
  """
  share = len(at_posterior) / (len(at_posterior) + len(at_proposal))
  z = 1.0
  for _ in range(200):
    top = np.mean(1 / (share + (1 - share) * z * np.exp(-at_proposal)))
    bottom = np.mean(1 / (share * np.exp(at_posterior) + (1 - share) * z))
    new = top / bottom
    if abs(new - z) < 1e-13 * z:
      break
    z = new
  return float(z)


def measure(
  problem: Problem,
  mixture_steps: tuple[float | None, ...],
  num_evaluations: int,
  num_replicates: int,
):
  """Yields (method, label, values) for all estimators."""
  truth, _ = problem.power_posterior(1.0)
  check, _ = problem.power_posterior(1.0, step=0.04)
  for name, values in peers(problem, num_evaluations, num_replicates).items():
    yield name, "none", _judge(values, truth, check)
  for step in mixture_steps:
    found = independent_metropolis(
      problem, step, num_evaluations, num_replicates
    )
    known, rate = found.pop("known"), float(found.pop("acceptance_rate"))
    label = "gaussian" if step is None else f"mixture_step_{step:g}"
    for name, values in found.items():
      yield (
        name,
        label,
        {
          **_judge(values, truth, check),
          "acceptance_rate": rate,
          "relative_error_of_known_mean": float(abs(known[0] - 1)),
        },
      )


def _judge(values: np.ndarray, truth: float, check: float) -> dict[str, float]:
  return {
    "relative_rmse": float(np.sqrt(np.mean((values - 1) ** 2))),
    "relative_bias": float(values.mean() - 1),
    "log_truth": truth,
    "truth_error": abs(truth - check),
  }
