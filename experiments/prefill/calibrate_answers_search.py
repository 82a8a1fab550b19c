# SPDX-License-Identifier: Apache-2.0
"""Which masks a calibration by the answers tries, and the cheapest of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.frame import flags_and_configs
from pallas_kernels import checks
from unisparse_jax import attention, models, tasks
from unisparse_jax.attention import budgets

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
    method: the pattern, a name in `attention.PATTERNS`.
    negligible: nats; a head's budgets fuller than one whose growth is no larger
      are not tried.
    settings: of the pattern, the same everywhere.
    scorers: settings that a layer may have beside them: ways to score or, for
      a pattern without budgets, all that is chosen.
    scorer_cost: time of each scorer, in the time of dense attention.
    budgets: values that a head's budget may have (`calibrate_search.BUDGETS`:
      top_p, min_score or density), from full to sparse. Their growth is
      measured against heads that keep everything. None for a pattern that has
      no budget by head (minference, streaming, UniSparse with top_k): its
      layers are calibrated as wholes.
    tolerances: nats that an answer's loss may grow by in the mean, at each of
      the lengths; a calibration is written for each.
    implementation: back end of sparse attention; None: the platform's.
    dtype: of weights and activations.
    seed: of the prompts; not that of `experiments.long_context`.
    compare_single: whether to measure each budget for all heads alike as well,
      and to note in the evidence what it came to.
    max_seconds: after this many, from the first loss on, no further head is
      tried alone; those left keep the fullest budget. None: all are tried.
  """

  model: str
  lengths: tuple[int, ...]
  tasks: tuple[str, ...]
  scorers: tuple
  scorer_cost: tuple[float, ...]
  tolerances: tuple[float, ...]
  budgets: tuple[float, ...] = ()
  method: str = "unisparse_threshold"
  samples: int = 6
  batch_size: int = 1
  negligible: float = 0.002
  settings: dict = dataclasses.field(default_factory=dict)
  implementation: str | None = None
  dtype: str = "float32"
  seed: int = 1
  compare_single: bool = False
  max_seconds: float | None = None

  def __post_init__(self):
    for name in ("samples", "batch_size"):
      checks.check_positive_int(name, getattr(self, name))
    checks.require(
      self.negligible >= 0.0, "negligible", "be 0 or more", self.negligible
    )
    for name in ("lengths", "tasks", "scorers", "tolerances"):
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
      all(t > 0.0 for t in self.tolerances),
      "tolerances",
      "be above 0",
      self.tolerances,
    )
    checks.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
    self._check_budgets()

  def _check_budgets(self):
    names = {budgets.budget_name(p) for p in self.patterns()}
    checks.require(
      len(names) == 1,
      "scorers",
      "all have a budget by head or all have none",
      self.scorers,
    )
    name = self.budget_name
    if name is None:
      checks.require(
        not self.budgets,
        "budgets",
        f"be empty for {self.method}, which has no budget by head",
        self.budgets,
        "() and, in scorers, what a layer may have",
      )
      checks.require(
        self.max_seconds is None,
        "max_seconds",
        f"be None for {self.method}: none of scorers keeps everything",
        self.max_seconds,
      )
      return
    checks.require(len(self.budgets) > 0, "budgets", "not be empty", ())
    sign = -1.0 if self.full > 0.0 else 1.0
    rising = [sign * budget for budget in (self.full, *self.budgets)]
    checks.require(
      rising == sorted(set(rising)),
      "budgets",
      "go from full to sparse",
      self.budgets,
      f"values of {name} that {'fall' if sign < 0.0 else 'rise'} from less "
      f"than everything, {self.full:g}",
    )
    for budget in self.budgets:
      self.patterns(**{name: budget})

  def patterns(self, **own: Any) -> tuple[attention.Pattern, ...]:
    """One for each scorer, with settings of a head or layer."""
    settings = flags_and_configs.to_dict(self.settings)
    return tuple(
      attention.make_pattern(self.method, **{**settings, **scorer, **own})
      for scorer in map(flags_and_configs.to_dict, self.scorers)
    )

  @property
  def budget_name(self) -> str | None:
    """The setting that each head has of its own; None: the method has none."""
    return budgets.budget_name(self.patterns()[0])

  @property
  def full(self) -> float:
    """The budget that keeps everything."""
    return 0.0 if self.budget_name == "min_score" else 1.0

  @property
  def head_budgets(self) -> tuple[float, ...]:
    """`budgets`; of a layer without them, one that stands for its scorer's."""
    return (0.0,) if self.budget_name is None else self.budgets

  def num_mask_heads(self, model_config: models.DecoderConfig) -> int:
    """Budgets of a layer; 1 where it is calibrated as a whole."""
    if self.budget_name is None:
      return 1
    return budgets.num_mask_heads(
      self.patterns()[0], model_config.num_heads, model_config.num_kv_heads
    )

  def layer_settings(self, choice: "Choice") -> tuple[dict[str, Any], ...]:
    """What each layer has of its own, as of `attention.Calibration`."""
    layers = [flags_and_configs.to_dict(self.scorers[i]) for i in choice.scorer]
    if self.budget_name is not None:
      for layer, row in zip(layers, choice.budget, strict=True):
        # float32 has digits that nobody wrote.
        layer[self.budget_name] = tuple(round(float(x), 6) for x in row)
    return tuple(layers)


def parse(config: Any) -> CalibrateAnswersConfig:
  """Builds the settings; ValueError for an unknown key or a bad value."""
  return flags_and_configs.to_dataclass(
    CalibrateAnswersConfig, config, name="config"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """Which scorer every layer, and which budget every mask head has.

  Attributes:
    scorer: int [num_layers], index of a scorer.
    budget: float [num_layers, num_mask_heads]; of a pattern without budgets
      [num_layers, 1], `full` or 0: as the scorer says.
    full: the budget that keeps everything.
  """

  scorer: Int[np.ndarray, " num_layers"]
  budget: Float[np.ndarray, "num_layers num_mask_heads"]
  full: float = 0.0

  @classmethod
  def keep_all(
    cls, num_layers: int, num_mask_heads: int, full: float = 0.0
  ) -> "Choice":
    return cls(
      scorer=np.zeros(num_layers, np.int32),
      budget=np.full((num_layers, num_mask_heads), full, np.float32),
      full=full,
    )

  def but(self, layer: int, head: int, scorer: int, budget: float) -> "Choice":
    """The same with one layer's scorer and the budget of one head changed."""
    scorers, budgets_ = self.scorer.copy(), self.budget.copy()
    scorers[layer], budgets_[layer, head] = scorer, budget
    return Choice(scorer=scorers, budget=budgets_, full=self.full)

  @property
  def key(self) -> str:
    """Names it in a record; a head that keeps everything needs no scorer."""
    return " ".join(
      f"{0 if budget == self.full else scorer}:{budget:g}"
      for scorer, row in zip(self.scorer, self.budget, strict=True)
      for budget in row
    )


def choose(
  config: CalibrateAnswersConfig,
  density: Float[np.ndarray, "layers heads scorers budgets"],
  growth: Float[np.ndarray, "layers heads scorers budgets"],
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
  assert num_scorers == len(config.scorers), "one column for each scorer"
  # What a layer's time and loss come to, by head.
  cost = density / (num_layers * num_heads)
  cost = cost + price * np.maximum(growth, 0.0)
  best = cost.argmin(-1)
  by_scorer = cost.min(-1).sum(1) + np.asarray(config.scorer_cost) / num_layers
  scorer = by_scorer.argmin(-1)  # [layers]
  best = np.take_along_axis(best, scorer[:, None, None], axis=2)[..., 0]
  return Choice(
    scorer=scorer.astype(np.int32),
    budget=np.asarray(config.head_budgets, np.float32)[best],
    full=config.full,
  )


def frontier(
  config: CalibrateAnswersConfig,
  density: Float[np.ndarray, "layers heads scorers budgets"],
  growth: Float[np.ndarray, "layers heads scorers budgets"],
) -> list[tuple[float, Choice]]:
  """Different choices from sparse to full, each with its first price."""
  found: dict[str, tuple[float, Choice]] = {}
  for price in _PRICES:
    choice = choose(config, density, growth, float(price))
    found.setdefault(choice.key, (float(price), choice))
  return list(found.values())


def alike(
  config: CalibrateAnswersConfig, everything: Choice
) -> list[tuple[int, float, Choice]]:
  """(scorer, budget, choice) of each setting that all heads may have alike."""
  return [
    (
      scorer,
      budget,
      Choice(
        scorer=np.full_like(everything.scorer, scorer),
        budget=np.full_like(everything.budget, budget),
        full=everything.full,
      ),
    )
    for scorer in range(len(config.scorers))
    for budget in config.head_budgets
  ]


def cost(
  config: CalibrateAnswersConfig, choice: Choice, density: Sequence
) -> float:
  """Time of all layers' attention, in that of dense attention."""
  scoring = np.asarray(config.scorer_cost)[choice.scorer].mean()
  return float(np.mean(density) + scoring)
