"""``bamboo-md spread config.yaml``: how far models that should agree are apart in liquids.

Groups of models, such as teachers of different seeds and the students of different teachers, simulate the same liquids.
What differs between liquids that were packed apart is far larger than what differs between models, and lasts longer
than a run. So a reference model prepares every liquid once, at its measured density, and takes ``starts`` from it, some
picoseconds apart; every model goes on from each of them with the same velocities: at constant volume, then at constant
pressure. For each group: the standard deviation over its models of the pressure at the measured density, on the starts
themselves (without what models share: kinetic energy, dispersion, wall) and in the model's own dynamics, of the
density, and of the distance of Li+ from its first shell; and how often a guard stops a hot liquid.

With x_mk of model m from start k (n models, K starts), the mean over models of each start is taken off, and with it
what the starts share. Two-way analysis of variance without replication (Fisher) tells models from chance:

    d_mk = x_mk - <x_k>,   sigma^2 = sum_m d_m^2 / (n - 1) - s^2,   s^2 = sum_mk (d_mk - d_m)^2 / ((n - 1) (K - 1) K)

with d_m the mean over starts. Variances are averaged over liquids before the root is taken; where chance explains all
of it, sigma is 0.

All work lies in the folder ``output``: the same command again continues, and started more than once at the same time
its processes share the work.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bamboo import checkpoint, units
from bamboo.errors import GuardError
from bamboo.evaluator import Evaluator, best_device
from bamboo.files import file_sha256, write_json
from bamboo.learn.align import molecular_pressure
from bamboo.system import System
from md.analysis.structure import pair_distances
from md.boxes import read_atoms
from md.config import Molecules
from md.liquid import Box, Stage, accept_settings, box_name, share, simulate
from md.measurements import Measurement, problems
from md.quantities import Duration, Temperature
from md.trajectory import ThermoSeries, Trajectory
from md.yaml_model import Problem, load_yaml

Say = Callable[[str], None]
Task = tuple[str, str, int]  # "liquid" or "hot", model, number of the liquid
RESULT, READY = "result.json", "ready.json"
APART_PS = 4.0  # between starts
FRAME_PS = 0.1
SHELL = 2.8  # Å; the first minimum of g(r) of O around Li+ in carbonates lies between 2.5 and 3
MOST_TRIPS = 10  # of one model in one liquid: it need not be shown to break more often
QUANTITIES = {"pressure_on_starts_bar": "bar", "pressure_bar": "bar", "density_g_cm3": "g/cm3", "shell_A": "Å"}


class SpreadConfig(BaseModel):
    """What ``bamboo-md spread`` reads.

    groups     name -> model files; four of a group give a standard deviation that is itself known to 40 %
    liquids    measured liquids with a density: rows as in a table of measurements
    reference  model that prepares the starts, best one whose liquids have the measured densities
    atoms, equilibrate, starts   size of a box; how long the reference runs before the first start; number of starts
    settle, expand, time   from each start: ``settle`` at constant volume, then ``time``, in which pressure and shell
               are looked at; ``expand`` at constant pressure, then ``time`` for the density
    hot_temperature, hot_time  every model keeps liquids at this temperature and the measured density for this time,
               each liquid an equal part of it; stopped by a guard, it begins again with another seed
    output     folder of all work and of report.json
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    molecules: Molecules = {}
    groups: Annotated[dict[str, Annotated[tuple[Path, ...], Field(min_length=2)]], Field(min_length=1)]
    liquids: Annotated[tuple[Measurement, ...], Field(min_length=1)]
    output: Path
    reference: str = "default"
    atoms: Annotated[int, Field(ge=20, le=100_000)] = 300
    equilibrate: Duration = 25.0 * units.PICOSECOND
    starts: Annotated[int, Field(ge=2, le=100)] = 4
    settle: Duration = 1.0 * units.PICOSECOND
    expand: Duration = 8.0 * units.PICOSECOND
    time: Duration = 2.0 * units.PICOSECOND
    hot_temperature: Temperature = 450.0
    hot_time: Duration = 200.0 * units.PICOSECOND
    seed: Annotated[int, Field(ge=0, le=10**6)] = 1


def load_spread_config(path: Path) -> SpreadConfig:
    """Read and check the configuration; raises InputError that lists every problem as ``file:line: key: problem``."""
    return load_yaml(path, SpreadConfig, checks=_checks)


def _checks(config: SpreadConfig) -> list[Problem]:
    found = problems(config.liquids, ("liquids",))
    found += [(("liquids", k), "has no density.") for k, row in enumerate(config.liquids) if row.density is None]
    names = [path.stem for paths in config.groups.values() for path in paths]
    if len(set(names)) < len(names):
        found.append((("groups",), "two models of one name: names tell models apart."))
    for group, paths in config.groups.items():
        found += [(("groups", group, k), f"{p}: no such file.") for k, p in enumerate(paths) if not p.exists()]
    return found


def spread(config: SpreadConfig, *, say: Say = print) -> dict[str, Any]:
    """Simulate what is not simulated yet and return the report, also written to the output folder."""
    models = {path.stem: path for paths in config.groups.values() for path in paths}
    reference = checkpoint.resolve(config.reference)
    settings = config.model_dump(mode="json", exclude={"output"})
    known = {name: file_sha256(path) for name, path in models.items()} | {"its reference": file_sha256(reference)}
    accept_settings(config.output, settings | {"sha256": known})
    prepared = [_start(config, number, config.starts - 1) / READY for number in range(len(config.liquids))]

    def prepare(number: int) -> None:
        make_starts(reference, config.liquids[number], number, config=config, say=say)
        write_json(prepared[number], config.starts)

    share(prepared, prepare)
    tasks = [
        (kind, name, number) for kind in ("liquid", "hot") for number in range(len(config.liquids)) for name in models
    ]
    places = [_place(config, *task) / RESULT for task in tasks]

    def compute(index: int) -> None:
        kind, name, number = tasks[index]
        row, act = config.liquids[number], measure if kind == "liquid" else heat
        found = act(models[name], row, places[index].parent, config=config, number=number)
        write_json(places[index], found)
        say(f"{sum(place.exists() for place in places)} of {len(tasks)}: {name}, {row.name}: {_told(found)}")

    share(places, compute)
    results = {task: json.loads(place.read_text()) for task, place in zip(tasks, places, strict=True)}
    report = _report(config, results)
    write_json(config.output / "report.json", report)
    say(spread_table(report))
    return report


def make_starts(reference: Path, row: Measurement, number: int, *, config: SpreadConfig, say: Say) -> None:
    """Simulate a liquid with the reference; each start goes on from the one before."""
    evaluator = Evaluator(checkpoint.load(reference), device=best_device())
    for k in range(config.starts):
        after = str(_start(config, number, k - 1)) if k else None
        box = Box(row.electrolyte, row.temperature, config.atoms, _seed(config, number, k), row.density_g_cm3, after)
        time = APART_PS if k else config.equilibrate / units.PICOSECOND
        simulate(box, [Stage("equilibrate", time)], evaluator, _start(config, number, k))
        say(f"{row.name}: start {k + 1} of {config.starts}")


def measure(model: Path, row: Measurement, folder: Path, *, config: SpreadConfig, number: int) -> dict[str, Any]:
    """Return what is compared, of one model in one liquid, a number for each start; or why a guard stopped it."""
    settle, expand, time = (t / units.PICOSECOND for t in (config.settle, config.expand, config.time))
    pressure = row.pressure / units.BAR
    stages = [
        Stage("settle", settle),
        Stage("nvt", time, frame_ps=min(FRAME_PS, time)),
        Stage("expand", expand, pressure),
        Stage("npt", time, pressure),
    ]
    force_field = checkpoint.load(model)
    evaluator, found = Evaluator(force_field, device=best_device()), dict[str, list[float]]()
    for k in range(config.starts):
        place, start = folder / f"{k:02d}", _start(config, number, k)
        box = Box(
            row.electrolyte, row.temperature, config.atoms, _seed(config, number, k), row.density_g_cm3, str(start)
        )
        try:
            simulate(box, stages, evaluator, place)
        except GuardError as error:
            return {"stopped": str(error).splitlines()[0]}
        virial = ThermoSeries.read(place / "nvt" / "molecular" / "thermo.h5").pressure
        values = {
            "pressure_on_starts_bar": molecular_pressure(
                force_field, [System.from_atoms(read_atoms(place / "start.extxyz"))]
            ),
            "pressure_bar": np.trace(virial, axis1=-2, axis2=-1)[:, 0] / 3.0,
            "density_g_cm3": ThermoSeries.read(place / "npt" / "thermo.h5").density_g_cm3[:, 0],
            "shell_A": shell_distances(Trajectory.read(place / "nvt" / "traj.h5")),
        }
        for name, series in values.items():
            if len(series):
                unit = units.BAR if QUANTITIES[name] == "bar" else 1.0
                found.setdefault(name, []).append(float(series.mean()) / unit)
    return found


def shell_distances(trajectory: Trajectory) -> np.ndarray:
    """Return the mean distance [Å] of O from Li+ within ``SHELL``, (n_frames,); empty where there is no Li+."""
    numbers, cells = trajectory.topology.numbers, trajectory.cells
    lithium, oxygen = (np.flatnonzero(numbers == z) for z in (3, 8))
    if not len(lithium) or not len(oxygen) or cells is None:
        return np.zeros(0)
    distances = [
        pair_distances(positions[lithium], positions[oxygen], cell=cell, r_max=SHELL)[2]
        for positions, cell in zip(trajectory.positions, cells, strict=True)
    ]
    return np.array([found.mean() for found in distances if len(found)])


def heat(model: Path, row: Measurement, folder: Path, *, config: SpreadConfig, number: int) -> dict[str, Any]:
    """Return how often a guard stopped the hot liquid, why, and how long it ran in all [ps]."""
    left, trips = config.hot_time / units.PICOSECOND / len(config.liquids), list[str]()
    evaluator, ran = Evaluator(checkpoint.load(model), device=best_device()), 0.0
    while left > 0.0 and len(trips) < MOST_TRIPS:
        attempt, seed = folder / f"{len(trips):02d}", _seed(config, number, len(trips))
        start = str(_start(config, number, len(trips) % config.starts))
        box = Box(row.electrolyte, config.hot_temperature, config.atoms, seed, row.density_g_cm3, start)
        try:
            simulate(box, [Stage("hot", left)], evaluator, attempt)
            lasted = left
        except GuardError as error:
            trips.append(str(error).splitlines()[0])
            record = attempt / "hot" / "thermo.h5"
            lasted = float(ThermoSeries.read(record).time_ps[-1]) if record.exists() else 0.0
        left, ran = left - lasted, ran + lasted
    return {"trips": len(trips), "ran_ps": ran, "reasons": trips}


def standard_deviation(values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the standard deviation over models of values, (n_models, n_starts), less what chance adds: "spread".

    variance = sum_m d_m^2 / (n - 1) - chance^2, below 0 by chance;  spread = sqrt(variance), at least 0
    chance^2 = sum_mk (d_mk - d_m)^2 / ((n - 1) (K - 1) K), the variance of the mean of one model over starts
    """
    deviations = np.asarray(values) - np.mean(values, axis=0)
    n_models, n_starts = deviations.shape
    means = deviations.mean(axis=1)
    rest = float(((deviations - means[:, None]) ** 2).sum()) / ((n_models - 1) * (n_starts - 1) * n_starts)
    variance = float((means**2).sum()) / (n_models - 1) - rest
    return {"spread": math.sqrt(max(variance, 0.0)), "variance": variance, "chance": math.sqrt(rest)}


def _report(config: SpreadConfig, results: Mapping[Task, Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by group and liquid, the standard deviations; their root mean square over liquids; trips."""
    groups: dict[str, Any] = {}
    for group, paths in config.groups.items():
        names = [path.stem for path in paths]
        liquids: dict[str, Any] = {}
        for number, row in enumerate(config.liquids):
            found = {name: results["liquid", name, number] for name in names}
            sound = [one for one in found.values() if "stopped" not in one]
            liquids[row.name] = {"models": found} | {
                key: standard_deviation([one[key] for one in sound])
                for key in QUANTITIES
                if len(sound) > 1 and all(key in one for one in sound)
            }
        hot = {name: [results["hot", name, number] for number in range(len(config.liquids))] for name in names}
        groups[group] = {
            "liquids": liquids,
            "spread": {
                key: math.sqrt(max(np.mean([e[key]["variance"] for e in liquids.values() if key in e]), 0.0))
                for key in QUANTITIES
                if any(key in each for each in liquids.values())
            },
            "trips": {name: sum(run["trips"] for run in runs) for name, runs in hot.items()},
            "hot_ps": {name: sum(run["ran_ps"] for run in runs) for name, runs in hot.items()},
            "hot": hot,
        }
    return {"groups": groups, "units": QUANTITIES, "hot_temperature_K": config.hot_temperature}


def spread_table(report: Mapping[str, Any]) -> str:
    """Return the standard deviations over models, by liquid and group, and the trips."""
    lines = [f"{'group':<12}{'liquid':<44}" + "".join(f"{f'{name}, {unit}':>24}" for name, unit in QUANTITIES.items())]
    for group, known in report["groups"].items():
        for liquid, found in known["liquids"].items():
            cells = [f"{found[k]['spread']:.4g} ({found[k]['chance']:.2g})" if k in found else "-" for k in QUANTITIES]
            lines.append(f"{group:<12}{liquid:<44}" + "".join(f"{cell:>24}" for cell in cells))
        cells = [f"{known['spread'][name]:.4g}" if name in known["spread"] else "-" for name in QUANTITIES]
        lines.append(f"{group:<12}{'root mean square over liquids':<44}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("(standard deviation over models; in brackets what chance would make of it, which is left out)")
    for group, known in report["groups"].items():
        ran = sum(known["hot_ps"].values())
        trips = ", ".join(f"{name} {count}" for name, count in known["trips"].items())
        lines.append(f"{group}: guards tripped at {report['hot_temperature_K']:g} K in {ran:.0f} ps: {trips}")
    return "\n".join(lines)


def _place(config: SpreadConfig, kind: str, name: str, number: int) -> Path:
    return config.output / kind / name / box_name(number, config.liquids[number].name)


def _start(config: SpreadConfig, number: int, k: int) -> Path:
    return config.output / "start" / box_name(number, config.liquids[number].name) / f"{k:02d}"


def _seed(config: SpreadConfig, number: int, k: int) -> int:
    """Return the seed of velocities and noise, which all models share."""
    return config.seed + 100 * number + k


def _told(found: Mapping[str, Any]) -> str:
    if "trips" in found:
        return f"{found['trips']} guards tripped in {found['ran_ps']:.3g} ps"
    means = {name: f"{np.mean(found[name]):.4g} {unit}" for name, unit in QUANTITIES.items() if name in found}
    return found.get("stopped") or ", ".join(f"{name} {text}" for name, text in means.items())
