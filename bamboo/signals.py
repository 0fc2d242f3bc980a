"""Signals that ask for an end: noted, so that work can stop where nothing is lost."""

import signal
import threading
from types import FrameType
from typing import Any

from bamboo.errors import CheckpointedStop


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT instead of dying of them; a second SIGINT acts as it would have before.

    active  False, or use outside the main thread: signals act as ever
    """

    def __init__(self, *, active: bool = True) -> None:
        self.received: int | None = None
        main = threading.current_thread() is threading.main_thread()
        self._signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if active and main else ()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:  # batch systems repeat the others, people mean it
            signal.signal(number, self._previous[number])

    def leave(self, message: str) -> None:
        """Raise what the signal asks for."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise CheckpointedStop(f"{message}; the same command continues it.")
