# SPDX-License-Identifier: Apache-2.0
"""Finds settings of a pattern for each layer and head of a model.

From a few texts: what every budget, or every candidate of MInference, keeps of
each head's dense attention; then the choice by a rule, and a check on a text
that it was not made on. Writes WORKDIR/calibration.json, which
`attention.load_calibration` reads, and WORKDIR/records.jsonl.

The same command goes on where an earlier one stopped.
"""

import time

import jax.numpy as jnp
import numpy as np
from absl import app

from experiments import long_context
from experiments.frame import flags_and_configs, runs
from experiments.prefill import (
  calibrate_search,
  long_context_config,
  long_context_run,
)
from unisparse_jax import attention, models, records

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = calibrate_search.parse(_CONFIG.value)
  folder = long_context_config.model_folder(config.model)
  identity = long_context_config.identity(config, folder)
  run = runs.begin(_WORKDIR.value, identity)
  console = long_context.make_console()
  done = {(r["text"], r["layer"]) for r in run.found()}
  corpus = long_context_run.held_out_code(folder, run.workdir)
  model = models.load_hf(folder, dtype=jnp.float32)
  num_layers = model.config.num_layers
  texts = [*config.texts]
  if config.compare_rules and config.test_text not in texts:
    texts.append(config.test_text)
  for text in texts:
    if all((text, layer) in done for layer in range(num_layers)):
      continue
    calls = models.capture_qkv(model, config.tokens(corpus, text))
    for layer, (q, k, v) in enumerate(calls):
      if (text, layer) in done:
        continue
      start = time.perf_counter()
      measured = calibrate_search.measure(config, q, k, v)
      seconds = time.perf_counter() - start
      run.writer.write(text=text, layer=layer, seconds=seconds, **measured)
      console.print(f"{text} layer {layer}: {seconds:.1f} s")

  found = run.found()
  layers = calibrate_search.choose(config, found, num_layers)
  single = calibrate_search.single_budget(config, found)
  calls = models.capture_qkv(model, config.tokens(corpus, config.test_text))
  dense_below, times = calibrate_search.measure_dense_below(
    config, calls[num_layers // 2], layers[num_layers // 2]
  )
  calibration = attention.Calibration(
    pattern=config.method,
    settings=config.settings,
    layers=layers,
    model_sha256=long_context_config.weights_hash(folder),
    target={"rule": config.rule, "recall": config.target_recall},
    dense_below=dense_below,
    evidence={
      "length": config.length,
      "texts": config.texts,
      "test_text": config.test_text,
      "test": check(config, layers, calls),
      "single_budget": single,
      "single_budget_test": single
      and check(config, (single,) * num_layers, calls),
      "dense_below_ms": times,
      **(
        {"rules": calibrate_search.compare_rules(config, found)}
        if config.compare_rules
        else {}
      ),
    },
  )
  path = run.workdir / "calibration.json"
  records.write_json(path, calibration.to_json())
  # What was written is what the plug-in reads.
  attention.load_calibration(path, model_sha256=calibration.model_sha256)
  for line in summary(calibration):
    console.print(line, highlight=False)
  console.print(f"Calibration: {path.absolute()}", soft_wrap=True)


def check(config, layers, calls) -> list[dict]:
  """Density and recall of each layer on the text that was held out."""
  rows = []
  for settings, (q, k, _) in zip(layers, calls, strict=True):
    density, recall = calibrate_search.density_and_recall(
      config.make_pattern(**settings), q, k
    )
    rows.append(
      {"density": float(density.mean()), "recall": float(recall.mean())}
    )
  return rows


def summary(calibration: attention.Calibration) -> list[str]:
  """Lines on what was found."""
  test = calibration.evidence["test"]
  lines = [
    f"layer {layer}: density {row['density']:.3f}, recall {row['recall']:.4f} "
    f"on {calibration.evidence['test_text']}; {settings}"
    for layer, (row, settings) in enumerate(
      zip(test, calibration.layers, strict=True)
    )
  ]
  for name, rows in (
    ("all layers", test),
    (
      f"all layers, {calibration.evidence['single_budget']} for all",
      calibration.evidence["single_budget_test"],
    ),
  ):
    if rows:
      density, recall = (
        np.mean([row[x] for row in rows]) for x in ("density", "recall")
      )
      lines.append(f"{name}: density {density:.3f}, recall {recall:.4f}")
  for row in calibration.evidence.get("rules", ()):
    lines.append(
      f"{row['rule']}, mean budget {row['budget']:.3f}: density "
      f"{row['density']:.3f}, recall {row['recall']:.4f}; on the test text "
      f"{row['test_density']:.3f}, {row['test_recall']:.4f}"
    )
  lines.append(f"dense below {calibration.dense_below:,} keys")
  return lines


if __name__ == "__main__":
  flags_and_configs.run(main)
