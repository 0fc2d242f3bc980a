"""What a running simulation tells: the protocol of reporters, the thermo.csv table, the progress display."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bamboo.errors import InputError
from bamboo.files import write_text
from bamboo.units import BAR
from md.engine.state import MDState


class Reporter(Protocol):
    """Records the state at every step divisible by ``stride``, the start of the stage (step 0) included, each once.

    ``flush`` makes records durable; it runs before every checkpoint. ``truncate`` drops records later than a step; it
    runs when a stage goes on from a checkpoint, so that no step is recorded twice.
    """

    @property
    def stride(self) -> int: ...

    def report(self, state: MDState) -> None: ...

    def flush(self) -> None: ...

    def truncate(self, step: int) -> None: ...


class ThermoTable:
    """One line per replica and record in a CSV file, for people and spreadsheets.

    conserved_eV is what the integrator would conserve exactly; pressure, density and volume are NaN for clusters.
    ``replicas`` are those it tells of, counted from zero in the table.
    """

    COLUMNS = (
        "step",
        "time_ps",
        "replica",
        "temperature_K",
        "pressure_bar",
        "density_g_cm3",
        "volume_A3",
        "potential_eV",
        "kinetic_eV",
        "conserved_eV",
    )

    def __init__(self, path: Path, *, stride: int, replicas: slice = slice(None)) -> None:
        if stride < 1:
            raise InputError(f"stride is {stride}, expected a positive number of steps.")
        self.path, self.stride, self.replicas = path, stride, replicas

    def report(self, state: MDState) -> None:
        columns = (
            state.temperature_K(),
            state.pressure() / BAR,
            state.density_g_cm3,
            state.volume,
            state.energy,
            state.kinetic_energy(),
            state.conserved_energy,
        )
        lines = []
        for replica, values in enumerate(zip(*(column[self.replicas].tolist() for column in columns), strict=True)):
            numbers = [state.time_fs / 1000.0, replica, *values]
            lines.append(",".join([str(state.step), *(f"{number:.10g}" for number in numbers)]) + "\n")
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self._header)
        with open(self.path, "a") as file:
            file.write("".join(lines))

    def flush(self) -> None:
        if self.path.exists():
            with open(self.path, "a") as file:
                os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Keep the lines up to a step; a last line cut short by a crash goes as well."""
        if not self.path.exists():
            return
        complete = [line for line in self.path.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
        kept = [line for line in complete if int(line.split(",", 1)[0]) <= step]
        write_text(self.path, "".join([self._header, *kept]))

    @property
    def _header(self) -> str:
        return ",".join(self.COLUMNS) + "\n"


class WallTimeLimit:
    """Asks for a checkpoint and an orderly end when the wall time is used up, by the signal batch systems send."""

    stride = 10

    def __init__(self, seconds: float, *, started: float) -> None:
        self._end = started + seconds

    def report(self, state: MDState) -> None:
        if time.monotonic() >= self._end:
            os.kill(os.getpid(), signal.SIGUSR1)

    def flush(self) -> None:
        """Keep nothing."""

    def truncate(self, step: int) -> None:
        """Keep nothing."""


@dataclass(frozen=True)
class ProgressReport:
    """How far a stage has come, averaged over replicas.

    eta_s is what remains of this call of ``Simulation.run`` in seconds.
    """

    stage: str
    step: int
    last_step: int
    time_ps: float
    temperature_K: float
    pressure_bar: float
    density_g_cm3: float
    ns_per_day: float
    eta_s: float

    def line(self) -> str:
        """Return everything in one line; pressure and density are left out for clusters."""
        parts = [
            f"{self.stage}  {100.0 * self.step / max(self.last_step, 1):.0f} %  {self.time_ps:.4g} ps",
            f"T {self.temperature_K:.0f} K",
        ]
        if self.density_g_cm3 == self.density_g_cm3:  # not NaN
            parts += [f"P {self.pressure_bar:.0f} bar", f"rho {self.density_g_cm3:.3f} g/cm3"]
        parts += [f"{self.ns_per_day:.3g} ns/day", f"eta {duration_text(self.eta_s)}"]
        return "  ".join(parts)


class ProgressDisplay(Protocol):
    """Shows progress about once a second; ``close`` ends the display whatever happened."""

    def update(self, report: ProgressReport) -> None: ...

    def close(self) -> None: ...


class ConsoleProgress:
    """A bar on a terminal; elsewhere one plain line a minute and one at the end, without control characters."""

    def __init__(self, *, console: Console | None = None, plain_interval_s: float = 60.0) -> None:
        self._console = console or Console()
        self._interval = plain_interval_s
        self._last_line: float | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def update(self, report: ProgressReport) -> None:
        if self._console.is_terminal:
            self._update_bar(report)
            return
        now = time.monotonic()
        due = self._last_line is None or now - self._last_line >= self._interval
        if due or report.step >= report.last_step:
            self._last_line = now
            print(report.line(), file=self._console.file, flush=True)

    def _update_bar(self, report: ProgressReport) -> None:
        if self._bar is None:
            self._bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task("", total=report.last_step)
            self._bar.start()
        self._bar.update(self._task, completed=report.step, total=report.last_step, description=report.line())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: 42 s, 7 min, 4 h 27 min, 2 d 3 h."""
    minutes, hours, days = round(seconds / 60), round(seconds / 60) // 60, round(seconds / 3600) // 24
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {round(seconds / 3600) % 24} h"
