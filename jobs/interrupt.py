"""What SIGINT and SIGTERM do to a run: once is after the chunks in flight, twice is now. Both can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from latentmill.jobs.executors.base import Executor


class Interrupt:
    """The signals' handler: the first stops an executor that has work in flight, any other one everything."""

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self.asked = False
        self._on_stop = on_stop
        self._executor: Executor | None = None

    def listen(self) -> dict[int, Any]:
        """Take the signals; what handled them before. Only a main thread can: elsewhere its owner decides."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    @contextmanager
    def stopping(self, executor: Executor) -> Iterator[None]:
        """Within, the first signal lets this executor finish what is in flight."""
        self._executor = executor
        self.listen()  # once more: Ray has handlers of its own, which it installs when it connects
        try:
            yield
        finally:
            self._executor = None

    def _handle(self, _signal: int, _frame: Any) -> None:
        first, self.asked = not self.asked, True
        if not first or self._executor is None or not self._executor.stop():
            raise KeyboardInterrupt
        self._on_stop()


@contextmanager
def graceful_interrupt(on_stop: Callable[[], None]) -> Iterator[Interrupt]:
    """Within, SIGINT and SIGTERM are handled."""
    interrupt = Interrupt(on_stop)
    previous = interrupt.listen()
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
