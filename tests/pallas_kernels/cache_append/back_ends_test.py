# SPDX-License-Identifier: Apache-2.0
"""cache_append on every back end that a CPU can run, and on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cache_append import api, triton

BACK_ENDS = (
  "reference",
  "interpreted",
  pytest.param("triton", marks=pytest.mark.gpu),
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  fn = functools.partial(triton.cache_append, interpret=True)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted", fn)


def make(count, batch, n, capacity, dtype=jnp.float32, new_dtype=None):
  rng = np.random.default_rng(0)
  shapes = (batch, 2, capacity, 16), (batch, n, 2, 16)
  return [
    tuple(jnp.asarray(rng.standard_normal(shape), t) for _ in range(count))
    for shape, t in zip(shapes, (dtype, new_dtype or dtype), strict=True)
  ]


@pytest.mark.parametrize("implementation", BACK_ENDS)
@pytest.mark.parametrize(
  ("count", "n", "starts"),
  [
    (1, 1, [0]),
    (6, 1, [3, 12, 0]),  # 12: the last slot
    (4, 5, [0, 7, 8]),  # 8: the last place for five
    (2, 5, [9, 40, 3]),  # moved back
    (2, 13, [1, 0, 13]),  # everything
    (5, 41, [2, 0, 9]),  # several programs, the last not full
  ],
)
def test_slots_are_written_and_no_others(implementation, count, n, starts):
  capacity = 13 if n <= 13 else n + 9
  buffers, new = make(count, len(starts), n, capacity)
  found = jax.jit(
    functools.partial(api.cache_append, implementation=implementation)
  )(buffers, new, jnp.asarray(starts, jnp.int32))
  for buffer, values, out in zip(buffers, new, found, strict=True):
    wanted = np.asarray(buffer).copy()
    for row, start in enumerate(starts):
      start = min(start, capacity - n)
      wanted[row, :, start : start + n] = np.swapaxes(values[row], 0, 1)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("implementation", BACK_ENDS)
def test_values_take_the_dtype_of_the_buffer(implementation):
  buffers, new = make(2, 2, 3, 8, jnp.bfloat16, jnp.float32)
  starts = jnp.asarray([1, 4], jnp.int32)
  found = api.cache_append(buffers, new, starts, implementation=implementation)
  assert found[1].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    found[1][1, 0, 4:7], new[1][1, :, 0].astype(jnp.bfloat16)
  )


@pytest.mark.parametrize("implementation", BACK_ENDS)
@pytest.mark.parametrize(
  ("n", "num_slots", "capacity", "starts"),
  [
    (16, 1, 8, [7, 2]),  # 7: the last slot
    (33, 17, 30, [20, 2]),  # two programs; 20: moved back to 13
  ],
)
def test_slots_behind_those_asked_for_are_not_written(
  implementation, n, num_slots, capacity, starts
):
  buffers, new = make(3, 2, n, capacity)
  found = api.cache_append(
    buffers,
    new,
    jnp.asarray(starts, jnp.int32),
    num_slots=num_slots,
    implementation=implementation,
  )
  wanted = np.asarray(buffers[2]).copy()
  for row, start in enumerate(starts):
    start = min(start, capacity - num_slots)
    values = np.swapaxes(new[2][row, :num_slots], 0, 1)
    wanted[row, :, start : start + num_slots] = values
  np.testing.assert_array_equal(found[2], wanted)


def test_many_buffers_take_several_launches(monkeypatch):
  monkeypatch.setattr(triton, "_MAX_BUFFERS", 2)
  buffers, new = make(5, 2, 1, 4)
  starts = jnp.asarray([2, 0], jnp.int32)
  found, wanted = (
    api.cache_append(buffers, new, starts, implementation=name)
    for name in ("interpreted", "reference")
  )
  assert len(found) == 5
  for x, y in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(x, y)


def test_bad_arguments_are_named():
  buffers, new = make(2, 2, 3, 8)
  starts = jnp.zeros((2,), jnp.int32)
  with pytest.raises(ValueError, match=r"^new must be as many as buffers"):
    api.cache_append(buffers, new[:1], starts)
  with pytest.raises(ValueError, match=r"^num_slots .* expected 1 .*<= 2"):
    api.cache_append([x[:, :, :2] for x in buffers], new, starts)
  with pytest.raises(ValueError, match=r"^num_slots .* got num_slots=4"):
    api.cache_append(buffers, new, starts, num_slots=4)
  with pytest.raises(ValueError, match=r"^starts must have shape"):
    api.cache_append(buffers, new, starts[:1])
  with pytest.raises(ValueError, match=r"^buffers must have shape"):
    api.cache_append((buffers[0], buffers[1][:, :, :5]), new, starts)
  odd = [x[..., :12] for x in buffers], [x[..., :12] for x in new]
  with pytest.raises(NotImplementedError, match=r"got head_dim=12"):
    api.cache_append(*odd, starts, implementation="interpreted")
