# SPDX-License-Identifier: Apache-2.0
"""The 13 RULER tasks, re-founded on Python source."""

from __future__ import annotations

import types
from collections.abc import Mapping

from unisparse_jax.tasks.base import Episode as Episode
from unisparse_jax.tasks.base import Question as Question
from unisparse_jax.tasks.base import Task as Task
from unisparse_jax.tasks.base import TaskSample as TaskSample
from unisparse_jax.tasks.base import score as score
from unisparse_jax.tasks.code_questions import CodeQuestions as CodeQuestions
from unisparse_jax.tasks.needles import NeedleTask as NeedleTask
from unisparse_jax.tasks.variable_tracking import (
  VariableTracking as VariableTracking,
)
from unisparse_jax.tasks.word_counts import CommonWords as CommonWords
from unisparse_jax.tasks.word_counts import FrequentWords as FrequentWords

TASKS: Mapping[str, Task] = types.MappingProxyType(
  {
    task.name: task
    for task in (
      NeedleTask(name="niah_single_1", haystack_kind="noise"),
      NeedleTask(name="niah_single_2", haystack_kind="code"),
      NeedleTask(name="niah_single_3", haystack_kind="code", value_kind="uuid"),
      NeedleTask(name="niah_multikey_1", haystack_kind="code", num_keys=4),
      NeedleTask(name="niah_multikey_2", haystack_kind="needles"),
      NeedleTask(
        name="niah_multikey_3",
        haystack_kind="needles",
        value_kind="uuid",
        uuid_keys=True,
      ),
      NeedleTask(name="niah_multivalue", haystack_kind="code", num_values=4),
      NeedleTask(
        name="niah_multiquery",
        haystack_kind="code",
        num_keys=4,
        num_queries=4,
      ),
      VariableTracking(name="vt"),
      CommonWords(name="cwe"),
      FrequentWords(name="fwe"),
      CodeQuestions(name="qa_1", num_hops=1),
      CodeQuestions(name="qa_2", num_hops=2),
    )
  }
)


def get_task(name: str) -> Task:
  """Returns a task by name."""
  if name not in TASKS:
    raise ValueError(f"task must be one of {sorted(TASKS)}; got task={name!r}.")
  return TASKS[name]
