# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding without a draft model, on a laptop.

Continues held-out code, its docstrings and a JSON table by plain decoding, by
prompt lookup and by suffix matching, and checks that every token is the same.
Writes WORKDIR/records.jsonl, a line a text, temperature and drafter, and prints
a table.
"""

import ast
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from rich import table as rich_table

from experiments import long_context
from experiments.frame import flags_and_configs, runs
from experiments.prefill import long_context_config
from pallas_kernels import checks
from unisparse_jax import data, models, speculative
from unisparse_jax.data import sources

_CONFIG, _WORKDIR = flags_and_configs.define()
TEXTS = ("code", "docstrings", "table")
DRAFTERS = {
  "prompt lookup": (
    speculative.PromptLookup(),
    speculative.TreeShape(width=1, base_depth=8, buckets=(1, 9)),
  ),
  "suffix match": (
    speculative.SuffixMatch(),
    speculative.TreeShape(
      width=4, base_depth=4, max_depth=12, buckets=(1, 8, 16, 32)
    ),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupConfig:
  """What is measured.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    texts: of `TEXTS`.
    prompts: of each text.
    prompt_len: tokens.
    new_tokens: drawn after each prompt.
    temperatures: 0 for greedy.
    repeats: timed runs; the fastest counts.
    seed: of prompts and sampling.
  """

  model: str
  texts: tuple[str, ...] = TEXTS
  prompts: int = 4
  prompt_len: int = 384
  new_tokens: int = 128
  temperatures: tuple[float, ...] = (0.0, 1.0)
  repeats: int = 3
  seed: int = 0

  def __post_init__(self):
    for name in ("prompts", "prompt_len", "new_tokens", "repeats"):
      checks.check_positive_int(name, getattr(self, name))
    for text in self.texts:
      checks.check_choice("texts", text, TEXTS)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = flags_and_configs.to_dataclass(
    LookupConfig, _CONFIG.value, name="config"
  )
  folder = long_context_config.model_folder(config.model)
  run = runs.begin(_WORKDIR.value, long_context_config.identity(config, folder))
  console = long_context.make_console()
  tokenizer = data.Tokenizer.load(folder / "tokenizer.json")
  # float32: the comparison is token by token.
  model = models.load_hf(folder, dtype=jnp.float32)
  done = {(r["text"], r["temperature"]) for r in run.found()}
  for text in config.texts:
    prompts = make_prompts(text, tokenizer, config)
    for temperature in config.temperatures:
      if (text, temperature) in done:
        continue
      # Written together: half of the drafters would pass for all of them.
      measured = list(measure(model, prompts, temperature, config))
      for values in measured:
        run.writer.write(text=text, temperature=temperature, **values)
  console.print(report(run.found()))


def make_prompts(text: str, tokenizer, config: LookupConfig) -> np.ndarray:
  """int32 [prompts, prompt_len] of a text that the model was not trained on."""
  rng = np.random.default_rng(config.seed)
  if text == "table":
    pieces = [_table(rng) for _ in range(config.prompts)]
  else:
    held_out = [s for s in sources.find_sources() if s.held_out]
    order = rng.permutation(len(held_out))
    codes = (sources.read_source(held_out[i].path) for i in order)
    codes = (code for code in codes if code is not None)
    pieces = (code if text == "code" else _docstrings(code) for code in codes)
  rows = []
  for piece in pieces:
    ids = tokenizer.encode(piece)
    if len(ids) >= 2 * config.prompt_len:
      rows.append(ids[config.prompt_len // 2 :][: config.prompt_len])
    if len(rows) == config.prompts:
      return np.asarray(rows, np.int32)
  raise ValueError(
    f"prompts must be at most what the texts give; got "
    f"prompts={config.prompts}; expected {len(rows)} of text={text!r}."
  )


def _docstrings(code: str) -> str:
  kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
  nodes = (n for n in ast.walk(ast.parse(code)) if isinstance(n, kinds))
  return "\n\n".join(filter(None, (ast.get_docstring(n) for n in nodes)))


def _table(rng) -> str:
  names = ("alpha", "beta", "gamma", "delta")
  rows = [
    dict(
      index=i,
      name=str(rng.choice(names)),
      count=int(rng.integers(100)),
      valid=bool(rng.integers(2)),
    )
    for i in range(120)
  ]
  return json.dumps(rows, indent=1)


def measure(model, prompts, temperature: float, config: LookupConfig):
  """Yields a record of plain decoding and of each drafter."""
  how = dict(max_new_tokens=config.new_tokens)
  if temperature > 0:
    how["sampler"] = models.Temperature(temperature=temperature)
    how["rng_key"] = jax.random.key(config.seed)

  def plain():
    return [models.generate(model, row[None], **how) for row in prompts]

  expected, plain_s = _best_of(plain, config.repeats)
  tokens = prompts.shape[0] * config.new_tokens
  yield dict(drafter="none", seconds=plain_s, tokens_per_s=tokens / plain_s)
  for name, (drafter, shape) in DRAFTERS.items():

    def draft(drafter=drafter, shape=shape):
      results = [
        speculative.generate(model, drafter, row[None], shape=shape, **how)
        for row in prompts
      ]
      return [r.tokens for r in results], [r.log for r in results]

    (found, logs), seconds = _best_of(draft, config.repeats)
    same = [
      bool(np.array_equal(a, b)) for a, b in zip(found, expected, strict=True)
    ]
    summaries = [speculative.summarize(log) for log in logs]
    calls = sum(s["calls"] for s in summaries)
    emitted = sum(s["tokens"] for s in summaries)
    yield dict(
      drafter=name,
      seconds=seconds,
      tokens_per_s=tokens / seconds,
      speedup=plain_s / seconds,
      identical=sum(same),
      prompts=len(same),
      target_calls=calls,
      tokens_per_step=emitted / calls,
      verified_per_token=sum(s["verified"] for s in summaries) / emitted,
    )


def _best_of(fn, repeats: int):
  jax.block_until_ready(fn())  # compiles
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    times.append(time.perf_counter() - start)
  return out, min(times)


def report(written) -> rich_table.Table:
  """A table of the records."""
  columns = {
    "text": "text",
    "temperature": "temperature",
    "drafter": "drafter",
    "tokens/s": "tokens_per_s",
    "speed-up": "speedup",
    "same output": "identical",
    "target calls": "target_calls",
    "tokens a call": "tokens_per_step",
    "verified a token": "verified_per_token",
  }
  out = rich_table.Table(*columns)
  for record in written:
    cells = []
    for field in columns.values():
      value = record.get(field, "")
      cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
    out.add_row(*cells)
  return out


if __name__ == "__main__":
  flags_and_configs.run(main)
