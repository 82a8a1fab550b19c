# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention of other libraries, (q, k, v) -> out."""

import importlib.util

import jax
import jax.numpy as jnp


def _cudnn(q, k, v):
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def _xla_dense(q, k, v):
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="xla"
  )


def _attention_mgpu(q, k, v):
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  # The block sizes of its own benchmark; it takes no scale.
  tuning = attention_mgpu.TuningConfig(
    block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  return attention_mgpu.attention(q * scale, k, v, tuning)


def _tokamax(q, k, v):
  if importlib.util.find_spec("tokamax") is None:
    raise NotImplementedError("tokamax is not installed")
  import tokamax  # pyright: ignore[reportMissingImports]

  return tokamax.dot_product_attention(q, k, v, is_causal=True)


PEERS = {
  "cudnn": _cudnn,
  "attention_mgpu": _attention_mgpu,
  "tokamax": _tokamax,
  "xla_dense": _xla_dense,
}
