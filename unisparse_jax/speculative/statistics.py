# SPDX-License-Identifier: Apache-2.0
"""What the decoding loop records at every step, and its summary.

The loop writes one row of integers and one of floats per step and sequence into
arrays of fixed size; every mean and histogram is computed from them on the
host.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree

INT_FIELDS = (
  "accept_len",  # accepted draft tokens, before a cut by EOS or the limit
  "num_emitted",  # tokens added
  "nodes",  # nodes verified for this row, root included
  "bucket",  # nodes of the compiled pass: per row, or in all if packed
  "bin",  # of the policy
  "terminal_rank",  # index of the deepest accepted node; 0: none accepted
  "depth",  # deepest valid node
  "draft_levels",  # levels drafted in this step; 0: a plain step or a copy
)
FLOAT_FIELDS = ("entropy", "score")  # those of `policy.Evidence`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeLog:
  """Trees and accepted paths, for fitting a policy by replay.

  Attributes:
    parents: int16 [max_steps, batch, max_nodes]; see `tree.DraftTree`.
    depths: int8 [max_steps, batch, max_nodes], -1 where not valid.
    scores: float32 [max_steps, batch, max_nodes].
    path: int16 [max_steps, batch, max_depth + 1], accepted node of each depth,
      -1 for none; path[..., 0] is the root, 0.
  """

  parents: Int[Array, "max_steps batch max_nodes"]
  depths: Int[Array, "max_steps batch max_nodes"]
  scores: Float[Array, "max_steps batch max_nodes"]
  path: Int[Array, "max_steps batch max_path"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLog:
  """One entry per step and row; steps that a row did not take hold -1.

  Attributes:
    ints: int32 [max_steps, batch, len(INT_FIELDS)].
    floats: float32 [max_steps, batch, len(FLOAT_FIELDS)].
    num_steps: int32 scalar, steps taken.
    trees: or None.
    is_packed: whether a bucket counts the nodes of all rows. Static.
  """

  ints: Int[Array, "max_steps batch num_ints"]
  floats: Float[Array, "max_steps batch num_floats"]
  num_steps: Int[Array, ""]
  trees: TreeLog | None = None
  is_packed: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @classmethod
  def init(
    cls,
    *,
    max_steps: int,
    batch: int,
    max_nodes: int,
    max_depth: int,
    with_trees: bool,
    is_packed: bool = False,
  ) -> "StepLog":
    """A log of no steps."""
    shape = (max_steps, batch)
    trees = None
    if with_trees:
      trees = TreeLog(
        parents=jnp.zeros((*shape, max_nodes), jnp.int16),
        depths=jnp.full((*shape, max_nodes), -1, jnp.int8),
        scores=jnp.zeros((*shape, max_nodes), jnp.float32),
        path=jnp.full((*shape, max_depth + 1), -1, jnp.int16),
      )
    return cls(
      ints=jnp.full((*shape, len(INT_FIELDS)), -1, jnp.int32),
      floats=jnp.zeros((*shape, len(FLOAT_FIELDS)), jnp.float32),
      num_steps=jnp.int32(0),
      trees=trees,
      is_packed=is_packed,
    )

  def append(
    self,
    outcome: policy_lib.Outcome,
    *,
    draft: tree.DraftTree,
    num_nodes: Int[Array, " batch"],
    bucket_size: Int[Array, ""],
    path: Int[Array, "batch max_path"],
    score: Float[Array, " batch"],
  ) -> "StepLog":
    """The log with one more step.

    Args:
      outcome: of the step.
      draft: the tree before the policy's cut.
      num_nodes: nodes verified in each row, root included.
      bucket_size: nodes that the compiled pass had.
      path: accepted nodes, see `verification.Acceptance`.
      score: of the best path.
    """
    active = outcome.active[:, None]
    rows = outcome.accept_len
    index = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)[None, :]
    is_verified = draft.valid & (index < num_nodes[:, None])
    ints = dict(
      accept_len=outcome.accept_len,
      num_emitted=outcome.num_emitted,
      nodes=num_nodes,
      bucket=jnp.broadcast_to(bucket_size, rows.shape),
      bin=outcome.decision.bin,
      terminal_rank=path[:, -1],
      depth=jnp.max(jnp.where(is_verified, draft.depths, 0), axis=-1),
      draft_levels=jnp.broadcast_to(outcome.draft_levels, rows.shape),
    )
    assert tuple(ints) == INT_FIELDS, "the layout of the log"
    floats = jnp.stack([outcome.evidence_entropy, score], axis=-1)

    def write(buffer, values):
      values = values.astype(buffer.dtype)[None]
      start = (self.num_steps, *(0,) * (buffer.ndim - 1))
      return lax.dynamic_update_slice(buffer, values, start)

    trees = self.trees
    if trees is not None:
      depth = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :]
      on_path = (depth <= outcome.accept_len[:, None]) & active
      trees = TreeLog(
        parents=write(trees.parents, draft.parents),
        depths=write(trees.depths, jnp.where(draft.valid, draft.depths, -1)),
        scores=write(trees.scores, draft.scores),
        path=write(trees.path, jnp.where(on_path, path, -1)),
      )
    table = jnp.stack(list(ints.values()), axis=-1)
    return StepLog(
      ints=write(self.ints, jnp.where(active, table, -1)),
      floats=write(self.floats, floats),
      num_steps=self.num_steps + 1,
      trees=trees,
      is_packed=self.is_packed,
    )

  def append_plain(
    self,
    num_steps: Int[Array, ""],
    counts: Int[Array, " batch"],
    *,
    bucket_size: int,
  ) -> "StepLog":
    """The log with a stretch of plain steps.

    Args:
      num_steps: int32 scalar, its length.
      counts: tokens that each row got, in its first steps.
      bucket_size: nodes that the compiled pass had.
    """
    step = jnp.arange(len(self.ints), dtype=jnp.int32) - self.num_steps
    is_new = (step >= 0) & (step < num_steps)
    took = step[:, None] < counts[None]
    values = dict.fromkeys(INT_FIELDS, 0)
    values |= dict(num_emitted=1, nodes=1, bucket=bucket_size)
    row = jnp.asarray([values[name] for name in INT_FIELDS], jnp.int32)

    def write(buffer, values):
      values = jnp.asarray(values, buffer.dtype)
      return jnp.where(is_new[:, None, None], values, buffer)

    def first(buffer, is_one):
      index = jnp.arange(buffer.shape[-1], dtype=jnp.int32)[None, None]
      return jnp.where(is_one & (index == 0), 0, -1)

    trees = self.trees
    if trees is not None:
      is_root = first(trees.scores, True) == 0
      trees = TreeLog(
        parents=write(trees.parents, 0),
        depths=write(trees.depths, first(trees.depths, True)),
        scores=write(trees.scores, jnp.where(is_root, 0.0, tree.EMPTY)),
        path=write(trees.path, first(trees.path, took[..., None])),
      )
    return dataclasses.replace(
      self,
      ints=write(self.ints, jnp.where(took[..., None], row[None, None], -1)),
      floats=write(self.floats, 0.0),
      num_steps=self.num_steps + num_steps,
      trees=trees,
    )

  def column(self, name: str) -> np.ndarray:
    """[num_steps, batch] of one field, on the host."""
    steps = int(self.num_steps)
    if name in INT_FIELDS:
      return np.asarray(self.ints)[:steps, :, INT_FIELDS.index(name)]
    return np.asarray(self.floats)[:steps, :, FLOAT_FIELDS.index(name)]


def summarize(log: StepLog) -> dict[str, Any]:
  """Counts, means and histograms of a decode; the prompt's token not counted.

  A target call is one step of one row. Definitions:
    tokens_per_step: tokens added / calls, the target's own token included
      (the papers' tau).
    accept_len: accepted draft tokens / calls, the target's own left out.
    verified_per_token: nodes verified, roots included, / tokens added.
    padding: share of the computed nodes that were not asked for.
    acceptance_by_depth: share of calls that accept at least 1, 2, ... tokens.
    conditional_acceptance: the same, given that the depth before was accepted.
    terminal_rank: histogram of the index of the deepest accepted node; entry 0
      counts calls that accept nothing.
    top_quarter: share of the calls that accept something whose terminal rank is
      in the first quarter of the tree.
    bins: per bin of the policy, calls, tokens per step and mean nodes.
    entropy: histogram of the drafted calls' entropies: counts and edges, nats.

  Returns:
    A dict of plain numbers and lists, fit for JSON.
  """
  took = log.column("num_emitted") > 0
  field = {name: log.column(name)[took] for name in INT_FIELDS}
  calls = int(took.sum())
  emitted = int(field["num_emitted"].sum())
  if calls == 0:
    return dict(steps=int(log.num_steps), calls=0, tokens=0)
  accept_len, nodes = field["accept_len"], field["nodes"]
  deepest = int(max(accept_len.max(), 1))
  reached = [float(np.mean(accept_len >= d)) for d in range(deepest + 1)]
  ranks = field["terminal_rank"]
  accepting = ranks > 0
  quarter = ranks[accepting] <= np.maximum(nodes[accepting] // 4, 1)
  drafted = field["draft_levels"] > 0
  entropy = log.column("entropy")[took][drafted]
  counts, edges = np.histogram(entropy, bins=32) if entropy.size else ([], [])
  bins = {}
  for index in np.unique(field["bin"][drafted]):
    inside = drafted & (field["bin"] == index)
    bins[int(index)] = dict(
      calls=int(inside.sum()),
      tokens_per_step=float(field["num_emitted"][inside].mean()),
      nodes=float(nodes[inside].mean()),
      depth=float(field["depth"][inside].mean()),
    )
  buckets, bucket_calls = np.unique(field["bucket"], return_counts=True)
  return dict(
    steps=int(log.num_steps),
    calls=calls,
    tokens=emitted,
    tokens_per_step=emitted / calls,
    accept_len=float(accept_len.mean()),
    verified=int(nodes.sum()),
    verified_per_token=float(nodes.sum()) / emitted,
    verified_per_call=float(nodes.mean()),
    padding=_padding(log, took),
    draft_levels=float(field["draft_levels"].mean()),
    acceptance_by_depth=reached[1:],
    conditional_acceptance=[
      now / before if before else 0.0
      for before, now in itertools.pairwise(reached)
    ],
    terminal_rank=np.bincount(ranks).tolist(),
    top_quarter=float(quarter.mean()) if quarter.size else 0.0,
    bins=bins,
    buckets={
      int(size): int(n) for size, n in zip(buckets, bucket_calls, strict=True)
    },
    entropy=dict(
      counts=[int(x) for x in counts], edges=[float(x) for x in edges]
    ),
  )


def _padding(log: StepLog, took: np.ndarray) -> float:
  """Share of computed nodes beyond those asked for, done rows included."""
  asked = np.where(took, log.column("nodes"), 0).sum()
  # The compiled size of a step: the same in all of its active rows.
  sizes = log.column("bucket").max(axis=1).astype(np.int64)
  rows = 1 if log.is_packed else took.shape[1]
  return float(1.0 - asked / max(int(sizes.sum()) * rows, 1))
