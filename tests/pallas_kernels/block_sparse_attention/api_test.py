# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from tests.pallas_kernels.block_sparse_attention import suite


def call(**changes):
  (q, k, v, indices, counts), settings, _ = suite.make_case("square")
  arrays = dict(q=q, k=k, v=v, kv_block_indices=indices, num_kv_blocks=counts)
  return pallas_kernels.block_sparse_attention(
    **{**arrays, **settings, **changes}
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(q=jnp.zeros((256, 4, 16))), r"q must have shape.*expected 4 axes"),
    (dict(v=jnp.zeros((1, 256, 2, 8))), r"v must have shape.*head_dim=16"),
    (dict(k=jnp.zeros((1, 256, 3, 16))), r"num_kv_heads must divide"),
    (
      dict(k=jnp.zeros((1, 256, 2, 16), jnp.bfloat16)),
      r"k must have dtype float32; got bfloat16",
    ),
    (dict(q=jnp.zeros((1, 256, 4, 16), jnp.int32)), r"q must have dtype"),
    (dict(block_q=96), r"num_kv_blocks must have shape.*num_q_blocks=3"),
    (dict(block_q=0), r"block_q must be an integer >= 1; got block_q=0"),
    (dict(block_kv=2.5), r"block_kv must be an integer"),
    (dict(scale=float("nan")), r"scale must be"),
    (dict(q_offset=jnp.zeros((3,), jnp.int32)), r"q_offset must"),
    (dict(kv_len=1.5), r"kv_len must"),
    (dict(implementation="cuda"), r"implementation must.*'reference'"),
  ],
)
def test_bad_argument_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    call(**changes)


def test_a_named_back_end_never_falls_through():
  def refuse(*args, **kwargs):
    raise NotImplementedError("no")

  table = {"mosaic_gpu": refuse, "xla": lambda: "ran"}
  with pytest.raises(NotImplementedError):
    dispatch.dispatch(table, "mosaic_gpu")
  assert dispatch.dispatch(table, ("mosaic_gpu", "xla")) == "ran"
  assert dispatch.dispatch(table, None) == "ran"
  with pytest.raises(ExceptionGroup) as refusals:
    dispatch.dispatch({"xla": refuse}, None)
  assert len(refusals.value.exceptions) == 1


def test_callers_fault_is_never_swallowed():
  def reject():
    raise ValueError("bad argument")

  with pytest.raises(ValueError, match="bad argument"):
    dispatch.dispatch({"a": reject, "b": lambda: 1}, ("a", "b"))
