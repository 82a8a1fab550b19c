# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unisparse_jax.training import tiny_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """A run that was never stopped: its workdir and result. Only read it."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  result = tiny_run.train(workdir, evaluate=lambda model, step: {})
  return workdir, result
