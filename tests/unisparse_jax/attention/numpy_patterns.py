# SPDX-License-Identifier: Apache-2.0
"""The methods' published steps in plain NumPy, to be compared with.

Written from the papers, a head and a row at a time, for one sequence without
padding: q [q_len, num_heads, dim], k [kv_len, num_kv_heads, dim], query i at
position offset + i. All return booleans [num_heads, q blocks, kv blocks], and
[num_heads, kv_len] for single keys, or None.
"""

import fractions
import math

import numpy as np


class Problem:
  """One sequence and its blocks."""

  def __init__(self, q, k, offset, block_q, block_kv, causal=True, later=None):
    """later: keys [n, num_kv_heads, dim] after the last that a query sees."""
    self.q, self.k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    later = self.k[:0] if later is None else np.asarray(later, np.float64)
    self.all_k = np.concatenate([self.k, later])
    self.offset, self.causal = offset, causal
    self.block_q, self.block_kv = block_q, block_kv
    self.q_len, self.num_heads, self.dim = self.q.shape
    self.kv_len = len(self.k)
    self.q_blocks = math.ceil(self.q_len / block_q)
    self.kv_blocks = math.ceil(self.kv_len / block_kv)
    self.group = self.num_heads // self.k.shape[1]

  def keys(self, head):
    return self.k[:, head // self.group]

  def limit(self, i):
    """Keys that query i sees."""
    if not self.causal:
      return self.kv_len
    return min(self.kv_len, self.offset + i + 1)

  def row(self, head, i):
    """Softmax of query i over all keys."""
    logits = self.keys(head) @ self.q[i, head] / math.sqrt(self.dim)
    logits[self.limit(i) :] = -np.inf
    p = np.exp(logits - logits.max())
    return p / p.sum()

  def queries_of(self, block):
    start = block * self.block_q
    return range(start, min(start + self.block_q, self.q_len))

  def keys_of(self, block):
    start = block * self.block_kv
    return range(start, min(start + self.block_kv, self.kv_len))

  def empty(self):
    return np.zeros((self.num_heads, self.q_blocks, self.kv_blocks), bool)

  def reachable(self, i, j):
    last = self.queries_of(i)[-1]
    return j * self.block_kv < self.limit(last)

  def diagonal(self, i):
    """Blocks that hold the position of a query of row i."""
    return {(self.offset + t) // self.block_kv for t in self.queries_of(i)}

  def cut(self, kept):
    """Without what attention cannot reach."""
    for i in range(self.q_blocks):
      for j in range(self.kv_blocks):
        if not self.reachable(i, j):
          kept[:, i, j] = False
    return kept


def order(scores):
  """Indices by falling score, equal ones by index."""
  return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def cover(scores, share):
  """The fewest largest that reach a share of the sum."""
  chosen, running, total = set(), 0.0, sum(scores)
  for j in order(scores):
    if chosen and running >= share * total:
      break
    chosen.add(j)
    running += scores[j]
  return chosen


def per_head(value, head):
  return value[head] if isinstance(value, tuple) else value


def share_of(share, length):
  return math.ceil(fractions.Fraction(round(share * 10_000), 10_000) * length)


def add_token_slashes(problem, kept, head, distances):
  """Marks each block that holds a pair (query, key) at a kept distance."""
  for t in range(problem.q_len):
    for d in distances:
      j = problem.offset + t - d
      if 0 <= j < problem.kv_len:
        kept[head, t // problem.block_q, j // problem.block_kv] = True


def add_block_slashes(problem, kept, head, distances):
  """Marks blocks at a kept distance, in blocks, from a block of the row."""
  for i in range(problem.q_blocks):
    for own in problem.diagonal(i):
      for d in distances:
        if 0 <= own - d < problem.kv_blocks:
          kept[head, i, own - d] = True


def masses(problem, head, rows):
  """Column sums by key and slash sums by distance of some rows."""
  columns, slashes = np.zeros(problem.kv_len), np.zeros(problem.kv_len)
  for i in rows:
    p = problem.row(head, i)
    columns += p
    for j in range(problem.kv_len):
      distance = problem.offset + i - j
      if 0 <= distance < problem.kv_len:
        slashes[distance] += p[j]
  return columns, slashes


def by_block(profile, block):
  return [profile[s : s + block].sum() for s in range(0, len(profile), block)]


def sample_attention(
  problem, *, top_p, slash_top_p, num_chunks, sample_rows, widen_slashes
):
  kept = problem.empty()
  n = problem.q_len
  for head in range(problem.num_heads):
    rows = []
    for c in range(num_chunks):
      start, end = c * n // num_chunks, (c + 1) * n // num_chunks
      rows += range(max(start, end - sample_rows), end)
    columns, slashes = masses(problem, head, rows)
    columns = by_block(columns, problem.block_kv)
    slashes = by_block(slashes, problem.block_kv)
    for j in cover(columns, per_head(top_p, head)):
      kept[head, :, j] = True
    if problem.causal:
      share = top_p if slash_top_p is None else slash_top_p
      near = cover(slashes, per_head(share, head)) | {0}
      if widen_slashes:
        near |= {o + 1 for o in near}
      kept[head, :, 0] = True
      add_block_slashes(problem, kept, head, near)
  return problem.cut(kept), None


def sample_attention_v1(problem, *, top_p, sample_share, window_share):
  kept = problem.empty()
  columns = np.zeros((problem.num_heads, problem.kv_len), bool)
  n = problem.q_len
  count = share_of(sample_share, n)
  rows = {t * (n // count) for t in range(count)} | {n - 1}
  width = share_of(window_share, problem.kv_len)
  for head in range(problem.num_heads):
    scores, _ = masses(problem, head, sorted(rows))
    columns[head, list(cover(scores, per_head(top_p, head)))] = True
    if problem.causal:
      add_token_slashes(problem, kept, head, range(width))
  return problem.cut(kept), columns


def xattention(problem, *, top_p, stride, num_sink_blocks=1):
  kept = problem.empty()
  q_tiles = math.ceil(problem.q_len / stride)
  kv_tiles = math.ceil(problem.kv_len / stride)
  for head in range(problem.num_heads):
    keys = problem.keys(head)
    logits = np.full((q_tiles, kv_tiles), -np.inf)
    for r in range(q_tiles):
      for c in range(kv_tiles):
        last = problem.offset + r * stride + stride - 1
        if problem.causal and c * stride > last:
          continue
        total = 0.0
        for m in range(stride):
          i, j = r * stride + stride - 1 - m, c * stride + m
          if i < problem.q_len and j < problem.kv_len:
            total += problem.q[i, head] @ keys[j]
        logits[r, c] = total / (math.sqrt(problem.dim) * stride)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for i in range(problem.q_blocks):
      rows = [r for r in range(q_tiles) if r * stride // problem.block_q == i]
      scores = [
        sum(
          p[r, c]
          for r in rows
          for c in range(kv_tiles)
          if c * stride // problem.block_kv == j
        )
        for j in range(problem.kv_blocks)
      ]
      forced = set()
      if problem.causal:
        forced = problem.diagonal(i) | set(range(num_sink_blocks))
      keep_with_forced(kept[head, i], scores, forced, per_head(top_p, head))
  return problem.cut(kept), None


def keep_with_forced(row, scores, forced, share):
  """Forced first, then by falling score while the mass before is too small."""
  total, before = sum(scores), 0.0
  for j in sorted(order(scores), key=lambda j: j not in forced):
    if j in forced or before < share * total or share == 1.0:
      row[j] = True
    before += scores[j]


def oracle(problem, *, top_p, head_group):
  kept = problem.empty()
  for first in range(0, problem.num_heads, head_group):
    for i in range(problem.q_blocks):
      mass = np.zeros(problem.kv_blocks)
      for head in range(first, first + head_group):
        for t in problem.queries_of(i):
          p = problem.row(head, t)
          mass += by_block(p, problem.block_kv)
      forced = problem.diagonal(i) if problem.causal else set()
      for head in range(first, first + head_group):
        share = per_head(top_p, first // head_group)
        keep_with_forced(kept[head, i], mass, forced, share)
  return problem.cut(kept), None


def composite_scores(problem, first, group, window_q, window_kv):
  """By row and block: attention of each composite query, and its tokens.

  Composites are means over tokens and over the query heads first, ...,
  first + group - 1, or the key heads that these read. A composite of keys is
  the mean of all its keys, those after the last query included, and is seen
  by the composite queries whose last token is not before its first.
  """
  kv_heads = sorted({h // problem.group for h in range(first, first + group)})
  queries = problem.q[:, first : first + group].mean(1)
  keys = problem.all_k[:, kv_heads].mean(1)
  starts = range(0, len(keys), window_kv)
  counts = [len(keys[start : start + window_kv]) for start in starts]
  means = [keys[start : start + window_kv].mean(0) for start in starts]
  for i in range(problem.q_blocks):
    rows, sizes = [], []
    tokens = problem.queries_of(i)
    for start in range(tokens.start, tokens.stop, window_q):
      members = queries[start : min(start + window_q, tokens.stop)]
      logits = np.stack(means) @ members.mean(0) / math.sqrt(problem.dim)
      # A ragged composite stands for fewer keys.
      logits += np.log(np.array(counts) / window_kv)
      if problem.causal:
        last = problem.offset + start + len(members) - 1
        logits[np.array(starts) > last] = -np.inf
      p = np.exp(logits - logits.max())
      p /= p.sum()
      blocks = by_block(p, problem.block_kv // window_kv)
      rows.append(blocks[: problem.kv_blocks])
      sizes.append(len(members))
    yield i, np.array(rows), np.array(sizes)


def always_kept(problem, i):
  """Without causality nothing; else the diagonal and the first block."""
  return problem.diagonal(i) | {0} if problem.causal else set()


def unisparse(problem, *, top_p, window_q, window_kv, head_group):
  kept = problem.empty()
  group = head_group or problem.group
  for first in range(0, problem.num_heads, group):
    for i, rows, sizes in composite_scores(
      problem, first, group, window_q, window_kv
    ):
      scores = (rows * sizes[:, None]).sum(0) / sizes.sum()
      forced = always_kept(problem, i)
      for head in range(first, first + group):
        share = per_head(top_p, first // group)
        keep_with_forced(kept[head, i], scores, forced, share)
  return problem.cut(kept), None


def unisparse_threshold(
  problem,
  *,
  min_score,
  over_queries,
  window_q,
  window_kv,
  head_group,
  num_columns=0,
  num_last=64,
):
  kept = problem.empty()
  group = head_group or problem.group
  for first in range(0, problem.num_heads, group):
    limit = per_head(min_score, first // group) / problem.kv_blocks
    for i, rows, sizes in composite_scores(
      problem, first, group, window_q, window_kv
    ):
      scores = rows.max(0)
      if over_queries == "mean":
        scores = (rows * sizes[:, None]).sum(0) / sizes.sum()
      is_kept = (scores >= limit) | (scores == scores.max())
      is_kept[list(always_kept(problem, i))] = True
      kept[first : first + group, i] = is_kept
  if not (num_columns and problem.causal):
    return problem.cut(kept), None
  columns = np.zeros((problem.num_heads, problem.kv_len), bool)
  rows = range(max(0, problem.q_len - num_last), problem.q_len)
  for first in range(0, problem.num_heads, group):
    heads = range(first, first + group)
    vertical = sum(masses(problem, head, rows)[0] for head in heads)
    best = order(vertical)[: min(num_columns, problem.kv_len)]
    columns[first : first + group, best] = True
  return problem.cut(kept), columns


def streaming(problem, *, num_sink, num_local):
  """Whole blocks: the first ones, and as many as num_local needs on each side
  of those that hold the row's own positions (causal: before them only)."""
  kept = problem.empty()
  near = math.ceil(num_local / problem.block_kv)
  for i in range(problem.q_blocks):
    own = problem.diagonal(i)
    for j in range(problem.kv_blocks):
      is_sink = j * problem.block_kv < num_sink
      is_near = min(own) - near <= j <= max(own) + near
      kept[:, i, j] = is_sink or is_near
  return problem.cut(kept), None


def minference(
  problem, *, heads, num_last, min_columns, min_slashes, num_near_slashes
):
  kept = problem.empty()
  columns = np.zeros((problem.num_heads, problem.kv_len), bool)
  length = problem.kv_len
  for head in range(problem.num_heads):
    kind, first, second = heads[head] if len(heads) > 1 else heads[0]
    if kind == "a_shape":
      for j in range(problem.kv_blocks):
        if j * problem.block_kv < first:
          kept[head, :, j] = True
      add_token_slashes(problem, kept, head, range(second))
    elif kind == "vertical_slash":
      rows = range(max(0, problem.q_len - num_last), problem.q_len)
      vertical, slash = masses(problem, head, rows)
      vertical[:min_columns] = np.inf
      slash[:num_near_slashes] = np.inf
      vertical_size = min(length, max(first, min_columns))
      slash_size = min(length, max(second, min_slashes))
      columns[head, order(vertical)[:vertical_size]] = True
      add_token_slashes(problem, kept, head, order(slash)[:slash_size])
    else:
      for i in range(problem.q_blocks):
        query = problem.q[problem.queries_of(i), head].mean(0)
        scores = np.full(problem.kv_blocks, -np.inf)
        for j in range(problem.kv_blocks):
          if problem.reachable(i, j):
            scores[j] = query @ problem.keys(head)[problem.keys_of(j)].mean(0)
        diagonal = sorted(problem.diagonal(i))
        scores[diagonal] = np.inf
        kept[head, i, order(scores)[: max(first, len(diagonal))]] = True
  has_columns = any(kind == "vertical_slash" for kind, _, _ in heads)
  return problem.cut(kept), columns if has_columns else None


def flexprefill(problem, *, top_p, max_divergence, min_budget):
  """Also returns which heads are query-aware."""
  kept = problem.empty()
  block, length = problem.block_kv, problem.kv_len
  is_query_aware = np.zeros(problem.num_heads, bool)
  min_blocks = math.ceil(min_budget / block)
  for head in range(problem.num_heads):
    gamma = per_head(top_p, head)
    shortest = max(problem.block_q + block, min_blocks * block)
    if length <= shortest or gamma == 1.0:
      kept[head] = True
      continue
    rows = range(max(0, problem.q_len - block), problem.q_len)
    vertical, slash = (x / len(rows) for x in masses(problem, head, rows))

    def number_of_blocks(profile, gamma=gamma):
      running, tokens = 0.0, 0
      for j in order(profile):
        running += profile[j]
        tokens += running <= gamma
      return (tokens + 1) // block + 1

    num_vertical = max(number_of_blocks(vertical), min_blocks)
    num_slash = max(number_of_blocks(slash), min_blocks)
    vertical = np.array(by_block(vertical, block))
    slash = np.array(by_block(slash, block))
    pooled = np.stack(
      [
        problem.keys(head)[problem.keys_of(j)].mean(0)
        for j in range(problem.kv_blocks)
      ]
    )
    logits = pooled @ problem.q[rows, head].mean(0) / math.sqrt(problem.dim)
    estimate = np.exp(logits - logits.max())
    estimate /= estimate.sum()
    divergence = 0.0
    for p, other in ((estimate, vertical), (vertical, estimate)):
      for a, b in zip(p, other, strict=True):
        if a > 0:
          divergence += 0.5 * a * math.log(a / ((a + b) / 2))
    is_query_aware[head] = math.sqrt(max(divergence, 0.0)) < max_divergence
    if is_query_aware[head]:
      num_vertical = num_slash = min_blocks
    vertical[0] = slash[0] = np.inf
    for j in order(vertical)[:num_vertical]:
      kept[head, :, j] = True
    add_block_slashes(problem, kept, head, order(slash)[:num_slash])
    if is_query_aware[head]:
      scores = np.zeros((problem.q_blocks, problem.kv_blocks))
      for i in range(problem.q_blocks):
        query = problem.q[problem.queries_of(i), head].mean(0)
        row = pooled @ query / math.sqrt(problem.dim)
        for j in range(problem.kv_blocks):
          if not problem.reachable(i, j):
            row[j] = -np.inf
        row = np.exp(row - row.max())
        scores[i] = row / row.sum()
      running = 0.0
      for flat in order(scores.ravel()):
        running += scores.ravel()[flat]
        if running <= gamma * problem.q_blocks:
          kept[head, flat // problem.kv_blocks, flat % problem.kv_blocks] = True
  return problem.cut(kept), None, is_query_aware
