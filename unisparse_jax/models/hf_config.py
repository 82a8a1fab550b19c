# SPDX-License-Identifier: Apache-2.0
"""Hugging Face `config.json` to and from `DecoderConfig`."""

from typing import Any

from unisparse_jax.models import config as config_lib

ARCHITECTURES = {
  "LlamaForCausalLM": "llama",
  "Qwen2ForCausalLM": "qwen2",
  "Qwen3ForCausalLM": "qwen3",
}
# Their maths would differ from ours; a file that sets one is refused.
_UNSUPPORTED = {
  "mlp_bias": False,
  "use_sliding_window": False,
  "partial_rotary_factor": 1.0,
  "pretraining_tp": 1,
}
_RENAMED = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "embed_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "num_heads": "num_attention_heads",
  "max_len": "max_position_embeddings",
  "norm_eps": "rms_norm_eps",
}
_YARN_OPTIONAL = (
  "beta_fast",
  "beta_slow",
  "attention_factor",
  "mscale",
  "mscale_all_dim",
  "truncate",
)


def from_dict(values: dict[str, Any]) -> config_lib.DecoderConfig:
  """The settings in a parsed `config.json`.

  Args:
    values: content of the file, in the layout of transformers 4 or 5.

  Returns:
    The decoder's settings.

  Raises:
    ValueError: the architecture or a setting is unknown, or a key is missing.
  """
  architecture = _architecture(values)
  _check_supported(values, architecture)
  settings = {}
  for ours, theirs in _RENAMED.items():
    if theirs not in values:
      raise ValueError(f"config.json must have {theirs}; got none.")
    settings[ours] = values[theirs]
  heads = settings["num_heads"]
  rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
  theta = rope.get("rope_theta") or values.get("rope_theta") or 10_000.0
  return config_lib.DecoderConfig(
    **settings,
    num_kv_heads=values.get("num_key_value_heads") or heads,
    head_dim=values.get("head_dim") or settings["embed_dim"] // heads,
    rope_theta=float(theta),
    rope_scaling=_scaling_from_dict(rope, values),
    qk_norm=architecture == "Qwen3ForCausalLM",
    attention_bias=architecture == "Qwen2ForCausalLM",
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
  )


def to_dict(config: config_lib.DecoderConfig, *, dtype: str) -> dict[str, Any]:
  """Content of `config.json` for a decoder.

  Args:
    config: the decoder's settings.
    dtype: of the saved weights, such as "bfloat16".

  Returns:
    A dict to write as JSON.

  Raises:
    ValueError: no Hugging Face architecture has these settings.
  """
  if config.qk_norm and config.attention_bias:
    raise ValueError(
      "config must have qk_norm or attention_bias, not both, to be saved; got "
      "qk_norm=True, attention_bias=True; expected a Llama, Qwen2 or Qwen3."
    )
  architecture = "LlamaForCausalLM"
  if config.qk_norm:
    architecture = "Qwen3ForCausalLM"
  elif config.attention_bias:
    architecture = "Qwen2ForCausalLM"
  values = {
    "architectures": [architecture],
    "model_type": ARCHITECTURES[architecture],
    **{theirs: getattr(config, ours) for ours, theirs in _RENAMED.items()},
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": dtype,
  }
  if architecture == "Qwen2ForCausalLM":
    del values["attention_bias"]  # always has them on q, k and v
  if config.rope_scaling is not None:
    values["rope_scaling"] = _scaling_to_dict(config.rope_scaling)
  return values


def _architecture(values: dict[str, Any]) -> str:
  named = values.get("architectures") or []
  by_type = {v: k for k, v in ARCHITECTURES.items()}
  name = named[0] if named else by_type.get(values.get("model_type"))
  if name not in ARCHITECTURES:
    got = name if named else values.get("model_type")
    raise ValueError(
      f"architectures must name a supported model; got architectures={got!r}; "
      f"expected {' or '.join(ARCHITECTURES)}."
    )
  return name


def _check_supported(values: dict[str, Any], architecture: str):
  unsupported = dict(_UNSUPPORTED, hidden_act="silu")
  if architecture != "Qwen2ForCausalLM":
    unsupported["attention_bias"] = False  # would also put one on o_proj
  for name, expected in unsupported.items():
    got = values.get(name)
    if got is not None and got != expected:
      raise ValueError(f"{name} must be {expected!r}; got {name}={got!r}.")
  layer_types = set(values.get("layer_types") or ()) - {"full_attention"}
  if layer_types:
    raise ValueError(
      "layer_types must all be 'full_attention'; got "
      f"{', '.join(sorted(layer_types))}."
    )


def _scaling_from_dict(rope: dict[str, Any], values: dict[str, Any]):
  kind = rope.get("rope_type", rope.get("type", "default"))
  original = rope.get(
    "original_max_position_embeddings", values["max_position_embeddings"]
  )
  try:
    match kind:
      case "default":
        return None
      case "linear":
        return config_lib.LinearScaling(factor=rope["factor"])
      case "llama3":
        return config_lib.Llama3Scaling(
          factor=rope["factor"],
          low_freq_factor=rope["low_freq_factor"],
          high_freq_factor=rope["high_freq_factor"],
          original_max_len=original,
        )
      case "yarn":
        optional = {
          name: rope[name]
          for name in _YARN_OPTIONAL
          if rope.get(name) is not None
        }
        factor = rope.get("factor")
        if factor is None:
          factor = values["max_position_embeddings"] / original
        return config_lib.YarnScaling(
          factor=factor, original_max_len=original, **optional
        )
  except KeyError as error:
    raise ValueError(
      f"rope_scaling must have {error.args[0]} for {kind!r}; got {rope}."
    ) from error
  raise ValueError(
    f"rope_type must be a known scaling; got rope_type={kind!r}; expected "
    "'default' or 'linear' or 'llama3' or 'yarn'."
  )


def _scaling_to_dict(scaling: config_lib.RopeScaling) -> dict[str, Any]:
  match scaling:
    case config_lib.LinearScaling():
      return {"rope_type": "linear", "factor": scaling.factor}
    case config_lib.Llama3Scaling():
      return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_len,
      }
    case config_lib.YarnScaling():
      optional = {
        name: getattr(scaling, name)
        for name in _YARN_OPTIONAL
        if getattr(scaling, name) is not None
      }
      return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_len,
        **optional,
      }
  raise AssertionError(f"rope_scaling was not checked: {scaling}")
