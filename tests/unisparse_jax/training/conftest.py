# SPDX-License-Identifier: Apache-2.0
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.unisparse_jax.training import tiny_run


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
  """One compilation cache for every run and process, as runs of users have."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      patch.setenv(name.upper(), str(value))
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def whole(compiled_once, tmp_path_factory):
  """A run that was never stopped: its workdir and result. Only read it."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  result = tiny_run.train(workdir, evaluate=lambda model, step: {})
  return workdir, result
