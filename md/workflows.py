"""From a configuration to results: build the box, run the stages, analyse; the same call again continues."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from rich.console import Console

import bamboo
from bamboo.errors import InputError
from bamboo.structure.packing import pack_box
from bamboo.system import System
from bamboo.units import FEMTOSECOND, GRAM_PER_CM3, PICOSECOND
from md import protocol
from md.analysis.estimate import Estimate
from md.boxes import read_box
from md.citations import bibliography
from md.composition import Realisation, realise
from md.config import NVT, Minimise, RunConfig, Stage
from md.engine import restart
from md.engine.minimiser import minimise
from md.engine.reporters import Reporter, ThermoTable, duration_text
from md.engine.simulation import Simulation
from md.engine.state import Evaluator, MDState
from md.model import Model, check_memory, device_of, load_model, memory_needed, seconds_per_step
from md.recording import FrameRecorder, ThermoRecorder, build_topology, write_pdb
from md.results import analyse, mean_volume, property_table, write_properties, write_thermo_table
from md.run_folder import RunFolder
from md.run_log import RunLog
from md.topology import Topology

DEVIATION_WORTH_A_WARNING = 0.05  # relative, of a realised amount from the asked one


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


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    model: Model | None = None,
    source: Path | None = None,
    console: Console | None = None,
) -> dict[str, Estimate]:
    """Run all stages in a folder, analyse them and return the properties; finished work is not repeated.

    model    force field to use instead of the configured one
    source   the file the configuration came from, copied as input.yaml
    console  where lines and progress go; default: standard output

    Raises InputError for settings that contradict the folder, UnknownElementError, GuardError where the simulation
    left physical ground, CheckpointedStop after SIGTERM, SIGUSR1 or the wall time.
    """
    started = time.monotonic()
    config = protocol.resolve(config)
    run_folder = RunFolder(Path(folder))
    box = realise(config.what(), n_atoms=config.build.atoms)
    model = model or load_model(config)
    check_memory(model.evaluator, config.build.replicas * box.n_atoms)
    with run_folder.locked(), open(run_folder.log, "a", encoding="utf-8") as file:
        log = RunLog(console or Console(), file)
        saved = restart.load(run_folder.restart, device=device_of(model.evaluator))
        begun = int(saved.info["stage"]) if saved else -1
        run_folder.accept(config, begun=begun, model=model.record, source=source)
        _banner(log, config, box, model, folder=run_folder)
        run_folder.update_manifest(model=model.record, counts=box.counts, formula=box.formula, seed=config.build.seed)
        systems = _start_systems(config, box, run_folder, log=log)
        state = saved.state if saved else _start_state(config, systems, model.evaluator)
        limit = config.checkpoint.wall_time
        runner = _Runner(
            config=config,
            folder=run_folder,
            evaluator=model.evaluator,
            topology=build_topology(systems[0], box.counts),
            systems=systems,
            log=log,
            extra=(WallTimeLimit(limit, started=started),) if limit else (),
        )
        for index, stage in enumerate(config.stages):
            if index >= begun:
                runner.run_stage(index, stage, state, resume=index == begun)
        properties, table = write_results(run_folder, config)
        for line in table:
            log.line(line)
        log.line(f"wrote {run_folder.properties} and {run_folder.figures}")
    return properties


def write_results(folder: RunFolder, config: RunConfig) -> tuple[dict[str, Estimate], list[str]]:
    """Analyse a run, write properties.json, figures and CITATIONS.bib; return the properties and their table."""
    from md.report import write_figures  # imported here: it loads matplotlib

    properties = analyse(folder, config)
    write_properties(folder, properties)
    write_thermo_table(folder, config)
    write_figures(folder, config, properties)
    (folder.path / "CITATIONS.bib").write_text(bibliography(config), encoding="utf-8")
    return properties, property_table(properties)


@dataclass(frozen=True)
class _Runner:
    """What every stage of a run needs."""

    config: RunConfig
    folder: RunFolder
    evaluator: Evaluator
    topology: Topology
    systems: Sequence[System]
    log: RunLog
    extra: Sequence[Reporter]

    def run_stage(self, index: int, stage: Stage, state: MDState, *, resume: bool) -> None:
        """Run or finish one stage; the state is moved on."""
        name = protocol.stage_name(index, stage)
        if isinstance(stage, Minimise):
            if not resume:  # a checkpoint of this stage is its result
                self._minimise(name, stage, state, index=index)
            return
        total = protocol.n_steps(stage)
        if resume and state.step >= total:
            self.log.line(f"[{index + 1}/{len(self.config.stages)}] {name}  done before")
            return
        self.log.line(self._headline(index, stage, state, resume=resume))
        if isinstance(stage, NVT) and stage.volume == "mean" and not resume:
            self._set_mean_volume(index, state)
        with self._recorders(name, stage, n_replicas=state.n_replicas) as reporters:
            simulation = Simulation(
                state,
                self.evaluator,
                integrator=protocol.integrator(
                    stage, temperature_K=self.config.temperature_K, pressure=self.config.target_pressure
                ),
                reporters=reporters,
                guards=protocol.guards(self.config, stage, systems=self.systems),
                progress=self.log.progress(),
                resume=resume,
                restart_folder=self.folder.restart,
                frame_folder=self.folder.stage(name),
                checkpoint_minutes=self.config.checkpoint.every / 60.0,
                stage=name,
                info={"stage": index},
            )
            simulation.run(total - state.step)

    def _minimise(self, name: str, stage: Minimise, state: MDState, *, index: int) -> None:
        begun = time.monotonic()
        result = minimise(state, self.evaluator, max_steps=stage.steps, force_tolerance=stage.force)
        seconds = time.monotonic() - begun
        outcome = "converged" if result.converged else f"stopped after {stage.steps} steps, good enough to warm up"
        self.log.line(
            f"[{index + 1}/{len(self.config.stages)}] {name}  {result.n_steps} steps, "
            f"largest force {float(result.max_force.max()):.3g} eV/Å, {outcome}"
        )
        steps = sum(protocol.n_steps(s) for s in self.config.stages if not isinstance(s, Minimise))
        per_step = seconds / (result.n_steps + 1)
        self.log.line(f"about {per_step:.3g} s per step; {steps} steps of dynamics: {duration_text(per_step * steps)}")
        restart.save(self.folder.restart, state, info={"stage": index})

    def _headline(self, index: int, stage: protocol.Dynamics, state: MDState, *, resume: bool) -> str:
        start, end = protocol.temperatures(stage, temperature_K=self.config.temperature_K)
        warmth = f"{end:g} K" if start == end else f"{start:g} -> {end:g} K"
        goes_on = f", continued at {state.time_fs / 1000.0:.4g} ps" if resume else ""
        return (
            f"[{index + 1}/{len(self.config.stages)}] {protocol.stage_name(index, stage)}  {stage.kind}, {warmth}, "
            f"{stage.time / PICOSECOND:.4g} ps at {stage.timestep / FEMTOSECOND:g} fs{goes_on}"
        )

    def _set_mean_volume(self, index: int, state: MDState) -> None:
        """Give all replicas the mean volume of the NPT stage before."""
        npt = max(i for i, stage in enumerate(self.config.stages[:index]) if stage.kind == "npt")
        volume, note = mean_volume(self.folder.stage(protocol.stage_name(npt, self.config.stages[npt])))
        state.scale_volume(volume)
        self.log.line(f"volume set to {volume:.1f} Å^3, {float(state.density_g_cm3[0]):.4f} g/cm3: {note}")

    @contextmanager
    def _recorders(self, name: str, stage: protocol.Dynamics, *, n_replicas: int) -> Iterator[list[Reporter]]:
        output = self.config.output
        folder = self.folder.stage(name)
        common: dict[str, Any] = {
            "ensemble": protocol.ensemble(stage, pressure=self.config.target_pressure),
            "n_replicas": n_replicas,
        }
        frames = FrameRecorder(folder, self.topology, stride=protocol.stride(output.trajectory_every, stage), **common)
        series = ThermoRecorder(folder, self.topology, stride=protocol.stride(output.transport_every, stage), **common)
        table = ThermoTable(folder / "thermo.csv", stride=protocol.stride(output.thermo_every, stage))
        with ExitStack() as stack:
            stack.enter_context(closing(frames))
            stack.enter_context(closing(series))
            yield [frames, series, table, *self.extra]


def _banner(log: RunLog, config: RunConfig, box: Realisation, model: Model, *, folder: RunFolder) -> None:
    log.line(f"bamboo-md {bamboo.__version__}   {model.description}   run: {folder.path}")
    replicas = f", {config.build.replicas} replicas" if config.build.replicas > 1 else ""
    log.line(f"box    {box}, charge 0{replicas}")
    if box.worst_deviation > DEVIATION_WORTH_A_WARNING:
        log.line(
            f"       this box is too small for what was asked: an amount is off by {box.worst_deviation:.0%}. "
            "More atoms (build.atoms) come closer."
        )


def packing_density(config: RunConfig, box: Realisation) -> float:
    """Return the density to pack at [g/cm3]."""
    if config.build.density is not None:
        return config.build.density / GRAM_PER_CM3
    return protocol.PACKING_FRACTION * box.density_g_cm3


def _start_systems(config: RunConfig, box: Realisation, folder: RunFolder, *, log: RunLog) -> list[System]:
    """Pack the boxes, or read those packed before; what is read is what is used, so that both are the same."""
    if not folder.start.exists() and config.structure is not None:
        write_start(folder, [read_box(config.structure)[1]] * config.build.replicas, box)
        log.line(f"start from {config.structure}")
    elif not folder.start.exists():
        density = packing_density(config, box)
        seeds = range(config.build.seed, config.build.seed + config.build.replicas)
        packed = [
            pack_box(box.counts, density_g_cm3=density, seed=seed, tolerance_A=config.build.tolerance) for seed in seeds
        ]
        write_start(folder, packed, box)
        length = packed[0].volume ** (1.0 / 3.0)
        log.line(
            f"packed {length:.2f} Å box at {density:.3f} g/cm3 (liquid, by ideal mixing: {box.density_g_cm3:.3f} g/cm3)"
        )
    frames = ase.io.read(folder.start, index=":", format="extxyz")
    systems = [System.from_atoms(atoms) for atoms in frames]
    if config.structure is not None:
        given = read_box(config.structure)[1].positions
        if given.shape != systems[0].positions.shape or not np.allclose(given, systems[0].positions, atol=1.0e-6):
            raise InputError(f"{config.structure} has changed since {folder.path} was begun. Choose another folder.")
    return systems


def write_start(folder: RunFolder, systems: list[System], box: Realisation) -> None:
    """Write the boxes a run starts from, all at once, and the first as PDB."""
    draft = folder.start.with_suffix(".part")
    ase.io.write(draft, [system.to_atoms() for system in systems], format="extxyz")
    os.replace(draft, folder.start)
    write_pdb(folder.path / "start.pdb", systems[0], build_topology(systems[0], box.counts))


def _start_state(config: RunConfig, systems: Sequence[System], evaluator: Evaluator) -> MDState:
    first = next((stage for stage in config.stages if not isinstance(stage, Minimise)), None)
    start = (
        config.temperature_K if first is None else protocol.temperatures(first, temperature_K=config.temperature_K)[0]
    )
    return MDState.from_systems(
        systems, temperature_K=start, seed=config.build.seed, exact_temperature=True, device=device_of(evaluator)
    )


def start_box(config: RunConfig) -> tuple[Realisation, System]:
    """Return the counts and one packed box of a configuration, for `build` and `check`."""
    box = realise(config.what(), n_atoms=config.build.atoms)
    if config.structure is not None:
        return box, read_box(config.structure)[1]
    density = packing_density(config, box)
    return box, pack_box(box.counts, density_g_cm3=density, seed=config.build.seed, tolerance_A=config.build.tolerance)


def analyse_folder(folder: Path) -> tuple[dict[str, Estimate], list[str]]:
    """Analyse a run again; returns the properties and their table."""
    run_folder = RunFolder(folder)
    return write_results(run_folder, run_folder.read_config())


@dataclass(frozen=True)
class Check:
    """What `bamboo-md check` found: the box, the speed, and the length of every stage."""

    model: str
    box: Realisation
    length_A: float
    seconds_per_step: float
    memory_bytes: float | None  # None where it is not known
    stages: dict[str, int]  # name -> steps

    def __str__(self) -> str:
        total = sum(self.stages.values())
        lines = [self.model, f"box    {self.box}, charge 0, {self.length_A:.1f} Å as packed"]
        if self.memory_bytes is not None:
            lines.append(f"memory about {self.memory_bytes / 1e9:.1f} GB")
        for name, steps in self.stages.items():
            lines.append(f"{name:<20s} {steps:>9d} steps  {duration_text(steps * self.seconds_per_step)}")
        duration = duration_text(total * self.seconds_per_step)
        lines.append(f"{'all':<20s} {total:>9d} steps  {duration} at {1e3 * self.seconds_per_step:.3g} ms per step")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON types."""
        return {
            "model": self.model,
            "counts": self.box.counts,
            "n_atoms": self.box.n_atoms,
            "length_A": self.length_A,
            "seconds_per_step": self.seconds_per_step,
            "memory_bytes": self.memory_bytes,
            "stages": self.stages,
            "seconds": sum(self.stages.values()) * self.seconds_per_step,
        }


def check(config: RunConfig, *, model: Model | None = None) -> Check:
    """Load the model, pack one box and time a few evaluations; raises what a run would raise."""
    config = protocol.resolve(config)
    model = model or load_model(config)
    n_atoms = config.build.replicas * realise(config.what(), n_atoms=config.build.atoms).n_atoms
    check_memory(model.evaluator, n_atoms)
    box, system = start_box(config)
    seconds = config.build.replicas * seconds_per_step(model.evaluator, system)
    stages = {
        protocol.stage_name(index, stage): stage.steps if isinstance(stage, Minimise) else protocol.n_steps(stage)
        for index, stage in enumerate(config.stages)
    }
    memory = memory_needed(model.evaluator, n_atoms)
    return Check(model.description, box, system.volume ** (1.0 / 3.0), seconds, memory, stages)
