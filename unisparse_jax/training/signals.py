# SPDX-License-Identifier: Apache-2.0
"""Requests to stop, taken between two steps."""

import signal
import threading
import time

# `timeout` signals its child and then the whole group: one request, not two.
_SAME_REQUEST = 2.0  # seconds


class StopRequests:
  """Notes SIGTERM and SIGINT instead of dying, in the main thread."""

  def __init__(self):
    self.received: str | None = None
    self._time = 0.0
    self._old = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    del frame
    if self.received:
      if time.monotonic() - self._time > _SAME_REQUEST:
        raise KeyboardInterrupt  # asked again: stop at once
      return
    self._time = time.monotonic()
    self.received = signal.Signals(number).name
