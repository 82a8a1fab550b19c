# SPDX-License-Identifier: Apache-2.0
"""Code text, tokenizer and training rows. Nothing here imports jax."""

from unisparse_jax.data import domains as domains
from unisparse_jax.data.cache_builder import build_cache as build_cache
from unisparse_jax.data.code_corpus import CodeCorpus as CodeCorpus
from unisparse_jax.data.sources import (
  site_packages_directories as site_packages_directories,
)
from unisparse_jax.data.tokenizer import Tokenizer as Tokenizer
from unisparse_jax.data.tokenizer import (
  train_on_standard_library as train_on_standard_library,
)
from unisparse_jax.data.training_rows import Mixture as Mixture
from unisparse_jax.data.training_rows import TrainingRows as TrainingRows
