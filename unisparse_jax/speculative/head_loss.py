# SPDX-License-Identifier: Apache-2.0
"""Training-time test: a draft head unrolled on its own output in training.

At step s slot i reads the output of its own step s - 1, the token i + 1 + s,
and has position i + s. It sees the keys of step 0 at slots 0 to i and the keys
of steps 1 to s at slot i alone: what it would see while drafting from slot i.

Source: Li et al., 2025, "EAGLE-3", arXiv 2503.01840, section 3.2.
"""

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
    attention_fn: of step 0, which is plain causal attention.

  Returns:
    The scalar loss, and arrays of sums: METRICS [num_steps] each, and
    "confidence", "accuracy", "accepted" (the target's probability of the head's
    likeliest token) and "count" [num_steps, NUM_BINS] by confidence.
  """
  features = head.fused(taps)
  losses, sums = [], []
  firsts: tuple[Array, ...] = ()  # keys and values of step 0
  later: list[tuple[Array, Array]] = []  # of steps 1, 2, ...
  alive = jnp.ones(tokens.shape, jnp.bool_)
  for step in range(num_steps):
    out, k, v = layer_step(
      head, tokens, features, firsts, later, step, attention_fn
    )
    if step == 0:
      firsts = (k, v)
    else:
      later.append((k, v))
    score = jax.checkpoint(_score, static_argnums=(0, 4, 5))
    loss, values, alive = score(
      target_logits,
      head,
      (out, _shift(target_hidden, step + 1)),
      (_shift(tokens, step + 2), _shift(weights, step + 2), alive),
      top_k,
      step,
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


def layer_step(head, tokens, features, firsts, later, step: int, attention_fn):
  """Output, keys and values of all slots at one step."""
  batch, seq_len = tokens.shape
  positions = jnp.arange(seq_len, dtype=jnp.int32)[None, :] + step
  positions = jnp.broadcast_to(positions, (batch, seq_len))
  inputs = _shift(tokens, step + 1)
  q, k, v = head.project(inputs, features, positions)
  if step == 0:
    attended = attention_fn(
      q, k, v, causal=True, scale=None, q_offset=0, kv_len=None
    )
  else:
    own = ([*(x for x, _ in later), k], [*(x for _, x in later), v])
    attended = attend_unrolled(q, *firsts, *own)
  return head.finish(features, attended), k, v


def attend_unrolled(q, k, v, own_k: Sequence[Array], own_v: Sequence[Array]):
  """Causal attention to k, and to one key of each of own_k: the query's own."""
  seq_len = q.shape[1]
  # [batch, seq_len, num_own, num_kv_heads, head_dim]
  all_k, all_v = jnp.stack(own_k, axis=2), jnp.stack(own_v, axis=2)
  parts = []
  for start in range(0, seq_len, _QUERY_CHUNK):
    stop = min(start + _QUERY_CHUNK, seq_len)
    chunk = jax.checkpoint(_attend_chunk, static_argnums=0)
    parts.append(
      chunk(
        start,
        q[:, start:stop],
        k[:, :stop],
        v[:, :stop],
        all_k[:, start:stop],
        all_v[:, start:stop],
      )
    )
  return jnp.concatenate(parts, axis=1)


def _attend_chunk(start: int, q, k, v, own_k, own_v):
  batch, q_len, num_heads, head_dim = q.shape
  q = q.reshape(batch, q_len, k.shape[2], -1, head_dim)
  wide = dict(preferred_element_type=jnp.float32)
  scale = jnp.float32(head_dim**-0.5)
  # [batch, num_kv_heads, group, q_len, kv_len] and [..., q_len, num_own]
  common = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, **wide) * scale
  own = jnp.einsum("bqhgd,bqshd->bhgqs", q, own_k, **wide) * scale
  row = jax.lax.broadcasted_iota(jnp.int32, (q_len, k.shape[1]), 0) + start
  column = jax.lax.broadcasted_iota(jnp.int32, (q_len, k.shape[1]), 1)
  common = jnp.where(
    (column <= row)[None, None, None], common, jnp.float32(-1e30)
  )
  weights = jax.nn.softmax(jnp.concatenate([common, own], axis=-1), axis=-1)
  weights = weights.astype(q.dtype)
  out = jnp.einsum("bhgqk,bkhd->bqhgd", weights[..., : k.shape[1]], v, **wide)
  out += jnp.einsum(
    "bhgqs,bqshd->bqhgd", weights[..., k.shape[1] :], own_v, **wide
  )
  return out.astype(q.dtype).reshape(batch, q_len, num_heads, head_dim)


def _score(target_logits, head, states, written, top_k: int, step: int):
  """Loss and sums of one step; its logits live only in here."""
  del step
  out, hidden = states
  tokens, weights, alive = written
  logits = head.logits(out)
  wanted = jax.lax.stop_gradient(target_logits(hidden))
  log_q = jax.nn.log_softmax(logits, axis=-1)
  p = jax.nn.softmax(wanted, axis=-1)
  loss = -jnp.sum(p * log_q, axis=-1)
  weight_sum = jnp.sum(weights)
  mean = jnp.sum(weights * loss) / jnp.maximum(weight_sum, jnp.float32(1e-6))

  frozen = jax.lax.stop_gradient(log_q)
  best, target_best = jnp.argmax(frozen, axis=-1), jnp.argmax(wanted, axis=-1)
  _, candidates = jax.lax.top_k(frozen, min(top_k, frozen.shape[-1]))
  is_right = best == target_best
  is_hit = jnp.any(candidates == target_best[..., None], axis=-1)
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
