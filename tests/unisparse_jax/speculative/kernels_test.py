# SPDX-License-Identifier: Apache-2.0
"""Plain and speculative decoding on the Triton back ends of their ops."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.cache_append import api as append_api
from pallas_kernels.cache_append import triton as append_triton
from pallas_kernels.head_rotation import api as rotation_api
from pallas_kernels.head_rotation import triton as rotation_triton
from pallas_kernels.top_log_probs import api as top_api
from pallas_kernels.top_log_probs import triton as top_triton
from pallas_kernels.tree_attention import api as tree_api
from pallas_kernels.tree_attention import triton as tree_triton
from tests.unisparse_jax.speculative import conftest
from unisparse_jax import models, speculative


@pytest.fixture
def calls(monkeypatch):
  """Registers the kernels as "interpreted"; counts their calls by name."""
  # Two programs for the cache, one for the tree, and a merge.
  tile = (16, 32, 4, 1, 3)
  kernels = dict(
    tree_attention=functools.partial(
      tree_triton.tree_attention, tile=tile, interpret=True
    ),
    top_log_probs=functools.partial(top_triton.top_log_probs, interpret=True),
    head_rotation=functools.partial(
      rotation_triton.head_rotation, interpret=True
    ),
    cache_append=functools.partial(append_triton.cache_append, interpret=True),
  )
  found = dict.fromkeys(kernels, 0)

  def counting(name):
    def fn(*args, **kwargs):
      found[name] += 1
      return kernels[name](*args, **kwargs)

    return fn

  apis = (tree_api, top_api, rotation_api, append_api)
  for name, api in zip(kernels, apis, strict=True):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted", counting(name))
  return found


def test_greedy_tokens_are_those_of_xla(calls):
  config = dataclasses.replace(conftest.CONFIG, head_dim=16)
  target = conftest.make_model(0, config)
  drafter = speculative.SmallDecoder(model=conftest.make_model(1, config))
  prompts = np.asarray(
    jax.random.randint(jax.random.key(0), (2, 9), 0, 24), np.int32
  )
  lengths = np.asarray([9, 3], np.int32)
  expected = models.generate(
    target, prompts, lengths=lengths, max_new_tokens=10
  )
  with dispatch.preferring(**dict.fromkeys(calls, "interpreted")):
    plain = models.generate(target, prompts, lengths=lengths, max_new_tokens=10)
    # One a layer, in the prompt's pass, too, and one a step for all layers.
    assert calls == dict(
      tree_attention=2, top_log_probs=0, head_rotation=4, cache_append=1
    )
    np.testing.assert_array_equal(plain, expected)
    for packed in (), (5, 9):  # of the 7 nodes of each row, or of both
      drafted = speculative.generate(
        target,
        drafter,
        prompts,
        lengths=lengths,
        max_new_tokens=10,
        shape=speculative.TreeShape(
          width=3, base_depth=2, max_depth=2, buckets=(7,), packed=packed
        ),
      )
      np.testing.assert_array_equal(drafted.tokens, expected)
  assert min(calls.values()) > 0


def test_padding_of_one_row_changes_no_token(calls, monkeypatch):
  """What a GPU does in a batch of one, in caches that are full at the end."""
  config = dataclasses.replace(conftest.CONFIG, head_dim=16, qk_norm=True)
  target = conftest.make_model(0, config)
  drafter = speculative.SmallDecoder(model=target)  # which is always right
  prompt = np.asarray(
    jax.random.randint(jax.random.key(0), (1, 9), 0, 24), np.int32
  )
  shape = speculative.TreeShape(
    width=3, base_depth=2, max_depth=2, buckets=(7,)
  )
  policies = (
    None,
    speculative.Gated(  # closes at once, for stretches of plain steps
      policy=speculative.Fixed(depth=2, nodes=6), step_cost=20.0, period=4
    ),
  )

  def run():
    logits, cache = models.prefill(target, prompt, capacity=9 + 11)
    found = [models.decode(target, logits, cache, max_new_tokens=12)[0]]
    steps = []
    for policy in policies:
      drafted = speculative.generate(
        target,
        drafter,
        prompt,
        max_new_tokens=12,
        shape=shape,
        policy=policy,
        capacity=9 + 12 + 3,
      )
      found.append(drafted.tokens)
      steps.append(int(drafted.log.num_steps))
    return found, steps

  (expected, *others), wanted_steps = run()
  # The package exports the function under the module's name.
  module = importlib.import_module("unisparse_jax.models.tree_forward")
  monkeypatch.setitem(module._LEAST_ROWS, "cpu", 16)
  with dispatch.preferring(**dict.fromkeys(calls, "interpreted")):
    found, steps = run()
  assert steps == wanted_steps and steps[0] == 4 < steps[1]
  for tokens in (*others, *found):
    np.testing.assert_array_equal(tokens, expected)
