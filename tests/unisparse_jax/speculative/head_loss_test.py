# SPDX-License-Identifier: Apache-2.0
"""The unrolled loss against one written out slot by slot in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import attention, models
from unisparse_jax.speculative import eagle_head, head_loss

CONFIG = models.DecoderConfig(
  vocab_size=40,
  num_layers=2,
  embed_dim=16,
  mlp_dim=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  max_len=64,
)
DENSE = attention.DenseAttention(implementation="xla")


@pytest.fixture(scope="module")
def made():
  target = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
  head = eagle_head.EagleHead.from_target(target, rngs=nnx.Rngs(1))
  graphdef, state = nnx.split(head)
  state = jax.tree.map(lambda x: x * 5.0 if x.ndim == 2 else x, state)
  head = nnx.merge(graphdef, state)
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(0, 40, (2, 12)), jnp.int32
  )
  hidden, _, taps = jax.jit(
    lambda tokens: target.hidden_states_and_taps(
      tokens, taps=head.config.tap_layers, attention_fn=DENSE
    )
  )(tokens)
  weights = jnp.asarray(
    np.arange(12)[None] >= np.array([[4], [6]]), jnp.float32
  )
  return target, head, tokens, hidden, taps, weights


def test_attention_sees_the_past_and_its_own_steps():
  rng = np.random.default_rng(1)
  q = rng.normal(size=(1, 9, 4, 4)).astype(np.float32)
  k, v = rng.normal(size=(2, 1, 9, 2, 4)).astype(np.float32)
  own_k, own_v = rng.normal(size=(2, 2, 1, 9, 2, 4)).astype(np.float32)
  got = head_loss.attend_unrolled(
    *map(jnp.asarray, (q, k, v)), list(own_k), list(own_v)
  )
  for i in range(9):
    for h in range(4):
      keys = [k[0, j, h // 2] for j in range(i + 1)]
      keys += [x[0, i, h // 2] for x in own_k]
      values = [v[0, j, h // 2] for j in range(i + 1)]
      values += [x[0, i, h // 2] for x in own_v]
      scores = np.array([q[0, i, h] @ key for key in keys]) / 2.0
      p = np.exp(scores - scores.max())
      expected = (p / p.sum()) @ np.array(values)
      np.testing.assert_allclose(got[0, i, h], expected, atol=1e-5)


def test_sums_are_those_of_a_loop(made):
  target, head, tokens, hidden, taps, weights = made
  steps = 3
  loss, sums = jax.jit(
    lambda *a: head_loss.unrolled_loss(
      head, *a, target.logits, weights, num_steps=steps, attention_fn=DENSE
    )
  )(tokens, taps, hidden)

  # Logits of every step, by the same layer but scored here.
  @jax.jit
  def unrolled(tokens, taps):
    features, firsts, later, logits = head.fused(taps), (), [], []
    for step in range(steps):
      out, k, v = head_loss.layer_step(
        head, tokens, features, firsts, later, step, DENSE
      )
      if step == 0:
        firsts = (k, v)
      else:
        later.append((k, v))
      logits.append(head.logits(out))
      features = head.feedback(out)
    return logits

  logits = [np.asarray(x) for x in unrolled(tokens, taps)]
  wanted = np.asarray(target.logits(hidden))
  expected = {name: np.zeros(steps) for name in head_loss.METRICS}
  for b in range(2):
    for i in range(12):
      alive = True
      for s in range(steps):
        if i + s + 2 >= 12:
          continue
        w = float(weights[b, i + s + 2])
        q = np.exp(logits[s][b, i] - logits[s][b, i].max())
        q /= q.sum()
        p = np.exp(wanted[b, i + s + 1] - wanted[b, i + s + 1].max())
        p /= p.sum()
        best = int(q.argmax())
        alive = alive and best == int(tokens[b, i + s + 2])
        values = dict(
          weight=1.0,
          loss=-(p * np.log(q)).sum(),
          correct=best == int(p.argmax()),
          hit=int(p.argmax()) in np.argsort(-q)[:10],
          overlap=np.minimum(p, q).sum(),
          chain=alive,
        )
        for name, value in values.items():
          expected[name][s] += w * float(value)
  for name in head_loss.METRICS:
    np.testing.assert_allclose(
      sums[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name
    )
  means = expected["loss"] / expected["weight"]
  np.testing.assert_allclose(
    loss, (means * 0.8 ** np.arange(steps)).sum(), rtol=1e-4
  )
  np.testing.assert_allclose(np.sum(sums["count"], axis=1), sums["weight"])


def test_summary_and_calibration_error():
  zeros = np.zeros((2, head_loss.NUM_BINS))
  sums = {
    "weight": np.array([10.0, 10.0]),
    "loss": np.array([20.0, 30.0]),
    "correct": np.array([8.0, 5.0]),
    "hit": np.array([9.0, 9.0]),
    "overlap": np.array([7.0, 6.0]),
    "chain": np.array([6.0, 3.0]),
    "confidence": zeros.copy(),
    "accuracy": zeros.copy(),
    "accepted": zeros.copy(),
    "count": zeros.copy(),
  }
  sums["count"][0, 3], sums["confidence"][0, 3] = 10.0, 2.5
  sums["accuracy"][0, 3], sums["accepted"][0, 3] = 4.0, 2.0
  found = head_loss.summarise(sums)
  assert found["tau"] == pytest.approx(1.9)
  assert found["accuracy"] == pytest.approx([0.8, 0.5])
  assert found["chain_accept"] == pytest.approx([0.6, 0.5])
  assert found["ece"] == pytest.approx(0.15)
  assert found["ece_sampled"] == pytest.approx(0.05)


def test_a_window_changes_nothing(made):
  target, head, tokens, hidden, taps, _ = made
  index = np.arange(12)[None]
  weights = jnp.asarray(
    (index >= [[4], [6]]) & (index < [[8], [12]]), jnp.float32
  )

  def loss(graphdef, state, window):
    head = nnx.merge(graphdef, state)
    return head_loss.unrolled_loss(
      head, tokens, taps, hidden, target.logits, weights, num_steps=3,
      window=window, attention_fn=DENSE,
    )  # fmt: skip

  graphdef, state = nnx.split(head)
  both = jax.jit(
    jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=(0, 2)
  )
  (whole, sums), grads = both(graphdef, state, None)
  (part, part_sums), part_grads = both(graphdef, state, 8)
  np.testing.assert_allclose(part, whole, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves((part_sums, part_grads)),
    jax.tree.leaves((sums, grads)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  # A window that is too small loses some.
  (_, small), _ = both(graphdef, state, 5)
  assert small["weight"][0] < sums["weight"][0]
