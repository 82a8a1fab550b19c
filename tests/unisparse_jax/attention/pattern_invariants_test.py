# SPDX-License-Identifier: Apache-2.0
"""What holds for the mask of every pattern on any input."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from unisparse_jax import attention

BATCH, HEADS, KV_HEADS, DIM, Q_LEN, CAPACITY = 2, 4, 2, 8, 50, 110
BLOCKS = dict(block_q=16, block_kv=8)
SOME = {
  "dense": BLOCKS,
  "streaming": dict(num_sink=5, num_local=10, **BLOCKS),
  "unisparse": dict(top_p=0.6, window_q=4, window_kv=4, **BLOCKS),
  "xattention": dict(top_p=0.5, stride=4, **BLOCKS),
  "flexprefill": dict(top_p=0.5, min_budget=10, **BLOCKS),
  "minference": dict(
    heads=(
      ("a_shape", 3, 5),
      ("vertical_slash", 6, 9),
      ("block_sparse", 2, 0),
      ("vertical_slash", 400, 3),
    ),
    num_last=8,
    min_columns=2,
    min_slashes=3,
    num_near_slashes=4,
    **BLOCKS,
  ),
  "sample_attention": dict(top_p=0.5, sample_rows=8, **BLOCKS),
  "sample_attention_v1": dict(top_p=0.5, max_columns=40, **BLOCKS),
  "oracle": dict(top_p=0.5, **BLOCKS),
  "random_blocks": dict(density=0.3, **BLOCKS),
  "unisparse_threshold": dict(min_score=1.5, window_q=4, window_kv=4, **BLOCKS),
}
# Budgets that keep everything.
ALL = {
  "dense": {},
  "streaming": dict(num_local=CAPACITY),
  "unisparse": dict(top_p=1.0),
  "xattention": dict(top_p=1.0),
  "flexprefill": dict(top_p=1.0),
  "minference": dict(heads=(("a_shape", 1, CAPACITY),)),
  "sample_attention": dict(top_p=1.0),
  "sample_attention_v1": dict(top_p=1.0, max_columns=CAPACITY),
  "oracle": dict(top_p=1.0),
  "random_blocks": dict(density=1.0),
  "unisparse_threshold": dict(min_score=0.0),
}
ONLY_CAUSAL = ("flexprefill", "minference")
BIDIRECTIONAL = (
  "oracle",
  "random_blocks",
  "sample_attention",
  "sample_attention_v1",
  "unisparse",
  "unisparse_threshold",
  "xattention",
)


def make(name, **settings):
  return attention.make_pattern(name, **(SOME[name] | settings))


@functools.partial(jax.jit, static_argnames=("pattern", "causal"))
def select(pattern, q, k, q_offset, kv_len, *, causal):
  return pattern.select(q, k, causal=causal, q_offset=q_offset, kv_len=kv_len)


@st.composite
def problems(draw):
  """q, k, q_offset and kv_len of one shape, so that they compile once."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  kind = draw(
    st.sampled_from(["normal", "equal", "one key", "tiny", "huge", "half huge"])
  )
  q = rng.standard_normal((BATCH, Q_LEN, HEADS, DIM))
  k = rng.standard_normal((BATCH, CAPACITY, KV_HEADS, DIM))
  kv_len = [draw(st.integers(1, CAPACITY)) for _ in range(BATCH)]
  q_offset = [draw(st.integers(0, length - 1)) for length in kv_len]
  if kind == "equal":
    k[:] = k[:, :1]
  elif kind == "one key":
    q = np.abs(q)
    k[np.arange(BATCH), [draw(st.integers(0, n - 1)) for n in kv_len]] = 1e3
  elif kind == "tiny":
    q, k = q * 1e-30, k * 1e-30
  elif kind == "huge":  # logits up to about 1e34, still finite in float32
    q, k = q * 1e16, k * 1e16
  elif kind == "half huge":
    k[:, ::3] *= 1e20
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k)]
  return (*arrays, *(jnp.asarray(x, jnp.int32) for x in (q_offset, kv_len)))


def check_invariants(mask, q_offset, kv_len, causal):
  grid = mask.grid
  q_offset, kv_len = np.asarray(q_offset), np.asarray(kv_len)
  counts = np.asarray(mask.num_kv_blocks)
  lists = np.asarray(mask.kv_block_indices)
  kept = np.asarray(mask.to_dense())
  admissible = np.asarray(grid.admissible())[:, None]
  assert counts.min() >= 0 and counts.max() <= lists.shape[-1]
  for row in np.ndindex(counts.shape):
    live = lists[row][: counts[row]]
    assert (np.diff(live) < 0).all(), "descending, each once"
  assert not (kept & ~admissible).any(), "nothing out of reach"
  assert not np.asarray(mask.num_dropped).any()
  if causal:
    diagonal = np.asarray(grid.diagonal())[:, None]
    assert (kept | ~diagonal).all(), "the diagonal is kept"
  is_column = np.zeros((BATCH, 1, CAPACITY), bool)
  if mask.columns is not None:
    column_counts = np.asarray(mask.columns.num_columns)
    for row in np.ndindex(column_counts.shape):
      live = np.asarray(mask.columns.column_indices[row])[: column_counts[row]]
      assert len(set(live.tolist())) == len(live), "each column once"
    is_column = np.asarray(mask.columns.to_dense(CAPACITY))
  for b in range(BATCH):
    assert not is_column[b, :, int(kv_len[b]) :].any()
    for i in range(Q_LEN):
      position = int(q_offset[b]) + i
      limit = int(kv_len[b])
      if causal and position >= limit:
        continue  # padding
      limit = min(limit, position + 1) if causal else limit
      by_key = np.repeat(kept[b, :, i // grid.block_q], grid.block_kv, axis=-1)
      seen = by_key[:, :limit] | is_column[b, :, :limit]
      assert seen.any(-1).all(), "every query sees a key"


@pytest.mark.parametrize(
  ("name", "causal"),
  [(name, True) for name in attention.PATTERNS]
  + [(name, False) for name in BIDIRECTIONAL],
)
def test_invariants(name, causal):
  pattern = make(name)

  @hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
  @hypothesis.given(problems())
  def check(problem):
    q, k, q_offset, kv_len = problem
    mask = select(pattern, q, k, q_offset, kv_len, causal=causal)
    check_invariants(mask, q_offset, kv_len, causal)
    again = select(pattern, q, k, q_offset, kv_len, causal=causal)
    jax.tree.map(np.testing.assert_array_equal, mask, again)

  before = select._cache_size()
  check()
  assert select._cache_size() == before + 1, "compiled once for all values"


@pytest.fixture(scope="module")
def chunk():
  """q, k, v, q_offset and kv_len of a batch, and their dense attention."""
  q, k, v = helpers.make_qkv(
    batch=BATCH,
    q_len=Q_LEN,
    kv_len=CAPACITY,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
  )
  where = dict(
    q_offset=jnp.asarray([60, 3], jnp.int32),
    kv_len=jnp.asarray([110, 53], jnp.int32),
  )
  return q, k, v, where, jax.jit(attention.dense_attention)(q, k, v, **where)


@pytest.mark.parametrize("name", attention.PATTERNS)
def test_everything_kept_is_dense_attention(name, chunk):
  q, k, v, where, expected = chunk
  mask = select(make(name, **ALL[name]), q, k, **where, causal=True)
  if mask.columns is None:
    # Nothing is left out, hence nothing of the output.
    full = attention.BlockMask.full(mask.grid)
    kept = np.asarray(mask.to_dense())
    np.testing.assert_array_equal(
      kept, np.broadcast_to(np.asarray(full.to_dense()), kept.shape)
    )
  if name in ("dense", "sample_attention_v1"):
    out = jax.jit(attention.sparse_attention)(q, k, v, mask)
    helpers.assert_same(out, expected, 2e-6)


EVERY_HEAD = {  # MInference's kinds, each with all that there is
  "a_shape": ("a_shape", 1, CAPACITY),
  "a_shape, sinks": ("a_shape", CAPACITY, 1),
  "vertical": ("vertical_slash", CAPACITY, 1),
  "slash": ("vertical_slash", 1, CAPACITY),
  "block_sparse": ("block_sparse", CAPACITY, 0),
}


@pytest.mark.parametrize(
  ("name", "settings", "causal"),
  [(name, ALL[name], True) for name in attention.PATTERNS]
  + [("minference", dict(heads=(h,)), True) for h in EVERY_HEAD.values()]
  + [(name, ALL[name], False) for name in (*BIDIRECTIONAL, "dense")]
  + [("streaming", ALL["streaming"], False)],
)
def test_a_budget_of_everything_hides_no_key(name, settings, causal):
  pattern = make(name, **settings)

  @hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
  @hypothesis.given(problems())
  def check(problem):
    q, k, q_offset, kv_len = problem
    mask = select(pattern, q, k, q_offset, kv_len, causal=causal)
    seen = np.repeat(np.asarray(mask.to_dense()), BLOCKS["block_q"], axis=2)
    seen = np.repeat(seen, BLOCKS["block_kv"], axis=3)
    seen = seen[:, :, :Q_LEN, :CAPACITY]
    if mask.columns is not None:
      columns = np.asarray(mask.columns.to_dense(CAPACITY))
      seen = seen | columns[:, :, None]
    offset, length = (
      np.asarray(x)[:, None, None, None] for x in (q_offset, kv_len)
    )
    position = offset + np.arange(Q_LEN)[:, None]
    key = np.arange(CAPACITY)
    needed = key < length
    if causal:  # positions past kv_len are padding
      needed = needed & (key <= position) & (position < length)
    assert (seen | ~needed).all()

  check()


@pytest.mark.parametrize("name", ONLY_CAUSAL)
def test_causal_methods_refuse_bidirectional_attention(name):
  q, k, _ = helpers.make_qkv(q_len=32, num_heads=HEADS)
  with pytest.raises(ValueError, match=f"causal must be True for {name}"):
    make(name).select(q, k, causal=False)


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("xattention", dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
    ("xattention", dict(top_p=()), r"top_p must not be empty"),
    ("xattention", dict(top_p=(0.5, 2.0)), r"top_p must.*got top_p=2.0"),
    ("xattention", dict(stride=3), r"stride must divide block_q"),
    ("xattention", dict(max_blocks=0), r"max_blocks must be an integer >= 1"),
    ("xattention", dict(num_sink_blocks=-1), r"num_sink_blocks must be"),
    ("flexprefill", dict(top_p=1.1), r"top_p must be in"),
    ("flexprefill", dict(max_divergence=2.0), r"max_divergence must be in"),
    ("flexprefill", dict(min_budget=0), r"min_budget must be"),
    ("minference", dict(heads=()), r"heads must not be empty"),
    ("minference", dict(heads=(("slash", 1, 1),)), r"heads must.*'slash'"),
    ("minference", dict(heads=(("a_shape", 1),)), r"heads must hold \(kind"),
    ("minference", dict(heads=(("a_shape", 0, 1),)), r"heads must be an int"),
    ("minference", dict(heads=(("a_shape", 1, 0),)), r"heads must have a sec"),
    ("minference", dict(num_last=0), r"num_last must be"),
    ("sample_attention", dict(slash_top_p=-1.0), r"slash_top_p must be in"),
    ("sample_attention", dict(num_chunks=0), r"num_chunks must be"),
    ("sample_attention", dict(block_q=0), r"block_q must be"),
    ("sample_attention_v1", dict(sample_share=0.0), r"sample_share must be"),
    ("sample_attention_v1", dict(window_share=1.5), r"window_share must be"),
    ("sample_attention_v1", dict(max_columns=0), r"max_columns must be"),
    ("oracle", dict(head_group=0), r"head_group must be"),
    ("random_blocks", dict(density=0.0), r"density must be in"),
    ("unisparse_threshold", dict(min_score=-0.1), r"min_score must be a fin"),
    ("unisparse_threshold", dict(min_score=(1.0, np.nan)), r"min_score must"),
    ("unisparse_threshold", dict(min_score=()), r"min_score must not be empty"),
    ("unisparse_threshold", dict(over_queries="sum"), r"over_queries must be"),
    ("unisparse_threshold", dict(window_q=3), r"window_q must divide block_q"),
    ("random_blocks", dict(seed=-1), r"seed must be an integer >= 0"),
  ],
)
def test_bad_settings_are_named(name, settings, message):
  with pytest.raises(ValueError, match=message):
    attention.make_pattern(name, **settings)


def test_settings_of_another_number_of_heads_are_refused():
  q, k, _ = helpers.make_qkv(q_len=32, num_heads=HEADS)
  with pytest.raises(ValueError, match=r"top_p must have one.*4 values"):
    jax.eval_shape(make("xattention", top_p=(0.5, 0.5, 0.5)).select, q, k)
  with pytest.raises(ValueError, match=r"heads must be one.*1 or 4"):
    jax.eval_shape(
      make("minference", heads=(("a_shape", 1, 1),) * 3).select, q, k
    )
  with pytest.raises(ValueError, match=r"head_group must divide num_heads"):
    jax.eval_shape(make("oracle", head_group=3).select, q, k)


def test_a_value_for_each_head_is_that_of_its_head(chunk):
  q, k, _, where, _ = chunk

  def kept(top_p):
    pattern = make("unisparse", top_p=top_p)
    mask = select(pattern, q, k, **where, causal=True)
    return np.asarray(mask.to_dense())

  low, high = kept(0.2), kept(0.9)
  found = kept(tuple((0.2, 0.9)[h % 2] for h in range(low.shape[1])))
  assert (low != high).any()
  for head in range(low.shape[1]):
    np.testing.assert_array_equal(
      found[:, head], (low, high)[head % 2][:, head]
    )


def test_random_blocks_keep_their_share_and_depend_on_the_seed():
  q, k, _ = helpers.make_qkv(q_len=160, num_heads=HEADS, head_dim=DIM)

  @functools.partial(jax.jit, static_argnums=0)
  def select_dense(pattern, q, k):
    return pattern.select(q, k).to_dense()

  def kept(**settings):
    pattern = make("random_blocks", **settings)
    return np.asarray(select_dense(pattern, q, k))[0]

  first = kept(density=0.25)
  reachable = np.arange(2, 21, 2)
  expected = np.maximum(np.ceil(0.25 * reachable), 3)
  expected[0] = 2  # the sink is one of the two diagonal blocks
  np.testing.assert_array_equal(
    first.sum(-1), np.broadcast_to(expected, first.shape[:2])
  )
  np.testing.assert_array_equal(first, kept(density=0.25))
  assert (first != kept(density=0.25, seed=1)).any()
  assert (first[0] != first[1]).any()


def test_no_selector_holds_more_than_the_best_blocks_by_true_mass(chunk):
  q, k, _, where, _ = chunk
  for name in ("xattention", "unisparse", "random_blocks", "oracle"):
    mask = select(make(name), q, k, **where, causal=True)
    mass = np.asarray(jax.jit(attention.metrics.block_mass)(q, k, mask.grid))
    group = HEADS // mask.num_mask_heads
    kept = np.repeat(np.asarray(mask.to_dense()), group, axis=1)
    counts = np.repeat(np.asarray(mask.num_kv_blocks), group, axis=1)
    best = np.cumsum(-np.sort(-mass, axis=-1), axis=-1)
    ceiling = np.take_along_axis(best, counts[..., None] - 1, axis=-1)[..., 0]
    held = np.where(kept, mass, 0.0).sum(-1)
    assert (held <= ceiling + 1e-6).all()
    if name == "oracle":
      assert (held >= 0.5 - 1e-6).all()


def test_a_threshold_cuts_all_rows_at_one_score(chunk):
  q, k, _, where, _ = chunk
  pattern = make("unisparse_threshold", min_score=2.0, num_sink_blocks=0)
  mask = select(pattern, 3.0 * q, k, **where, causal=True)
  scorer = make("unisparse", window_q=4, window_kv=4, head_group=1)
  scores = jax.jit(scorer.block_scores)(3.0 * q, k, mask.grid)
  scores = np.asarray(scores)
  num_blocks = np.array([14, 7])[:, None, None, None]  # of 110 and 53 keys
  expected = scores >= 2.0 / num_blocks
  expected |= scores == scores.max(-1, keepdims=True)
  expected |= np.asarray(mask.grid.diagonal())[:, None]
  expected &= np.asarray(mask.grid.admissible())[:, None]
  np.testing.assert_array_equal(mask.to_dense(), expected)
  assert 0.1 < expected.mean() < 0.4


@pytest.mark.parametrize(
  ("scores", "count", "expected"),
  [
    ([3.0, 1.0, 2.0], 2, [1, 0, 1]),
    ([1.0, 1.0, 1.0], 2, [1, 1, 0]),
    ([1.0, 2.0, 1.0], 2, [1, 1, 0]),
    ([1.0, 2.0, 3.0], 0, [0, 0, 0]),
    ([np.inf, -np.inf, 0.0], 1, [1, 0, 0]),
    ([1.0, 2.0, 3.0], 9, [1, 1, 1]),
  ],
)
def test_top_count(scores, count, expected):
  from unisparse_jax.attention import scoring

  found = scoring.top_count(jnp.asarray(scores), jnp.int32(count))
  np.testing.assert_array_equal(found, np.asarray(expected, bool))


@pytest.mark.parametrize(
  ("share", "most", "expected"),
  [
    (0.4, None, [0, 1, 0, 0]),
    (0.5, None, [0, 1, 1, 0]),
    (0.8, None, [0, 1, 1, 0]),
    (0.9, None, [1, 1, 1, 0]),
    (1.0, None, [1, 1, 1, 1]),
    (1.0, 1, [0, 1, 0, 0]),
    (0.9, 2, [0, 1, 1, 0]),
  ],
)
def test_top_mass(share, most, expected):
  from unisparse_jax.attention import scoring

  scores = jnp.asarray([1.0, 4.0, 4.0, 1.0])
  found = scoring.top_mass(scores, jnp.float32(share), most)
  np.testing.assert_array_equal(found, np.asarray(expected, bool))


def within_by_sort(scores, budget):
  """As published: sorted, added up, cut where the sum exceeds the budget."""
  kept = np.zeros(scores.shape, bool)
  for row, limit, out in zip(scores, budget, kept, strict=True):
    falling = np.argsort(-row, kind="stable")
    out[falling] = np.cumsum(row[falling], dtype=np.float64) <= limit
  return kept


# Sixteenths and multiples of them: a float32 adds them up in any order exactly.
WITHIN = {
  "ties": ([8, 3, 3, 8, 1, 3, 3, 0], (0, 7, 8, 16, 17, 19, 22, 25, 28, 29)),
  "all equal": ([2] * 9, (-1, 0, 1, 2, 5, 17, 18, 19)),
  "all zero": ([0] * 5, (-1, 0, 1)),
  "one dominates": (
    [1, 0, 1, 1 << 20, 1],
    (3, 1 << 19, 1 << 20, (1 << 20) + 2),
  ),
  "one": ([5], (0, 4, 5, 6)),
  "large and small": (
    [2.0**100, 2.0**-100, 2.0**100, 2.0**-100],
    (2.0**-101, 2.0**99, 2.0**100, 2.0**101, 2.0**102),
  ),
}


@pytest.mark.parametrize("sort_below", [0, 100])
@pytest.mark.parametrize("name", WITHIN)
def test_top_within(name, sort_below, monkeypatch):
  from unisparse_jax.attention import scoring

  monkeypatch.setattr(scoring, "_SORT_BELOW", sort_below)
  row, budgets = WITHIN[name]
  budget = np.asarray(budgets, np.float32) / 16
  scores = np.tile(np.asarray(row, np.float32) / 16, (len(budget), 1))
  expected = within_by_sort(scores, budget)
  find = jax.jit(scoring.top_within)
  np.testing.assert_array_equal(find(scores, budget), expected)
  # A zero with a sign is a zero.
  signed = np.where(scores == 0.0, np.float32(-0.0), scores)
  np.testing.assert_array_equal(find(signed, budget), expected)


def test_top_within_a_head_of_128k_tokens():
  from unisparse_jax.attention import scoring

  # 512 x 1024 causal blocks, the last rows padding; ties in hundreds.
  scores = np.random.default_rng(0).integers(0, 24, (2, 512, 1024))
  scores = np.tril(scores, 512).astype(np.float32) / 16
  scores[1, 300:] = 0.0
  scores = scores.reshape(2, -1)
  total = scores.sum(-1)
  counts = []
  for share in (0.0, 0.37, 0.9, 1.0):
    budget = (share * total).astype(np.float32)
    found = np.asarray(jax.jit(scoring.top_within)(scores, budget))
    np.testing.assert_array_equal(found, within_by_sort(scores, budget))
    counts.append(found.sum())
  assert counts[0] == 0 and counts[-1] == scores.size
  assert counts[1] < counts[2] < (scores > 0.0).sum()


def test_one_query_that_looks_at_one_place_is_heard():
  """A needle: by the mean over a block it is lost, by the largest it is not."""
  q, k = (np.zeros((1, 256, 1, 8), np.float32) for _ in range(2))
  k[0, 33, 0, 0] = k[0, 97, 0, 1] = 1.0
  q[0, 192:, 0, 1] = 40.0  # The others look elsewhere.
  q[0, 250, 0] = [40.0] + [0.0] * 7
  kept = {}
  for over_queries in ("mean", "max"):
    pattern = make(
      "unisparse_threshold",
      min_score=8.0,
      over_queries=over_queries,
      window_q=1,
      window_kv=1,
      num_sink_blocks=0,
    )
    mask = jax.jit(pattern.select)(q, k)
    kept[over_queries] = np.asarray(mask.to_dense())[0, 0]
  row, block = 250 // pattern.block_q, 33 // pattern.block_kv
  assert kept["max"][row, block] and not kept["mean"][row, block]
  assert (kept["max"] >= kept["mean"]).all()
