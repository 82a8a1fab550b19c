# SPDX-License-Identifier: Apache-2.0
"""Writes `goldens/`: tiny random checkpoints by `transformers`, with logits.

Run: python tests/unisparse_jax/models/make_goldens.py, with torch and
transformers installed. Weights are stored in bfloat16; the expected logits are
computed from them in float32.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers
from safetensors import numpy as safetensors_numpy

FOLDER = pathlib.Path(__file__).parent / "goldens"
SIZES = dict(
  vocab_size=40,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
  max_position_embeddings=128,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
YARN = dict(
  rope_type="yarn",
  rope_theta=10_000.0,
  factor=4.0,
  original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=10_000.0, factor=2.0)


def specs():
  """Name -> (config, keyword arguments of save_pretrained)."""
  llama = transformers.LlamaConfig
  qwen2, qwen3 = transformers.Qwen2Config, transformers.Qwen3Config
  no_head_dim = {k: v for k, v in SIZES.items() if k != "head_dim"}
  return {
    "llama": (llama(tie_word_embeddings=False, **SIZES), {}),
    "llama_linear": (
      llama(tie_word_embeddings=True, rope_parameters=LINEAR, **SIZES),
      {},
    ),
    "llama3": (
      llama(tie_word_embeddings=True, rope_parameters=LLAMA3, **SIZES),
      {},
    ),
    # In shards; its head_dim follows from the other sizes.
    "qwen2": (
      qwen2(tie_word_embeddings=True, **no_head_dim),
      dict(max_shard_size="10KB"),
    ),
    "qwen3": (qwen3(tie_word_embeddings=False, **SIZES), {}),
    "qwen3_yarn": (
      qwen3(tie_word_embeddings=True, rope_parameters=YARN, **SIZES),
      {},
    ),
  }


def make_model(config, seed: int):
  """A model whose every weight, norms and biases included, is random."""
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for name, param in model.named_parameters():
      if "norm" in name:
        param.uniform_(0.5, 1.5)
      else:
        param.normal_(std=0.3)
      # Exact in bfloat16, so that storing loses nothing.
      param.copy_(param.to(torch.bfloat16).to(param.dtype))
  return model.eval()


def main():
  shutil.rmtree(FOLDER, ignore_errors=True)
  for seed, (name, (config, options)) in enumerate(specs().items()):
    model = make_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (2, 48), generator=generator)
    with torch.no_grad():
      logits = model(tokens).logits
    expected = {
      "tokens": tokens.numpy().astype(np.int32),
      "logits": logits.numpy(),
      "inv_freq": model.model.rotary_emb.inv_freq.numpy(),
    }
    folder = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    safetensors_numpy.save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
  main()
