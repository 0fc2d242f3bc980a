"""What a run says: plain lines to the terminal and to log.txt, progress on both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console

from md.engine.reporters import ConsoleProgress, ProgressDisplay, ProgressReport


class RunLog:
    """Lines for the terminal and for log.txt, and progress on both."""

    def __init__(self, console: Console, file: TextIO) -> None:
        self._console, self._file = console, file

    def line(self, text: str) -> None:
        """Print one line, plainly, to both."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.record(text)

    def record(self, text: str) -> None:
        """Print to log.txt only, what the terminal learns otherwise."""
        print(text, file=self._file, flush=True)

    def progress(self) -> ProgressDisplay:
        """Return the display of one stage: a bar on a terminal, a line a minute in files."""
        plain = Console(file=self._file, force_terminal=False)
        return _BothDisplays((ConsoleProgress(console=self._console), ConsoleProgress(console=plain)))


@dataclass(frozen=True)
class _BothDisplays:
    displays: Sequence[ConsoleProgress]

    def update(self, report: ProgressReport) -> None:
        for display in self.displays:
            display.update(report)

    def close(self) -> None:
        for display in self.displays:
            display.close()
