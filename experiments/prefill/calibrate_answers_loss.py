# SPDX-License-Identifier: Apache-2.0
"""What masks cost the answers: one program for all that are tried."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from experiments.prefill import calibrate_answers_search
from unisparse_jax import attention, models
from unisparse_jax.attention import budgets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Prompts of one length, and what dense attention answers.

  Attributes:
    tokens: int32 [num_prompts, prompt_len], right-padded.
    lengths: int32 [num_prompts].
    answers: int32 [num_prompts, answer_len].
    is_answer: bool [num_prompts, answer_len], up to the first newline.
  """

  tokens: Int[Array, "num_prompts prompt_len"]
  lengths: Int[Array, " num_prompts"]
  answers: Int[Array, "num_prompts answer_len"]
  is_answer: Bool[Array, "num_prompts answer_len"]


def make_loss(
  model: models.Decoder, config: calibrate_answers_search.CalibrateAnswersConfig
) -> Callable[[Prompts, calibrate_answers_search.Choice], dict[str, Any]]:
  """A function of prompts and a choice; compiled once for each shape.

  It returns "loss", nats of the whole dense answer after a prefill with these
  masks, mean over the prompts; "exact", the share of prompts whose answer stays
  the most likely; "density", float [num_layers, num_mask_heads].
  """
  patterns = config.patterns()
  templates = [budgets.split_budget(pattern)[0] for pattern in patterns]
  has_budgets = config.budget_name is not None
  if not has_budgets:  # what keeps everything is one more
    templates.append(
      attention.Dense(
        block_q=patterns[0].block_q, block_kv=patterns[0].block_kv
      )
    )
  graphdef, state = nnx.split(model)

  def attend_by(template, q, k, v, budget, *, scale, **where):
    """Output and density by mask head."""
    if has_budgets:
      template = budgets.with_budget(template, budget)
    mask = template.select(q, k, scale=scale, **where)
    density = attention.metrics.density(mask)
    if mask.columns is not None:
      density = attention.metrics.nominal_density(mask)
    if not has_budgets:
      density = density.mean(1, keepdims=True)
    out = attention.sparse_attention(
      q, k, v, mask, scale=scale, implementation=config.implementation
    )
    return out, density.mean(0)

  @jax.jit
  def run(state, tokens, lengths, answers, is_answer, scorers, head_budgets):
    model = nnx.merge(graphdef, state)
    densities = []

    def attend(q, k, v, **where):
      layer = len(densities)
      scorer, budget = scorers[layer], head_budgets[layer]
      if not has_budgets:
        is_full = budget[0] == config.full
        scorer = jnp.where(is_full, len(patterns), scorer)
      branches = [
        functools.partial(attend_by, template, **where)
        for template in templates
      ]
      if len(branches) == 1:
        out, density = branches[0](q, k, v, budget)
      else:
        out, density = jax.lax.switch(scorer, branches, q, k, v, budget)
      densities.append(density)
      return out

    batch, prompt_len = tokens.shape
    cache = models.KVCache.init(
      model.config,
      batch=batch,
      capacity=prompt_len + answers.shape[1],
      dtype=model.dtype,
    )
    first, cache = model(
      tokens,
      cache=cache,
      attention_fn=attend,
      lengths=lengths,
      logits_for="last",
      cache_is_empty=True,
    )
    rest, _ = model(
      answers[:, :-1],
      cache=cache,
      attention_fn=attention.DenseAttention(implementation="xla"),
    )
    logits = jnp.concatenate([first[:, None], rest], axis=1)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = jnp.take_along_axis(log_p, answers[..., None], axis=-1)[..., 0]
    agrees = (logits.argmax(-1) == answers) | ~is_answer
    loss = -jnp.where(is_answer, log_p, 0.0).sum(1)
    return loss, agrees.all(1), jnp.stack(densities)

  def measure(
    prompts: Prompts, choice: calibrate_answers_search.Choice
  ) -> dict[str, Any]:
    losses, exact, densities = [], [], []
    num_prompts = prompts.tokens.shape[0]
    for start in range(0, num_prompts, config.batch_size):
      # The last batch is filled up: a new shape would compile again.
      rows = np.arange(start, start + config.batch_size) % num_prompts
      num_new = min(config.batch_size, num_prompts - start)
      loss, is_exact, density = run(
        state,
        prompts.tokens[rows],
        prompts.lengths[rows],
        prompts.answers[rows],
        prompts.is_answer[rows],
        jnp.asarray(choice.scorer, jnp.int32),
        jnp.asarray(choice.budget, jnp.float32),
      )
      losses.append(np.asarray(loss, np.float64)[:num_new])
      exact.append(np.asarray(is_exact)[:num_new])
      densities.append(np.asarray(density, np.float64))
    return {
      "loss": float(np.concatenate(losses).mean()),
      "exact": float(np.concatenate(exact).mean()),
      "density": np.mean(densities, axis=0).tolist(),
    }

  return measure
