# SPDX-License-Identifier: Apache-2.0
"""Trains a draft head for a decoder, on text that the decoder writes itself.

Makes prompts of five domains from the training split of a corpus, lets the
target continue them at several temperatures, trains the head by training-time
test, and writes it to WORKDIR/head.

The same command goes on where an earlier one stopped, whatever stopped it.
"""

import logging
import pathlib

import jax.numpy as jnp
from absl import app
from flax import nnx

from experiments.frame import flags_and_configs
from experiments.prefill import long_context_config
from experiments.training import own_text_data
from unisparse_jax import attention, data, models, records, training
from unisparse_jax.speculative import eagle_head, head_files

_LOG = logging.getLogger("experiments.train_draft_head")
_CONFIG, _WORKDIR = flags_and_configs.define()
_SECTIONS = ("target", "corpus", "texts", "head", "train")
_TEXTS_KEYS = ("groups", "seed", "temperatures", "max_seconds", "num_processes")
_RUN_CONTROL = training.head_config.RUN_CONTROL_FIELDS
_FREE = ("texts.max_seconds", "texts.num_processes")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = flags_and_configs.to_dict(_CONFIG.value)
  flags_and_configs.check_keys("config", config, _SECTIONS)
  texts = flags_and_configs.to_dict(config["texts"])
  flags_and_configs.check_keys("config.texts", texts, _TEXTS_KEYS)
  make = flags_and_configs.to_dataclass
  groups = tuple(
    make(own_text_data.GroupConfig, group, name=f"config.texts.groups[{i}]")
    for i, group in enumerate(texts["groups"])
  )
  train_config = make(
    training.HeadTrainConfig, config["train"], name="config.train"
  )
  folder = long_context_config.model_folder(config["target"])
  target_config = models.load_hf_config(folder)
  flags = flags_and_configs.to_dict(config["head"])
  head_config = make(
    eagle_head.EagleHeadConfig,
    {
      **flags,
      "target": target_config,
      "tap_layers": flags.get("tap_layers")
      or models.tap_layers(target_config.num_layers),
    },
    name="config.head",
  )
  workdir = records.claim_workdir(
    _WORKDIR.value,
    {**config, "target_sha256": long_context_config.weights_hash(folder)},
    free=[
      *_FREE,
      *(f"train.{n}" for n in training.head_config.RUN_CONTROL_FIELDS),
    ],
  )
  flags_and_configs.start_jax(workdir)
  dtype = jnp.dtype(train_config.dtype)
  target = models.load_hf(folder, dtype=dtype)
  corpus = open_corpus(config["corpus"], folder, workdir)
  written = own_text_data.write_groups(
    groups,
    target,
    corpus,
    workdir / "texts",
    seed=texts["seed"],
    temperatures=texts["temperatures"],
    max_seconds=texts["max_seconds"],
    num_processes=texts["num_processes"],
    attention_fn=attention.DenseAttention(),
  )
  result = training.train_head(
    train_config,
    target,
    written,
    workdir / "train",
    head=eagle_head.EagleHead.from_target(
      target,
      config=head_config,
      rngs=nnx.Rngs(train_config.seed),
      dtype=dtype,
    ),
  )
  _LOG.info(
    "stopped at step %d of %d after %.0f s: %s",
    result.step,
    train_config.steps,
    result.seconds,
    result.reason,
  )
  about = {
    "config": records.to_json(config),
    "steps": result.step,
    "evaluation": result.evaluation,
    "written_tokens": {n: g.num_written for n, g in written.items()},
  }
  head_files.save_head(result.head, workdir / "head", about=about)
  _LOG.info("the head is in %s", workdir / "head")


def open_corpus(
  path: str, model_folder: pathlib.Path, workdir: pathlib.Path
) -> data.CodeCorpus:
  """The training split at `path`; "" builds one of the standard library."""
  tokenizer = data.Tokenizer.load(model_folder / "tokenizer.json")
  folder = pathlib.Path(path) if path else workdir / "corpus"
  if not path:
    data.build_cache(folder, tokenizer)
    data.domains.prepare_docs(data.CodeCorpus(folder, "train"))
  corpus = data.CodeCorpus(folder, "train")
  if corpus.tokenizer.to_json() != tokenizer.to_json():
    raise ValueError(
      "config.corpus must be tokenised as the target reads; got "
      f"corpus={path!r}, whose tokenizer is another one."
    )
  return corpus


if __name__ == "__main__":
  flags_and_configs.run(main)
