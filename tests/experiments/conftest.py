# SPDX-License-Identifier: Apache-2.0
import pytest
from flax import nnx

from experiments.frame import flags_and_configs
from unisparse_jax import models
from unisparse_jax.data import sources
from unisparse_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
  """A tiny decoder that has learnt nothing, and a tokenizer."""
  folder = tmp_path_factory.mktemp("model")
  config = models.DecoderConfig(
    vocab_size=384,
    num_layers=2,
    embed_dim=32,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_len=1024,
  )
  models.save_hf(models.Decoder(config, rngs=nnx.Rngs(0)), folder)
  found = [s for s in sources.find_sources() if not s.held_out][:20]
  texts = (sources.read_source(source.path) for source in found)
  tokenizer_lib.train(
    (text for text in texts if text is not None), vocab_size=384
  ).save(folder / "tokenizer.json")
  return folder


@pytest.fixture
def in_process(monkeypatch):
  """Lets a main run in this process, on a few held-out modules."""
  # It would leave its settings behind for the tests after this one.
  monkeypatch.setattr(flags_and_configs, "start_jax", lambda workdir: None)
  everything = sources.find_sources()
  few = [s for s in everything if s.held_out][:16]
  few += [s for s in everything if not s.held_out][:3]
  monkeypatch.setattr(sources, "find_sources", lambda extra_directories=(): few)
