# SPDX-License-Identifier: Apache-2.0
"""Checks and times the Triton kernels on an NVIDIA GPU, beside cuDNN.

python -m experiments.portable_kernels --workdir=out/portable_kernels

One layer of 32 query heads, 8 key heads and head_dim 128 in bfloat16. Numbers
are checked first, at 2,048 tokens, against the float32 references; then every
kernel is timed at each of --lengths. Prints a table, writes one JSON line per
measurement to WORKDIR/portable_kernels.jsonl.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import pallas_kernels
from pallas_kernels.block_selection import reference as selection_reference
from pallas_kernels.block_sparse_attention import triton as attention_triton
from pallas_kernels.column_score_sampling import triton as column_triton
from pallas_kernels.composite_scores import triton as scores_triton
from unisparse_jax import records, timing

_WORKDIR = flags.DEFINE_string("workdir", None, "Where records go.")
_LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072"], "Tokens.")
_VARIANTS = flags.DEFINE_integer(
  "variants_at", 0, "Tokens at which to time other tile sizes; 0: not."
)
_CHECK = flags.DEFINE_bool("check", True, "Check numbers before timing.")
_SECONDS = flags.DEFINE_float("seconds", 1e9, "Start nothing after so long.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls.")

HEADS, KV_HEADS, HEAD_DIM, BLOCK, WINDOW = 32, 8, 128, 128, 16
# (queries or rows, keys or key blocks, warps, stages) of a tile
# By kernel: its module, the entry of its table of sizes (or None), variants.
VARIANTS = {
  "column_lse": (
    column_triton,
    "lse",
    (
      (128, 128, 4, 2),
      (64, 128, 4, 2),
      (128, 64, 4, 2),
      (64, 64, 4, 4),
      (64, 256, 4, 2),
    ),
  ),
  "column_sum": (
    column_triton,
    "sum",
    (
      (128, 128, 4, 2),
      (128, 64, 4, 2),
      (64, 128, 4, 3),
      (128, 64, 4, 3),
      (256, 64, 4, 2),
    ),
  ),
  "attention": (
    attention_triton,
    None,
    ((128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 2)),
  ),
  "scores": (
    scores_triton,
    None,
    ((128, 32, 4, 3), (128, 32, 4, 2), (128, 16, 4, 4)),
  ),
}


class Bench:
  """Times functions, writes their records and prints a line for each."""

  def __init__(self, writer):
    self.writer = writer
    self.start = time.perf_counter()

  def run(self, what, length, fn, *args, flops=None, dense_ms=None, **extra):
    """Median milliseconds of fn(*args); None where it fails or time is up."""
    if time.perf_counter() - self.start > _SECONDS.value:
      print(f"{what:<44} {length:>7}  left out: time is up", flush=True)
      return None
    try:
      t = timing.measure(jax.jit(fn), *args, repeats=_REPEATS.value, warmup=1)
    except Exception as error:  # a refused tile must not end the run
      reason = f"{type(error).__name__}: {error}"[:300]
      print(f"{what:<44} {length:>7}  failed: {reason}", flush=True)
      self.writer.write(what=what, length=length, error=reason, **extra)
      return None
    tflops = flops / t.min_ms / 1e9 if flops else None
    share = t.median_ms / dense_ms if dense_ms else None
    self.writer.write(
      what=what,
      length=length,
      median_ms=t.median_ms,
      min_ms=t.min_ms,
      spread=t.spread,
      repeats=t.repeats,
      compile_s=t.compile_s,
      peak_bytes=t.peak_bytes,
      tflops=tflops,
      share_of_dense=share,
      **extra,
    )
    print(
      f"{what:<44} {length:>7} {t.median_ms:9.3f} ms"
      + (f" {tflops:6.0f} TFLOP/s" if tflops else " " * 15)
      + (f" {100 * share:6.2f}% of dense" if share else "")
      + f"  (compiled in {t.compile_s:.1f} s)",
      flush=True,
    )
    return t.median_ms


def draw_qkv(length, seed=0):
  """q, k, v, bfloat16 [1, length, heads, head_dim]."""
  keys = jax.random.split(jax.random.key(seed), 3)
  heads = (HEADS, KV_HEADS, KV_HEADS)
  return [
    jax.random.normal(key, (1, length, n, HEAD_DIM), jnp.bfloat16)
    for key, n in zip(keys, heads, strict=True)
  ]


def random_lists(length, density, seed=0):
  """Random causal lists with the diagonal, one for each key head."""
  rng = np.random.default_rng(seed)
  blocks = length // BLOCK
  room = min(blocks, int(blocks * density) + 1)
  indices = np.zeros((1, KV_HEADS, blocks, room), np.int32)
  counts = np.zeros((1, KV_HEADS, blocks), np.int32)
  for head, row in np.ndindex(KV_HEADS, blocks):
    wanted = min(room, max(1, round((row + 1) * density)))
    others = rng.permutation(row)[: wanted - 1]
    kept = np.sort(np.append(others, row))[::-1]
    indices[0, head, row, : len(kept)] = kept
    counts[0, head, row] = len(kept)
  # The diagonal block counts half.
  kept_blocks = counts.sum() - 0.5 * counts.size
  flops = 4.0 * kept_blocks * BLOCK * BLOCK * HEAD_DIM * HEADS / KV_HEADS
  return jnp.asarray(indices), jnp.asarray(counts), float(flops)


def composites(q, k):
  """Composite queries (one for the heads of a key head) and keys."""
  q_means, q_counts = pallas_kernels.composite_pooling(
    q, window=WINDOW, head_group=HEADS // KV_HEADS
  )
  k_means, k_counts = pallas_kernels.composite_pooling(k, window=WINDOW)
  return q_means, k_means, q_counts, k_counts


def scores_of(arrays, implementation="triton"):
  return pallas_kernels.composite_scores(
    *arrays,
    window_q=WINDOW,
    window_kv=WINDOW,
    implementation=implementation,
  )


def select(scores, length, implementation="triton", top_p=0.9):
  return pallas_kernels.block_selection(
    scores,
    q_len=length,
    kv_len=length,
    top_p=top_p,
    num_sink_blocks=1,
    implementation=implementation,
  )


def relative_error(actual, expected):
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def check(writer, length=2048):
  """Relative errors and block agreement at a length that dense code can do."""
  q, k, v = draw_qkv(length)
  indices, counts, _ = random_lists(length, 0.3)
  errors = {}
  attend = pallas_kernels.block_sparse_attention
  results = {
    name: jax.jit(functools.partial(attend, implementation=name))(
      q, k, v, indices, counts
    )
    for name in ("triton", "reference")
  }
  for part, name in enumerate(("out", "lse")):
    errors[f"attention {name}"] = relative_error(
      results["triton"][part].astype(jnp.float32),
      results["reference"][part].astype(jnp.float32),
    )
  # Neighbouring tokens alike, so that composites matter.
  smooth = jax.random.normal(
    jax.random.key(3), (1, length // 64, 1, HEAD_DIM), jnp.bfloat16
  )
  smooth = jnp.repeat(smooth, 64, axis=1)
  arrays = jax.jit(composites)(q + smooth / 2, k + smooth)
  scores = {
    name: jax.jit(functools.partial(scores_of, implementation=name))(arrays)
    for name in ("triton", "reference")
  }
  errors["composite scores"] = relative_error(
    scores["triton"], scores["reference"]
  )
  lists = [
    jax.jit(functools.partial(select, length=length, implementation=name))(
      scores["reference"]
    )
    for name in ("triton", "reference")
  ]
  same = np.asarray((lists[0][0] == lists[1][0]).all(-1))
  errors["rows of other blocks, same scores"] = float(1 - same.mean())
  lists[0] = jax.jit(functools.partial(select, length=length))(scores["triton"])
  same = np.asarray((lists[0][0] == lists[1][0]).all(-1))
  errors["rows of other blocks, own scores"] = float(1 - same.mean())
  errors["density"] = float(lists[1][1].mean() * 2 / (length // BLOCK + 1))
  rows = jnp.arange(19, length, 20)[None]
  columns = {
    name: jax.jit(
      functools.partial(
        pallas_kernels.column_score_sampling, implementation=name
      )
    )(q[:, rows[0]], k, rows)
    for name in ("triton", "reference")
  }
  errors["column scores"] = relative_error(
    columns["triton"], columns["reference"]
  )
  for name, error in errors.items():
    print(f"check: {name:<40} {error:.3g}", flush=True)
  writer.write(what="check", length=length, errors=errors)


def time_length(bench, length):
  """Every kernel at one length, beside cuDNN's dense attention."""
  q, k, v = draw_qkv(length)
  dense_flops = 4.0 * length * (length + 1) / 2 * HEAD_DIM * HEADS
  dense_ms = bench.run(
    "dense, cuDNN",
    length,
    functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    ),
    q,
    k,
    v,
    flops=dense_flops,
  )
  run = functools.partial(bench.run, dense_ms=dense_ms)
  attend = functools.partial(
    pallas_kernels.block_sparse_attention, implementation="triton"
  )
  for density in (0.25, 0.1):
    indices, counts, flops = random_lists(length, density)
    run(
      f"attention, density {density}",
      length,
      attend,
      q,
      k,
      v,
      indices,
      counts,
      flops=flops,
      density=density,
    )

  run("UniSparse: pooling", length, composites, q, k)
  arrays = jax.jit(composites)(q, k)
  score_flops = 4.0 * (length / WINDOW) ** 2 / 2 * HEAD_DIM * KV_HEADS
  run(
    "UniSparse: scores",
    length,
    lambda *arrays: scores_of(arrays),
    *arrays,
    flops=score_flops,
  )
  scores = jax.jit(scores_of)(arrays)
  choose = functools.partial(select, length=length)
  run("UniSparse: lists", length, choose, scores)
  run(
    "UniSparse: selection, all of it",
    length,
    lambda q, k: choose(scores_of(composites(q, k))),
    q,
    k,
  )
  if length <= 32768:
    run(
      "UniSparse: selection by XLA and a sort",
      length,
      lambda q, k: selection_reference_lists(
        scores_of(composites(q, k), "xla"), length
      ),
      q,
      k,
    )

  for name, rows in (("5% of rows", length // 20), ("256 rows", 256)):
    positions = (jnp.arange(rows, dtype=jnp.int32) + 1) * (length // rows) - 1
    run(
      f"SampleAttention stage 1, {name}",
      length,
      lambda q, k, p: pallas_kernels.column_score_sampling(
        q[:, p], k, p[None], implementation="triton"
      ),
      q,
      k,
      positions,
      flops=4.0 * rows * length / 2 * HEAD_DIM * HEADS,
      rows=rows,
    )


def selection_reference_lists(scores, length):
  batch = jnp.zeros((1,), jnp.int32)
  return selection_reference.block_selection(
    scores,
    batch + length,
    batch + length,
    batch,
    block_q=BLOCK,
    block_kv=BLOCK,
    causal=True,
    top_p=0.9,
    top_k=None,
    num_sink_blocks=1,
    num_local_blocks=0,
    max_blocks=scores.shape[-1],
  )


def time_variants(bench, length):
  """Other tile sizes, one kernel at a time; the rest of the run has the best.

  The two passes over the columns are timed together, one varied at a time.
  """
  q, k, v = draw_qkv(length)
  indices, counts, flops = random_lists(length, 0.1)
  arrays = jax.jit(composites)(q, k)
  rows = length // 20
  positions = (jnp.arange(rows, dtype=jnp.int32) + 1) * 20 - 1
  columns = (
    lambda q, k, p: pallas_kernels.column_score_sampling(
      q, k, p, implementation="triton"
    ),
    (q[:, positions], k, positions[None]),
    4.0 * rows * length / 2 * HEAD_DIM * HEADS,
  )
  calls = {
    "column_lse": columns,
    "column_sum": columns,
    "attention": (
      lambda *args: pallas_kernels.block_sparse_attention(
        *args, implementation="triton"
      ),
      (q, k, v, indices, counts),
      flops,
    ),
    "scores": (
      lambda *arrays: scores_of(arrays),
      arrays,
      4.0 * (length / WINDOW) ** 2 / 2 * HEAD_DIM * KV_HEADS,
    ),
  }
  for kernel, (module, entry, variants) in VARIANTS.items():
    fn, args, flops = calls[kernel]
    chosen = module._tile_sizes

    def use(variant, module=module, entry=entry, chosen=chosen):
      def sizes(*target):
        return {**chosen(*target), entry: variant} if entry else variant

      module._tile_sizes = sizes

    times = {}
    for variant in variants:
      use(variant)
      # A new function each time: jit must not reuse the last variant's trace.
      time_ms = bench.run(
        f"{kernel} {variant}",
        length,
        lambda *args, fn=fn: fn(*args),
        *args,
        flops=flops,
        kernel=kernel,
        variant=variant,
      )
      if time_ms is not None:
        times[variant] = time_ms
    module._tile_sizes = chosen
    if times:
      best = min(times, key=times.__getitem__)
      use(best)
      print(f"kept: {kernel} {best}", flush=True)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  workdir = pathlib.Path(_WORKDIR.value)
  settings = dict(
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    block=BLOCK,
    window=WINDOW,
    dtype="bfloat16",
  )
  writer = records.RecordWriter(workdir / "portable_kernels.jsonl", settings)
  bench = Bench(writer)
  print(jax.devices()[0].device_kind, jax.__version__, flush=True)
  if _CHECK.value:
    check(writer)
  if _VARIANTS.value:
    time_variants(bench, _VARIANTS.value)
  for length in map(int, _LENGTHS.value):
    time_length(bench, length)


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  app.run(main)
