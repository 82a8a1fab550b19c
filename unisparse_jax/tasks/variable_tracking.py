# SPDX-License-Identifier: Apache-2.0
"""Variable tracking, RULER's `vt`: follow chains of assignments.

Source: Hsieh et al., 2024, RULER, section 3. Differs from it in: comment lines,
and no solved example before the context.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from unisparse_jax.tasks import base, line_tokens, needles

_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_INTRO = (
  "# Memorize the chains of variable assignments hidden in the following "
  "text.\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(base.Task):
  """Names of all variables that hold a value.

  Attributes:
    num_hops: assignments after the first; the answer has num_hops + 1 names.
    max_training_chains: most chains of a training document.
  """

  max_new_tokens: int = 40
  num_hops: int = 4
  max_training_chains: int = 12

  def build(self, rng, haystack, tokenizer, budget, *, training):
    letters, digits, hops = 5, 5, [self.num_hops]
    if training:
      most = min(self.max_training_chains, max(1, budget // 220))
      hops = rng.integers(1, 7, base.many(rng, most)).tolist()
      letters = int(rng.choice([4, 5, 5, 5, 6]))
      digits = int(rng.choice([4, 5, 5, 5, 6]))
    names = base.distinct(
      lambda: "".join(_LETTERS[rng.integers(26, size=letters)]),
      sum(hops) + len(hops),
    )
    low = 10 ** (digits - 1)
    values = base.distinct(
      lambda: str(int(rng.integers(low, 10 * low))), len(hops)
    )
    chains = []
    for count in hops:
      chains.append(names[: count + 1])
      names = names[count + 1 :]

    intro = tokenizer.encode(_INTRO)
    questions = [
      _question(chain, value)
      for chain, value in zip(chains, values, strict=True)
    ]
    room = budget - len(intro)
    room -= base.questions_len(self, tokenizer, questions, training)
    texts = [
      _assignments(chain, value)
      for chain, value in zip(chains, values, strict=True)
    ]
    lines = line_tokens.encode_lines(
      tokenizer,
      [line for text in texts for line in text],
      line_tokens.RANDOM_WEIGHT,
    )
    room -= len(lines.tokens)
    if room < 0:
      raise base.TooSmallError
    if training and rng.random() < 0.3:
      filler = line_tokens.code_lines(rng, haystack, room)
    else:
      filler = line_tokens.repeat_line(tokenizer.encode(needles.NOISE), room)
    # Random places, but each chain in its own order.
    positions = np.concatenate(
      [
        np.sort(rng.integers(0, len(filler) + 1, len(chain)))
        for chain in chains
      ]
    )
    tokens, weights = line_tokens.interleave(filler, lines, positions)
    return base.Episode(
      context=np.concatenate([intro, tokens]),
      context_weights=np.concatenate(
        [np.full(len(intro), line_tokens.RANDOM_WEIGHT, np.float32), weights]
      ),
      questions=questions,
      metadata={
        "chains": chains,
        "depths": (positions / max(len(filler), 1)).tolist(),
      },
    )


def _assignments(chain: list[str], value: str) -> list[str]:
  lines = [f"# VAR {chain[0]} = {value}\n"]
  for previous, name in itertools.pairwise(chain):
    lines.append(f"# VAR {name} = VAR {previous}\n")
  return lines


def _question(chain: list[str], value: str) -> base.Question:
  return base.Question(
    prompt=(
      f"# Find all variables that are assigned the value {value} in the text "
      f"above.\n# {len(chain)} variables are assigned the value {value}, "
      "they are:"
    ),
    answer=f" {' '.join(chain)}\n",
    targets=tuple(chain),
    metadata={"value": value},
  )
