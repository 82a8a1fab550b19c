# SPDX-License-Identifier: Apache-2.0
"""Markov chain Monte Carlo with control variates, on thousands of chains.

    sampler = mcmc.gi_mala.as_top_level_api(logdensity_fn, 0.5, preconditioner)

is a sampler in the BlackJAX convention. For controlled means, `run_chains`
feeds the terms of `control_variates` to streaming accumulators, and `choose`
turns them into means with errors; nothing is stored but moments.

    fit = mcmc.adaptive_independent_metropolis.adapt(key, logdensity_fn, start)

fits a proposal, and `independent_blocks.run_chains` runs independent Metropolis
with it, whose controlled means can beat those of independent draws.
"""

from unisparse_jax.mcmc import accumulators as accumulators
from unisparse_jax.mcmc import adaptation as adaptation
from unisparse_jax.mcmc import (
  adaptive_independent_metropolis as adaptive_independent_metropolis,
)
from unisparse_jax.mcmc import base as base
from unisparse_jax.mcmc import batch_sums as batch_sums
from unisparse_jax.mcmc import blackjax_warm_up as blackjax_warm_up
from unisparse_jax.mcmc import chain_data as chain_data
from unisparse_jax.mcmc import control_variates as control_variates
from unisparse_jax.mcmc import covariances as covariances
from unisparse_jax.mcmc import estimates as estimates
from unisparse_jax.mcmc import expectations as expectations
from unisparse_jax.mcmc import flow_fits as flow_fits
from unisparse_jax.mcmc import flows as flows
from unisparse_jax.mcmc import gi_hessian_mala as gi_hessian_mala
from unisparse_jax.mcmc import gi_latent_gaussian as gi_latent_gaussian
from unisparse_jax.mcmc import gi_mala as gi_mala
from unisparse_jax.mcmc import gi_rwm as gi_rwm
from unisparse_jax.mcmc import independent_blocks as independent_blocks
from unisparse_jax.mcmc import independent_metropolis as independent_metropolis
from unisparse_jax.mcmc import laplace as laplace
from unisparse_jax.mcmc import latent_targets as latent_targets
from unisparse_jax.mcmc import poisson as poisson
from unisparse_jax.mcmc import preconditioner as preconditioner
from unisparse_jax.mcmc import proposal_fits as proposal_fits
from unisparse_jax.mcmc import proposals as proposals
from unisparse_jax.mcmc import smooth_functions as smooth_functions
from unisparse_jax.mcmc import summary as summary
from unisparse_jax.mcmc import targets as targets
from unisparse_jax.mcmc import white_coordinates as white_coordinates
from unisparse_jax.mcmc.base import SamplingAlgorithm as SamplingAlgorithm
from unisparse_jax.mcmc.base import bind as bind
from unisparse_jax.mcmc.base import run_chains as run_chains
from unisparse_jax.mcmc.estimates import Candidate as Candidate
from unisparse_jax.mcmc.estimates import choose as choose
from unisparse_jax.mcmc.estimates import estimate as estimate
from unisparse_jax.mcmc.sampling import sample as sample
