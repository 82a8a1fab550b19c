# SPDX-License-Identifier: Apache-2.0
"""The one protocol of drafters.

A drafter is a pytree (a registered frozen dataclass or an `nnx.Module`). Its
own state, such as a key-value cache, is another pytree that the decoding loop
carries. A step calls

    draft = drafter.draft(target, state, context, ...)   # before verification
    state = drafter.extend(target, state, committed, ...)  # after it

`extend` is also what the prompt goes through, once, before the loop.

Alignment: `committed.tokens[i]` stands at absolute position `start + i`;
`committed.taps[i]` are the target's hidden states at that position; and
`committed.next_tokens[i]` is the token after it. So an EAGLE head reads
(taps[i], embedding of next_tokens[i]) at position start + i. The last valid
next token is the new root, which the target has not seen yet.
"""

import dataclasses
import hashlib
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """What is known when a step begins.

  Attributes:
    tokens: int32 [batch, capacity], prompt and emitted tokens from slot 0 on;
      slots at or past `lengths` are junk.
    lengths: int32 [batch], known tokens. The root is the last of them, at
      position lengths - 1; no cache holds it yet.
    active: bool [batch], rows that still decode.
    step: int32 scalar, steps done.
    keys: typed keys [batch], or None for a sampler without noise.
  """

  tokens: Int[Array, "batch capacity"]
  lengths: Int[Array, " batch"]
  active: Bool[Array, " batch"]
  step: Int[Array, ""]
  keys: Any = None

  @property
  def root_tokens(self) -> Int[Array, " batch"]:
    """int32 [batch], the last known token of each row."""
    index = self.lengths[:, None] - 1
    return jnp.take_along_axis(self.tokens, index, axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Committed:
  """Tokens that the target's cache has just taken; see the file's docstring.

  Attributes:
    tokens: int32 [batch, n].
    next_tokens: int32 [batch, n].
    start: int32 [batch], absolute position of tokens[:, 0].
    counts: int32 [batch], valid entries, from the left; 0 for a finished row.
    taps: [batch, n, 3 * embed_dim], the target's residual stream at its low,
      middle and high tap, side by side; None unless `needs_taps`.
    record: `Draft.record` of the step; None for a prompt and plain steps.
  """

  tokens: Int[Array, "batch n"]
  next_tokens: Int[Array, "batch n"]
  start: Int[Array, " batch"]
  counts: Int[Array, " batch"]
  taps: Float[Array, "batch n taps_dim"] | None = None
  record: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """What a drafter proposes in a step.

  Attributes:
    pool: candidates.
    decision: of the policy.
    entropy: float32 [batch], that of `policy.Evidence`.
    score: float32 [batch], that of `policy.Evidence`.
    levels: int32 scalar, levels drafted.
    probabilities: float32 [batch, max_depth, vocab_size], what the token of
      each level of a chain was drawn from; None for tokens that were chosen.
      A drafter that gives them says so in an attribute `gives_probabilities`,
      and is verified by rejection.
    record: what the drafter's own `extend` is to know of this draft, a pytree.
  """

  pool: tree.Pool
  decision: policy_lib.Decision
  entropy: Float[Array, " batch"]
  score: Float[Array, " batch"]
  levels: Int[Array, ""]
  probabilities: Float[Array, "batch max_depth vocab_size"] | None = None
  record: Any = None


@runtime_checkable
class Drafter(Protocol):
  """What the engine calls; all but `check` inside the compiled loop."""

  @property
  def needs_taps(self) -> bool:
    """Whether `Committed.taps` must be given. Static.

    A drafter may name the layers in an attribute `tap_layers`; default:
    `models.tap_layers`.
    """
    ...

  def check(self, target: Any, shape: tree.TreeShape):
    """Raises ValueError where the drafter does not fit the target or tree."""
    ...

  def init(self, target: Any, *, batch: int, capacity: int) -> Any:
    """An empty state for rows of up to `capacity` tokens."""
    ...

  def extend(
    self,
    target: Any,
    state: Any,
    committed: Committed,
    *,
    is_prefill: bool,
    attention_fn: Any,
  ) -> Any:
    """The state after `committed`.

    Args:
      target: the model that verifies.
      state: earlier tokens; empty in a prefill.
      committed: new tokens; the caches have room for all n from their start.
      is_prefill: static; the state is empty and every start is 0.
      attention_fn: how to attend in a prefill.
    """
    ...

  def draft(
    self,
    target: Any,
    state: Any,
    context: Context,
    *,
    shape: tree.TreeShape,
    policy: policy_lib.Policy,
    policy_state: Any,
  ) -> Draft:
    """Candidates after each row's root. Must not change the state."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoDrafter:
  """Stands for a drafter that is never asked; keeps nothing."""

  needs_taps = False

  def check(self, target, shape):
    del target, shape

  def init(self, target, *, batch, capacity):
    del target, batch, capacity
    return ()

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    del target, committed, is_prefill, attention_fn
    return state

  def draft(self, *args, **kwargs):
    del args, kwargs
    raise NotImplementedError("a policy that declines asks for no draft")


def top_children(
  logits: Float[Array, "... vocab_size"], width: int
) -> tuple[Int[Array, "... width"], Float[Array, "... width"]]:
  """The likeliest tokens and their log-probabilities, at most 0, float32."""
  return pallas_kernels.top_log_probs(logits, width)


def top_entropy(
  log_probs: Float[Array, "... width"],
) -> Float[Array, "..."]:
  """Entropy of renormalised probabilities, natural log; 0 for none at all."""
  log_probs = jnp.maximum(log_probs, tree.EMPTY)
  log_p = log_probs - jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)
  p = jnp.exp(log_p)
  return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def step_keys(keys: Array, lengths: Int[Array, " batch"], use: int) -> Array:
  """Keys [batch] of one step, apart from the noise of plain sampling.

  Args:
    keys: one a request, [batch].
    lengths: int32 [batch], known tokens, which differ between steps.
    use: 0 for drawing drafts, 1 for accepting them.
  """

  def fold(key, length):
    return jax.random.fold_in(jax.random.fold_in(key, length), use)

  return jax.vmap(fold)(keys, lengths)


def fingerprint(drafter: Any) -> str:
  """Hash of a drafter's class, settings and weights; reads every weight.

  A drafter that wraps the one that policies are fitted for names it in an
  attribute `fitted_drafter`, and has its hash.
  """
  drafter = getattr(drafter, "fitted_drafter", drafter)
  leaves = jax.tree.leaves(drafter)
  digest = hashlib.sha256(type(drafter).__name__.encode())
  digest.update(str([jnp.shape(x) for x in leaves]).encode())
  for leaf in jax.device_get(leaves):
    leaf = np.asarray(leaf)
    digest.update(leaf.dtype.name.encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:32]
