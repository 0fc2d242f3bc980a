"""How far runs have come, read from their folders while they may be at work."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bamboo.errors import InputError
from bamboo.units import FEMTOSECOND
from md import protocol
from md.config import Minimise, RunConfig
from md.engine.reporters import duration_text
from md.engine.restart import SLOTS
from md.run_folder import RunFolder, is_locked

State = Literal["running", "finished", "stopped by a guard", "interrupted"]
STEPS_PER_SECOND = 1.0e6 / 86400.0  # of a timestep of 1 fs, at 1 ns per day
_PROGRESS = re.compile(r"^(\S+)  \d+ %  .*  (\S+) ns/day  eta ")  # a line of ``ProgressReport``
TAIL_BYTES = 20_000  # of log.txt, looked through for the last progress


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment.

    stage     the one in progress, or the last; 'preparation' before the first checkpoint
    progress  share of the steps of dynamics that are done, 0 to 1, over all models of a committee
    eta_s     seconds of dynamics left at the speed last seen; None where the run is not at work, or has just begun
    reason    what the guard said that stopped it
    updated   when anything was last written
    """

    folder: Path
    electrolyte: str
    state: State
    stage: str
    progress: float
    eta_s: float | None
    reason: str | None
    updated: datetime

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON types."""
        return {
            "folder": str(self.folder),
            "electrolyte": self.electrolyte,
            "state": self.state,
            "stage": self.stage,
            "progress": round(self.progress, 4),
            "eta_s": self.eta_s,
            "reason": self.reason,
            "updated": self.updated.isoformat(timespec="seconds"),
        }


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder and below, sorted; conditions and models of a run belong to it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Runs are in `runs` unless `run --folder` said otherwise.")
    found: list[Path] = []
    for path in sorted((entry.parent for entry in folder.rglob("resolved.yaml")), key=lambda path: path.parts):
        if not any(path.is_relative_to(run) for run in found):
            found.append(path)
    return found


def run_status(folder: Path) -> RunStatus:
    """Return how far a run has come; InputError for a folder that holds none."""
    run = RunFolder(folder)
    config = protocol.resolve(run.read_config())
    members = {name: RunFolder(folder / name) for name in config.each_member()}
    totals = [0 if isinstance(stage, Minimise) else protocol.n_steps(stage) for stage in config.stages]
    positions = [_position(member, config) for member in members.values()]
    done = [sum(totals[: max(index, 0)]) + min(step, totals[index] if index >= 0 else 0) for index, step in positions]
    latest = max((number for number, (index, _) in enumerate(positions) if index >= 0), default=0)
    index = positions[latest][0]
    steps, n_steps = sum(done), sum(totals) * len(members)
    reasons = [run_of(member.path).manifest().get("stopped") for member in members.values()]
    reason = next((text for text in reasons if text), None)
    if steps == n_steps and all(index == len(totals) - 1 for index, _ in positions) and run.properties.exists():
        state: State = "finished"
    elif is_locked(run_of(folder).path):
        state = "running"
    else:
        state = "stopped by a guard" if reason else "interrupted"
    rate = _steps_per_second(list(members.values())[latest], config) if state == "running" else None
    stage = "preparation" if index < 0 else protocol.stage_name(index, config.stages[index])
    return RunStatus(
        folder=folder,
        electrolyte=contents(config),
        state=state,
        stage=f"{list(members)[latest]}: {stage}" if len(members) > 1 else stage,
        progress=steps / n_steps if n_steps else float(state == "finished"),
        eta_s=(n_steps - steps) / rate if rate else None,
        reason=reason if state == "stopped by a guard" else None,
        updated=datetime.fromtimestamp(_latest_change(folder), UTC),
    )


def run_of(folder: Path) -> RunFolder:
    """Return the run that a folder is, or the one that the condition in it is part of: lock, checkpoints, manifest."""
    parent = RunFolder(folder.resolve().parent)
    return parent if folder.resolve().name in parent.manifest().get("conditions", {}) else RunFolder(folder)


def contents(config: RunConfig) -> str:
    """Return what a run is of, in one line: compositions and temperatures."""
    if isinstance(config.electrolyte, tuple):
        what = ", ".join(config.electrolyte)
    elif config.electrolyte is not None:
        what = config.electrolyte
    elif config.structure is not None:
        what = Path(config.structure).name
    else:
        composition = config.what()
        parts = composition.counts or composition.solvents
        what = " ".join(f"{count:g} {name}" for name, count in parts.items())
        what += "".join(f" + {amount.value:g} {amount.unit} {name}" for name, amount in composition.salts.items())
    return f"{what}, {', '.join(f'{temperature:g}' for temperature in config.temperatures_K)} K"


def status_table(found: Sequence[RunStatus]) -> str:
    """Return one line for each run, and the reason below those that a guard stopped."""
    if not found:
        return "no runs here"
    rows = [("run", "electrolyte", "state", "stage", "done", "left", "last change")]
    for run in found:
        left = "" if run.eta_s is None else duration_text(run.eta_s)
        when = run.updated.astimezone().strftime("%Y-%m-%d %H:%M")
        rows.append(
            (str(run.folder), run.electrolyte, run.state, run.stage, f"{100.0 * run.progress:.0f} %", left, when)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row, reason in zip(rows, [None, *(run.reason for run in found)], strict=True):
        lines.append("  ".join(f"{text:<{width}s}" for text, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"    {reason}"] if reason else []
    return "\n".join(lines)


def _position(member: RunFolder, config: RunConfig) -> tuple[int, int]:
    """Return index and step of the stage in progress, (-1, 0) before the first, by checkpoint and thermo.csv.

    A checkpoint ends every stage, thermo.csv is minutes ahead of the last one. All conditions advance together.
    """
    first = RunFolder(member.path / next(iter(config.each_condition())))
    positions = [(-1, 0)]
    headers = [_json(run_of(member.path).restart / f"{slot}.json") for slot in SLOTS]
    if newest := max((header for header in headers if header), key=lambda header: int(header["serial"]), default=None):
        positions.append((int(newest["info"]["stage"]), int(newest["state"]["step"])))
    for index, stage in enumerate(config.stages):
        table = _tail(first.stage(protocol.stage_name(index, stage)) / "thermo.csv", n_bytes=1000)
        lines = table[: table.rfind("\n") + 1].splitlines()  # complete ones
        steps = [line.split(",", 1)[0] for line in lines[1:]]
        if steps and steps[-1].isdigit():
            positions.append((index, int(steps[-1])))
    index, step = max(positions)
    return (index, 0) if index >= 0 and isinstance(config.stages[index], Minimise) else (index, step)


def _steps_per_second(member: RunFolder, config: RunConfig) -> float | None:
    """Return the speed that the log last told of; None where it has told of none."""
    names = {protocol.stage_name(index, stage): stage for index, stage in enumerate(config.stages)}
    for line in reversed(_tail(run_of(member.path).log, n_bytes=TAIL_BYTES).splitlines()):
        match = _PROGRESS.match(line)
        stage = names.get(match[1]) if match else None
        if match and stage is not None and not isinstance(stage, Minimise):
            return float(match[2]) * STEPS_PER_SECOND / (stage.timestep / FEMTOSECOND)
    return None


def _latest_change(folder: Path) -> float:
    names = ("resolved.yaml", "log.txt", "manifest.json", "properties.json", "thermo.csv", "traj.h5")
    return max(path.stat().st_mtime for name in names for path in folder.rglob(name))


def _tail(path: Path, *, n_bytes: int) -> str:
    """Return the end of a text file, '' where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - n_bytes))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint's header; None where there is none, or it is being replaced or damaged."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and {"serial", "info", "state"} <= content.keys() else None
