# SPDX-License-Identifier: Apache-2.0
"""Which changes to UniSparse's block scores bring it nearer to the oracle.

Captures every layer's queries and keys of a model on held-out text, scores
blocks in all the ways of `selector_study_scores`, and reads off the density at
which each reaches a recall of the dense softmax. Writes WORKDIR/records.jsonl,
a line a text and layer, and WORKDIR/table.json.

The same command goes on where an earlier one stopped.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from experiments import long_context
from experiments.frame import flags_and_configs, runs
from experiments.prefill import (
  long_context_config,
  long_context_run,
  selector_study_curves,
  selector_study_scores,
)
from pallas_kernels import checks
from unisparse_jax import attention, data, models, records, tasks

_CONFIG, _WORKDIR = flags_and_configs.define()
_PER_HEAD = ("oracle", "mean 16")  # whose curves are kept by head
_CODE = "code"
_MADE = (  # of the last record, that the table can be judged by
  "settings",
  "time_utc",
  "commit",
  "dirty",
  "device_kind",
  "cpu_count",
  "versions",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
  """What is studied.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    lengths: tokens; multiples of the block.
    texts: "code" or names of tasks; one text of each.
    layers: layers that are looked at; none: all.
    targets: recalls at which densities are compared.
    block: tokens in a block.
    group_text: if given, the text (of the next seed) on which each layer's
      heads are put into groups of similar scores, as large as a key head's;
      two more ways to score are then tried.
    seed: of the texts.
  """

  model: str
  lengths: tuple[int, ...]
  texts: tuple[str, ...]
  layers: tuple[int, ...] = ()
  targets: tuple[float, ...] = (0.9, 0.95, 0.98)
  block: int = 128
  group_text: str = ""
  seed: int = 0

  def __post_init__(self):
    checks.check_positive_int("block", self.block)
    for name in ("lengths", "texts", "targets"):
      checks.require(getattr(self, name), name, "not be empty", ())
    for length in self.lengths:
      checks.check_positive_int("lengths", length)
      checks.check_divides("block", self.block, "lengths", length)
    for text in self.texts:
      checks.check_choice("texts", text, (_CODE, *tasks.TASKS))
    checks.check_choice(
      "group_text", self.group_text, ("", _CODE, *tasks.TASKS)
    )
    for target in self.targets:
      checks.check_fraction("targets", target)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = flags_and_configs.to_dataclass(
    StudyConfig, _CONFIG.value, name="config"
  )
  folder = long_context_config.model_folder(config.model)
  identity = long_context_config.identity(config, folder)
  run = runs.begin(_WORKDIR.value, identity)
  console = long_context.make_console()
  done = {(r["length"], r["text"], r["layer"]) for r in run.found()}
  corpus = long_context_run.held_out_code(folder, run.workdir)
  model = models.load_hf(folder, dtype=jnp.float32)
  layers = config.layers or tuple(range(model.config.num_layers))
  for length in config.lengths:
    groups = {}
    for text in config.texts:
      missing = [n for n in layers if (length, text, n) not in done]
      if not missing:
        continue
      calls = models.capture_qkv(
        model,
        tokens_of(corpus, text, length, config.seed),
        attention_fn=attention.DenseAttention(),
      )
      if config.group_text and not groups:
        groups = grouped_heads(config, model, corpus, length)
      previous = {}
      for layer, (q, k, _) in enumerate(calls):
        start = time.perf_counter()
        measured, previous = measure(
          q[0], k[0], config.block, previous, groups.get(layer)
        )
        if layer in missing:
          seconds = time.perf_counter() - start
          run.writer.write(
            length=length,
            text=text,
            layer=layer,
            curves=measured,
            seconds=seconds,
            **({"groups": groups[layer]} if groups else {}),
          )
          console.print(f"{length:,} {text} layer {layer}: {seconds:.1f} s")
  report(run.found(), config, run.workdir, console)


def tokens_of(corpus, text: str, length: int, seed: int) -> jax.Array:
  """int32 [1, length] of held-out code, or of a task's documents."""
  mixture = data.Mixture(
    **dict.fromkeys((*tasks.TASKS, _CODE), 0.0) | {text: 1.0}, full_row=1.0
  )
  rows = data.TrainingRows(corpus, seed, length, mixture)
  return jnp.asarray(rows[0]["tokens"][None, :-1], jnp.int32)


def grouped_heads(config: StudyConfig, model, corpus, length) -> dict:
  """Groups of similar heads of each layer, on a text that is not measured."""
  tokens = tokens_of(corpus, config.group_text, length, config.seed + 1)
  scorer = selector_study_scores.Composite(head_group=1, block=config.block)
  dense = attention.DenseAttention()
  return {
    layer: selector_study_scores.similar_heads(
      np.asarray(scorer(q[0], k[0])), q.shape[2] // k.shape[2]
    )
    for layer, (q, k, _) in enumerate(
      models.capture_qkv(model, tokens, attention_fn=dense)
    )
  }


def measure(q, k, block: int, previous: dict, groups=None):
  """Curves of every variant, and the scores that the next layer may reuse."""
  mass = np.asarray(
    selector_study_scores.true_mass(q, k, block=block), np.float64
  )
  scores = {"oracle": mass}
  scores["oracle, one mask a key head"] = mass.reshape(
    k.shape[1], -1, *mass.shape[1:]
  ).mean(1)
  for name, variant in selector_study_scores.VARIANTS.items():
    variant = selector_study_scores.with_block(variant, block)
    scores[name] = np.asarray(variant(q, k), np.float64)
  base = scores["mean 16"]
  scores["mean 16 of the layer before"] = previous.get("base", base)
  scores["mean 16, with the layer before"] = 0.5 * (
    base + previous.get("base", base)
  )
  if groups is not None:
    scorer = selector_study_scores.Composite(head_group=1, block=block)
    by_head = np.asarray(scorer(q, k), np.float64)
    by_key_head = np.arange(q.shape[1]).reshape(k.shape[1], -1)
    for of, parts in (("a key head's", by_key_head), ("similar", groups)):
      scores[f"mean 16, mean of {of} heads"] = (
        selector_study_scores.mean_of_groups(by_head, parts)
      )
  measured = {}
  for name, value in scores.items():
    measured[name] = selector_study_curves.curves(value, mass)
    if name not in _PER_HEAD:
      for curve in measured[name].values():
        for what in ("density", "recall"):
          curve[what] = curve[what].mean(0)
  rounded = jax.tree.map(lambda x: np.round(x, 5), measured)
  return rounded, {"base": base}


def report(found, config: StudyConfig, workdir, console):
  """Prints the tables and writes them."""
  calibration = selector_study_curves.calibrate(
    found, config.lengths, config.texts, config.targets, _PER_HEAD
  )
  for record in found:
    for name in _PER_HEAD:
      for curve in record["curves"][name].values():
        for what in ("density", "recall"):
          curve[what] = np.mean(curve[what], axis=0)
  rows = selector_study_curves.table(found, config.targets)
  console.print(selector_study_curves.rich_table(rows, config.targets))
  for line in calibration:
    console.print(line)
  made = {key: found[-1][key] for key in _MADE if key in found[-1]}
  records.write_json(
    workdir / "table.json",
    {"made": made, "rows": rows, "calibration": calibration},
  )


if __name__ == "__main__":
  flags_and_configs.run(main)
