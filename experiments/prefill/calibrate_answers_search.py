# SPDX-License-Identifier: Apache-2.0
"""What a layer's mask costs the answers, and the cheapest masks they bear."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiments.frame import flags_and_configs
from pallas_kernels import checks
from unisparse_jax import attention, models, tasks

_PRICES = np.geomspace(1e-3, 1e3, 400)  # nats a density, of the search


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateAnswersConfig:
  """What is calibrated.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    lengths: tokens of a prompt and its answer.
    tasks: names in `tasks.TASKS`.
    samples: prompts of each task and length.
    batch_size: prompts run together.
    negligible: nats; a head's limits below one whose growth is no larger are
      not tried.
    settings: of `UniSparseThreshold`, the same everywhere.
    scorers: settings that a layer may have beside them.
    scorer_cost: time of each scorer, in the time of dense attention.
    min_scores: limits that a head may have, rising; 0 keeps everything and is
      always among them.
    tolerances: nats that an answer's loss may grow by in the mean, at each of
      the lengths; a calibration is written for each.
    implementation: back end of sparse attention; None: the platform's.
    dtype: of weights and activations.
    seed: of the prompts; not that of `experiments.long_context`.
    max_seconds: after this many, from the first loss on, no further head is
      tried alone; those left keep the fullest limit. None: all are tried.
  """

  model: str
  lengths: tuple[int, ...]
  tasks: tuple[str, ...]
  scorers: tuple
  scorer_cost: tuple[float, ...]
  min_scores: tuple[float, ...]
  tolerances: tuple[float, ...]
  samples: int = 6
  batch_size: int = 1
  negligible: float = 0.002
  settings: dict = dataclasses.field(default_factory=dict)
  implementation: str | None = None
  dtype: str = "float32"
  seed: int = 1
  max_seconds: float | None = None

  def __post_init__(self):
    for name in ("samples", "batch_size"):
      checks.check_positive_int(name, getattr(self, name))
    checks.require(
      self.negligible >= 0.0, "negligible", "be 0 or more", self.negligible
    )
    for name in ("lengths", "tasks", "scorers", "min_scores", "tolerances"):
      value = getattr(self, name)
      checks.require(len(value) > 0, name, "not be empty", value)
    for task in self.tasks:
      checks.check_choice("tasks", task, tasks.TASKS)
    checks.require(
      len(self.scorer_cost) == len(self.scorers),
      "scorer_cost",
      "have one value for each scorer",
      self.scorer_cost,
      f"{len(self.scorers)} values",
    )
    checks.require(
      list(self.min_scores) == sorted(set(self.min_scores))
      and self.min_scores[0] > 0.0,
      "min_scores",
      "rise and be above 0",
      self.min_scores,
    )
    checks.require(
      all(t > 0.0 for t in self.tolerances),
      "tolerances",
      "be above 0",
      self.tolerances,
    )
    checks.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
    self.patterns()

  def patterns(self) -> tuple[attention.UniSparseThreshold, ...]:
    """One for each scorer."""
    return tuple(
      attention.UniSparseThreshold(**{**self.settings, **scorer})
      for scorer in map(flags_and_configs.to_dict, self.scorers)
    )


def parse(config: Any) -> CalibrateAnswersConfig:
  """Builds the settings; ValueError for an unknown key or a bad value."""
  return flags_and_configs.to_dataclass(
    CalibrateAnswersConfig, config, name="config"
  )


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """Which scorer and limit every mask head of every layer has.

  Attributes:
    scorer: int [num_layers, num_mask_heads], index of a scorer.
    min_score: float [num_layers, num_mask_heads].
  """

  scorer: Int[np.ndarray, "num_layers num_mask_heads"]
  min_score: Float[np.ndarray, "num_layers num_mask_heads"]

  @classmethod
  def keep_all(cls, num_layers: int, num_mask_heads: int) -> "Choice":
    shape = (num_layers, num_mask_heads)
    return cls(
      scorer=np.zeros(shape, np.int32), min_score=np.zeros(shape, np.float32)
    )

  def but(self, layer: int, head: int, scorer: int, min_score: float):
    """The same with another setting of one head."""
    scorers, limits = self.scorer.copy(), self.min_score.copy()
    scorers[layer, head], limits[layer, head] = scorer, min_score
    return Choice(scorer=scorers, min_score=limits)

  @property
  def key(self) -> str:
    """Names it in a record."""
    return " ".join(
      f"{s}:{m:g}"
      for s, m in zip(self.scorer.flat, self.min_score.flat, strict=True)
    )


def make_loss(
  model: models.Decoder, config: CalibrateAnswersConfig
) -> Callable[[Prompts, Choice], dict[str, Any]]:
  """A function of prompts and a choice; compiled once for each shape.

  It returns "loss", nats of the whole dense answer after a prefill with these
  masks, mean over the prompts; "exact", the share of prompts whose answer stays
  the most likely; "density", float [num_layers, num_mask_heads].
  """
  patterns = config.patterns()
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, tokens, lengths, answers, is_answer, scorers, limits):
    model = nnx.merge(graphdef, state)
    densities = []

    def attend(q, k, v, *, causal, scale, q_offset, kv_len):
      layer = len(densities)
      grid = attention.BlockGrid.create(
        q,
        k,
        block_q=patterns[0].block_q,
        block_kv=patterns[0].block_kv,
        causal=causal,
        q_offset=q_offset,
        kv_len=kv_len,
      )
      scores = jnp.stack([p.block_scores(q, k, grid) for p in patterns])
      index = scorers[layer][None, None, :, None, None]
      scores = jnp.take_along_axis(scores, index, axis=0)[0]
      mask = patterns[0].cut(grid, scores, limits[layer])
      densities.append(attention.metrics.density(mask).mean(0))
      return attention.sparse_attention(
        q, k, v, mask, scale=scale, implementation=config.implementation
      )

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

  def measure(prompts: Prompts, choice: Choice) -> dict[str, Any]:
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
        jnp.asarray(choice.min_score, jnp.float32),
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


def choose(
  config: CalibrateAnswersConfig,
  density: Float[np.ndarray, "layers heads scorers limits"],
  growth: Float[np.ndarray, "layers heads scorers limits"],
  price: float,
) -> Choice:
  """The choice of least cost when a nat of loss is worth `price` of density.

  Args:
    config: the settings.
    density: kept share of a head's blocks with each setting; inf: not tried.
    growth: of the loss, in nats, when this head alone has it.
    price: mean density that one nat is worth.
  """
  num_layers, num_heads, num_scorers, _ = density.shape
  # What a layer's time and loss come to, by head.
  cost = density / (num_layers * num_heads)
  cost = cost + price * np.maximum(growth, 0.0)
  best_limit = cost.argmin(-1)
  by_scorer = cost.min(-1).sum(1) + np.asarray(config.scorer_cost) / num_layers
  scorer = by_scorer.argmin(-1)  # [layers]
  limit = np.take_along_axis(
    best_limit, scorer[:, None, None].repeat(num_heads, 1), axis=2
  )[..., 0]
  assert num_scorers == len(config.scorers), "one column for each scorer"
  return Choice(
    scorer=np.repeat(scorer[:, None], num_heads, 1).astype(np.int32),
    min_score=np.asarray(config.min_scores, np.float32)[limit],
  )


def frontier(
  config: CalibrateAnswersConfig,
  density: Float[np.ndarray, "layers heads scorers limits"],
  growth: Float[np.ndarray, "layers heads scorers limits"],
) -> list[tuple[float, Choice]]:
  """Different choices from sparse to full, each with its first price."""
  found: dict[str, tuple[float, Choice]] = {}
  for price in _PRICES:
    choice = choose(config, density, growth, float(price))
    found.setdefault(choice.key, (float(price), choice))
  return list(found.values())


def cost(
  config: CalibrateAnswersConfig, choice: Choice, density: Sequence
) -> float:
  """Time of all layers' attention, in that of dense attention."""
  scoring = np.asarray(config.scorer_cost)[choice.scorer[:, 0]].mean()
  return float(np.mean(density) + scoring)
