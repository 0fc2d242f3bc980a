"""Figures of a collection: properties against concentration, and their Arrhenius lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from md.analysis.arrhenius import ArrheniusFit
from md.analysis.estimate import NORMAL_95
from md.collect import Collection, Group

BOX = ("composition", "structure", "build")  # settings of which every concentration has its own


def write_figures(collection: Collection, folder: Path) -> list[Path]:
    """Draw what can be drawn and return the files: PROPERTY-concentration.png, PROPERTY-arrhenius.png."""
    figures: dict[str, Figure] = {}
    for name in dict.fromkeys(name for group in collection.groups for name in group.properties):
        figure = concentration_figure(collection, name)
        if figure is not None:
            figures[f"{name}-concentration"] = figure
    fits: dict[str, list[tuple[list[Group], ArrheniusFit]]] = {}
    for name, groups, fit in collection.arrhenius():
        if fit.energy.value is not None:
            fits.setdefault(name, []).append((groups, fit))
    figures |= {f"{name}-arrhenius": arrhenius_figure(name, found) for name, found in fits.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    return [folder / f"{name}.png" for name in figures]


def concentration_figure(collection: Collection, name: str) -> Figure | None:
    """Draw a property against the molality, or, without ions, the mole fraction; None where neither varies.

    A line joins the same molecules at the same temperature and, with salts, in the same ratio of solvents, simulated in
    the same way.
    """
    series: dict[tuple[Any, ...], list[tuple[float, Group]]] = {}
    axis = "molality_mol_kg" if any(group.concentration["molality_mol_kg"] for group in collection.groups) else None
    for group in collection.groups:
        estimate, x = group.properties.get(name), group.concentration[axis or "mole_fraction"]
        if estimate is not None and estimate.value is not None and x is not None:
            series.setdefault(_series(group, salts=axis is not None), []).append((x, group))
    if not any(len({x for x, _ in points}) > 1 for points in series.values()):
        return None
    first = next(iter(collection.groups[0].first.counts))
    x_label = "molality / (mol/kg)" if axis else f"mole fraction of {first}"
    figure, axes = _axes(x_label, name, _unit(collection.groups, name))
    several = len({key[:-1] for key in series}) > 1
    for (molecules, ratio, basis, *_), points in series.items():
        points.sort(key=lambda point: point[0])
        shares = "".join(f", {part:.3g} {solvent}" for solvent, part in ratio) + f" {basis}".rstrip()
        label = f"{' '.join(molecules) + shares if several else ''} {points[0][1].temperature_K:g} K".strip()
        label += _differs_in([group for _, group in points])
        _points(axes, [x for x, _ in points], [g for _, g in points], name, label)
    axes.legend()
    return figure


def _series(group: Group, *, salts: bool) -> tuple[Any, ...]:
    """Return what the groups of one line have in common."""
    what = group.first.config.what()
    total = sum(what.solvents.values())
    ratio = tuple((solvent, round(part / total, 6)) for solvent, part in what.solvents.items()) if salts else ()
    settings = {item for item in group.first.settings.items() if not item[0].startswith(BOX)}
    names = tuple(sorted(group.first.counts))
    return names, ratio, what.basis if ratio else "", frozenset(settings), f"{group.temperature_K:.6g}"


def _differs_in(groups: Sequence[Group]) -> str:
    """Return what to add to the label of a line beside which others are of the same liquid."""
    told = next((group.differs_in for group in groups if group.differs_in), "")
    return f"\n{told}" if told else ""


def arrhenius_figure(name: str, fits: Sequence[tuple[list[Group], ArrheniusFit]]) -> Figure:
    """Draw a property on a logarithmic axis against 1000 K / T, with the fitted lines."""
    figure, axes = _axes("1000 K / T", name, _unit([group for groups, _ in fits for group in groups], name))
    axes.set_yscale("log")
    for index, (groups, fit) in enumerate(fits):
        valued = [g for g in groups if name in g.properties and g.properties[name].value is not None]
        x = [1000.0 / group.temperature_K for group in valued]
        label = f"{groups[0].first.electrolyte}: {fit.energy}{_differs_in(groups)}"
        _points(axes, x, valued, name, label, line="", colour=f"C{index}")
        ends = np.array([min(x), max(x)])
        axes.plot(ends, np.exp(fit.intercept + fit.slope * ends), f"C{index}-", lw=1.0)
    axes.legend(fontsize="small")
    return figure


def _points(
    axes: Axes, x: Sequence[float], groups: Sequence[Group], name: str, label: str, *, line: str = "-", colour: str = ""
) -> None:
    """Draw values with their 95 % intervals."""
    estimates = [group.properties[name] for group in groups]
    values = [e.value if e.value is not None else np.nan for e in estimates]
    errors = [NORMAL_95 * (e.stderr or 0.0) for e in estimates]
    axes.errorbar(x, values, yerr=errors, fmt=f"o{line}", color=colour or None, ms=4, lw=1.0, capsize=2, label=label)


def _unit(groups: Sequence[Group], name: str) -> str:
    return next(
        g.properties[name].unit for g in groups if name in g.properties and g.properties[name].value is not None
    )


def _axes(x_label: str, name: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=f"{name.replace('_', ' ')} / ({unit})" if unit else name.replace("_", " "))
    return figure, axes
