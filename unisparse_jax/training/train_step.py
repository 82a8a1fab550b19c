# SPDX-License-Identifier: Apache-2.0
"""Loss and one optimizer step, as pure functions over plain dicts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

# Sums over one batch, kept apart so that lines of metrics can add steps up.
METRIC_NAMES = (
  "loss_sum",  # weighted nats
  "weight_sum",
  "code_loss_sum",  # nats over tokens of weight exactly 1
  "code_count",
  "answer_loss_sum",  # nats over tokens of weight above 1
  "answer_count",
  "answer_correct",
  "lse_sq_mean",
  "grad_norm",
)


def weighted_loss(
  logits: Float[Array, "batch seq_len vocab_size"],
  targets: Int[Array, "batch seq_len"],
  weights: Float[Array, "batch seq_len"],
  *,
  z_loss: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
  """Weighted mean of the next-token loss, nats.

  loss = sum(weights * nll) / sum(weights) + z_loss * mean(lse ** 2)

  Args:
    logits: any float dtype; the softmax is taken in float32.
    targets: token that each position must predict.
    weights: float32, >= 0; 1 marks plain text, above 1 an answer.
    z_loss: coefficient, dimensionless.

  Returns:
    The scalar loss and the sums of METRIC_NAMES without grad_norm.
  """
  logits = logits.astype(jnp.float32)
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll = lse - picked
  loss_sum = jnp.sum(weights * nll)
  weight_sum = jnp.sum(weights)
  lse_sq_mean = jnp.mean(jnp.square(lse))
  loss = loss_sum / jnp.maximum(weight_sum, jnp.float32(1e-6))
  if z_loss:
    loss = loss + jnp.float32(z_loss) * lse_sq_mean
  code = (weights == 1.0).astype(jnp.float32)
  answer = (weights > 1.0).astype(jnp.float32)
  correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
  sums = {
    "loss_sum": loss_sum,
    "weight_sum": weight_sum,
    "code_loss_sum": jnp.sum(code * nll),
    "code_count": jnp.sum(code),
    "answer_loss_sum": jnp.sum(answer * nll),
    "answer_count": jnp.sum(answer),
    "answer_correct": jnp.sum(answer * correct),
    "lse_sq_mean": lse_sq_mean,
  }
  return loss, sums


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  *,
  attention_fn: Any,
  z_loss: float,
  remat: bool,
) -> Callable:
  """Returns `step(state, batch) -> (state, metrics)`.

  Args:
    graphdef: of the model, computing in its own dtype.
    optimizer: its state is `state["opt_state"]`.
    attention_fn: passed to the model.
    z_loss: see `weighted_loss`.
    remat: passed to the model.

  Returns:
    A function to jit with the first argument donated. state is a dict with
    params (nested dict, float32) and opt_state; batch has tokens
    [batch, seq_len + 1] int32 and loss_weights, same shape, float32, and maybe
    update_scale, a float32 scalar that multiplies the updates. metrics is a
    float32 vector in the order of METRIC_NAMES.
  """

  def loss_fn(params, batch):
    model = nnx.merge(graphdef, nnx.State(params))
    tokens = batch["tokens"]
    logits, _ = model(tokens[:, :-1], attention_fn=attention_fn, remat=remat)
    return weighted_loss(
      logits, tokens[:, 1:], batch["loss_weights"][:, 1:], z_loss=z_loss
    )

  def step(state, batch):
    (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state["params"], batch
    )
    sums["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(
      grads, state["opt_state"], state["params"]
    )
    if "update_scale" in batch:
      updates = jax.tree.map(lambda u: u * batch["update_scale"], updates)
    params = optax.apply_updates(state["params"], updates)
    metrics = jnp.stack([sums[name] for name in METRIC_NAMES])
    return {"params": params, "opt_state": opt_state}, metrics

  return step
