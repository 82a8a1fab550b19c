# SPDX-License-Identifier: Apache-2.0
"""Errors of block-sparse attention on what a trained decoder's layers see.

Queries, keys and values of a shipped model on held-out code, the masks that
patterns choose for them, and one back end's output, log-sum-exp and gradients:
the first two against float64 on a sample of rows, the last against the XLA back
end in float32. Writes WORKDIR/records.jsonl, a line a layer and pattern.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from experiments import selector_study
from experiments.frame import flags_and_configs, runs
from experiments.prefill import long_context_config, long_context_run
from pallas_kernels import checks
from unisparse_jax import attention, models, records

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What is checked.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    length: tokens of the text; a multiple of the patterns' blocks.
    layers: their numbers; none: all.
    patterns: settings of `make_pattern`, with its name under "method"; such
      that keep blocks alone.
    dtype: of q, k and v.
    implementation: the back end that is checked.
    num_rows: queries, of every head, that are compared with float64.
    gradients: whether to compare gradients too.
    seed: of the text, the rows and the cotangent.
  """

  model: str
  length: int
  patterns: tuple[Mapping, ...]
  layers: tuple[int, ...] = ()
  dtype: str = "bfloat16"
  implementation: str = "mosaic_gpu"
  num_rows: int = 256
  gradients: bool = True
  seed: int = 0

  def __post_init__(self):
    for name in ("length", "num_rows"):
      checks.check_positive_int(name, getattr(self, name))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = flags_and_configs.to_dataclass(Config, _CONFIG.value, name="config")
  folder = long_context_config.model_folder(config.model)
  identity = long_context_config.identity(config, folder)
  run = runs.begin(_WORKDIR.value, identity)
  done = [(r["layer"], r["pattern"]) for r in run.found()]
  dtype = jnp.dtype(config.dtype)
  calls = models.capture_qkv(
    models.load_hf(folder, dtype=dtype), _tokens(config, folder, run.workdir)
  )
  for layer in config.layers or range(len(calls)):
    qkv = tuple(x.astype(dtype) for x in calls[layer])
    for settings in config.patterns:
      if (layer, records.to_json(settings)) in done:
        continue
      found = check(config, settings, *qkv)
      run.writer.write(layer=layer, pattern=dict(settings), **found)
      errors = ", ".join(f"{k} {v:.2e}" for k, v in found.items())
      print(f"layer {layer}, {dict(settings)}: {errors}", flush=True)


def _tokens(config: Config, folder: pathlib.Path, workdir: pathlib.Path):
  corpus = long_context_run.held_out_code(folder, workdir)
  return selector_study.tokens_of(corpus, "code", config.length, config.seed)


def check(config: Config, settings: Mapping, q, k, v) -> dict[str, float]:
  """Density of a pattern's mask and errors of the back end on it.

  Args:
    config: the settings.
    settings: of the pattern.
    q: [1, len, num_heads, head_dim].
    k: [1, len, num_kv_heads, head_dim].
    v: as k.

  Returns:
    "density"; "out" and "lse", relative errors on the sampled rows; "dq", "dk"
    and "dv", relative errors of the whole gradients.
  """
  rest = dict(settings)
  pattern = attention.make_pattern(rest.pop("method"), **rest)
  mask = _select(pattern, q, k)
  out, lse = _attend(q, k, v, mask, implementation=config.implementation)
  rng = np.random.default_rng(config.seed)
  num_rows = min(config.num_rows, config.length)
  rows = np.sort(rng.permutation(config.length)[:num_rows])
  expected_out, expected_lse = attend_rows(q, k, v, mask, rows)
  found = {
    "density": float(attention.metrics.nominal_density(mask).mean()),
    "out": relative_error(out[0, rows], expected_out),
    "lse": relative_error(lse[0, rows], expected_lse),
  }
  if config.gradients:
    # Rounded as q is, so that both back ends are given the same.
    d_out = jnp.asarray(rng.standard_normal(q.shape), q.dtype)

    actual = _gradients(
      q, k, v, d_out, mask, implementation=config.implementation
    )
    wide = (x.astype(jnp.float32) for x in (q, k, v, d_out))
    with jax.default_matmul_precision("highest"):
      expected = _gradients(*wide, mask, implementation="xla")
    for name, a, e in zip(("dq", "dk", "dv"), actual, expected, strict=True):
      found[name] = relative_error(a, e)
  return found


@functools.partial(jax.jit, static_argnums=0)
def _select(pattern, q, k):
  return pattern.select(q, k)


@functools.partial(jax.jit, static_argnames="implementation")
def _attend(q, k, v, mask, *, implementation):
  return attention.sparse_attention(
    q, k, v, mask, return_lse=True, implementation=implementation
  )


@functools.partial(jax.jit, static_argnames="implementation")
def _gradients(q, k, v, d_out, mask, *, implementation):
  """Of <out, d_out> in q, k and v."""
  _, pull = jax.vjp(
    lambda q, k, v: attention.sparse_attention(
      q, k, v, mask, implementation=implementation
    ),
    q,
    k,
    v,
  )
  return pull(d_out)


def attend_rows(q, k, v, mask: Any, rows: np.ndarray):
  """float64 attention of some causal rows over a mask's blocks.

  Args:
    q: [1, len, num_heads, head_dim].
    k: [1, len, num_kv_heads, head_dim].
    v: as k.
    mask: without columns.
    rows: int [num_rows], their numbers.

  Returns:
    float64 [num_rows, num_heads, head_dim] and [num_rows, num_heads].
  """
  assert mask.columns is None, "columns are not checked here"
  grid = mask.grid
  q, k, v = (
    np.asarray(x[0].astype(jnp.float32), np.float64) for x in (q, k, v)
  )
  kept_blocks = np.asarray(mask.to_dense())[0]
  num_heads, head_dim = q.shape[1:]
  out = np.zeros((len(rows), num_heads, head_dim))
  lse = np.zeros((len(rows), num_heads))
  is_past = np.arange(k.shape[0]) <= rows[:, None]
  for head in range(num_heads):
    kv_head = head * k.shape[1] // num_heads
    kept = kept_blocks[head * kept_blocks.shape[0] // num_heads]
    kept = np.repeat(kept[rows // grid.block_q], grid.block_kv, axis=1)
    kept = kept[:, : k.shape[0]] & is_past
    logits = q[rows, head] @ k[:, kv_head].T * head_dim**-0.5
    logits = np.where(kept, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(-1, keepdims=True)
    out[:, head] = p @ v[:, kv_head] / total
    lse[:, head] = (top + np.log(total))[:, 0]
  return out, lse


def relative_error(actual, expected) -> float:
  """2-norm of the difference over that of what is expected."""
  actual = np.asarray(jnp.asarray(actual, jnp.float32), np.float64)
  expected = np.asarray(expected, np.float64)
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
  flags_and_configs.run(main)
