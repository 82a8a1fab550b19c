# SPDX-License-Identifier: Apache-2.0
"""What a sparse attention costs in accuracy, and what it saves in time."""

from unisparse_jax.evaluation.answers import Answer as Answer
from unisparse_jax.evaluation.answers import answer as answer
from unisparse_jax.evaluation.answers import pad_prompts as pad_prompts
from unisparse_jax.evaluation.answers import score_tokens as score_tokens
from unisparse_jax.evaluation.attention_layers import (
  LayerQuality as LayerQuality,
)
from unisparse_jax.evaluation.attention_layers import (
  layer_quality as layer_quality,
)
from unisparse_jax.evaluation.attention_layers import (
  mask_quality as mask_quality,
)
from unisparse_jax.evaluation.next_token import (
  NextTokenQuality as NextTokenQuality,
)
from unisparse_jax.evaluation.next_token import (
  compare_hidden_states as compare_hidden_states,
)
from unisparse_jax.evaluation.next_token import (
  hidden_states as hidden_states,
)
from unisparse_jax.evaluation.next_token import (
  hidden_states_and_qkv as hidden_states_and_qkv,
)
from unisparse_jax.evaluation.next_token import (
  next_token_means as next_token_means,
)
from unisparse_jax.evaluation.next_token import (
  next_token_quality as next_token_quality,
)
from unisparse_jax.evaluation.speed import AttentionTime as AttentionTime
from unisparse_jax.evaluation.speed import time_attention as time_attention
from unisparse_jax.evaluation.speed import time_prefill as time_prefill
