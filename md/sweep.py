"""``bamboo-md sweep sweep.yaml``: many separate runs, one for every composition, temperature and seed.

When to use which: a run whose file gives lists (``temperature: [280 K, 298 K]``) advances all its conditions together,
as one batch, in one process: the right choice for a few small boxes on a GPU. A sweep makes every combination a run of
its own, in its own folder and process: for many processors, for array jobs, and where one that fails or is killed must
not touch the others.

A member is finished when its run has ended well with the settings it would have now; its folder then holds an
outcome.json that says so. Everything else the same command continues, from the checkpoints of the runs.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field

from bamboo.checkpoint import zoo
from bamboo.errors import CheckpointedStop
from bamboo.files import file_sha256, write_json, write_text
from bamboo.signals import PARENT, StopSignals
from md.composition import parse_composition
from md.config import RunConfig, dump_config, folder_name, load_config
from md.quantities import MOST_SEVERAL, Temperature, validator
from md.run_folder import is_locked
from md.yaml_model import Problem, load_yaml

Say = Callable[[str], None]
MOST_MEMBERS = 1000  # Slurm's usual limit of an array
POLL_S = 0.1
REASON_LINES = 8
KILLED = 128  # a process that a signal ended has 128 + its number as code, as in a shell
INTERRUPTED = (CheckpointedStop.exit_code, KILLED + signal.SIGTERM, KILLED + signal.SIGUSR1)  # asked to end, by us


class SweepConfig(BaseModel):
    """What ``bamboo-md sweep`` reads.

    run            what all members share: a block with the keys of a run
    electrolytes, temperatures, seeds   one member for every combination; what is not given here is as in ``run``
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunConfig  # first: it gives names to molecules that electrolytes may use
    electrolytes: Annotated[
        tuple[Annotated[str, validator(lambda text: (parse_composition(str(text)), str(text))[1])], ...],
        Field(max_length=MOST_SEVERAL),
    ] = ()
    temperatures: Annotated[tuple[Temperature, ...], Field(max_length=MOST_SEVERAL)] = ()
    seeds: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0, le=2**31 - 1000)], ...], Field(max_length=MOST_MEMBERS)
    ] = ()

    def members(self) -> dict[str, RunConfig]:
        """Return the run of every member by its name, which does not depend on the other members."""
        members = {}
        for electrolyte, temperature, seed in itertools.product(
            self.electrolytes or (self.run.electrolyte,),
            self.temperatures or self.run.temperatures_K,
            self.seeds or (self.run.build.seed,),
        ):
            update: dict[str, Any] = {
                "electrolyte": electrolyte,
                "temperature": temperature,
                "pressure": self.run.target_pressure,
                "conditions": None,
                "build": self.run.build.model_copy(update={"seed": seed}),
            }
            words = [folder_name(electrolyte)] if isinstance(electrolyte, str) else []
            members["-".join([*words, f"{temperature:g}K", f"seed{seed}"])] = self.run.model_copy(update=update)
        return members

    def one_of_each(self) -> dict[str, RunConfig]:
        """Return the first member of every composition, by its name."""
        first: dict[str | tuple[str, ...] | None, tuple[str, RunConfig]] = {}
        for name, config in self.members().items():
            first.setdefault(config.electrolyte, (name, config))
        return dict(first.values())


def load_sweep(path: Path) -> SweepConfig:
    """Read and check a sweep; raises InputError that lists every problem as ``file:line: key: problem``."""
    return load_yaml(path, SweepConfig, checks=_checks)


def _checks(config: SweepConfig) -> list[Problem]:
    run, problems = config.run, list[Problem]()
    given = [key for key in ("electrolyte", "composition", "structure") if getattr(run, key) is not None]
    if config.electrolytes and given:
        problems.append((("electrolytes",), f"given here and as `run.{given[0]}`. Keep one of them."))
    if not config.electrolytes and not given:
        problems.append((("run",), "no composition: give `electrolytes`, or one for all in `run`."))
    if config.temperatures and "temperature" in run.model_fields_set:
        problems.append((("temperatures",), "given here and as `run.temperature`. Keep one of them."))
    if config.seeds and "seed" in run.build.model_fields_set:
        problems.append((("seeds",), "given here and as `run.build.seed`. Keep one of them."))
    if len(run.each_condition()) > 1:
        problems.append((("run",), "a list is a batch inside one run; lists of a sweep are `electrolytes` and so on."))
    tables = {
        "electrolytes": [folder_name(text) for text in config.electrolytes],
        "temperatures": [f"{temperature:g}" for temperature in config.temperatures],
        "seeds": [str(seed) for seed in config.seeds],
    }
    for key, names in tables.items():
        problems += [((key, i), "is in the list already.") for i, name in enumerate(names) if name in names[:i]]
    ordered, replicas = sorted(config.seeds), run.build.replicas
    if any(0 < after - before < replicas for before, after in itertools.pairwise(ordered)):
        text = f"{replicas} replicas take as many seeds: keep seeds {replicas} apart, or boxes occur twice."
        problems.append((("seeds",), text))
    if (n := max(1, len(tables["electrolytes"])) * max(1, len(tables["temperatures"])) * max(1, len(ordered))) > (
        MOST_MEMBERS
    ):
        problems.append(((), f"{n} members, expected at most {MOST_MEMBERS}."))
    return problems


@dataclass(frozen=True)
class Outcome:
    """How the process of a member ended; ``settings`` is the SHA-256 of its configuration."""

    code: int
    reason: str
    settings: str


@dataclass(frozen=True)
class Member:
    """One run of a sweep and the folder where it works."""

    name: str
    config: RunConfig
    folder: Path

    @cached_property
    def text(self) -> str:
        """Its configuration as YAML."""
        return dump_config(self.config)

    @cached_property
    def settings(self) -> str:
        """SHA-256 of its configuration and of the files that it names: a model trained anew is another run."""
        digest = hashlib.sha256(self.text.encode())
        files = [zoo().get(name, Path(name)) for name in self.config.model_names]
        for file in [*files, *([Path(self.config.structure)] if self.config.structure else [])]:
            digest.update(file_sha256(file).encode() if file.is_file() else b"missing")
        return digest.hexdigest()

    @property
    def outcome(self) -> Outcome | None:
        """How it ended the last time, None where it has not or that cannot be read."""
        try:
            return Outcome(**json.loads((self.folder / "outcome.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def is_finished(self) -> bool:
        outcome = self.outcome
        return outcome is not None and outcome.code == 0 and outcome.settings == self.settings

    @property
    def is_busy(self) -> bool:
        """Whether another process works in its folder."""
        return is_locked(self.folder)

    def check(self) -> None:
        """Write its configuration and read it back; raises InputError for what its run would refuse."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "member.yaml"
        write_text(path, self.text)
        load_config(path)

    def start(self, *, threads: int) -> "Process":
        """Start its checked run as a process of its own: signals reach it only through us, and it ends with us."""
        number = str(threads)
        with open(self.folder / "output.txt", "a") as output, open(self.folder / "errors.txt", "w") as errors:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "md.cli", "run"),
                    *(str(self.folder / "member.yaml"), "--folder", str(self.folder)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, PARENT: str(os.getpid())},
                start_new_session=True,
            )
        return Process(self, child)


@dataclass(frozen=True)
class Process:
    """The run of a member while it lives."""

    member: Member
    child: "subprocess.Popen[bytes]"

    def finished(self) -> Outcome | None:
        """Return and keep how it ended, None where it has not yet."""
        code = self.child.poll()
        if code is None:
            return None
        outcome = Outcome(code if code >= 0 else KILLED - code, self._reason(code), self.member.settings)
        write_json(self.member.folder / "outcome.json", asdict(outcome))
        return outcome

    def _reason(self, code: int) -> str:
        if code == 0:
            return ""
        if code < 0:
            memory = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{memory}"
        text = (self.member.folder / "errors.txt").read_text(encoding="utf-8", errors="replace")
        return " ".join(line.strip() for line in text.splitlines()[-REASON_LINES:]) or f"exit code {code}"


def members_of(config: SweepConfig, folder: Path) -> list[Member]:
    """Return the members in their order, the one that array jobs count."""
    return [Member(name, one, folder / name) for name, one in config.members().items()]


def processors() -> int:
    """Return how many processors this process, or its job, may use."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1


def default_processes(config: RunConfig) -> int:
    """Return how many members run at a time: one on a GPU, which they would share, else one for each processor."""
    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    return 1 if on_gpu else processors()


def run_members(members: Sequence[Member], *, processes: int | None = None, say: Say = print) -> None:
    """Run what is not finished, ``processes`` at a time; how they end is in ``Member.outcome`` and ``summary``.

    Each process gets its share of the processors as threads. That share does not depend on what is finished, because
    the last digits of a trajectory depend on it. A member that fails does not stop the others; one that another process
    works on is waited for, and counts as one of ``processes`` if it is at work from the beginning: what is left of a
    sweep that was killed needs its processors. SIGTERM, SIGUSR1 and SIGINT end all in checkpoints, and no further
    member begins.
    Raises InputError for a member whose settings no run would accept, before any begins.
    """
    waiting = [member for member in members if not member.is_finished]
    for member in waiting:
        member.check()
    n_processes = min(processes or default_processes(members[0].config), len(members))
    threads = max(1, processors() // n_processes)
    say(
        f"{len(members)} members, {len(members) - len(waiting)} finished before; "
        f"{n_processes} at a time, {threads} thread{'s' if threads > 1 else ''} each"
    )
    running: list[Process] = []
    left = [member for member in waiting if member.is_busy]
    waits, told = False, set[int]()
    with StopSignals() as stop, _ended_with_us(running):
        while running or (waiting and stop.received is None):
            left = [member for member in left if member.is_busy]
            while waiting and stop.received is None and len(running) + len(left) < n_processes:
                free = next((member for member in waiting if not member.is_busy), None)
                if free is None:
                    break
                waiting.remove(free)
                if not free.is_finished:  # now, by the process that it was waited for
                    running.append(free.start(threads=threads))
            blocked = waiting and not (running or waits) and stop.received is None
            if blocked and (busy := [member.name for member in left or waiting if member.is_busy]):
                waits = True
                say(f"waiting for other processes that work on {', '.join(busy)}")
            _hand_on(stop.received, running, told)
            time.sleep(POLL_S)
            for process in list(running):
                if (outcome := process.finished()) is not None:
                    running.remove(process)
                    say(f"{process.member.name}: {outcome.reason or 'finished'}")


def summary(members: Sequence[Member]) -> tuple[str, int]:
    """Return what became of all members, and the exit code that tells it.

    The code is 0 where all are finished, that of the first that failed, or 75 where some were interrupted or not begun;
    for a single member it is always that of its run.
    """
    left = [member for member in members if not member.is_finished]
    outcomes = {member.name: member.outcome for member in left}
    failed = {name: one for name, one in outcomes.items() if one and one.code not in (0, *INTERRUPTED)}
    lines = [f"{len(members) - len(left)} of {len(members)} members are finished"]
    lines += [f"  {name} failed (code {one.code}): {one.reason}" for name, one in failed.items()]
    n_open = len(left) - len(failed)
    if n_open:
        lines.append(f"  {n_open} interrupted or not begun")
    if left:
        lines.append("The same command continues what is not finished.")
    code = next((one.code for one in failed.values()), CheckpointedStop.exit_code if left else 0)
    if len(members) == len(left) == 1 and (only := members[0].outcome) is not None:
        code = only.code or CheckpointedStop.exit_code
    return "\n".join(lines), code


@contextmanager
def _ended_with_us(running: Sequence[Process]) -> Iterator[None]:
    """Ask for the end of processes that still live when an error or a second SIGINT ends the sweep."""
    try:
        yield
    except BaseException:
        _hand_on(signal.SIGTERM, running, set())
        raise


def _hand_on(received: int | None, running: Sequence[Process], told: set[int]) -> None:
    """Ask the processes, each once, to end in their checkpoints, where that is asked of us."""
    if received is None:
        return
    number = signal.SIGUSR1 if received == signal.SIGUSR1 else signal.SIGTERM
    for process in running:
        if process.child.pid not in told:
            told.add(process.child.pid)
            process.child.send_signal(number)
