"""From a configuration to results: build the box, run the stages, analyse; the same call again continues."""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import bamboo
from bamboo.errors import CheckpointedStop, GuardError, InputError
from bamboo.files import write_text
from bamboo.system import System
from bamboo.units import FEMTOSECOND, PICOSECOND
from md import protocol
from md.analysis.estimate import Estimate
from md.citations import bibliography
from md.composition import Realisation, realise
from md.conditions import Condition, conditions_of, per_replica, portions, start_box, start_systems
from md.config import NVT, Minimise, Property, RunConfig, Stage
from md.engine import restart
from md.engine.minimiser import minimise
from md.engine.reporters import Reporter, ThermoTable, WallTimeLimit, duration_text
from md.engine.simulation import Simulation
from md.engine.state import Evaluator, MDState, PerReplica
from md.model import Model, check_memory, device_of, load_model, memory_needed, seconds_per_step
from md.recording import FrameRecorder, ThermoRecorder
from md.results import analyse, mean_volume, over_models, property_table, write_properties, write_thermo_table
from md.run_folder import RunFolder
from md.run_length import Outlook, outlook
from md.run_log import RunLog

DEVIATION_WORTH_A_WARNING = 0.05  # relative, of a realised amount from the asked one


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
    console = console or Console()
    if not config.model.committee:
        return _run_model(
            config, Path(folder), model=model or load_model(config), source=source, console=console, started=started
        )
    if model is not None:
        raise InputError("A committee is loaded from its files: give no model.")
    run_folder = RunFolder(Path(folder))
    members = config.each_member()
    models = {name: load_model(member) for name, member in members.items()}
    with run_folder.locked(), open(run_folder.log, "a", encoding="utf-8") as file:
        run_folder.accept(config, begun=-1 if run_folder.is_packed else None, model={}, source=source)
        run_folder.update_manifest(models={name: models[name].record for name in members})
        results = {}
        for name, member in members.items():
            others = [models[other].evaluator for other in members if other != name]
            results[name] = _run_model(
                member, run_folder.path / name, model=models[name], committee=others, console=console, started=started
            )
        properties, table = _write_combined(run_folder, over_models(results))
        log = RunLog(console, file)
        wrote = f"wrote {run_folder.properties} and {_write_report(run_folder)}"
        for line in (f"mean of the models {', '.join(members)}", *table, wrote):
            log.line(line)
    return properties


def _run_model(
    config: RunConfig,
    folder: Path,
    *,
    model: Model,
    console: Console,
    started: float,
    source: Path | None = None,
    committee: Sequence[Evaluator] = (),
) -> dict[str, Estimate]:
    """Run all stages with one model; ``committee``: the others, which watch; ``started``: when the wall time began."""
    run_folder = RunFolder(folder)
    conditions = conditions_of(config, run_folder.path)
    n_atoms = sum(condition.n_atoms for condition in conditions)
    check_memory(model.evaluator, n_atoms * (1 + len(committee)))
    with run_folder.locked(), open(run_folder.log, "a", encoding="utf-8") as file:
        log = RunLog(console, file)
        saved = restart.load(run_folder.restart, device=device_of(model.evaluator))
        begun = int(saved.info["stage"]) if saved else -1 if run_folder.is_packed else None
        run_folder.accept(config, begun=begun, model=model.record, source=source)
        for condition in conditions:
            if condition.name:
                condition.folder.write_config(condition.config)
        _banner(log, conditions, model, folder=run_folder, notes=config.notes)
        made_by = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "stopped": None}
        run_folder.update_manifest(model=model.record, seed=config.build.seed, **made_by, **_contents(conditions))
        systems = start_systems(conditions, log=log)
        temperature_K = per_replica(
            conditions, [condition.config.temperature_K for condition in conditions], device=device_of(model.evaluator)
        )
        limit = config.checkpoint.wall_time
        runner = _Runner(
            config=config,
            conditions=conditions,
            folder=run_folder,
            evaluator=model.evaluator,
            committee=committee,
            systems=systems,
            temperature_K=temperature_K,
            log=log,
            extra=(WallTimeLimit(limit, started=started),) if limit else (),
        )
        state = saved.state if saved else runner.start_state()
        try:
            for index, stage in enumerate(config.stages):
                if begun is None or index >= begun:
                    runner.run_stage(index, stage, state, resume=index == begun)
        except GuardError as error:
            run_folder.update_manifest(stopped=str(error))
            log.record(str(error))
            raise
        except CheckpointedStop as stop:
            log.record(str(stop))
            raise
        properties, table = write_results(run_folder, config)
        for line in table:
            log.line(line)
        figures = run_folder.figures if len(conditions) == 1 else "figures in the folder of each condition"
        log.line(f"wrote {run_folder.properties} and {figures}")
        if not committee:  # else there is one of all models
            log.line(f"wrote {_write_report(run_folder)}")
    return properties


def write_results(folder: RunFolder, config: RunConfig) -> tuple[dict[str, Estimate], list[str]]:
    """Analyse a run, write properties.json, figures and CITATIONS.bib; return the properties and their table.

    Where there are several conditions each has these in its folder, and the properties of all are named
    ``condition/property``; where there are several models, likewise, and the properties of the run are their means.
    """
    from md.figures import write_figures  # imported here: it loads matplotlib

    members, conditions = config.each_member(), config.each_condition()
    if len(members) > 1:
        results = {name: write_results(RunFolder(folder.path / name), one)[0] for name, one in members.items()}
        return _write_combined(folder, over_models(results))
    if len(conditions) > 1:
        results = {name: write_results(RunFolder(folder.path / name), one)[0] for name, one in conditions.items()}
        every = {f"{name}/{key}": e for name, found in results.items() for key, e in found.items()}
        return _write_combined(folder, every)
    properties = analyse(folder, config)
    write_properties(folder, properties)
    write_thermo_table(folder, config)
    write_figures(folder, config, properties)
    write_text(folder.path / "CITATIONS.bib", bibliography(config))
    return properties, property_table(properties)


def _write_report(folder: RunFolder) -> Path:
    """Write report.html and return it."""
    from md.html_report import write_report  # imported here: it loads matplotlib

    return write_report(folder.path)


def _write_combined(folder: RunFolder, properties: dict[str, Estimate]) -> tuple[dict[str, Estimate], list[str]]:
    """Write properties.json of several runs; return the properties and their table."""
    write_properties(folder, properties)
    return properties, property_table(properties)


@dataclass(frozen=True)
class _Runner:
    """What every stage of a run needs."""

    config: RunConfig
    conditions: Sequence[Condition]
    folder: RunFolder
    evaluator: Evaluator
    committee: Sequence[Evaluator]
    systems: Sequence[System]
    temperature_K: PerReplica
    log: RunLog
    extra: Sequence[Reporter]

    def start_state(self) -> MDState:
        """Return the state that the first stage starts from: momenta at its first temperature."""
        first = next((stage for stage in self.config.stages if not isinstance(stage, Minimise)), None)
        start = self.temperature_K
        if first is not None:
            start, _ = protocol.temperatures(first, temperature_K=self.temperature_K)
        return MDState.from_systems(
            self.systems,
            temperature_K=start,
            seed=self.config.build.seed,
            exact_temperature=True,
            device=device_of(self.evaluator),
        )

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
        with self._recorders(name, stage) as reporters:
            simulation = Simulation(
                state,
                self.evaluator,
                integrator=protocol.integrator(
                    stage, temperature_K=self.temperature_K, pressure=self.config.target_pressure
                ),
                reporters=reporters,
                guards=protocol.guards(
                    self.config,
                    stage,
                    systems=self.systems,
                    temperature_K=self.temperature_K,
                    committee=self.committee,
                ),
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
        start, end = stage.temperature or (0.0, 0.0)
        warmth = f"{end:g} K" if start == end else f"{start:g} -> {end:g} K"
        if stage.temperature is None:
            warmth = ", ".join(f"{temperature:g}" for temperature in self.config.temperatures_K) + " K"
        goes_on = f", continued at {state.time_fs / 1000.0:.4g} ps" if resume else ""
        return (
            f"[{index + 1}/{len(self.config.stages)}] {protocol.stage_name(index, stage)}  {stage.kind}, {warmth}, "
            f"{stage.time / PICOSECOND:.4g} ps at {stage.timestep / FEMTOSECOND:g} fs{goes_on}"
        )

    def _set_mean_volume(self, index: int, state: MDState) -> None:
        """Give all replicas of a condition the mean volume of the NPT stage before."""
        npt = max(i for i, stage in enumerate(self.config.stages[:index]) if stage.kind == "npt")
        name = protocol.stage_name(npt, self.config.stages[npt])
        found = [mean_volume(condition.folder.stage(name)) for condition in self.conditions]
        state.scale_volume(per_replica(self.conditions, [volume for volume, _ in found], device=state.device))
        for condition, (volume, note) in zip(self.conditions, found, strict=True):
            density = float(state.density_g_cm3[condition.first])
            self.log.line(f"{condition.title}volume set to {volume:.1f} Å^3, {density:.4f} g/cm3: {note}")

    @contextmanager
    def _recorders(self, name: str, stage: protocol.Dynamics) -> Iterator[list[Reporter]]:
        output = self.config.output
        parts = portions(self.conditions, self.systems, stage=name)
        ensemble = protocol.ensemble(stage, pressure=self.config.target_pressure)
        frames = FrameRecorder(parts, ensemble=ensemble, stride=protocol.stride(output.trajectory_every, stage))
        series = ThermoRecorder(parts, ensemble=ensemble, stride=protocol.stride(output.transport_every, stage))
        every = protocol.stride(output.thermo_every, stage)
        tables = [ThermoTable(part.folder / "thermo.csv", stride=every, replicas=part.replicas) for part in parts]
        with ExitStack() as stack:
            stack.enter_context(closing(frames))
            stack.enter_context(closing(series))
            yield [frames, series, *tables, *self.extra]


def _banner(
    log: RunLog, conditions: Sequence[Condition], model: Model, *, folder: RunFolder, notes: Sequence[str]
) -> None:
    log.line(f"bamboo-md {bamboo.__version__}   {model.description}   run: {folder.path}")
    for note in notes:
        log.line(f"note   {note}")
    for condition in conditions:
        replicas = f", {condition.n_replicas} replicas" if condition.n_replicas > 1 else ""
        log.line(f"box    {condition.title}{condition.box}, charge 0{replicas}")
        if warning := _size_warning(condition.box):
            log.line(f"       {warning}")


def _size_warning(box: Realisation) -> str | None:
    """Return what is to be said of a box that misses its composition, None where it meets it."""
    name, deviation = box.worst
    if deviation <= DEVIATION_WORTH_A_WARNING:
        return None
    return (
        f"this box is too small for what was asked: {name} is off by {deviation:.0%}. "
        "More atoms (build.atoms) come closer."
    )


def _contents(conditions: Sequence[Condition]) -> dict[str, Any]:
    """Return what is in the boxes, for the manifest."""
    entries = {c.name: {"counts": c.box.counts, "formula": c.box.formula} for c in conditions}
    return {"conditions": entries} if len(conditions) > 1 else entries[conditions[0].name]


def analyse_folder(folder: Path) -> tuple[dict[str, Estimate], list[str]]:
    """Analyse a run again, and write its report again where it has one; returns the properties and their table."""
    run_folder = RunFolder(folder)
    results = write_results(run_folder, run_folder.read_config())
    if (folder / "report.html").exists():
        _write_report(run_folder)
    return results


@dataclass(frozen=True)
class Check:
    """What `bamboo-md check` found: the boxes of every condition, the speed of all, and the length of every stage.

    outlook  for every condition what its stages can give of every property
    """

    model: str
    boxes: dict[str, tuple[Realisation, float]]  # name of the condition -> content, length as packed [Å]
    seconds_per_step: float
    memory_bytes: float | None  # None where it is not known
    stages: dict[str, int]  # name -> steps
    outlook: dict[str, dict[Property, Outlook]]
    notes: tuple[str, ...]  # what is allowed and perhaps not meant

    def __str__(self) -> str:
        total = sum(self.stages.values())
        lines = [self.model, *(f"note   {note}" for note in self.notes)]
        for name, (box, length_A) in self.boxes.items():
            lines.append(f"box    {f'{name}: ' if name else ''}{box}, charge 0, {length_A:.1f} Å as packed")
            if warning := _size_warning(box):
                lines.append(f"       {warning}")
        if self.memory_bytes is not None:
            lines.append(f"memory about {self.memory_bytes / 1e9:.1f} GB")
        for name, steps in self.stages.items():
            lines.append(f"{name:<20s} {steps:>9d} steps  {duration_text(steps * self.seconds_per_step)}")
        duration = duration_text(total * self.seconds_per_step)
        lines.append(f"{'all':<20s} {total:>9d} steps  {duration} at {1e3 * self.seconds_per_step:.3g} ms per step")
        alike = all(found == next(iter(self.outlook.values())) for found in self.outlook.values())
        for name, found in list(self.outlook.items())[: 1 if alike else None]:
            title = f"{name}: " if name and not alike else ""
            lines += [f"{title}{asked}: {one.text}" for asked, one in found.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON types; with several conditions the boxes by name."""
        boxes = {
            name: {
                "counts": box.counts,
                "n_atoms": box.n_atoms,
                "length_A": length_A,
                "warning": _size_warning(box),
                "properties": {asked: asdict(one) for asked, one in self.outlook[name].items()},
            }
            for name, (box, length_A) in self.boxes.items()
        }
        return {
            "model": self.model,
            "notes": list(self.notes),
            **boxes.get("", {"conditions": boxes}),
            "seconds_per_step": self.seconds_per_step,
            "memory_bytes": self.memory_bytes,
            "stages": self.stages,
            "seconds": sum(self.stages.values()) * self.seconds_per_step,
        }


def check(config: RunConfig, *, model: Model | None = None) -> Check:
    """Load the model, pack a box of each composition and time a few evaluations; raises what a run would raise.

    Of a committee the first model is timed and all are counted.
    """
    config = protocol.resolve(config)
    members = list(config.each_member().values())
    config, n_models = members[0], len(members)
    model = model or load_model(config)
    alone = config.each_condition()
    n_atoms = sum(one.build.replicas * realise(one.what(), n_atoms=one.build.atoms).n_atoms for one in alone.values())
    check_memory(model.evaluator, n_atoms * n_models)
    packed = {str(one.electrolyte): start_box(one) for one in alone.values()}
    seconds = {name: seconds_per_step(model.evaluator, system) for name, (_, system) in packed.items()}
    boxes = {}
    for name, one in alone.items():
        box, system = packed[str(one.electrolyte)]
        boxes[name] = box, system.volume ** (1.0 / 3.0)
    total = n_models * config.build.replicas * sum(seconds[str(one.electrolyte)] for one in alone.values())
    stages = {
        protocol.stage_name(index, stage): stage.steps if isinstance(stage, Minimise) else protocol.n_steps(stage)
        for index, stage in enumerate(config.stages)
    }
    prospects = {name: outlook(one, boxes[name][0], seconds_per_step=total) for name, one in alone.items()}
    memory = memory_needed(model.evaluator, n_atoms * n_models)
    return Check(model.description, boxes, total, memory, stages, prospects, config.notes)
