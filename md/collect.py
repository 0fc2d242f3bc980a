"""``bamboo-md collect``: from many finished runs to one table, with error bars, and to figures of its trends.

Runs that differ in nothing but their seed are independent measurements of the same: their mean is weighted by the
numbers of independent samples, and where they scatter more than their error bars allow, the error bar grows by that
factor (``md.analysis.statistics.combine``). Runs of one liquid that differ in more, such as the timestep or the model
file, stay apart and are told what they differ in. What is not finished, or gives no value, is listed with its reason.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bamboo import units
from bamboo.errors import InputError
from bamboo.structure.densities import formula_mass
from bamboo.structure.molecules import molecule
from md.analysis.arrhenius import ArrheniusFit, arrhenius_fit
from md.analysis.estimate import Estimate
from md.analysis.statistics import combine
from md.composition import realise
from md.config import Minimise, RunConfig
from md.run_folder import HARMLESS, RunFolder, flatten
from md.status import run_status
from md.sweep import Member, load_sweep, members_of

ACTIVATED = ("viscosity", "conductivity", "diffusion_")  # what follows an Arrhenius law, roughly
DEEPEST = 3  # folders below the given one in which runs are looked for
MOST_TOLD = 4  # settings in which a result differs from others: the rest is in their resolved.yaml
# keys that are no settings of a result: the seed, what leaves the numbers alone, and what `Result` tells in other words
NO_SETTINGS = (
    *("build.seed", "output", *HARMLESS),
    *("electrolyte", "temperature", "pressure", "conditions", "model.name", "model.committee"),
)


@dataclass(frozen=True)
class Result:
    """What one condition of one finished run says.

    counts    of the molecules and ions in its box
    settings  how it was simulated, by dotted key, apart from composition, temperature, pressure and seed
    """

    name: str
    config: RunConfig
    properties: dict[str, Estimate]
    counts: dict[str, int]
    settings: dict[str, str]

    @property
    def electrolyte(self) -> str:
        """The composition in words."""
        given = self.config.electrolyte
        return given if isinstance(given, str) else ", ".join(f"{n} {name}" for name, n in self.counts.items())

    @property
    def liquid(self) -> tuple[Any, ...]:
        """What is in the box, and its pressure."""
        pressure_bar = f"{self.config.target_pressure / units.BAR:.6g}"
        return self.electrolyte, tuple(self.counts.items()), pressure_bar

    @property
    def system(self) -> tuple[Any, ...]:
        """What runs that can be compared across temperatures have in common."""
        return *self.liquid, frozenset(self.settings.items())


@dataclass(frozen=True)
class Group:
    """Results that differ in nothing but their seed, and what they say together.

    differs_in  settings that other results of the same liquid have otherwise: 'model.dtype: float64'
    """

    results: tuple[Result, ...]
    differs_in: str = ""

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def temperature_K(self) -> float:
        return self.first.config.temperature_K

    @cached_property
    def properties(self) -> dict[str, Estimate]:
        """Every property over all results, by name."""
        names = dict.fromkeys(name for result in self.results for name in result.properties)
        return {name: together([r.properties[name] for r in self.results if name in r.properties]) for name in names}

    def n_values(self, name: str) -> int:
        """Return how many of the results have a value of a property."""
        found = (result.properties.get(name) for result in self.results)
        return sum(estimate is not None and estimate.value is not None for estimate in found)

    @cached_property
    def concentration(self) -> dict[str, float | None]:
        """Amount of salt, counted by its cations, as realised: molality [mol/kg solvent], mole fraction, [mol/L].

        mol/L follows from the density of the runs, None without one. Without ions all are 0, and the mole fraction is
        that of the first molecule.
        """
        counts = self.first.counts
        neutral = {name: n for name, n in counts.items() if molecule(name).charge == 0}
        cations = sum(n for name, n in counts.items() if molecule(name).charge > 0)
        kilograms = sum(n * formula_mass(name) for name, n in neutral.items()) / 1000.0
        grams = sum(n * formula_mass(name) for name, n in counts.items())
        share = cations if len(neutral) < len(counts) else next(iter(neutral.values()))
        of = cations + sum(neutral.values())
        density = self.properties.get("density")
        litres = grams / density.value / 1000.0 if density is not None and density.value else None
        return {
            "molality_mol_kg": cations / kilograms if kilograms else None,
            "mole_fraction": share / of if of else None,
            "molarity_mol_L": cations / litres if litres else None,
        }


def together(estimates: Sequence[Estimate]) -> Estimate:
    """Return one estimate from those of runs with different seeds (``md.analysis.statistics.combine``)."""
    if len(estimates) == 1:
        return estimates[0]
    estimates = sorted(estimates, key=lambda estimate: estimate.value is None)  # the first tells unit and method
    same = [e if e.value is not None else replace(e, unit=estimates[0].unit) for e in estimates]
    spreads = [e.spread_over_models for e in estimates if e.spread_over_models is not None]
    mean = sum(spreads) / len(spreads) if spreads else None
    return replace(combine(same), spread_over_models=mean)


@dataclass(frozen=True)
class Collection:
    """All finished runs in groups, and why the others are not among them."""

    groups: tuple[Group, ...]
    missing: dict[str, str]

    def systems(self) -> dict[tuple[Any, ...], list[Group]]:
        """Return the groups of every composition, by rising temperature."""
        found: dict[tuple[Any, ...], list[Group]] = {}
        for group in sorted(self.groups, key=lambda group: group.temperature_K):
            found.setdefault(group.first.system, []).append(group)
        return found

    def arrhenius(self) -> list[tuple[str, list[Group], ArrheniusFit]]:
        """Return the fits of every activated property of every composition at several temperatures."""
        fits = []
        for groups in self.systems().values():
            names = dict.fromkeys(name for g in groups for name in g.properties if name.startswith(ACTIVATED))
            for name in names if len(groups) > 1 else ():
                estimates = {g.temperature_K: g.properties[name] for g in groups if name in g.properties}
                fit = arrhenius_fit(estimates, rises=not name.startswith("viscosity"))
                fits.append((name, groups, fit))
        return fits

    def rows(self) -> list[dict[str, Any]]:
        """Return the table: one row for each property of each group, and for each activation energy."""
        rows = [
            _row(group, name, estimate, group.n_values(name)) | {"temperature_K": group.temperature_K}
            for group in self.groups
            for name, estimate in group.properties.items()
        ]
        for name, groups, fit in self.arrhenius():
            n_values = sum(group.n_values(name) for group in groups)
            n_runs = sum(len(group.results) for group in groups)
            rows.append(_row(groups[0], f"{name}_activation_energy", fit.energy, n_values) | {"runs": n_runs})
        return rows


def _row(group: Group, name: str, estimate: Estimate, n_values: int) -> dict[str, Any]:
    fields = estimate.to_dict()
    return {
        "property": name,
        "electrolyte": group.first.electrolyte,
        "temperature_K": None,
        **group.concentration,
        **{key: fields[key] for key in ("value", "stderr", "unit", "n_effective")},
        "runs": len(group.results),
        "runs_with_value": n_values,
        "spread_over_models": estimate.spread_over_models,
        "method": estimate.method,
        "differs_in": group.differs_in,
        "warnings": "; ".join(estimate.warnings),
    }


def collect(source: Path, *, folder: Path | None = None) -> Collection:
    """Read all runs in a folder, or of the sweep of a YAML file.

    folder  of the sweep, default: runs/<name of the file>
    Raises InputError where there are none, or none is finished.
    """
    if source.is_dir():
        runs = [
            Member(path.relative_to(source).as_posix(), RunFolder(path).read_config(), path)
            for path in sorted(_run_folders(source, depth=DEEPEST))
        ]
        unfit: dict[str, str] = {}
    else:
        runs = members_of(load_sweep(source), folder or Path("runs") / source.stem)
        unfit = {run.name: "its settings have changed since it ran" for run in runs if _is_stale(run)}
    if not runs:
        raise InputError(f"{source}: no run in it (no resolved.yaml).")
    results: list[Result] = []
    missing: dict[str, str] = {}
    for run in runs:
        try:
            if run.name in unfit:
                raise InputError(unfit[run.name])
            results += _results(run)
        except InputError as error:
            missing[run.name] = str(error)
    if not results:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        raise InputError(f"{source}: no run is finished.\n{listing}")
    if not any(result.properties for result in results):
        raise InputError(f"{source}: its runs were asked for no properties. Give some and analyse them again.")
    return _grouped(results, missing)


def _is_stale(run: Member) -> bool:
    return run.outcome is not None and run.outcome.settings != run.settings


def _run_folders(folder: Path, *, depth: int) -> Iterator[Path]:
    if (folder / "resolved.yaml").exists():
        yield folder
    elif depth:
        for inner in folder.iterdir():
            if inner.is_dir():
                yield from _run_folders(inner, depth=depth - 1)


def _results(run: Member) -> list[Result]:
    """Return what a run says of each of its conditions; raises InputError with the reason where it says nothing."""
    outcome, path = run.outcome, RunFolder(run.folder).properties
    if outcome is not None and outcome.code != 0 and not _is_complete(run, path):
        raise InputError(outcome.reason)
    if not run.folder.exists() or not (run.folder / "resolved.yaml").exists():
        raise InputError("not begun")
    if run.is_busy:
        raise InputError("still running")
    if not path.exists():
        raise InputError("not finished (no properties.json)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        properties = {name: Estimate(**e | {"warnings": tuple(e["warnings"])}) for name, e in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"properties.json cannot be read ({type(error).__name__}). Analyse the run again.") from None
    whole, manifest = RunFolder(run.folder).read_config(), RunFolder(run.folder).manifest()
    return [
        Result(
            f"{run.name}/{name}".rstrip("/"),
            config,
            {key.removeprefix(f"{name}/"): e for key, e in properties.items() if key.startswith(f"{name}/")}
            if name
            else properties,
            realise(config.what(), n_atoms=config.build.atoms).counts,
            _settings(config, manifest, coldest_K=min(whole.temperatures_K)),
        )
        for name, config in whole.each_condition().items()
    ]


def _is_complete(run: Member, properties: Path) -> bool:
    """Tell whether all of a run is done: one that failed in its sweep may have been finished alone."""
    return properties.exists() and run_status(run.folder).state == "finished"


def _settings(config: RunConfig, manifest: Mapping[str, Any], *, coldest_K: float) -> dict[str, str]:
    """Return how one condition was simulated; ``coldest_K`` of all conditions of its run, where its warm-up ends.

    A stage at the temperature of the run, and a ramp from or to it, are the same at every temperature. A model is its
    file: one trained anew keeps its name.
    """
    flat = flatten(config.model_dump(mode="json", exclude_none=True))
    settings = {key: str(value) for key, value in flat.items() if not key.startswith(NO_SETTINGS)}
    records = manifest.get("models", {"": manifest.get("model", {})}).values()
    checksums = sorted(str(record["sha256"]) for record in records if "sha256" in record)
    settings |= {"model.sha256": ", ".join(checksums)} if checksums else {"model.name": ", ".join(config.model_names)}
    for index, stage in enumerate(config.stages):
        if isinstance(stage, Minimise) or stage.temperature is None:
            continue
        start_K, end_K = stage.temperature
        for number, value_K in enumerate(stage.temperature):
            key = f"stages.{index}.temperature.{number}"
            if start_K == end_K == config.temperature_K:
                del settings[key]
            elif start_K != end_K and value_K in (config.temperature_K, coldest_K):
                settings[key] = "that of the run"
    return settings


def _grouped(results: Sequence[Result], missing: Mapping[str, str]) -> Collection:
    """Put together what differs in the seed only; the same seed twice is one measurement, not two."""
    left_out = dict(missing)
    found: dict[tuple[Any, ...], dict[int, Result]] = {}
    for result in results:
        key = *result.system, f"{result.config.temperature_K:.6g}"
        same = found.setdefault(key, {})
        seed = result.config.build.seed
        if seed in same:
            left_out[result.name] = f"has the seed of {same[seed].name}, which is no independent run"
        else:
            same[seed] = result
    seeds = [tuple(same.values()) for same in found.values()]
    groups = [Group(same, _differs_in(same[0], [other for other, *_ in seeds])) for same in seeds]
    groups.sort(key=lambda g: (g.concentration["molality_mol_kg"] or 0.0, g.first.electrolyte, g.temperature_K))
    return Collection(tuple(groups), left_out)


def _differs_in(result: Result, others: Sequence[Result]) -> str:
    """Return the settings of a result that are others in another result of the same liquid."""
    names = ", ".join(result.config.model_names)
    own, alike = result.settings, [other.settings for other in others if other.liquid == result.liquid]
    keys = dict.fromkeys(key for settings in alike for key in settings)
    told = [
        f"{key}: {own.get(key, 'absent')}{f' ({names})' if key == 'model.sha256' else ''}"
        for key in keys
        if any(settings.get(key) != own.get(key) for settings in alike)
    ]
    return "; ".join([*told[:MOST_TOLD], *(["..."] if len(told) > MOST_TOLD else [])])


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def table(collection: Collection) -> str:
    """Return the table for people, property by property, and what is missing."""
    rows = collection.rows()
    width = max(len(row["electrolyte"]) for row in rows)
    lines: list[str] = []
    for name in dict.fromkeys(row["property"] for row in rows):
        lines.append(name)
        for row in rows:
            if row["property"] == name:
                lines += _lines(row, width)
    lines += [f"without results: {name}: {reason}" for name, reason in collection.missing.items()]
    return "\n".join(lines)


def _lines(row: Mapping[str, Any], width: int) -> list[str]:
    temperature = "" if row["temperature_K"] is None else f"{row['temperature_K']:g} K"
    molality = f"{row['molality_mol_kg']:.3g} mol/kg" if row["molality_mol_kg"] else ""
    estimate = Estimate(row["value"], row["stderr"], row["unit"], None, "")
    value = "no value" if estimate.value is None else str(estimate)
    runs = f"({row['runs_with_value']} of {row['runs']} runs)"
    line = f"  {row['electrolyte']:<{width}s}  {temperature:>8s}  {molality:>11s}  {value} {runs}"
    notes = [f"differs from others in {row['differs_in']}" if row["differs_in"] else "", row["warnings"]]
    return [line.rstrip(), *(f"      {note}" for note in notes if note)]
