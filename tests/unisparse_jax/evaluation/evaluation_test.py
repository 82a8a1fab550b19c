# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import attention, evaluation, models, tasks

SMALL = models.DecoderConfig(
  vocab_size=61,
  num_layers=2,
  embed_dim=32,
  mlp_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_len=256,
)
DENSE = attention.DenseAttention(implementation="tiled")
NARROW = attention.SparseAttention(
  pattern=attention.Streaming(num_sink=0, num_local=8, block_q=8, block_kv=8)
)
ALL_BLOCKS = attention.SparseAttention(
  pattern=attention.Dense(block_q=16, block_kv=16)
)


@pytest.fixture(scope="module")
def model():
  model = models.Decoder(SMALL, rngs=nnx.Rngs(0))
  # Attention that counts: random weights of the usual size hardly move logits.
  state = nnx.state(model, nnx.Param)
  nnx.update(model, jax.tree.map(lambda x: x * jnp.float32(2.0), state))
  return model


@pytest.fixture(scope="module")
def tokens():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(0, 61, (2, 96)), jnp.int32)


@pytest.fixture(scope="module")
def qkv(model, tokens):
  return models.capture_qkv(model, tokens, attention_fn=DENSE)[1]


def sample(length, targets=("needle",), max_new_tokens=6, seed=0):
  rng = np.random.default_rng(seed)
  return tasks.TaskSample(
    task="niah_single_1",
    prompt="",
    prompt_tokens=rng.integers(0, 61, length).astype(np.int32),
    targets=targets,
    match="all",
    max_new_tokens=max_new_tokens,
    metadata={},
  )


def spell(ids):
  return " ".join(str(int(i)) for i in ids)


# ---- next token


def test_dense_agrees_with_itself(model, tokens):
  quality = evaluation.next_token_quality(
    model, tokens, attention_fn=DENSE, dense_fn=DENSE
  )
  assert quality.kl == 0.0
  assert quality.agreement == 1.0
  assert quality.loss == quality.dense_loss


def test_all_blocks_are_dense(model, tokens):
  quality = evaluation.next_token_quality(
    model, tokens, attention_fn=ALL_BLOCKS
  )
  assert abs(quality.kl) < 1e-5
  assert quality.agreement == 1.0


def test_a_narrow_window_moves_the_next_token(model, tokens):
  quality = evaluation.next_token_quality(model, tokens, attention_fn=NARROW)
  assert quality.kl > 1e-3
  assert quality.agreement < 1.0


def test_next_token_values_are_those_of_the_logits(model, tokens, monkeypatch):
  # Several chunks, the last of them padded; a length not compiled before.
  monkeypatch.setattr(evaluation.next_token, "_CHUNK", 7)
  tokens = tokens[:, :90]
  quality = evaluation.next_token_quality(
    model, tokens, attention_fn=NARROW, dense_fn=DENSE
  )
  log_q, log_p = (
    np.asarray(
      jax.nn.log_softmax(model(tokens, attention_fn=fn)[0][:, :-1]), np.float64
    )
    for fn in (NARROW, DENSE)
  )
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
  picked = np.take_along_axis(log_q, np.asarray(tokens)[:, 1:, None], -1)
  np.testing.assert_allclose(quality.kl, kl, rtol=1e-3)
  np.testing.assert_allclose(quality.loss, -picked.mean(), rtol=1e-5)
  agreement = (log_p.argmax(-1) == log_q.argmax(-1)).mean()
  np.testing.assert_allclose(quality.agreement, agreement, rtol=1e-5)


def test_one_token_has_no_next(model):
  with pytest.raises(ValueError, match=r"tokens must hold 2 tokens"):
    evaluation.next_token_quality(
      model, jnp.zeros((1, 1), jnp.int32), attention_fn=DENSE
    )


def test_hidden_states_of_other_tokens_are_refused(model, tokens):
  hidden = evaluation.hidden_states(model, tokens, attention_fn=DENSE)
  with pytest.raises(ValueError, match="dense_hidden must have shape"):
    evaluation.compare_hidden_states(model, tokens, hidden, hidden[:1])


def test_one_pass_gives_hidden_states_and_qkv(model, tokens):
  hidden, calls = evaluation.hidden_states_and_qkv(
    model, tokens, attention_fn=NARROW
  )
  expected = evaluation.hidden_states(model, tokens, attention_fn=NARROW)
  np.testing.assert_allclose(hidden, expected, atol=1e-5)
  captured = models.capture_qkv(model, tokens, attention_fn=NARROW)
  assert len(calls) == len(captured) == 2
  for ours, theirs in zip(
    jax.tree.leaves(calls), jax.tree.leaves(captured), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---- answers


def test_a_padded_batch_answers_like_single_prompts(model):
  samples = [sample(n, seed=n) for n in (20, 48, 20)]
  single = [
    evaluation.answer(
      model,
      [one],
      spell,
      attention_fn=DENSE,
      prompt_len=len(one.prompt_tokens),
    )[0]
    for one in samples
  ]
  for batch_size in (2, 3):  # 2: the last batch is filled up
    batch = evaluation.answer(
      model,
      samples,
      spell,
      attention_fn=DENSE,
      prompt_len=64,
      batch_size=batch_size,
    )
    assert batch == single


def test_answers_are_those_of_greedy_decoding_and_scored(model):
  prompt = sample(24)
  tokens = np.zeros((1, 30), np.int32)
  tokens[0, :24] = prompt.prompt_tokens
  forward = nnx.jit(lambda m, t: m(t, attention_fn=DENSE)[0])
  for i in range(24, 30):  # causal: what follows i - 1 does not matter
    tokens[0, i] = int(forward(model, jnp.asarray(tokens))[0, i - 1].argmax())
  expected = spell(tokens[0, 24:])
  found, missed = evaluation.answer(
    model,
    [sample(24, targets=(expected,)), sample(24, targets=("needle",))],
    spell,
    attention_fn=DENSE,
    prompt_len=40,
  )
  assert found.text == missed.text == expected
  assert (found.score, missed.score) == (1.0, 0.0)


def test_answers_end_at_a_stop_and_at_their_budget(model):
  whole = evaluation.answer(
    model, [sample(24)], spell, attention_fn=DENSE, prompt_len=24
  )[0].text.split()
  short = evaluation.answer(
    model,
    [sample(24, max_new_tokens=2)],
    spell,
    attention_fn=DENSE,
    prompt_len=24,
    max_new_tokens=6,
  )[0].text.split()
  assert short == whole[:2]
  stopped = evaluation.answer(
    model,
    [sample(24)],
    spell,
    attention_fn=DENSE,
    prompt_len=24,
    stop_ids=(int(whole[0]),),
  )[0].text.split()
  assert stopped == [whole[0]] * 6  # the rest is filled with the stop


def test_a_prompt_longer_than_the_room_is_named(model):
  with pytest.raises(ValueError, match=r"prompt_len must hold every prompt"):
    evaluation.answer(
      model, [sample(24)], spell, attention_fn=DENSE, prompt_len=23
    )
  with pytest.raises(ValueError, match="max_len"):
    evaluation.answer(
      model, [sample(24)], spell, attention_fn=DENSE, prompt_len=256
    )


# ---- layers


def test_all_blocks_keep_everything(qkv):
  out = jax.jit(DENSE)(*qkv)
  quality = evaluation.layer_quality(attention.Dense(), *qkv, out)
  assert quality.density == quality.nominal_density == 1.0
  np.testing.assert_allclose(
    [quality.recall, quality.cra, quality.cosine], 1.0, rtol=1e-5
  )
  assert quality.relative_l1 < 1e-5


def test_a_narrow_window_loses_mass_and_output(qkv):
  out = jax.jit(DENSE)(*qkv)
  quality = evaluation.layer_quality(NARROW.pattern, *qkv, out)
  assert quality.density < 0.5
  assert quality.cra <= quality.recall_p1 <= quality.recall < 0.9
  assert quality.relative_l1 > 0.1
  assert quality.cosine < 1.0


# ---- speed


@pytest.mark.parametrize("fn", [DENSE, NARROW])
def test_times_are_positive_and_parts_apart(qkv, fn):
  timed = evaluation.time_attention(fn, *qkv, repeats=1)
  assert timed.total_ms > 0.0
  assert timed.attend_ms > 0.0
  assert (timed.select_ms > 0.0) == (fn is NARROW)
  # q, k, v and the output are counted at least.
  assert timed.peak_bytes >= sum(x.nbytes for x in qkv) + qkv[0].nbytes


def test_prefill_is_timed_and_grows_with_the_cache(model, tokens):
  short, long = (
    evaluation.time_prefill(model, tokens[:, :n], DENSE, repeats=1, warmup=0)
    for n in (32, 96)
  )
  assert short.repeats == 1
  assert short.median_ms > 0.0
  assert long.peak_bytes > short.peak_bytes
