# SPDX-License-Identifier: Apache-2.0
"""What a measurement of speculative decoding records of its calls."""

from collections.abc import Mapping
from typing import Any

import numpy as np

ENTROPY_EDGES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)


def of_calls(calls, batch: int, new_tokens: int) -> dict[str, Any]:
  """Counts and histograms of calls of `batch` rows each.

  Tokens that a prefill writes count nowhere; `tokens_per_call` has the bonus
  token in, `accepted_per_call` has not.
  """
  rows = len(calls) * batch
  # The prefill writes the first token.
  written = rows * (new_tokens - 1)
  values = {"rows": rows, "written": written}
  if calls[0].log is None:
    return values | {
      "steps": len(calls) * (new_tokens - 1),
      "calls": written,
      "tokens_per_call": 1.0,
      "nodes_per_call": 1.0,
      "nodes_per_token": 1.0,
    }
  logs = {
    name: np.concatenate([call.log.column(name).reshape(-1) for call in calls])
    for name in (
      "accept_len",
      "num_emitted",
      "nodes",
      "bucket",
      "bin",
      "terminal_rank",
      "draft_levels",
      "entropy",
    )
  }
  active = logs["num_emitted"] > 0
  logs = {name: column[active] for name, column in logs.items()}
  num_calls, emitted = int(active.sum()), int(logs["num_emitted"].sum())
  nodes = int(logs["nodes"].sum())
  ranks = logs["terminal_rank"]
  accepted = ranks > 0
  quarter = np.maximum(logs["nodes"] // 4, 1)
  entropy = logs["entropy"][logs["draft_levels"] > 0]
  return values | {
    "steps": sum(int(call.log.num_steps) for call in calls),
    "calls": num_calls,
    "tokens_per_call": emitted / num_calls,
    "accepted_per_call": float(logs["accept_len"].mean()),
    "nodes_per_call": nodes / num_calls,
    "bucket_per_call": float(logs["bucket"].mean()),
    "nodes_per_token": nodes / emitted,
    "levels_per_call": float(logs["draft_levels"].mean()),
    "accept_histogram": np.bincount(logs["accept_len"]).tolist(),
    "terminal_rank_histogram": np.bincount(ranks).tolist(),
    "terminal_rank_top_quarter": float(
      np.mean(ranks[accepted] <= quarter[accepted])
    )
    if accepted.any()
    else None,
    "entropy_histogram": np.histogram(entropy, ENTROPY_EDGES)[0].tolist(),
    "bin_histogram": np.bincount(np.maximum(logs["bin"], 0)).tolist(),
    "bin_tokens": np.bincount(
      np.maximum(logs["bin"], 0), weights=logs["num_emitted"]
    ).tolist(),
  }


def of_times(
  times: Mapping[str, np.ndarray], method: str, written: int, num_calls: int
) -> dict[str, Any]:
  """Times of the median turn, and speeds over other methods by turn.

  Args:
    times: by method, seconds of decoding and of prefill, [turns, 2]. The
      methods of a turn ran beside each other, so that its ratios hold however
      the machine drifts.
    method: whose values these are.
    written: tokens of a turn.
    num_calls: calls of a turn.
  """
  own = times[method]
  decode_s, prefill_s = np.median(own, axis=0)
  values = {
    "decode_s": float(decode_s),
    "prefill_s": float(prefill_s),
    "tokens_per_s": written / float(decode_s),
    "latency_s": float(np.median(own.sum(axis=1))) / num_calls,
    "turn_s": own[:, 0].tolist(),
  }
  for other in ("plain", "fixed"):
    if other in times and method not in ("plain", other):
      ratios = times[other][:, 0] / own[:, 0]
      values[f"turn_over_{other}"] = ratios.tolist()
  return values


def mismatches(calls, expected) -> dict[str, Any]:
  """Rows and tokens that differ from plain decoding, and where first."""
  rows = tokens = 0
  firsts = []
  for call, wanted in zip(calls, expected, strict=True):
    differs = call.tokens != wanted
    rows += int(differs.any(axis=1).sum())
    tokens += int(differs.sum())
    firsts += [int(np.argmax(row)) for row in differs if row.any()]
  return {
    "mismatched_rows": rows,
    "mismatched_tokens": tokens,
    "first_mismatch": min(firsts) if firsts else None,
  }
