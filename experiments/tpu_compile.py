# SPDX-License-Identifier: Apache-2.0
"""Compiles every TPU kernel for v5e and v6e, and records what they take.

JAX_PLATFORMS=cpu python -m experiments.tpu_compile --workdir=out/tpu_compile

Needs no TPU but the package libtpu (`pip install unisparse-jax[tpu]`). One JSON
line per kernel, length and chip in WORKDIR/tpu_compile.jsonl: bytes of
arguments, results, temporaries and code, and the compiler's count of operations
and bytes moved, which takes every list as full.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from pallas_kernels import ahead_of_time
from pallas_kernels.block_sparse_attention import mosaic_tpu as attention
from pallas_kernels.column_score_sampling import mosaic_tpu as columns
from pallas_kernels.composite_pooling import mosaic_tpu as pooling
from pallas_kernels.composite_scores import mosaic_tpu as scores
from unisparse_jax import records

_WORKDIR = flags.DEFINE_string("workdir", None, "Where records go.")
_LENGTHS = flags.DEFINE_list("lengths", ["8192", "131072"], "Tokens.")

HEADS, KV_HEADS, HEAD_DIM, BLOCK, WINDOW = 32, 8, 128, 128, 16


def array(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def kernels(length):
  """Name to (back end with settings, shapes) of one layer at a length."""
  q = array(1, length, HEADS, HEAD_DIM, dtype=jnp.bfloat16)
  k = array(1, length, KV_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
  blocks, count = length // BLOCK, length // WINDOW
  means = array(1, count, KV_HEADS, HEAD_DIM, dtype=jnp.float32)
  rows = array(1, length // 20, HEADS, HEAD_DIM, dtype=jnp.bfloat16)
  scale = HEAD_DIM**-0.5
  return {
    "block_sparse_attention": (
      functools.partial(
        attention.block_sparse_attention,
        block_q=BLOCK,
        block_kv=BLOCK,
        causal=True,
        scale=scale,
      ),
      (
        *(q, k, k, array(1, KV_HEADS, blocks, blocks)),
        *(array(1, KV_HEADS, blocks), array(1), array(1)),
      ),
    ),
    "composite_pooling": (
      functools.partial(
        pooling.composite_pooling,
        window=WINDOW,
        head_group=HEADS // KV_HEADS,
      ),
      (q, array(1)),
    ),
    "composite_scores": (
      functools.partial(
        scores.composite_scores,
        window_q=WINDOW,
        window_kv=WINDOW,
        block_q=BLOCK,
        block_kv=BLOCK,
        causal=True,
        scale=scale,
        over_queries="mean",
      ),
      (means, means, array(1, count), array(1, count), array(1)),
    ),
    "column_score_sampling": (
      functools.partial(columns.column_score_sampling, scale=scale),
      (rows, k, array(1, length // 20)),
    ),
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  writer = records.RecordWriter(
    pathlib.Path(_WORKDIR.value) / "tpu_compile.jsonl",
    dict(
      heads=HEADS,
      kv_heads=KV_HEADS,
      head_dim=HEAD_DIM,
      block=BLOCK,
      window=WINDOW,
      dtype="bfloat16",
    ),
  )
  for tpu in ahead_of_time.TPUS:
    for length in map(int, _LENGTHS.value):
      for name, (fn, shapes) in kernels(length).items():
        start = time.perf_counter()
        compiled = ahead_of_time.compile_for_tpu(fn, shapes, tpu)
        seconds = time.perf_counter() - start
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None and cost is not None, "libtpu has both"
        record = writer.write(
          tpu=tpu,
          kernel=name,
          length=length,
          argument_bytes=memory.argument_size_in_bytes,
          output_bytes=memory.output_size_in_bytes,
          temporary_bytes=memory.temp_size_in_bytes,
          code_bytes=memory.generated_code_size_in_bytes,
          flops=cost["flops"],
          bytes_accessed=cost["bytes accessed"],
          compile_s=seconds,
        )
        mebi = {
          key: record[f"{key}_bytes"] / 2**20
          for key in ("argument", "output", "temporary")
        }
        print(
          f"{tpu} {name:<24}{length:>7}"
          + "".join(f"  {key} {value:7.1f} MiB" for key, value in mebi.items())
          + f"  {cost['flops'] / 1e9:9.1f} GFLOP"
          + f"  {cost['bytes accessed'] / 1e9:7.2f} GB  {seconds:.1f} s",
          flush=True,
        )


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  app.run(main)
