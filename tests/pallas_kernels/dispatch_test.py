# SPDX-License-Identifier: Apache-2.0
"""Back ends that are named around a call, not in it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.top_log_probs import api


@pytest.fixture
def top(monkeypatch):
  """A compiled user of an op, and the back ends that it was traced with."""
  traced = []

  def back_end(name):
    def fn(logits, width):
      traced.append(name)
      return logits[..., :width], logits[..., :width]

    return fn

  names = ("xla", "one", "two")
  monkeypatch.setattr(api, "IMPLEMENTATIONS", {x: back_end(x) for x in names})

  @jax.jit
  def top(logits):
    return api.top_log_probs(logits, 1)

  return lambda: (top(jnp.zeros((2, 3))), traced)[1]


def test_compiled_once_for_each_preference(top):
  assert top() == ["xla"]
  for _ in range(2):
    with dispatch.preferring(top_log_probs="one"):
      assert top() == ["xla", "one"]
    assert top() == ["xla", "one"]


def test_contexts_nest(top):
  with dispatch.preferring(top_log_probs="one"):
    with dispatch.preferring(tree_attention="triton"):
      assert top() == ["one"]
      with dispatch.preferring(top_log_probs=None):
        assert top() == ["one", "xla"]
      assert dispatch.preferred("tree_attention") == "triton"
  assert dispatch.preferred("tree_attention") is None


def test_a_sequence_is_tried_in_order(top, monkeypatch):
  def refuse(logits, width):
    raise NotImplementedError("not today")

  monkeypatch.setitem(api.IMPLEMENTATIONS, "one", refuse)
  with dispatch.preferring(top_log_probs=["one", "two"]):
    assert top() == ["two"]


def test_names_are_checked(top):
  with pytest.raises(ValueError, match=r"^op must be a known name.*op='pool'"):
    dispatch.preferring(pool="xla")
  with dispatch.preferring(top_log_probs="three"):
    with pytest.raises(ValueError, match=r"^implementation must be a known"):
      top()
