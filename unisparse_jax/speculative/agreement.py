# SPDX-License-Identifier: Apache-2.0
"""Where two greedy outputs part, and how near a tie the target was there.

In float32 speculative and plain output are the same. In bfloat16 a pass over
many tokens rounds otherwise than a pass over one, and two tokens whose logits
nearly agree may change places; after that the outputs differ. So a difference
is an error only where the target was not near a tie.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from unisparse_jax import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch:
  """The first difference of a row.

  Attributes:
    row: of the batch.
    index: of the new token, from 0.
    expected: token of the one output.
    found: token of the other.
    gap: how far the logits of the two tokens lie apart, in a pass over the
      known text.
  """

  row: int
  index: int
  expected: int
  found: int
  gap: float


def first_mismatches(
  target: models.Decoder, prompts, expected, found, *, lengths=None
) -> list[Mismatch]:
  """The first difference of every row that has one.

  Args:
    target: the model that both outputs are of.
    prompts: int [batch, q_len], right-padded.
    expected: int [batch, num_tokens], such as `models.generate` returns.
    found: int [batch, num_tokens].
    lengths: int [batch], valid tokens of each prompt; default q_len.

  Returns:
    One entry per row that differs.
  """
  prompts, expected, found = (np.asarray(x) for x in (prompts, expected, found))
  if expected.shape != found.shape or len(prompts) != len(expected):
    raise ValueError(
      "found must have the shape of expected and the prompts' batch; got "
      f"{found.shape}; expected {expected.shape}, batch={len(prompts)}."
    )
  if lengths is None:
    lengths = np.full(len(prompts), prompts.shape[1])
  lengths = np.asarray(lengths)
  differs = expected != found
  rows = np.flatnonzero(differs.any(axis=1))
  if not len(rows):
    return []
  indices = differs.argmax(axis=1)
  total = prompts.shape[1] + expected.shape[1]
  known = np.zeros((len(prompts), total), np.int32)
  for row, length in enumerate(lengths):
    known[row, :length] = prompts[row, :length]
    known[row, length : length + expected.shape[1]] = expected[row]
  # The logits of the token at `index` stand one position before it.
  last = jnp.asarray(lengths + indices, jnp.int32)
  logits = np.asarray(_logits_at(target, jnp.asarray(known), last))
  out = []
  for row in rows:
    index = int(indices[row])
    pair = int(expected[row, index]), int(found[row, index])
    gap = abs(float(logits[row, pair[0]] - logits[row, pair[1]]))
    out.append(
      Mismatch(
        row=int(row), index=index, expected=pair[0], found=pair[1], gap=gap
      )
    )
  return out


@jax.jit
def _logits_at(target, tokens, lengths):
  return target(tokens, lengths=lengths, logits_for="last")[0]
