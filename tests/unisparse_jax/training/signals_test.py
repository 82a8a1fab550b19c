# SPDX-License-Identifier: Apache-2.0
import os
import signal

import pytest

from unisparse_jax.training import signals


def test_one_request_may_come_twice(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
  before = signal.getsignal(signal.SIGTERM)
  with signals.StopRequests() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    now[0] += 0.5  # as `timeout` does
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"
    now[0] += 10.0
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before
