"""Signals that ask for an end: noted, so that work can stop where nothing is lost."""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from bamboo.errors import CheckpointedStop

PARENT = "BAMBOO_PARENT"  # environment: process without which this one should not go on
PR_SET_PDEATHSIG = 1  # of Linux, <sys/prctl.h>


def end_with_parent() -> None:
    """Get SIGTERM when the parent named in the environment ends, even if it is killed; on Linux only, elsewhere not.

    Called by the child: code between fork and exec would not be safe beside threads.
    """
    parent = os.environ.pop(PARENT, None)  # it is not that of our own children
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


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
