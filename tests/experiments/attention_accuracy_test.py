# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from configs.attention_accuracy import default, smoke
from experiments import attention_accuracy
from experiments.frame import flags_and_configs
from tests import helpers


def make_config(**changes):
  return attention_accuracy.Config(
    model="unused",
    length=256,
    patterns=(),
    dtype="float32",
    num_rows=64,
    **{"implementation": "xla", **changes},
  )


SETTINGS = dict(method="unisparse", top_p=0.6, block_q=32, block_kv=32)


def test_errors_are_those_of_rounding():
  q, k, v = helpers.make_qkv(q_len=256)
  found = attention_accuracy.check(make_config(), SETTINGS, q, k, v)
  assert 0.1 < found["density"] < 0.9
  for name in ("out", "lse", "dq", "dk", "dv"):
    assert found[name] < 2e-6


def test_a_wrong_value_is_seen(monkeypatch):
  q, k, v = helpers.make_qkv(q_len=256)
  attend = attention_accuracy._attend

  def wrong(q, k, v, mask, **settings):
    return attend(q, k, v.at[0, 0].add(1.0), mask, **settings)

  monkeypatch.setattr(attention_accuracy, "_attend", wrong)
  config = make_config(gradients=False)
  found = attention_accuracy.check(config, SETTINGS, q, k, v)
  assert found["out"] > 1e-3 and found["lse"] < 2e-6


@pytest.mark.parametrize("config", [default, smoke])
def test_configs_parse(config):
  flags_and_configs.to_dataclass(
    attention_accuracy.Config, config.get_config(), name="config"
  )


def test_relative_error():
  actual = jnp.array([3.0, 4.5], jnp.bfloat16)
  assert attention_accuracy.relative_error(actual, np.array([3.0, 4.0])) == 0.1
