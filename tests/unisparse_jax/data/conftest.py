# SPDX-License-Identifier: Apache-2.0
"""Fixtures of a small corpus of real files."""

from tests.unisparse_jax.data.tiny_corpus import cache as cache
from tests.unisparse_jax.data.tiny_corpus import found as found
from tests.unisparse_jax.data.tiny_corpus import (
  held_out_corpus as held_out_corpus,
)
from tests.unisparse_jax.data.tiny_corpus import tokenizer as tokenizer
from tests.unisparse_jax.data.tiny_corpus import train_corpus as train_corpus
