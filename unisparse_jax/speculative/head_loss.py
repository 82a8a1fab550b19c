# SPDX-License-Identifier: Apache-2.0
"""Training-time test: a draft head unrolled on its own output in training.

At step s slot i reads the output of its own step s - 1, the token i + 1 + s,
and has position i + s. It sees the keys of step 0 at slots 0 to i and the keys
of steps 1 to s at slot i alone: what it would see while drafting from slot i.

Source: Li et al., 2025, "EAGLE-3", arXiv 2503.01840, section 3.2.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisparse_jax import attention
from unisparse_jax.speculative import eagle_head

NUM_BINS = 15  # of confidence, for the calibration error
# Sums over the weighted slots of a batch, per step.
METRICS = (
  "weight",
  "loss",  # nats, cross-entropy to the target's distribution
  "correct",  # head's likeliest token is the target's likeliest
  "hit",  # target's likeliest token is among the head's top_k
  "overlap",  # sum over the vocabulary of min(p, q)
  "chain",  # this token and all drafted before it are what was written
)
_QUERY_CHUNK = 512  # rows of the logit matrix in memory at once


def unrolled_loss(
  head: eagle_head.EagleHead,
  tokens: Int[Array, "batch seq_len"],
  taps: Float[Array, "batch seq_len taps_dim"],
  target_hidden: Float[Array, "batch seq_len embed_dim"],
  target_logits: Callable[[Array], Array],
  weights: Float[Array, "batch seq_len"],
  *,
  num_steps: int,
  decay: float = 0.8,
  top_k: int = 10,
  window: int | None = None,
  metric_rows: int | None = None,
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
) -> tuple[Array, dict[str, Array]]:
  """Loss of a head unrolled for several steps.

  loss = sum_s decay ** s * mean over weighted slots of CE(target, head)

  Args:
    head: the head that is trained.
    tokens: int [batch, seq_len].
    taps: of the target, see `Decoder.hidden_states_and_taps`.
    target_hidden: of the target; no gradient flows into it.
    target_logits: hidden states to float32 logits of the next token.
    weights: float32, >= 0; weights[i] weighs the drafting of tokens[i].
    num_steps: draft steps that are unrolled, at least 1.
    decay: weight of a step over that of the step before.
    top_k: candidates that count as a hit.
    window: slots of a row that are unrolled and scored, from the first on that
      drafts a weighted token. Exact where the weights of every row are one run
      of at most window + 1 - num_steps tokens; None: all slots.
    metric_rows: rows that the sums are of, the first ones; None: all. They read
      the logits several times, so where these are large they take their time.
    attention_fn: of step 0 without a window, which is plain causal attention.

  Returns:
    The scalar loss, and arrays of sums: METRICS [num_steps] each, and
    "confidence", "accuracy", "accepted" (the target's probability of the head's
    likeliest token) and "count" [num_steps, NUM_BINS] by confidence.
  """
  slots = _Slots.of(weights, window, num_steps)
  features = head.fused(taps)
  # Once for all steps: [batch, window + num_steps - 1, vocab_size].
  wanted = slots.take(target_hidden, 1, num_steps - 1)
  wanted = jax.nn.log_softmax(target_logits(wanted), axis=-1)
  wanted = jax.lax.stop_gradient(wanted)
  losses, sums = [], []
  firsts: tuple[Array, ...] = ()  # keys and values of step 0
  later: list[tuple[Array, Array]] = []  # of steps 1, 2, ...
  alive = jnp.ones((tokens.shape[0], slots.count), jnp.bool_)[:metric_rows]
  for step in range(num_steps):
    out, k, v = layer_step(
      head, tokens, features, firsts, later, step, attention_fn, slots
    )
    if step == 0:
      firsts = (k, v)
    else:
      later.append((k, v))
    score = jax.checkpoint(_score, static_argnums=(4, 5, 6))
    written = (slots.take(tokens, step + 2), slots.take(weights, step + 2))
    loss, values, alive = score(
      head, out, wanted, (*written, alive), top_k, step, metric_rows
    )
    losses.append(loss * jnp.float32(decay**step))
    sums.append(values)
    features = head.feedback(out)
  total = sum(losses[1:], start=losses[0])
  return total, {name: jnp.stack([s[name] for s in sums]) for name in sums[0]}


def summarise(sums) -> dict[str, float | list[float]]:
  """Numbers to log from the sums of any number of batches.

  Args:
    sums: what `unrolled_loss` returned, or the sum of several.

  Returns:
    Per step (lists): "loss", nats; "accuracy"; "hit_rate"; "overlap", the
    expected acceptance of a sampled chain; "chain_accept", the chance that a
    drafted token is accepted given that all before it were. Scalars: "tau",
    tokens per target call of a greedy chain of num_steps, bonus included;
    "ece", the expected calibration error of step 0 where acceptance is greedy,
    "ece_all" of all steps, and "ece_sampled" where the target samples.
  """
  weight = [max(float(w), 1e-9) for w in sums["weight"]]

  def per_step(name):
    return [float(x) / w for x, w in zip(sums[name], weight, strict=True)]

  chain = per_step("chain")
  before = [1.0, *chain[:-1]]
  return {
    "loss": per_step("loss"),
    "accuracy": per_step("correct"),
    "hit_rate": per_step("hit"),
    "overlap": per_step("overlap"),
    "chain_accept": [
      c / b if b > 0 else 0.0 for c, b in zip(chain, before, strict=True)
    ],
    "tau": 1.0 + sum(chain),
    "ece": calibration_error(sums, steps=[0]),
    "ece_all": calibration_error(sums, steps=range(len(chain))),
    "ece_sampled": calibration_error(sums, steps=[0], outcome="accepted"),
  }


def calibration_error(
  sums, steps: Sequence[int], outcome: str = "accuracy"
) -> float:
  """Mean over tokens of |confidence - outcome| of their confidence bin."""
  count, gap = 0.0, 0.0
  for index in range(NUM_BINS):
    count += sum(float(sums["count"][s][index]) for s in steps)
    confidence = sum(float(sums["confidence"][s][index]) for s in steps)
    accuracy = sum(float(sums[outcome][s][index]) for s in steps)
    gap += abs(confidence - accuracy)
  return gap / count if count else 0.0


def layer_step(
  head, tokens, features, firsts, later, step: int, attention_fn, slots=None
):
  """Output, keys and values of the slots at one step.

  At step 0 keys and values are of all slots, later of the window alone, as are
  the features then.
  """
  slots = _Slots(None, tokens.shape[1]) if slots is None else slots
  batch, seq_len = tokens.shape
  if step == 0:
    positions = jnp.arange(seq_len, dtype=jnp.int32)[None, :]
    inputs = _shift(tokens, 1)
  else:
    positions = slots.index + step
    inputs = slots.take(tokens, step + 1)
  positions = jnp.broadcast_to(positions, (batch, positions.shape[1]))
  q, k, v = head.project(inputs, features, positions)
  if step > 0:
    own = ([*(x for x, _ in later), k], [*(x for _, x in later), v])
    attended = attend_unrolled(q, *firsts, *own, first=slots.first)
  elif slots.first is None:
    attended = attention_fn(
      q, k, v, causal=True, scale=None, q_offset=0, kv_len=None
    )
  else:
    features = slots.take(features)
    attended = attend_unrolled(slots.take(q), k, v, (), (), first=slots.first)
  return head.finish(features, attended), k, v


@dataclasses.dataclass(frozen=True)
class _Slots:
  """`count` slots of each row from `first` int32 [batch] on; None: from 0."""

  first: Array | None
  count: int

  @classmethod
  def of(cls, weights, window: int | None, num_steps: int) -> "_Slots":
    seq_len = weights.shape[1]
    if window is None or window >= seq_len:
      return cls(None, seq_len)
    # Slot i drafts token i + 2 first, and token i + 1 + num_steps last.
    first = jnp.argmax(weights > 0, axis=1).astype(jnp.int32) - 1 - num_steps
    return cls(jnp.clip(first, 0, seq_len - window), window)

  @property
  def index(self) -> Int[Array, "#batch count"]:
    """Number of each slot."""
    index = jnp.arange(self.count, dtype=jnp.int32)[None, :]
    return index if self.first is None else index + self.first[:, None]

  def take(self, x: Array, offset: int = 0, more: int = 0) -> Array:
    """x[:, slot + offset], and of `more` slots; zeros past the end."""
    if self.first is None:
      x = _shift(x, offset)
      return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, offset + more)
    return jax.vmap(
      lambda row, first: jax.lax.dynamic_slice_in_dim(
        row, first + offset, self.count + more
      )
    )(jnp.pad(x, pad), self.first)


def attend_unrolled(
  q, k, v, own_k: Sequence[Array], own_v: Sequence[Array], first=None
):
  """Causal attention to k, and to one key of each of own_k: the query's own.

  Query i is slot i, or slot first[row] + i.
  """
  count = q.shape[1]
  # [batch, count, num_own, num_kv_heads, head_dim]
  if own_k:
    all_k, all_v = jnp.stack(own_k, axis=2), jnp.stack(own_v, axis=2)
  else:
    shape = (k.shape[0], count, 0, *k.shape[2:])
    all_k, all_v = jnp.zeros(shape, k.dtype), jnp.zeros(shape, v.dtype)
  parts = []
  for start in range(0, count, _QUERY_CHUNK):
    stop = min(start + _QUERY_CHUNK, count)
    seen = stop if first is None else k.shape[1]
    chunk = jax.checkpoint(_attend_chunk)
    parts.append(
      chunk(
        jnp.int32(start) if first is None else (first + start)[:, None, None],
        q[:, start:stop],
        k[:, :seen],
        v[:, :seen],
        all_k[:, start:stop],
        all_v[:, start:stop],
      )
    )
  return jnp.concatenate(parts, axis=1)


def _attend_chunk(start, q, k, v, own_k, own_v):
  batch, q_len, num_heads, head_dim = q.shape
  q = q.reshape(batch, q_len, k.shape[2], -1, head_dim)
  wide = dict(preferred_element_type=jnp.float32)
  scale = jnp.float32(head_dim**-0.5)
  # [batch, num_kv_heads, group, q_len, kv_len] and [..., q_len, num_own]
  common = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, **wide) * scale
  own = jnp.einsum("bqhgd,bqshd->bhgqs", q, own_k, **wide) * scale
  row = jax.lax.broadcasted_iota(jnp.int32, (1, q_len, k.shape[1]), 1) + start
  column = jax.lax.broadcasted_iota(jnp.int32, (1, q_len, k.shape[1]), 2)
  common = jnp.where((column <= row)[:, None, None], common, jnp.float32(-1e30))
  weights = jax.nn.softmax(jnp.concatenate([common, own], axis=-1), axis=-1)
  weights = weights.astype(q.dtype)
  out = jnp.einsum("bhgqk,bkhd->bqhgd", weights[..., : k.shape[1]], v, **wide)
  out += jnp.einsum(
    "bhgqs,bqshd->bqhgd", weights[..., k.shape[1] :], own_v, **wide
  )
  return out.astype(q.dtype).reshape(batch, q_len, num_heads, head_dim)


def _score(head, out, wanted, written, top_k: int, step: int, rows):
  """Loss and sums of one step; the head's logits live only in here."""
  tokens, weights, alive = written
  wanted = wanted[:, step : step + out.shape[1]]
  log_q = jax.nn.log_softmax(head.logits(out), axis=-1)
  loss = -jnp.sum(jnp.exp(wanted) * log_q, axis=-1)
  weight_sum = jnp.sum(weights)
  mean = jnp.sum(weights * loss) / jnp.maximum(weight_sum, jnp.float32(1e-6))

  frozen, wanted, loss, tokens, weights = (
    jax.lax.stop_gradient(x)[:rows]
    for x in (log_q, wanted, loss, tokens, weights)
  )
  p, weight_sum = jnp.exp(wanted), jnp.sum(weights)
  best, target_best = jnp.argmax(frozen, axis=-1), jnp.argmax(wanted, axis=-1)
  is_right = best == target_best
  # Without a sort: at most top_k - 1 tokens are likelier.
  found = jnp.take_along_axis(frozen, target_best[..., None], axis=-1)
  is_hit = jnp.sum(frozen > found, axis=-1) < top_k
  alive = alive & (best == tokens)
  confidence = jnp.exp(jnp.max(frozen, axis=-1))
  index = jnp.minimum((confidence * NUM_BINS).astype(jnp.int32), NUM_BINS - 1)

  def total(x):
    return jnp.sum(weights * x.astype(jnp.float32))

  in_bin = jax.nn.one_hot(index, NUM_BINS, dtype=jnp.float32)
  in_bin *= weights[..., None]

  def binned(x):
    return jnp.sum(in_bin * x.astype(jnp.float32)[..., None], axis=(0, 1))

  sums = {
    "weight": weight_sum,
    "loss": total(loss),
    "correct": total(is_right),
    "hit": total(is_hit),
    "overlap": total(jnp.sum(jnp.minimum(p, jnp.exp(frozen)), axis=-1)),
    "chain": total(alive),
    "confidence": binned(confidence),
    "accuracy": binned(is_right),
    "accepted": binned(
      jnp.take_along_axis(p, best[..., None], axis=-1)[..., 0]
    ),
    "count": binned(jnp.ones_like(confidence)),
  }
  return mean, jax.lax.stop_gradient(sums), alive


def _shift(x: Array, count: int) -> Array:
  """x[:, count:], filled up with zeros at the end."""
  if count >= x.shape[1]:
    return jnp.zeros_like(x)
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, count)
  return jnp.pad(x[:, count:], pad)
