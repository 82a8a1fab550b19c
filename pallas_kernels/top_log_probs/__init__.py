# SPDX-License-Identifier: Apache-2.0
"""The likeliest few of many logits, with their log-probabilities."""

from pallas_kernels.top_log_probs.api import top_log_probs as top_log_probs
