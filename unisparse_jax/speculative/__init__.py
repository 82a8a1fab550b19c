# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding whose output is that of plain decoding.

result = generate(target, PromptLookup(), tokens, max_new_tokens=256)
statistics.summarize(result.log)
"""

from unisparse_jax.speculative.agreement import (
  first_mismatches as first_mismatches,
)
from unisparse_jax.speculative.drafters.base import Committed as Committed
from unisparse_jax.speculative.drafters.base import Context as Context
from unisparse_jax.speculative.drafters.base import Draft as Draft
from unisparse_jax.speculative.drafters.base import Drafter as Drafter
from unisparse_jax.speculative.drafters.base import fingerprint as fingerprint
from unisparse_jax.speculative.drafters.by_level import Frontier as Frontier
from unisparse_jax.speculative.drafters.by_level import (
  LevelDrafter as LevelDrafter,
)
from unisparse_jax.speculative.drafters.combined import (
  LookupFirst as LookupFirst,
)
from unisparse_jax.speculative.drafters.eagle import Eagle as Eagle
from unisparse_jax.speculative.drafters.lookup import (
  PromptLookup as PromptLookup,
)
from unisparse_jax.speculative.drafters.lookup import (
  SuffixMatch as SuffixMatch,
)
from unisparse_jax.speculative.drafters.sampled_chain import (
  SampledChain as SampledChain,
)
from unisparse_jax.speculative.drafters.small_decoder import (
  SmallDecoder as SmallDecoder,
)
from unisparse_jax.speculative.eagle_head import EagleHead as EagleHead
from unisparse_jax.speculative.gated import Gated as Gated
from unisparse_jax.speculative.generate import Result as Result
from unisparse_jax.speculative.generate import Session as Session
from unisparse_jax.speculative.generate import generate as generate
from unisparse_jax.speculative.generate import prepare as prepare
from unisparse_jax.speculative.head_files import load_head as load_head
from unisparse_jax.speculative.head_files import save_head as save_head
from unisparse_jax.speculative.oracle import Oracle as Oracle
from unisparse_jax.speculative.policy import Decision as Decision
from unisparse_jax.speculative.policy import Evidence as Evidence
from unisparse_jax.speculative.policy import Fixed as Fixed
from unisparse_jax.speculative.policy import HeteroSpec as HeteroSpec
from unisparse_jax.speculative.policy import Outcome as Outcome
from unisparse_jax.speculative.policy import Policy as Policy
from unisparse_jax.speculative.policy import StatelessPolicy as StatelessPolicy
from unisparse_jax.speculative.statistics import StepLog as StepLog
from unisparse_jax.speculative.statistics import summarize as summarize
from unisparse_jax.speculative.tree import DraftTree as DraftTree
from unisparse_jax.speculative.tree import Pool as Pool
from unisparse_jax.speculative.tree import TreeShape as TreeShape
