# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors_numpy

from tests import helpers
from unisparse_jax import models
from unisparse_jax.models import hf_config

NAMES = ("llama", "llama_linear", "llama3", "qwen2", "qwen3", "qwen3_yarn")


def read_expected(folder):
  expected = safetensors_numpy.load_file(folder / "expected.safetensors")
  return jnp.asarray(expected["tokens"]), expected["logits"]


def logits_of(model, tokens):
  return jax.jit(lambda tokens: model(tokens)[0])(tokens)


def edit_config(folder, **changes):
  file = folder / "config.json"
  values = json.loads(file.read_text()) | changes
  file.write_text(json.dumps({k: v for k, v in values.items() if v != "drop"}))


def edit_tensors(folder, change):
  file = folder / "model.safetensors"
  tensors = safetensors_numpy.load_file(file)
  change(tensors)
  safetensors_numpy.save_file(tensors, file)


@pytest.fixture
def checkpoint(goldens, tmp_path):
  """A copy of the llama golden to spoil."""
  return shutil.copytree(goldens / "llama", tmp_path / "llama")


@pytest.fixture
def sharded(goldens, tmp_path):
  """A copy of the qwen2 golden, which is in three files."""
  return shutil.copytree(goldens / "qwen2", tmp_path / "qwen2")


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(goldens, name):
  model = models.load_hf(goldens / name)
  tokens, expected = read_expected(goldens / name)
  # Measured 0.7e-6 to 1.1e-6.
  error = helpers.relative_error(logits_of(model, tokens), expected)
  assert error < 4e-6


@pytest.mark.parametrize(
  "name, changes",
  [
    ("llama_linear", dict(rope_parameters=dict(rope_theta=1e4))),
    (
      "qwen3_yarn",
      dict(
        rope_parameters=dict(
          rope_type="yarn",
          rope_theta=1e4,
          factor=4.0,
          original_max_position_embeddings=32,
          attention_factor=1.0,
        )
      ),
    ),
    ("llama", dict(rms_norm_eps=1e-2)),
    ("llama", dict(rope_parameters=dict(rope_theta=2e4))),
  ],
)
def test_every_setting_shows_in_the_logits(goldens, tmp_path, name, changes):
  """The tolerance above sees a setting that is read wrongly."""
  folder = shutil.copytree(goldens / name, tmp_path / name)
  edit_config(folder, **changes)
  tokens, expected = read_expected(folder)
  actual = logits_of(models.load_hf(folder), tokens)
  assert helpers.relative_error(actual, expected) > 1e-3


@pytest.mark.parametrize(
  "name", ["llama", "llama_linear", "llama3", "qwen3_yarn"]
)
def test_older_config_layout(goldens, tmp_path, name):
  folder = shutil.copytree(goldens / name, tmp_path / name)
  values = json.loads((folder / "config.json").read_text())
  rope = values["rope_parameters"]
  theta = rope.pop("rope_theta")
  if rope["rope_type"] == "linear":
    rope["type"] = rope.pop("rope_type")
  edit_config(
    folder,
    rope_parameters="drop",
    rope_theta=theta,
    rope_scaling=None if rope.get("rope_type") == "default" else rope,
  )
  new = models.load_hf_config(goldens / name)
  assert models.load_hf_config(folder) == new


def test_config_of_a_real_checkpoint():
  """The settings published with Llama 3.2 1B and Qwen2.5 0.5B."""
  llama = hf_config.from_dict(
    {
      "architectures": ["LlamaForCausalLM"],
      "attention_bias": False,
      "head_dim": 64,
      "hidden_act": "silu",
      "hidden_size": 2048,
      "intermediate_size": 8192,
      "max_position_embeddings": 131072,
      "mlp_bias": False,
      "model_type": "llama",
      "num_attention_heads": 32,
      "num_hidden_layers": 16,
      "num_key_value_heads": 8,
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-05,
      "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
      },
      "rope_theta": 500000.0,
      "tie_word_embeddings": True,
      "vocab_size": 128256,
    }
  )
  assert llama.head_dim == 64 and llama.rope_theta == 5e5
  assert llama.rope_scaling.original_max_len == 8192
  assert llama.tie_embeddings and not llama.attention_bias
  qwen = hf_config.from_dict(
    {
      "architectures": ["Qwen2ForCausalLM"],
      "hidden_act": "silu",
      "hidden_size": 896,
      "intermediate_size": 4864,
      "max_position_embeddings": 32768,
      "max_window_layers": 21,
      "model_type": "qwen2",
      "num_attention_heads": 14,
      "num_hidden_layers": 24,
      "num_key_value_heads": 2,
      "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0,
      "sliding_window": 32768,
      "tie_word_embeddings": True,
      "use_sliding_window": False,
      "vocab_size": 151936,
    }
  )
  assert qwen.attention_bias and qwen.head_dim == 64 and not qwen.qk_norm
  for config, count in ((llama, 1_235_814_400), (qwen, 494_032_768)):
    shapes = nnx.eval_shape(
      lambda config=config: models.Decoder(config, rngs=nnx.Rngs(0))
    )
    assert shapes.num_params == count


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_loads_bit_for_bit(goldens, tmp_path, name):
  model = models.load_hf(goldens / name)
  models.save_hf(model, tmp_path / "saved", extra={"eos_token_id": 3})
  loaded = models.load_hf(tmp_path / "saved")
  assert loaded.config == model.config
  before, after = (nnx.to_flat_state(nnx.state(m)) for m in (model, loaded))
  assert before.paths == after.paths
  for x, y in zip(before.leaves, after.leaves, strict=True):
    np.testing.assert_array_equal(x.get_value(), y.get_value())
  values = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert values["eos_token_id"] == 3


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_saved_tensors_are_those_of_transformers(goldens, tmp_path, name):
  models.save_hf(models.load_hf(goldens / name), tmp_path, dtype=jnp.bfloat16)
  ours, theirs = (
    safetensors_numpy.load_file(folder / "model.safetensors")
    for folder in (tmp_path, goldens / name)
  )
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    assert ours[key].dtype == value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours[key], value)


def test_saved_config_names_the_dtype(small_model, tmp_path):
  models.save_hf(small_model, tmp_path, dtype=jnp.bfloat16)
  values = json.loads((tmp_path / "config.json").read_text())
  assert values["torch_dtype"] == "bfloat16"
  assert values["architectures"] == ["LlamaForCausalLM"]


def test_param_dtype_of_a_loaded_model(goldens):
  model = models.load_hf(
    goldens / "llama", dtype=jnp.bfloat16, param_dtype=jnp.float32
  )
  assert model.embed.embedding.dtype == jnp.float32
  assert model.dtype == jnp.bfloat16


def test_no_file_is_left_half_written(small_model, tmp_path, monkeypatch):
  models.save_hf(small_model, tmp_path)
  before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

  def fail(fd):
    raise OSError("disk is full")

  monkeypatch.setattr(os, "fsync", fail)
  other = models.Decoder(small_model.config, rngs=nnx.Rngs(1))
  with pytest.raises(OSError, match="disk is full"):
    models.save_hf(other, tmp_path, overwrite=True)
  assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_checkpoint_is_not_overwritten_unasked(small_model, tmp_path):
  models.save_hf(small_model, tmp_path)
  other = models.Decoder(small_model.config, rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match=r"^path must not hold a checkpoint"):
    models.save_hf(other, tmp_path)
  kept = models.load_hf(tmp_path).embed.embedding[...]
  np.testing.assert_array_equal(kept, small_model.embed.embedding[...])
  models.save_hf(other, tmp_path, overwrite=True)
  replaced = models.load_hf(tmp_path).embed.embedding[...]
  np.testing.assert_array_equal(replaced, other.embed.embedding[...])


def test_overwriting_shards_leaves_one_checkpoint(sharded):
  model = models.load_hf(sharded)
  models.save_hf(model, sharded, overwrite=True)
  assert not (sharded / "model.safetensors.index.json").exists()
  assert models.load_hf(sharded).config == model.config


def test_settings_of_no_architecture_are_refused(config, tmp_path):
  config = dataclasses.replace(config, qk_norm=True, attention_bias=True)
  model = models.Decoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"^config must have qk_norm or"):
    models.save_hf(model, tmp_path / "new")
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_truncated_file_is_named(checkpoint, length):
  file = checkpoint / "model.safetensors"
  file.write_bytes(file.read_bytes()[:length])
  with pytest.raises(
    ValueError, match=r"model\.safetensors must be a complete"
  ):
    models.load_hf(checkpoint)


def test_corrupt_header_is_named(checkpoint):
  file = checkpoint / "model.safetensors"
  content = bytearray(file.read_bytes())
  content[8:40] = b"\xff" * 32
  file.write_bytes(bytes(content))
  with pytest.raises(
    ValueError, match=r"model\.safetensors must be a complete"
  ):
    models.load_hf(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00\xff"])
def test_corrupt_config_is_named(checkpoint, content):
  (checkpoint / "config.json").write_text(content, encoding="latin-1")
  with pytest.raises(ValueError, match=r"config\.json must"):
    models.load_hf(checkpoint)


def test_missing_files_are_named(checkpoint, tmp_path):
  with pytest.raises(ValueError, match=r"config\.json must be a readable"):
    models.load_hf(tmp_path / "nowhere")
  (checkpoint / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"^path must hold model\.safetensors"):
    models.load_hf(checkpoint)


def test_missing_tensor_is_named(checkpoint):
  name = "model.layers.1.mlp.up_proj.weight"
  edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
  with pytest.raises(ValueError, match=f"without '{name}' and 0 more"):
    models.load_hf(checkpoint)


def test_unknown_tensor_is_named(checkpoint):
  def change(tensors):
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(24, np.float32)

  edit_tensors(checkpoint, change)
  with pytest.raises(ValueError, match=r"o_proj\.bias.*unknown name"):
    models.load_hf(checkpoint)


def test_derived_tensor_is_ignored(checkpoint):
  def change(tensors):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = np.zeros(8, np.float32)

  edit_tensors(checkpoint, change)
  models.load_hf(checkpoint)


def test_wrong_shape_is_named(checkpoint):
  name = "model.layers.0.self_attn.k_proj.weight"

  def change(tensors):
    tensors[name] = tensors[name].T.copy()

  edit_tensors(checkpoint, change)
  with pytest.raises(ValueError, match=r"k_proj.*\(32, 24\).*\(24, 32\)"):
    models.load_hf(checkpoint)


def test_missing_shard_is_named(sharded):
  (sharded / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match=r"00002-of-00003.* must exist"):
    models.load_hf(sharded)


def test_index_that_lies_is_refused(sharded):
  index = sharded / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  names = values["weight_map"]
  name = "model.norm.weight"
  first = "model-00001-of-00003.safetensors"
  assert names[name] != first
  index.write_text(json.dumps({"weight_map": names | {name: first}}))
  with pytest.raises(ValueError, match=r"00001.* must hold 'model\.norm"):
    models.load_hf(sharded)
  index.write_text(json.dumps({"weight_map": names | {name: "../x"}}))
  with pytest.raises(ValueError, match="must name files of its folder"):
    models.load_hf(sharded)
  index.write_text("{}")
  with pytest.raises(ValueError, match="must have a weight_map"):
    models.load_hf(sharded)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      dict(architectures=["MambaForCausalLM"]),
      "LlamaForCausalLM or Qwen2ForCausalLM or Qwen3ForCausalLM",
    ),
    (dict(architectures="drop", model_type="gpt2"), "architectures='gpt2'"),
    (dict(hidden_act="gelu"), "^hidden_act must be 'silu'"),
    (dict(attention_bias=True), "^attention_bias must be False"),
    (dict(mlp_bias=True), "^mlp_bias must be False"),
    (dict(use_sliding_window=True), "^use_sliding_window must be False"),
    (dict(layer_types=["sliding_attention"]), "^layer_types must all be"),
    (dict(hidden_size="drop"), "must have hidden_size"),
    (dict(num_key_value_heads=3), "^num_kv_heads must divide"),
    (dict(rms_norm_eps="small"), "^norm_eps must"),
    (dict(rope_parameters={"rope_type": "dynamic"}), "rope_type='dynamic'"),
    (dict(rope_parameters={"rope_type": "linear"}), "must have factor"),
  ],
)
def test_unsupported_config_is_refused(checkpoint, changes, message):
  edit_config(checkpoint, **changes)
  with pytest.raises(ValueError, match=message) as caught:
    models.load_hf(checkpoint)
  assert "config.json" in str(caught.value)


# The live counterpart of the goldens, where transformers is installed.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_save(goldens, tmp_path, name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = models.load_hf(goldens / name)
  models.save_hf(model, tmp_path)
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True, dtype=torch.float32
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  tokens = np.random.default_rng(1).integers(0, 40, (2, 100))
  with torch.no_grad():
    expected = theirs.eval()(torch.asarray(tokens)).logits.numpy()
  actual = logits_of(model, jnp.asarray(tokens, jnp.int32))
  # Measured 4e-6 at 100 positions.
  assert helpers.relative_error(actual, expected) < 2e-5
