# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax

from unisparse_jax.training import train_step

LOGITS = np.array(
  [[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]],
  np.float32,
)
TARGETS = np.array([[2, 1, 0, 0]], np.int32)
WEIGHTS = np.array([[1.0, 10.0, 0.1, 10.0]], np.float32)


def literal_nll():
  nll = []
  for logits, target in zip(LOGITS[0], TARGETS[0], strict=True):
    p = np.exp(logits.astype(np.float64))
    nll.append(-np.log(p[target] / p.sum()))
  return np.array(nll)


def test_loss_and_sums_by_hand():
  loss, sums = train_step.weighted_loss(
    jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(WEIGHTS)
  )
  nll = literal_nll()
  expected = np.sum(WEIGHTS[0] * nll) / 21.1
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(sums["loss_sum"], expected * 21.1, rtol=1e-6)
  np.testing.assert_allclose(sums["weight_sum"], 21.1, rtol=1e-6)
  np.testing.assert_allclose(sums["code_loss_sum"], nll[0], rtol=1e-6)
  assert sums["code_count"] == 1
  np.testing.assert_allclose(sums["answer_loss_sum"], nll[[1, 3]].sum(), 1e-6)
  assert sums["answer_count"] == 2
  assert sums["answer_correct"] == 1


def test_z_loss_adds_the_mean_square_of_lse():
  args = (jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
  plain, _ = train_step.weighted_loss(*args)
  loss, _ = train_step.weighted_loss(*args, z_loss=0.5)
  lse = np.log(np.exp(LOGITS).sum(-1))
  np.testing.assert_allclose(loss - plain, 0.5 * np.mean(lse**2), rtol=1e-5)


def test_softmax_is_float32_for_bfloat16_logits():
  logits = jnp.asarray(LOGITS, jnp.bfloat16)  # exact in bfloat16
  loss, _ = train_step.weighted_loss(
    logits, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS)
  )
  expected = np.sum(WEIGHTS[0] * literal_nll()) / 21.1
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_all_weights_zero_is_no_division_by_zero():
  zeros = jnp.zeros((1, 4))
  loss, _ = train_step.weighted_loss(
    jnp.asarray(LOGITS), jnp.asarray(TARGETS), zeros
  )
  assert loss == 0


def test_weights_belong_to_the_token_that_is_predicted():
  # A model that always predicts token 1, certain of it.
  import flax.nnx as nnx

  class Constant(nnx.Module):
    def __init__(self):
      self.logits = nnx.Param(jnp.array([0.0, 50.0, 0.0]))

    def __call__(self, tokens, **kwargs):
      del kwargs
      shape = (*tokens.shape, 3)
      return jnp.broadcast_to(self.logits[...][None, None, :], shape), None

  graphdef, params = nnx.split(Constant())
  params = nnx.to_pure_dict(params)
  transform = optax.sgd(1.0)
  step = train_step.make_train_step(
    graphdef, transform, attention_fn=None, z_loss=0.0, remat=False
  )
  batch = {
    "tokens": jnp.array([[0, 1, 2, 1]], jnp.int32),
    "loss_weights": jnp.array([[7.0, 1.0, 0.0, 10.0]]),
  }
  state = {"params": params, "opt_state": transform.init(params)}
  _, metrics = jax.jit(step)(state, batch)
  named = dict(zip(train_step.METRIC_NAMES, np.asarray(metrics), strict=True))
  # Only the prediction of token 2 is wrong, and it has no weight.
  assert named["loss_sum"] == 0
  assert named["weight_sum"] == 11
  assert (named["answer_count"], named["answer_correct"]) == (1, 1)
  assert named["grad_norm"] < 1e-6
