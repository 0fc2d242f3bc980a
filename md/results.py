"""From the files of a run to its properties: which stage answers which question, and how the answers are shown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers

from bamboo.errors import InputError
from bamboo.files import write_json, write_text
from md import protocol
from md.analysis.conductivity import conductivity, green_kubo_conductivity
from md.analysis.density import SHORTEST_PS, density
from md.analysis.dielectric import dielectric_constant
from md.analysis.diffusion import self_diffusion
from md.analysis.estimate import Estimate, format_time, no_value
from md.analysis.residence import residence_times
from md.analysis.statistics import combine, equilibration_start, series_mean
from md.analysis.structure import LIGANDS, NO_SHELL, coordination_numbers, ion_pairing
from md.analysis.viscosity import viscosity
from md.config import NPT, Minimise, RunConfig
from md.property_names import property_of
from md.protocol import TRANSPORT
from md.recording import trajectory_path
from md.run_folder import RunFolder
from md.run_length import needed_ps
from md.topology import Floats, Topology
from md.trajectory import ThermoSeries, Trajectory

FEWEST_FRAMES = 16


def dynamics_folders(folder: RunFolder, config: RunConfig) -> list[tuple[protocol.Dynamics, Path]]:
    """Return the stages of dynamics that have written results, in order, each with its folder."""
    stages = [
        (stage, folder.stage(protocol.stage_name(index, stage)))
        for index, stage in enumerate(config.stages)
        if not isinstance(stage, Minimise)
    ]
    return [(stage, path) for stage, path in stages if (path / "thermo.h5").exists()]


@dataclass(frozen=True)
class StageData:
    """What a stage wrote: its series, and one trajectory per replica; ``note`` says what was left out.

    discarded_ps  length of what was left out at its beginning
    drifts        whether what is left has no stationary part either
    """

    name: str
    thermo: ThermoSeries
    trajectories: Sequence[Trajectory]
    note: str | None = None
    discarded_ps: float = 0.0
    drifts: bool = False

    @property
    def length_ps(self) -> float:
        """Simulated time that is used [ps]."""
        return float(self.thermo.time_ps[-1] - self.thermo.time_ps[0])

    @property
    def length(self) -> str:
        """How long it lasted, and how much of that is used."""
        whole = format_time(self.length_ps + self.discarded_ps)
        return f"{whole}, of which {format_time(self.length_ps)} are usable" if self.discarded_ps > 0.0 else whole

    @property
    def has_ions(self) -> bool:
        return bool(self.trajectories[0].topology.molecule_charges.any())

    def equilibrated(self) -> "StageData":
        """Return the stage from where its potential energy is stationary: a new volume or temperature takes its time.

        Where none is found the second half is taken, and ``note`` warns.
        """
        series = self.thermo
        discarded, found = _equilibrium(series.potential_energy)
        if discarded == 0:
            return self
        since_ps = float(series.time_ps[discarded])
        discarded_ps = since_ps - float(series.time_ps[0])
        note = f"first {format_time(discarded_ps)} discarded"
        if not found:
            note += ": the potential energy drifts to the end, equilibrate longer before relying on this"
        trajectories = [trajectory.since(since_ps) for trajectory in self.trajectories]
        return StageData(self.name, series.since(since_ps), trajectories, note, discarded_ps, not found)


def stage_data(folder: RunFolder, config: RunConfig, *, suits: Callable[[protocol.Dynamics], bool]) -> StageData | None:
    """Return the data of the last stage that suits, or None."""
    found = [path for stage, path in dynamics_folders(folder, config) if suits(stage)]
    if not found:
        return None
    path = found[-1]
    trajectories = [Trajectory.read(trajectory_path(path, r)) for r in range(config.build.replicas)]
    return StageData(path.name, ThermoSeries.read(path / "thermo.h5"), trajectories)


def production(folder: RunFolder, config: RunConfig) -> StageData | None:
    """Return the last stage whose ensemble supports transport, else the last one (whose refusal is worth telling).

    Without its start, where that is not equilibrium.
    """

    def supports(stage: protocol.Dynamics) -> bool:
        return protocol.transport_objection(config, stage) is None

    data = stage_data(folder, config, suits=supports) or stage_data(folder, config, suits=lambda stage: True)
    return data and data.equilibrated()


def analyse(folder: RunFolder, config: RunConfig) -> dict[str, Estimate]:
    """Return the properties that were asked for, each a value with its error bar or the reason why there is none.

    Density comes from the last NPT stage, the rest from the last stage whose ensemble supports transport.
    """
    asked: set[str] = set(config.properties)
    properties: dict[str, Estimate] = {}
    if "density" in asked:
        npt = stage_data(folder, config, suits=lambda stage: isinstance(stage, NPT))
        if npt is None:
            properties["density"] = no_value("the run has no npt stage", unit="g/cm3", method="NPT average")
        else:
            found = _or_reason("density", "g/cm3", lambda: density(npt.thermo))
            properties |= {name: _with_needed(estimate, name, npt) for name, estimate in found.items()}
    data = production(folder, config)
    if data is None:
        missing = sorted(asked - {"density"})
        return properties | {name: no_value("no stage of dynamics has run", unit="", method="") for name in missing}
    n_frames = min(trajectory.n_frames for trajectory in data.trajectories)
    if n_frames < FEWEST_FRAMES:
        reason = f"not converged: {data.name} lasted {data.length}, {n_frames} frames, too few for any analysis"
        for name in sorted(asked - {"density"}):
            properties[name] = _with_needed(no_value(reason, unit="", method=""), name, data)
        return properties
    measured = production_properties(asked, data)
    if data.note is not None:
        measured = {name: e if e.value is None else e.with_warning(data.note) for name, e in measured.items()}
    return properties | long_enough(measured, data)


def production_properties(asked: set[str], data: StageData) -> dict[str, Estimate]:
    """Return the properties that a stage at constant volume gives: transport, structure, dielectric constant."""
    properties: dict[str, Estimate] = {}
    temperature_K = float(data.thermo.temperature_K.mean())
    eta = _or_reason("viscosity", "mPa s", lambda: viscosity(data.thermo)) if asked & TRANSPORT else {}
    if "viscosity" in asked:
        properties |= eta
    if "conductivity" in asked:
        if data.has_ions:
            properties |= _or_reason(
                "conductivity", "mS/cm", lambda: conductivity(data.trajectories, temperature_K=temperature_K)
            )
            properties |= _or_reason("conductivity_green_kubo", "mS/cm", lambda: green_kubo_conductivity(data.thermo))
        else:
            properties["conductivity"] = no_value("there are no ions", unit="mS/cm", method="")
    if "diffusion" in asked:
        properties |= _or_reason(
            "diffusion",
            "cm2/s",
            lambda: self_diffusion(data.trajectories, temperature_K=temperature_K, viscosity=eta.get("viscosity")),
        )
    if "coordination" in asked:
        properties |= _or_reason("coordination", "", lambda: coordination(data.trajectories))
    if "dielectric" in asked:
        properties |= dielectric_constant(data.thermo, data.trajectories[0].topology)
    return properties


def long_enough(properties: dict[str, Estimate], data: StageData) -> dict[str, Estimate]:
    """Withdraw what comes from less than ``SHORTEST_PS``: statistics cannot see motions slower than a run.

    A shell around an ion lives for 10 ps and more; before that, any average shows how the box was packed.
    Whatever is not converged gets the time that it takes as a rule.
    """
    if data.length_ps < SHORTEST_PS:
        reason = f"not converged: {data.name} lasted {data.length}"
        properties = {
            name: no_value(reason, unit=estimate.unit, method=estimate.method, n_effective=estimate.n_effective)
            if estimate.value is not None or estimate.warnings[0].startswith(("not converged", NO_SHELL))
            else estimate
            for name, estimate in properties.items()
        }
    return {name: _with_needed(estimate, name, data) for name, estimate in properties.items()}


def _with_needed(estimate: Estimate, name: str, data: StageData) -> Estimate:
    """Add what the property takes as a rule, where a shorter stage has given no value."""
    asked, replicas = property_of(name), len(data.trajectories)
    needed = needed_ps(asked, ions=data.has_ions, replicas=replicas)
    if estimate.value is not None or not estimate.warnings[0].startswith("not converged") or data.length_ps >= needed:
        return estimate
    each = " in each replica" if replicas > 1 else ""
    return estimate.with_warning(f"as a rule {asked} takes some {format_time(needed)}{each}")


def coordination(trajectories: Sequence[Trajectory]) -> dict[str, Estimate]:
    """Return the neighbours of every monatomic cation, how long they stay, and the state of its ion pairs."""
    topology = trajectories[0].topology
    cations = monatomic_cations(topology)
    if not cations:
        return {"coordination": no_value("there are no monatomic cations", unit="", method="")}
    properties: dict[str, Estimate] = {}
    for cation in cations:
        for ligand in LIGANDS:
            if has_element(topology, ligand):
                properties |= _over_replicas(trajectories, partial(coordination_numbers, centre=cation, ligand=ligand))
        properties |= _over_replicas(trajectories, partial(ion_pairing, cation=cation))
        properties |= residence_times(trajectories, cation=cation)
    return properties


def monatomic_cations(topology: Topology) -> list[str]:
    """Return the species that are single positive ions."""
    sizes, charges = np.bincount(topology.molecule), topology.molecule_charges
    return [name for name, index in topology.species.items() if sizes[index[0]] == 1 and charges[index[0]] > 0.0]


def has_element(topology: Topology, element: str) -> bool:
    """Tell whether an element occurs in the box."""
    return bool((topology.numbers == atomic_numbers[element]).any())


def _over_replicas(
    trajectories: Sequence[Trajectory], function: Callable[[Trajectory], dict[str, Estimate]]
) -> dict[str, Estimate]:
    per_replica = [function(trajectory) for trajectory in trajectories]
    if len(per_replica) == 1:
        return per_replica[0]
    return {name: combine([results[name] for results in per_replica]) for name in per_replica[0]}


def _or_reason(name: str, unit: str, estimate: Callable[[], dict[str, Estimate]]) -> dict[str, Estimate]:
    """Return the estimates, or, where the data are too few even to begin, that as the reason for no value."""
    try:
        return estimate()
    except InputError as error:
        return {name: no_value(str(error), unit=unit, method="")}


def over_models(results: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Return the mean of every property over the models of a committee, with its spread beside its sampling error.

    results  properties of each model by its name. The mean of M models has the error sqrt(sum of stderr^2)/M; the
             spread is the standard deviation over the models, M - 1 in its denominator.
    """
    names = dict.fromkeys(name for properties in results.values() for name in properties)
    return {
        name: _over_models({model: found[name] for model, found in results.items() if name in found}, len(results))
        for name in names
    }


def _over_models(estimates: Mapping[str, Estimate], n_models: int) -> Estimate:
    valued = [estimate for estimate in estimates.values() if estimate.value is not None]
    first = next(iter(estimates.values()))
    if len(valued) < 2:
        reasons = [f"{model}: {e.warnings[0]}" for model, e in estimates.items() if e.value is None and e.warnings]
        what = "; ".join(dict.fromkeys(reasons)) or "missing"
        return no_value(
            f"{len(valued)} of {n_models} models give a value ({what})", unit=first.unit, method=first.method
        )
    values = [estimate.value for estimate in valued if estimate.value is not None]
    errors = [estimate.stderr for estimate in valued if estimate.stderr is not None]
    samples = [estimate.n_effective for estimate in valued if estimate.n_effective is not None]
    warnings = tuple(dict.fromkeys(warning for estimate in valued for warning in estimate.warnings))
    if len(valued) < n_models:
        warnings = (f"mean of {len(valued)} of {n_models} models, the others give no value", *warnings)
    return Estimate(
        value=float(np.mean(values)),
        stderr=math.hypot(*errors) / len(values) if len(errors) == len(values) else None,
        unit=valued[0].unit,
        n_effective=sum(samples) if len(samples) == len(values) else None,
        method=f"{valued[0].method}; mean of {len(values)} models",
        warnings=warnings,
        spread_over_models=float(np.std(values, ddof=1)),
    )


def mean_volume(folder: Path) -> tuple[float, str]:
    """Return the mean volume [Å^3] of an NPT stage after equilibration, and a sentence on how good it is.

    A transport run needs a volume whatever happens: where the density still drifts, the second half is taken.
    """
    series = ThermoSeries.read(folder / "thermo.h5")
    start, found = _equilibrium(series.density_g_cm3)
    length = format_time(series.n_samples * series.interval_ps)
    volume = float(series.volume[start:].mean())
    if not found:
        return volume, f"mean of the second half of {length} NPT, not equilibrated"
    discarded = format_time(start * series.interval_ps) if start else "nothing"
    return volume, f"mean of {length} NPT, {discarded} discarded"


def _equilibrium(series: Floats) -> tuple[int, bool]:
    """Return the sample from which a series (n_samples, n_replicas) is stationary, and True; else its middle and False.

    A steady drift looks like one long correlation: few independent samples are no equilibrium.
    """
    start = equilibration_start(series.T)
    if start is not None and series_mean(series[start:].T).is_converged:
        return start, True
    return len(series) // 2, False


def write_properties(folder: RunFolder, properties: dict[str, Estimate]) -> None:
    """Write properties.json."""
    content = {name: _finite(estimate.to_dict()) for name, estimate in properties.items()}
    write_json(folder.properties, content)


def property_table(properties: dict[str, Estimate]) -> list[str]:
    """Return the values with error bars and warnings, then what has no value, grouped by its reason."""
    if not properties:
        return ["no properties asked for"]
    width = max(len(name) for name in properties) + 2
    lines: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name, estimate in properties.items():
        if estimate.value is None:
            reasons.setdefault("; ".join(estimate.warnings) or "no reason given", []).append(name)
            continue
        lines.append(f"{name:<{width}s}{estimate}")
        lines += [f"{'':<{width}s}  {warning}" for warning in estimate.warnings]
    for reason, names in reasons.items():
        lines += [f"no value: {', '.join(names)}", f"    {reason}"]
    return lines


def write_thermo_table(folder: RunFolder, config: RunConfig) -> None:
    """Join the thermo.csv of all stages into one at the top of the run, with the stage as first column."""
    rows: list[str] = []
    for _, path in dynamics_folders(folder, config):
        if (path / "thermo.csv").exists():
            header, *records = (path / "thermo.csv").read_text().splitlines()
            rows = rows or [f"stage,{header}"]
            rows += [f"{path.name},{record}" for record in records]
    if rows:
        write_text(folder.path / "thermo.csv", "\n".join(rows) + "\n")


def _finite(fields: dict[str, object]) -> dict[str, object]:
    """JSON knows no NaN: what is not a number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
