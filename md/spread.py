"""``bamboo-md spread config.yaml``: how far models that should agree are apart in liquids.

Groups of models, such as teachers of different seeds and the students of different teachers, simulate the same liquids
from the same boxes. For each group: the standard deviation over its models of the pressure at the measured density, of
the density, and of the distance of Li+ from its first shell; and how often a guard stops a hot liquid.

What sampling adds to the variance over models is subtracted: sigma^2 = sum_k (x_k - <x>)^2 / (n - 1) - <s_k^2>, with
the standard error s_k of x_k, not widened for readers. Variances are averaged over liquids before the root is taken;
where sampling explains all of it, sigma is 0.

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
from md.analysis.statistics import equilibrated_mean
from md.analysis.structure import pair_distances
from md.config import Molecules
from md.liquid import Box, Stage, accept_settings, box_name, share, simulate
from md.measurements import Measurement, problems
from md.quantities import Duration, Temperature
from md.trajectory import ThermoSeries, Trajectory
from md.yaml_model import Problem, load_yaml

Say = Callable[[str], None]
Task = tuple[str, str, int]  # "liquid" or "hot", model, number of the liquid
RESULT = "result.json"
FRAME_PS = 0.1
SHELL = 2.8  # Å; the first minimum of g(r) of O around Li+ in carbonates lies between 2.5 and 3
MOST_TRIPS = 10  # of one model in one liquid: it need not be shown to break more often
QUANTITIES = {"pressure_bar": "bar", "density_g_cm3": "g/cm3", "shell_A": "Å"}


class SpreadConfig(BaseModel):
    """What ``bamboo-md spread`` reads.

    groups     name -> model files; four of a group give a standard deviation that is itself known to 40 %
    liquids    measured liquids with a density: rows as in a table of measurements
    atoms, equilibrate, time   size of a box; then constant volume at the measured density, then constant pressure: of
               each, ``equilibrate`` is not looked at and ``time`` is
    hot_temperature, hot_time  every model keeps every liquid at this temperature and the measured density for this
               time in all; stopped by a guard, it begins again with another seed
    output     folder of all work and of report.json
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    molecules: Molecules = {}
    groups: Annotated[dict[str, Annotated[tuple[Path, ...], Field(min_length=2)]], Field(min_length=1)]
    liquids: Annotated[tuple[Measurement, ...], Field(min_length=1)]
    output: Path
    atoms: Annotated[int, Field(ge=20, le=100_000)] = 300
    equilibrate: Duration = 20.0 * units.PICOSECOND
    time: Duration = 20.0 * units.PICOSECOND
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
    settings = config.model_dump(mode="json", exclude={"output"})
    accept_settings(config.output, settings | {"sha256": {name: file_sha256(path) for name, path in models.items()}})
    tasks = [
        (kind, name, number) for kind in ("liquid", "hot") for number in range(len(config.liquids)) for name in models
    ]
    places = [_place(config, *task) / RESULT for task in tasks]

    def compute(index: int) -> None:
        kind, name, number = tasks[index]
        row, act = config.liquids[number], measure if kind == "liquid" else heat
        found = act(models[name], row, places[index].parent, config=config, seed=config.seed + 100 * number)
        write_json(places[index], found)
        say(f"{sum(place.exists() for place in places)} of {len(tasks)}: {name}, {row.name}: {_told(found)}")

    share(places, compute)
    results = {task: json.loads(place.read_text()) for task, place in zip(tasks, places, strict=True)}
    report = _report(config, results)
    write_json(config.output / "report.json", report)
    say(spread_table(report))
    return report


def measure(model: Path, row: Measurement, folder: Path, *, config: SpreadConfig, seed: int) -> dict[str, Any]:
    """Return mean and standard error of what is compared, of one model in one liquid; or why a guard stopped it."""
    box = Box(row.electrolyte, row.temperature, config.atoms, seed, row.density_g_cm3)
    skip, time = config.equilibrate / units.PICOSECOND, config.time / units.PICOSECOND
    stages = [
        Stage("settle", skip),
        Stage("nvt", time, frame_ps=FRAME_PS),
        Stage("expand", skip, pressure_bar=row.pressure / units.BAR),
        Stage("npt", time, pressure_bar=row.pressure / units.BAR),
    ]
    try:
        simulate(box, stages, Evaluator(checkpoint.load(model), device=best_device()), folder)
    except GuardError as error:
        return {"stopped": str(error).splitlines()[0]}
    pressure = ThermoSeries.read(folder / "nvt" / "molecular" / "thermo.h5").pressure
    series = {
        "pressure_bar": np.trace(pressure, axis1=-2, axis2=-1)[:, 0] / 3.0 / units.BAR,
        "density_g_cm3": ThermoSeries.read(folder / "npt" / "thermo.h5").density_g_cm3[:, 0],
    }
    shell = shell_distances(Trajectory.read(folder / "nvt" / "traj.h5"))
    if len(shell):
        series["shell_A"] = shell
    found = {name: equilibrated_mean(values) for name, values in series.items()}
    return {
        name: {"value": mean.value, "sigma": mean.sigma, "drifts": drifts} for name, (mean, drifts) in found.items()
    }


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


def heat(model: Path, row: Measurement, folder: Path, *, config: SpreadConfig, seed: int) -> dict[str, Any]:
    """Return how often a guard stopped the hot liquid, why, and how long it ran in all [ps]."""
    left, trips = config.hot_time / units.PICOSECOND / len(config.liquids), list[str]()
    evaluator, ran = Evaluator(checkpoint.load(model), device=best_device()), 0.0
    while left > 0.0 and len(trips) < MOST_TRIPS:
        attempt = folder / f"{len(trips):02d}"
        box = Box(row.electrolyte, config.hot_temperature, config.atoms, seed + len(trips), row.density_g_cm3)
        try:
            simulate(box, [Stage("hot", left)], evaluator, attempt)
            lasted = left
        except GuardError as error:
            trips.append(str(error).splitlines()[0])
            record = attempt / "hot" / "thermo.h5"
            lasted = float(ThermoSeries.read(record).time_ps[-1]) if record.exists() else 0.0
        left, ran = left - lasted, ran + lasted
    return {"trips": len(trips), "ran_ps": ran, "reasons": trips}


def standard_deviation(means: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the standard deviation of means ("value", "sigma") less what sampling adds, "spread"; and that.

    variance = sum_k (x_k - <x>)^2 / (n - 1) - sampling^2, below 0 by chance;  sampling^2 = <sigma_k^2>
    spread = sqrt(variance), at least 0
    """
    sampling = float(np.mean([mean["sigma"] ** 2 for mean in means]))
    variance = float(np.var([mean["value"] for mean in means], ddof=1)) - sampling
    return {"spread": math.sqrt(max(variance, 0.0)), "variance": variance, "sampling": math.sqrt(sampling)}


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
            "drifting": sum(
                one[key]["drifts"]
                for each in liquids.values()
                for one in each["models"].values()
                for key in QUANTITIES
                if key in one
            ),
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
            cells = [
                f"{found[k]['spread']:.4g} ({found[k]['sampling']:.2g})" if k in found else "-" for k in QUANTITIES
            ]
            lines.append(f"{group:<12}{liquid:<44}" + "".join(f"{cell:>24}" for cell in cells))
        cells = [f"{known['spread'][name]:.4g}" if name in known["spread"] else "-" for name in QUANTITIES]
        lines.append(f"{group:<12}{'root mean square over liquids':<44}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("(standard deviation over models; in brackets the standard error of one, which is already left out)")
    for group, known in report["groups"].items():
        if known["drifting"]:
            lines.append(f"{group}: {known['drifting']} series still drifted, half of each was taken")
        ran = sum(known["hot_ps"].values())
        trips = ", ".join(f"{name} {count}" for name, count in known["trips"].items())
        lines.append(f"{group}: guards tripped at {report['hot_temperature_K']:g} K in {ran:.0f} ps: {trips}")
    return "\n".join(lines)


def _place(config: SpreadConfig, kind: str, name: str, number: int) -> Path:
    return config.output / kind / name / box_name(number, config.liquids[number].name)


def _told(found: Mapping[str, Any]) -> str:
    if "trips" in found:
        return f"{found['trips']} guards tripped in {found['ran_ps']:.3g} ps"
    means = {
        name: f"{found[name]['value']:.4g} ± {found[name]['sigma']:.2g} {unit}"
        for name, unit in QUANTITIES.items()
        if name in found
    }
    return found.get("stopped") or ", ".join(f"{name} {text}" for name, text in means.items())
