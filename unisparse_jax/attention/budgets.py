# SPDX-License-Identifier: Apache-2.0
"""Budgets of patterns as arrays, so that one program serves them all.

A pattern is static under `jit`: each of its budgets is compiled apart, and so
is each layer of a model in which layers have budgets of their own. Here the
budget leaves the pattern. What stays, the template, is static; the budgets of
all layers are one array.
"""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax.attention import attention_fn, layered, selector
from unisparse_jax.attention.patterns import (
  flexprefill,
  oracle,
  random_blocks,
  sample_attention,
  unisparse,
  unisparse_threshold,
  xattention,
)

# The setting of a pattern that may be an array.
BUDGETS = {
  flexprefill.FlexPrefill: "top_p",
  oracle.Oracle: "top_p",
  random_blocks.RandomBlocks: "density",
  sample_attention.SampleAttention: "top_p",
  sample_attention.SampleAttentionV1: "top_p",
  unisparse.UniSparse: "top_p",
  unisparse_threshold.UniSparseThreshold: "min_score",
  xattention.XAttention: "top_p",
}
_PLACEHOLDER = 0.5  # what a template has in place of its budget


def budget_name(pattern: selector.Pattern) -> str | None:
  """The setting in `BUDGETS`; None where no array may take its place."""
  if getattr(pattern, "top_k", None) is not None:
    return None
  return BUDGETS.get(type(pattern))


def split_budget(
  pattern: selector.Pattern,
) -> tuple[selector.Pattern, Float[np.ndarray, "..."] | None]:
  """A pattern without its budget, and the budget.

  Args:
    pattern: the method with its settings.

  Returns:
    The template, equal for patterns that differ in their budget alone, and
    float32 [] or [num_mask_heads]; None where the budget must stay static.
  """
  name = budget_name(pattern)
  if name is None:
    return pattern, None
  budget = np.asarray(getattr(pattern, name), np.float32)
  return dataclasses.replace(pattern, **{name: _PLACEHOLDER}), budget  # type: ignore


def with_budget(
  template: selector.Pattern, budget: Float[Array, "..."]
) -> selector.Pattern:
  """The pattern again, its budget an array that may be traced.

  It must not leave the trace: an array has no hash.

  Args:
    template: from `split_budget`, of a type in `BUDGETS`.
    budget: float32 [] or [num_mask_heads]; its values are not checked.
  """
  pattern = copy.copy(template)
  # The checks of its class ask for the value.
  object.__setattr__(pattern, BUDGETS[type(template)], budget)
  return pattern


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerBudgets:
  """What tells the layers of a `BudgetedAttention` apart.

  Attributes:
    template: int32 [num_layers], index of each layer's template; [] of one
      layer.
    budget: float32 [num_layers, num_mask_heads] or, where a template takes
      none, zeros; [num_mask_heads] of one layer.
  """

  template: Int[Array, "..."]
  budget: Float[Array, "..."]

  def layer(self, index: int) -> "LayerBudgets":
    """That of one layer."""
    return jax.tree.map(lambda x: x[index], self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetedAttention:
  """An attention for all layers of a model; hashable, static under jit.

  Attributes:
    templates: attentions without their budgets, each once.
  """

  templates: tuple[attention_fn.AttentionFn, ...]

  def attention(
    self, index: int, budget: Float[Array, "..."]
  ) -> attention_fn.AttentionFn:
    """A template with its budget, inside a trace."""
    template = self.templates[index]
    if not isinstance(template, attention_fn.SparseAttention):
      return template
    if type(template.pattern) not in BUDGETS:
      return template
    sparse = copy.copy(template)
    pattern = template.pattern
    if split_budget(pattern)[1] is not None:
      pattern = with_budget(pattern, budget)
    object.__setattr__(sparse, "pattern", pattern)
    return sparse

  def __call__(self, layer: LayerBudgets, q, k, v, **where: Any) -> Array:
    """Attends as the layer does; other arguments as of an `AttentionFn`."""
    branches = [
      lambda q, k, v, index=index: self.attention(index, layer.budget)(
        q, k, v, **where
      )
      for index in range(len(self.templates))
    ]
    if len(branches) == 1:
      return branches[0](q, k, v)
    return lax.switch(layer.template, branches, q, k, v)


def budgeted(
  attention: attention_fn.AttentionFn,
  *,
  num_layers: int,
  num_heads: int,
  num_kv_heads: int,
) -> tuple[BudgetedAttention, LayerBudgets]:
  """Takes the budgets out of an attention.

  Args:
    attention: any attention of a model, layered or not.
    num_layers: of the model.
    num_heads: query heads of a layer.
    num_kv_heads: key heads of a layer.

  Returns:
    What is static, equal for attentions that differ in budgets alone, and the
    budgets.

  Raises:
    ValueError: the attention is for another number of layers; layers differ in
      their number of masks.
  """
  templates: dict[attention_fn.AttentionFn, int] = {}
  index, budgets = [], []
  for layer in range(num_layers):
    template = layered.for_layer(attention, layer, num_layers)
    budget = None
    if isinstance(template, attention_fn.SparseAttention):
      pattern, budget = split_budget(template.pattern)
      template = dataclasses.replace(template, pattern=pattern)
      if budget is not None:
        count = num_mask_heads(pattern, num_heads, num_kv_heads)
        checks.require(
          budget.shape in ((), (count,)),
          "budget",
          "have one value, or one for each mask head",
          budget.shape,
          f"[] or [{count}]",
        )
        budget = np.broadcast_to(budget, (count,))
    index.append(templates.setdefault(template, len(templates)))
    budgets.append(budget)
  counts = {b.shape[0] for b in budgets if b is not None} or {1}
  checks.require(
    len(counts) == 1,
    "attention",
    "have as many masks in every layer with a budget",
    sorted(counts),
  )
  (count,) = counts
  rows = [np.zeros(count) if b is None else b for b in budgets]
  return BudgetedAttention(templates=tuple(templates)), LayerBudgets(
    template=jnp.asarray(index, jnp.int32),
    budget=jnp.asarray(np.stack(rows), jnp.float32),
  )


@functools.lru_cache(maxsize=1024)
def num_mask_heads(
  pattern: selector.Pattern, num_heads: int, num_kv_heads: int
) -> int:
  """Masks that a pattern makes for so many heads; nothing is computed."""
  length = 2 * max(pattern.block_q, pattern.block_kv)
  q, k = (
    jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
    for heads in (num_heads, num_kv_heads)
  )
  return jax.eval_shape(pattern.select, q, k).num_mask_heads
