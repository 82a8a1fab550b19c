# SPDX-License-Identifier: Apache-2.0
"""Flax NNX decoder of the Llama and Qwen family, cache and generation."""

from unisparse_jax.models import hf_import as hf_import
from unisparse_jax.models.config import DecoderConfig as DecoderConfig
from unisparse_jax.models.config import LinearScaling as LinearScaling
from unisparse_jax.models.config import Llama3Scaling as Llama3Scaling
from unisparse_jax.models.config import YarnScaling as YarnScaling
from unisparse_jax.models.decoder import Decoder as Decoder
from unisparse_jax.models.decoder import capture_qkv as capture_qkv
from unisparse_jax.models.decoder import tap_layers as tap_layers
from unisparse_jax.models.flattened import Flat as Flat
from unisparse_jax.models.flattened import flat as flat
from unisparse_jax.models.generate import decode as decode
from unisparse_jax.models.generate import decode_step as decode_step
from unisparse_jax.models.generate import generate as generate
from unisparse_jax.models.generate import prefill as prefill
from unisparse_jax.models.kv_cache import KVCache as KVCache
from unisparse_jax.models.sampling import Greedy as Greedy
from unisparse_jax.models.sampling import Sampler as Sampler
from unisparse_jax.models.sampling import Temperature as Temperature
from unisparse_jax.models.sampling import TopK as TopK
from unisparse_jax.models.sampling import TopP as TopP
from unisparse_jax.models.sampling import noise_at as noise_at
from unisparse_jax.models.sampling import row_keys as row_keys
from unisparse_jax.models.scanned import Prefilled as Prefilled
from unisparse_jax.models.scanned import join_prefilled as join_prefilled
from unisparse_jax.models.scanned import scanned_prefill as scanned_prefill
from unisparse_jax.models.scanned import stack_layers as stack_layers
from unisparse_jax.models.tree_forward import Packing as Packing
from unisparse_jax.models.tree_forward import Scratch as Scratch
from unisparse_jax.models.tree_forward import TreeCache as TreeCache
from unisparse_jax.models.tree_forward import TreeOutput as TreeOutput
from unisparse_jax.models.tree_forward import tree_forward as tree_forward

load_hf = hf_import.load
load_hf_config = hf_import.load_config
save_hf = hf_import.save
