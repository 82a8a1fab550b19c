# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import training


class Successor(nnx.Module):
  """Predicts token + 1 with log-odds that grow with the position."""

  def __init__(self, vocab_size: int = 8):
    self.table = nnx.Param(jnp.eye(vocab_size, k=1) + jnp.eye(vocab_size, k=-7))

  def __call__(self, tokens, *, attention_fn):
    del attention_fn
    position = jnp.arange(tokens.shape[1], dtype=jnp.float32)
    rows = jnp.take(self.table[...], tokens, axis=0)
    return rows * position[None, :, None], None


def nll(position):
  return -np.log(np.exp(position) / (np.exp(position) + 7))


TOKENS = (np.arange(13)[None] + np.arange(4)[:, None]).astype(np.int32) % 8


def test_loss_by_position_against_the_closed_form():
  losses = training.loss_by_position(
    Successor(), TOKENS, edges=(0, 4, 12), batch_size=2, attention_fn=None
  )
  expected = nll(np.arange(12.0))
  np.testing.assert_allclose(losses["loss_0_4"], expected[:4].mean(), rtol=1e-5)
  np.testing.assert_allclose(
    losses["loss_4_12"], expected[4:].mean(), rtol=1e-4
  )
  np.testing.assert_allclose(losses["loss"], expected.mean(), rtol=1e-5)


def test_weights_leave_predictions_out():
  tokens = TOKENS.copy()
  tokens[1, 3] = 0  # a surprise, and what follows it
  weights = np.ones(tokens.shape, np.float32)
  weights[1, 3:5] = 0
  weights[:, 0] = np.nan  # nobody predicts the first token
  losses = training.loss_by_position(
    Successor(),
    tokens,
    weights,
    edges=(0, 12),
    batch_size=4,
    attention_fn=None,
  )
  mean = (4 * nll(np.arange(12.0)).sum() - nll(2) - nll(3)) / 46
  np.testing.assert_allclose(losses["loss"], mean, rtol=1e-5)


def test_answers_count_as_a_whole():
  tokens = TOKENS.copy()
  weights = np.ones(tokens.shape, np.float32)
  weights[0, 2:5] = 10  # right
  weights[0, 6:8] = 10  # right
  weights[1, 11:] = 10  # wrong at its end, the row's end
  tokens[1, 12] = 7 if tokens[1, 12] != 7 else 6
  weights[2, 1] = 10  # right by a hair: position 0 says nothing
  weights[3, 1:3] = 10
  tokens[3, 2:] = (tokens[3, 2:] + 1) % 8  # wrong, then right from there on
  scores = training.answer_accuracy(
    Successor(), tokens, weights, batch_size=2, attention_fn=None
  )
  assert scores["answers"] == 5
  # Position 0 has equal logits: argmax takes token 0.
  first = [tokens[2, 1] == 0, tokens[3, 1] == 0]
  assert scores["exact_match"] == (2 + first[0]) / 5
  assert scores["token_accuracy"] == (5 + 1 + first[0] + first[1]) / 10


def test_unigram_entropy():
  assert training.unigram_entropy(np.array([3, 3, 3])) == 0
  entropy = training.unigram_entropy(np.array([0, 0, 5, 9]))
  np.testing.assert_allclose(entropy, 1.5 * np.log(2))


def test_position_edges_double():
  assert training.position_edges(8192) == (0, 1024, 2048, 4096, 8192)
  assert training.position_edges(5000) == (0, 1024, 2048, 4096, 5000)
  assert training.position_edges(512) == (0, 512)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"edges": (4, 4)}, "edges must rise"),
    ({"edges": (0, 13)}, r"lie in \[0, seq_len\].*seq_len=12"),
    ({"batch_size": 3}, "batch_size=3, rows=4"),
  ],
)
def test_bad_arguments(changes, message):
  arguments = dict(edges=(0, 12), batch_size=2, attention_fn=None) | changes
  with pytest.raises(ValueError, match=message):
    training.loss_by_position(Successor(), TOKENS, **arguments)


def test_no_answer_is_an_error():
  with pytest.raises(ValueError, match="loss_weights must mark an answer"):
    training.answer_accuracy(
      Successor(),
      TOKENS,
      np.ones(TOKENS.shape),
      batch_size=2,
      attention_fn=None,
    )
