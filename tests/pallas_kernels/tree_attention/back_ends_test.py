# SPDX-License-Identifier: Apache-2.0
"""tree_attention on every back end that a CPU can run, and on a card."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import api, triton
from tests import helpers

# Measured at most 1.4e-7, 2.3e-3 and 3.2e-4 on a CPU; the reference: 1.4e-7,
# 1.7e-3 and 2.1e-4, the rounding of what it returns.
TOLERANCE = {"float32": 5e-7, "bfloat16": 6e-3, "float16": 1e-3}


@dataclasses.dataclass(frozen=True)
class Sizes:
  cache_len: tuple[int, ...]
  q_len: int
  tree_len: int
  num_heads: int
  num_kv_heads: int
  capacity: int = 80
  head_dim: int = 64
  scale: float | None = None


SIZES = {
  "step": Sizes((37, 0, 80), 1, 1, 6, 2),
  "step_128": Sizes((77,), 1, 1, 4, 1, head_dim=128),
  "tree": Sizes((0, 64), 64, 64, 6, 2),  # 192 rows: several tiles of them
  "scratch": Sizes((5, 70), 8, 40, 4, 4, head_dim=32, scale=0.3),
  # 48 rows, and tiles of 16 or 64: a count ends inside a tile or between two.
  "one_row": Sizes((50,), 16, 16, 6, 2, head_dim=16),
  "rows": Sizes((0, 50, 80, 33), 16, 16, 6, 2, head_dim=16),
  "many_nodes": Sizes((0, 50, 80, 33), 40, 40, 4, 4, head_dim=16),
}


# Three tiles of keys at most for four programs, and one for the tree.
SPLIT = (16, 32, 4, 2, 5)
# Tests of the same sizes share what is compiled.
attend = jax.jit(
  api.tree_attention, static_argnames=("scale", "implementation")
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  fn = functools.partial(triton.tree_attention, interpret=True)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted", fn)
  fn = functools.partial(fn, tile=SPLIT)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted_splits", fn)


def tree_mask(rng, q_len, tree_len):
  """The last q_len of tree_len nodes with random parents, [q_len, tree_len]."""
  seen = np.eye(tree_len, dtype=bool)
  for node in range(1, tree_len):
    seen[node] |= seen[rng.integers(node)]
  return seen[tree_len - q_len :]


def make_case(sizes, dtype="float32", factor=1.0):
  rng = np.random.default_rng(sizes.q_len)
  batch = len(sizes.cache_len)

  def draw(*shape):
    x = rng.standard_normal((batch, *shape)).astype(np.float32)
    return jnp.asarray(x).astype(dtype)

  cache = sizes.num_kv_heads, sizes.capacity, sizes.head_dim
  tree = sizes.tree_len, sizes.num_kv_heads, sizes.head_dim
  masks = [tree_mask(rng, sizes.q_len, sizes.tree_len) for _ in range(batch)]
  q = draw(sizes.q_len, sizes.num_heads, sizes.head_dim)
  return dict(
    q=q * jnp.asarray(factor, dtype),
    cache_k=draw(*cache),
    cache_v=draw(*cache),
    cache_len=jnp.asarray(sizes.cache_len, jnp.int32),
    tree_k=draw(*tree),
    tree_v=draw(*tree),
    tree_mask=jnp.asarray(np.stack(masks)),
  )


def in_float64(case, *, scale=None):
  k, v = (
    np.concatenate(
      [np.swapaxes(np.float64(case[f"cache_{x}"]), 1, 2), case[f"tree_{x}"]],
      axis=1,
    )
    for x in "kv"
  )
  batch, q_len, num_heads, _ = case["q"].shape
  capacity = case["cache_k"].shape[2]
  kept = np.zeros((batch, 1, q_len, k.shape[1]), bool)
  for row, length in enumerate(case["cache_len"]):
    kept[row, :, :, :length] = True
  kept[:, 0, :, capacity:] = case["tree_mask"]
  kept = np.tile(kept, (1, num_heads, 1, 1))
  return helpers.numpy_attention(case["q"], k, v, kept, scale=scale)[0]


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("step", "float32"),
    ("step", "bfloat16"),
    ("step_128", "float16"),
    ("tree", "float32"),
    ("tree", "bfloat16"),
    ("scratch", "float32"),
  ],
)
@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_equals_float64(implementation, name, dtype):
  sizes = SIZES[name]
  case = make_case(sizes, dtype)
  out = attend(**case, scale=sizes.scale, implementation=implementation)
  assert out.dtype == dtype
  error = helpers.relative_error(out, in_float64(case, scale=sizes.scale))
  assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize(
  ("name", "dtype"), [("step", "bfloat16"), ("tree", "float32")]
)
@pytest.mark.parametrize(
  "implementation", ["interpreted_splits", helpers.TRITON_BACK_ENDS[-1]]
)
def test_more_programs_than_tiles_of_keys(
  implementation, name, dtype, monkeypatch
):
  if implementation == "triton":
    fn = functools.partial(triton.tree_attention, tile=SPLIT)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", fn)
  case = make_case(SIZES[name], dtype)
  out = api.tree_attention(**case, implementation=implementation)
  error = helpers.relative_error(out, in_float64(case))
  assert error <= TOLERANCE[dtype], error


COUNTED = (*helpers.TRITON_BACK_ENDS, "interpreted_splits")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", COUNTED)
@pytest.mark.parametrize("name", ["one_row", "rows"])
def test_every_count_of_tokens(implementation, name, dtype):
  case = make_case(SIZES[name], dtype)
  whole = in_float64(case)
  batch, n = whole.shape[:2]
  for count in range(n + 1):
    # Rows of other counts, which come to every one; the first is never left.
    counts = (count + 5 * np.arange(batch)) % (n + 1)
    left_out = np.arange(n) >= counts[:, None]
    out = attend(
      **case,
      counts=jnp.asarray(counts, jnp.int32),
      implementation=implementation,
    )
    assert out.dtype == dtype
    assert (np.asarray(out)[left_out] == 0).all()
    if count:
      expected = np.where(left_out[..., None, None], 0.0, whole)
      error = helpers.relative_error(out, expected)
      assert error <= TOLERANCE[dtype], (count, error)


@pytest.mark.parametrize("implementation", COUNTED)
def test_counts_end_in_any_tile_of_nodes(implementation):
  case = make_case(SIZES["many_nodes"])
  whole = in_float64(case)
  for counts in ((40, 1, 17, 32), (0, 33, 40, 16)):
    left_out = np.arange(40) >= np.asarray(counts)[:, None]
    out = attend(
      **case,
      counts=jnp.asarray(counts, jnp.int32),
      implementation=implementation,
    )
    expected = np.where(left_out[..., None, None], 0.0, whole)
    error = helpers.relative_error(out, expected)
    assert error <= TOLERANCE["float32"], (counts, error)


def flat(case, counts, packed, fill):
  """The case with its counted tokens in one row, `fill` behind them."""
  kept = np.arange(case["tree_mask"].shape[1]) < counts[:, None]

  def row(values):
    values = np.asarray(values)[kept]
    out = np.full((1, packed, *values.shape[1:]), fill, values.dtype)
    out[0, : len(values)] = values
    return jnp.asarray(out)

  rows = {name: row(case[name]) for name in ("q", "tree_k", "tree_v")}
  starts = (np.cumsum(counts) - counts).astype(np.int32)
  return kept, case | rows | dict(
    counts=jnp.asarray(counts), starts=jnp.asarray(starts)
  )


@pytest.mark.parametrize(
  ("name", "dtype"), [("rows", "bfloat16"), ("many_nodes", "float32")]
)
@pytest.mark.parametrize("implementation", COUNTED)
def test_a_flat_row(implementation, name, dtype):
  case = make_case(SIZES[name], dtype)
  whole = in_float64(case)
  n, packed = whole.shape[1], 3 * whole.shape[1]
  # Room behind the last token, a last row of none at the very end, nothing.
  for some in ((7, n, 0, 3), (n, 1, n, 0), (n, n, n, 0), (0, 0, 0, 0)):
    counts = np.asarray(some, np.int32)
    kept, args = flat(case, counts, packed, fill=7.0)
    out = attend(**args, implementation=implementation)
    assert out.shape == (1, packed, *whole.shape[2:])
    assert out.dtype == dtype
    total = counts.sum()
    assert (np.asarray(out)[0, total:] == 0).all()
    if total:
      error = helpers.relative_error(out[0, :total], whole[kept])
      assert error <= TOLERANCE[dtype], (counts, error)


@pytest.mark.parametrize("implementation", COUNTED[2:])
def test_behind_a_flat_row_nothing_is_read(implementation):
  case = make_case(SIZES["rows"])
  counts = np.asarray((7, 16, 0, 3), np.int32)
  _, args = flat(case, counts, 40, fill=0.0)
  expected = attend(**args, implementation=implementation)
  _, args = flat(case, counts, 40, fill=np.nan)
  out = attend(**args, implementation=implementation)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("implementation", COUNTED)
def test_one_token_more_is_seen(implementation):
  case = make_case(SIZES["rows"])
  counts = jnp.asarray((7, 16, 0, 3), jnp.int32)
  out = attend(**case, counts=counts, implementation=implementation)
  more = attend(**case, counts=counts + 1, implementation=implementation)
  assert helpers.relative_error(more, np.asarray(out)) > 0.05


@pytest.mark.parametrize("implementation", COUNTED[2:])
def test_tokens_past_the_count_are_not_read(implementation):
  case = make_case(SIZES["rows"])
  counts = np.asarray((7, 16, 0, 3), np.int32)
  expected = attend(**case, counts=counts, implementation=implementation)
  junk = np.arange(16) >= counts[:, None]
  for name in ("q", "tree_k", "tree_v"):
    case[name] = jnp.where(junk[..., None, None], np.float32("nan"), case[name])
  out = attend(**case, counts=counts, implementation=implementation)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_one_slot_more_is_seen(implementation):
  case = make_case(SIZES["step"], "bfloat16")
  expected = in_float64(case)
  case["cache_len"] = case["cache_len"].at[1].set(1)
  out = attend(**case, implementation=implementation)
  assert helpers.relative_error(out, expected) > TOLERANCE["bfloat16"]


@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS)
def test_large_logits(implementation):
  case = make_case(SIZES["step"], factor=1e4)
  out = attend(**case, implementation=implementation)
  # The rounding of a logit of some 10,000 is that of its exponential.
  assert helpers.relative_error(out, in_float64(case)) <= 2e-3


@pytest.mark.parametrize("implementation", helpers.TRITON_BACK_ENDS[2:])
def test_slots_past_the_end_are_not_read(implementation):
  case = make_case(SIZES["step"])
  expected = attend(**case, implementation=implementation)
  slot = np.arange(case["cache_k"].shape[2])
  is_junk = slot[None, :] >= np.asarray(case["cache_len"])[:, None]
  for name in ("cache_k", "cache_v"):
    junk = is_junk[:, None, :, None]
    case[name] = jnp.where(junk, jnp.float32(np.nan), case[name])
  out = attend(**case, implementation=implementation)
  np.testing.assert_array_equal(out, expected)


def test_a_cache_of_another_dtype_is_read():
  case = make_case(SIZES["step"], "bfloat16")
  case["q"] = case["q"].astype(jnp.float32)
  for implementation in ("xla", "interpreted"):
    out = attend(**case, implementation=implementation)
    assert helpers.relative_error(out, in_float64(case)) <= 1.5e-6


@pytest.mark.parametrize(
  ("capacity", "num_walks", "num_rows", "splits"),
  [
    (128, 2, 3, 1),  # nothing to share
    (512, 2, 3, 5),
    (512, 512, 3, 1),  # the batch fills the card
    (1408, 32, 320, 3),  # 160 programs without sharers
    (131_072, 4, 192, 33),
    (131_072, 1, 1, 33),
  ],
)
def test_programs_share_a_long_cache(capacity, num_walks, num_rows, splits):
  if jnp.zeros(()).devices().pop().platform == "gpu":
    pytest.skip("depends on the card's multiprocessors")
  tile = triton.default_tile(
    num_rows=num_rows,
    num_walks=num_walks,
    capacity=capacity,
    head_dim=64,
    itemsize=2,
  )
  assert tile[-1] == splits


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(q=jnp.zeros((3, 1, 64))), r"^q must have shape"),
    (dict(q=jnp.zeros((3, 1, 5, 64))), r"^num_kv_heads must divide num_heads"),
    (dict(cache_v=jnp.zeros((3, 2, 79, 64))), r"^cache_v must have shape"),
    (dict(cache_len=jnp.zeros((2,), jnp.int32)), r"^cache_len must have shape"),
    (dict(tree_k=jnp.zeros((3, 1, 1, 64))), r"^tree_k must have shape"),
    (dict(tree_mask=jnp.ones((3, 1), bool)), r"^tree_mask must have shape"),
    (dict(counts=jnp.zeros((2,), jnp.int32)), r"^counts must have shape"),
    (dict(scale=-1.0), r"^scale must be None or a finite number"),
    (dict(implementation="cudnn"), r"^implementation must be a known name"),
  ],
)
def test_bad_arguments_are_named(change, message):
  case = make_case(SIZES["step"])
  with pytest.raises(ValueError, match=message):
    api.tree_attention(**case | change)


def test_counts_need_a_query_for_every_new_token():
  case = make_case(SIZES["scratch"])
  counts = jnp.asarray([8, 8], jnp.int32)
  with pytest.raises(ValueError, match=r"^counts must come with a query"):
    api.tree_attention(**case, counts=counts)


def test_a_flat_row_needs_counts():
  case = make_case(SIZES["rows"])
  _, args = flat(case, np.asarray((7, 16, 0, 3), np.int32), 40, fill=0.0)
  with pytest.raises(ValueError, match=r"^starts must come with counts"):
    api.tree_attention(**args | dict(counts=None))
  with pytest.raises(ValueError, match=r"^tree_k must have shape"):
    api.tree_attention(**args | dict(tree_k=args["tree_k"][:, :39]))
  with pytest.raises(ValueError, match=r"^q must have shape"):
    api.tree_attention(**case | dict(starts=args["starts"]))


def test_triton_names_what_it_cannot_serve():
  odd = dataclasses.replace(SIZES["step"], head_dim=48)
  with pytest.raises(NotImplementedError, match=r"got head_dim=48"):
    api.tree_attention(**make_case(odd), implementation="interpreted")
  wide = make_case(SIZES["step"])
  wide["q"] = wide["q"].astype(jnp.int32)
  with pytest.raises(NotImplementedError, match=r"of dtype .* got int32"):
    api.tree_attention(**wide, implementation="interpreted")
