# SPDX-License-Identifier: Apache-2.0
"""Held-out loss by position, and the entropy it is compared with."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def loss_by_position(
  model: nnx.Module,
  tokens: np.ndarray,
  loss_weights: np.ndarray | None = None,
  *,
  edges: Sequence[int],
  batch_size: int,
  attention_fn: Any,
) -> dict[str, float]:
  """Mean next-token loss per bucket of positions, nats per token.

  Args:
    model: a decoder.
    tokens: [rows, seq_len + 1] int32, held-out text.
    loss_weights: same shape; how much the prediction of each token counts.
      Default 1.
    edges: bucket limits, rising, within 0 and seq_len; bucket i holds the
      predictions made at positions edges[i] to edges[i + 1] - 1.
    batch_size: rows per call of the model; must divide the number of rows.
    attention_fn: passed to the model.

  Returns:
    {"loss_0_1024": nats, ..., "loss": nats over all buckets}.

  Raises:
    ValueError: edges do not rise or leave the row; batch_size does not fit.
  """
  seq_len = tokens.shape[1] - 1
  edges = tuple(int(edge) for edge in edges)
  if len(edges) < 2 or sorted(set(edges)) != list(edges):
    raise ValueError(f"edges must rise; got edges={edges}.")
  if edges[0] < 0 or edges[-1] > seq_len:
    raise ValueError(
      f"edges must lie in [0, seq_len]; got edges={edges}, seq_len={seq_len}."
    )
  if loss_weights is None:
    loss_weights = np.ones(tokens.shape, np.float32)
  nll, _ = _predict(model, tokens, batch_size, attention_fn)
  weights = loss_weights[:, 1:].astype(np.float64)
  total = np.sum(weights * nll, axis=0)
  count = np.sum(weights, axis=0)

  def mean(low, high):
    return float(total[low:high].sum() / count[low:high].sum())

  losses = {
    f"loss_{low}_{high}": mean(low, high)
    for low, high in itertools.pairwise(edges)
  }
  return losses | {"loss": mean(edges[0], edges[-1])}


def answer_accuracy(
  model: nnx.Module,
  tokens: np.ndarray,
  loss_weights: np.ndarray,
  *,
  batch_size: int,
  attention_fn: Any,
) -> dict[str, float]:
  """How often the most likely token is the right one inside answers.

  An answer is a run of tokens of weight above 1. All of its tokens are right
  just if greedy decoding from its start would write it.

  Args:
    model: a decoder.
    tokens: [rows, seq_len + 1] int32.
    loss_weights: [rows, seq_len + 1]; loss_weights[i] belongs to tokens[i].
    batch_size: rows per call of the model; must divide the number of rows.
    attention_fn: passed to the model.

  Returns:
    {"token_accuracy": in [0, 1], "exact_match": in [0, 1], "answers": count}.

  Raises:
    ValueError: no token has a weight above 1; batch_size does not fit.
  """
  _, right = _predict(model, tokens, batch_size, attention_fn)
  is_answer = loss_weights[:, 1:] > 1.0
  if not is_answer.any():
    raise ValueError("loss_weights must mark an answer; got none above 1.")
  before = np.zeros_like(is_answer)
  before[:, 1:] = is_answer[:, :-1]
  # Answers are counted from 0 along the flattened rows.
  answer = np.cumsum((is_answer & ~before).ravel()).reshape(is_answer.shape) - 1
  num_answers = int(answer.max()) + 1
  wrong = np.bincount(answer[is_answer & ~right], minlength=num_answers)
  return {
    "token_accuracy": float(right[is_answer].mean()),
    "exact_match": float(np.mean(wrong == 0)),
    "answers": num_answers,
  }


def position_edges(seq_len: int, *, first: int = 1024) -> tuple[int, ...]:
  """0, first, 2 * first, 4 * first, ... up to seq_len."""
  edges = [0]
  edge = first
  while edge < seq_len:
    edges.append(edge)
    edge *= 2
  return (*edges, seq_len)


def unigram_entropy(tokens: np.ndarray) -> float:
  """Entropy of the tokens' own frequencies, nats per token.

  A predictor that knows these frequencies and no context cannot lose less.
  """
  counts = np.bincount(np.asarray(tokens).ravel())
  p = counts[counts > 0] / counts.sum()
  return float(-np.sum(p * np.log(p)))


def _predict(model, tokens, batch_size, attention_fn):
  """Loss and hits of every prediction, numpy [rows, seq_len]."""
  if batch_size < 1 or len(tokens) % batch_size:
    raise ValueError(
      "batch_size must divide the number of rows; got "
      f"batch_size={batch_size}, rows={len(tokens)}."
    )
  graphdef, state = nnx.split(model)
  parts = []
  for start in range(0, len(tokens), batch_size):
    batch = jnp.asarray(tokens[start : start + batch_size], jnp.int32)
    parts.append(
      jax.device_get(
        _predict_batch(graphdef, state, batch, attention_fn=attention_fn)
      )
    )
  nll, right = zip(*parts, strict=True)
  return np.concatenate(nll), np.concatenate(right)


@jax.jit(static_argnames=("graphdef", "attention_fn"))
def _predict_batch(graphdef, state, tokens, *, attention_fn):
  model = nnx.merge(graphdef, state)
  logits, _ = model(tokens[:, :-1], attention_fn=attention_fn)
  logits = logits.astype(jnp.float32)
  targets = tokens[:, 1:]
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll = jax.nn.logsumexp(logits, axis=-1) - picked
  return nll, jnp.argmax(logits, axis=-1) == targets
