"""Figures of a run: what the numbers in properties.json rest on, to be looked at before they are believed."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from bamboo import units
from md.analysis.density import SHORTEST_PS
from md.analysis.diffusion import barycentric_centres, mean_squared_displacement
from md.analysis.estimate import NORMAL_95, Estimate, format_with_error
from md.analysis.statistics import autocovariance, equilibration_start
from md.analysis.structure import radial_distribution
from md.analysis.viscosity import deviatoric_components
from md.config import NPT, RunConfig
from md.convergence import Points, Window
from md.property_names import readable
from md.results import StageData, has_element, monatomic_cations, production, stage_data
from md.run_folder import RunFolder
from md.topology import Floats, Topology
from md.trajectory import ThermoSeries

LONGEST_POINTS = 4000  # drawn per curve; more are thinned out
MOST_DRAWN = 4000  # atoms in the picture of a box
HYDROGEN = 1
CATIONS, ANIONS = ("#c1121f", "#e36414", "#9d0208"), ("#0353a4", "#7b2cbf", "#118ab2")
SOLVENTS = ("#a3a3a3", "#8fb996", "#d4a373", "#8fb3d1", "#c08497")
SHORTEST_NAMED = 0.1  # share of the time axis from which a stage's name fits above it


def write_figures(folder: RunFolder, config: RunConfig, properties: dict[str, Estimate]) -> list[Path]:
    """Draw what the data of a run support and return the files."""
    figures: dict[str, Figure] = {}
    npt = stage_data(folder, config, suits=lambda stage: isinstance(stage, NPT))
    if npt is not None and npt.thermo.n_samples > 1:
        figures["density"] = density_figure(npt, properties.get("density"))
    data = production(folder, config)
    if data is not None and data.thermo.n_samples > 1 and data.thermo.ensemble.transport_objection is None:
        figures["viscosity"] = viscosity_figure(data.thermo, properties.get("viscosity"))
    if data is not None and min(trajectory.n_frames for trajectory in data.trajectories) > 2:
        figures |= _of_frames(data, properties)
    return _saved(folder, figures)


def frame_figures(folder: RunFolder, data: StageData, properties: dict[str, Estimate]) -> list[Path]:
    """Draw what frames alone support and return the files."""
    return _saved(folder, _of_frames(data, properties))


def _of_frames(data: StageData, properties: dict[str, Estimate]) -> dict[str, Figure]:
    topology = data.trajectories[0].topology
    figures = {"msd": msd_figure(data)}
    if has_element(topology, "O"):
        figures |= {f"rdf-{cation}-O": rdf_figure(data, cation) for cation in monatomic_cations(topology)}
    for name, figure in figures.items():
        # nobody may have asked for the properties behind a figure: the length of the stage speaks then
        start = "diffusion" if name == "msd" else name.replace("rdf", "coordination").replace("-", "_")
        found = [estimate for key, estimate in properties.items() if key.startswith(start)]
        withheld = bool(found) and all(estimate.value is None for estimate in found)
        if data.drifts or withheld or data.length_ps < SHORTEST_PS:
            _stamp(figure)
    return figures


def _saved(folder: RunFolder, figures: dict[str, Figure]) -> list[Path]:
    folder.figures.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder.figures / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def density_figure(data: StageData, estimate: Estimate | None) -> Figure:
    """Density against time of all replicas; the part that is not equilibrium is shaded."""
    figure, axes = _axes("time / ps", "density / (g/cm$^3$)", title=data.name)
    series = data.thermo
    step = max(1, series.n_samples // LONGEST_POINTS)
    axes.plot(series.time_ps[::step], series.density_g_cm3[::step], lw=0.8)
    start = equilibration_start(series.density_g_cm3.T)
    until = series.time_ps[-1 if start is None else start]
    label = "no equilibrium found" if start is None else "discarded"
    if until > series.time_ps[0]:
        axes.axvspan(series.time_ps[0], until, color="0.9", label=label)
    _mark(axes, estimate)
    return figure


def viscosity_figure(series: ThermoSeries, estimate: Estimate | None) -> Figure:
    """Running Green-Kubo integral eta(t) = V/(kT) int_0^t <P P> of the mean over components and replicas."""
    figure, axes = _axes("correlation time / ps", "running integral / (mPa s)", title="viscosity, Green-Kubo")
    components = deviatoric_components(series.pressure)
    n_samples = components.shape[-1]
    correlation = autocovariance(components.reshape(-1, n_samples))[: max(2, n_samples // 4)]
    interval = series.interval_ps * units.PICOSECOND
    steps = 0.5 * (correlation[1:] + correlation[:-1]) * interval
    thermal = units.BOLTZMANN * float(series.temperature_K.mean())
    integral = np.concatenate([[0.0], np.cumsum(steps)]) * float(series.volume.mean()) / thermal
    time_ps = np.arange(len(integral)) * series.interval_ps
    axes.plot(time_ps[1:], integral[1:] / units.MILLIPASCAL_SECOND, lw=1.0)
    axes.set_xscale("log")
    _mark(axes, estimate)
    return figure


def msd_figure(data: StageData) -> Figure:
    """Mean squared displacement of every species, with a line of slope 1 to compare the eye with."""
    figure, axes = _axes("time / ps", "mean squared displacement / Å$^2$", title=data.name)
    first = data.trajectories[0]
    longest = max(2, min(trajectory.n_frames for trajectory in data.trajectories) // 4)
    time_ps = np.arange(1, longest) * first.interval_ps
    centres = [barycentric_centres(trajectory) for trajectory in data.trajectories]
    curves = {
        name: np.mean([mean_squared_displacement(track[:, members])[1:longest] for track in centres], axis=0)
        for name, members in first.topology.species.items()
    }
    for name, curve in curves.items():
        axes.loglog(time_ps, curve, label=name)
    highest = max(float(curve[-1]) for curve in curves.values())
    axes.loglog(time_ps, highest * time_ps / time_ps[-1], "k:", lw=1.0, label="slope 1")
    axes.legend()
    return figure


def rdf_figure(data: StageData, cation: str) -> Figure:
    """g(r) of oxygen around a cation, and the running coordination number, mean over replicas."""
    figure, axes = _axes("r / Å", "g(r)", title=f"{cation}-O, {data.name}")
    results = [
        radial_distribution(t, t.topology.select(species=cation), second=t.topology.select(element="O"), r_max=7.0)
        for t in data.trajectories
    ]
    axes.plot(results[0].r, np.mean([result.g for result in results], axis=0), lw=1.0)
    right = axes.twinx()
    right.plot(results[0].r, np.mean([result.coordination for result in results], axis=0), "C1", lw=1.0)
    right.set(ylabel="running coordination number", ylim=(0.0, 10.0))
    return figure


def series_figure(stages: Sequence[tuple[str, ThermoSeries]], windows: Sequence[Window], *, n_atoms: int) -> Figure:
    """Temperature, density and potential energy of all stages of dynamics one after the other.

    Grey is what no property rests on: in the panel of the density what is discarded for it, in that of the energy what
    is discarded for transport and structure, in that of the temperature what is used for neither.
    """
    figure = Figure(figsize=(6.0, 6.0), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    lengths = [float(series.time_ps[-1]) for _, series in stages]
    begins = np.cumsum([0.0, *lengths])
    final = float(stages[-1][1].potential_energy[-1].mean())
    for (name, series), begin in zip(stages, begins, strict=False):
        thinned = slice(None, None, max(1, series.n_samples // LONGEST_POINTS))
        relative = (series.potential_energy[thinned] - final) / n_atoms
        values = series.temperature_K[thinned], series.density_g_cm3[thinned], relative
        for axes, curve in zip(panels, values, strict=True):
            axes.plot(begin + series.time_ps[thinned], curve, lw=0.7)
            axes.axvline(begin, color="k", lw=0.6, ls=":")
            axes.set_prop_cycle(None)
        if series.time_ps[-1] >= SHORTEST_NAMED * begins[-1]:
            panels[0].text(begin, 1.02, f" {name}", transform=panels[0].get_xaxis_transform(), fontsize=7)
    starts = {name: float(begin) for (name, _), begin in zip(stages, begins, strict=False)}
    for axes, judged in zip(panels, (None, "density", "potential energy"), strict=True):
        used = [
            (starts[w.stage] + w.start_ps, starts[w.stage] + w.end_ps) for w in windows if judged in (None, w.judged)
        ]
        _shade_except(axes, sorted(used), whole=(0.0, float(begins[-1])))
    panels[0].set(ylabel="temperature / K")
    panels[1].set(ylabel="density / (g/cm$^3$)")
    panels[2].set(ylabel="potential energy\n/ (eV per atom), less its last", xlabel="time of dynamics / ps")
    return figure


def _shade_except(axes: Axes, used: Sequence[tuple[float, float]], *, whole: tuple[float, float]) -> None:
    """Shade a range of x but for some intervals, sorted by their beginning."""
    at, end = whole
    for first, last in [*used, (end, end)]:
        if first > at:
            axes.axvspan(at, first, color="0.88", lw=0.0, zorder=0)
        at = max(at, last)
    axes.set_xlim(*whole)


def convergence_figure(points: dict[str, Points], properties: dict[str, Estimate]) -> Figure:
    """Every property at growing lengths of the run with its 95 % interval; the line is the final value."""
    n_rows = (len(points) + 1) // 2
    figure = Figure(figsize=(6.0, 1.9 * n_rows + 0.3), layout="constrained")
    panels = figure.subplots(n_rows, 2, squeeze=False).ravel()
    for axes, (name, found) in zip(panels, points.items(), strict=False):
        length_ps = [length for length, _ in found]
        value = np.array([estimate.value for _, estimate in found])
        half = np.array([NORMAL_95 * (estimate.stderr or 0.0) for _, estimate in found])
        axes.fill_between(length_ps, value - half, value + half, alpha=0.25, lw=0.0)
        axes.plot(length_ps, value, "o-", ms=3.0, lw=1.0)
        final = properties.get(name)
        if final is not None and final.value is not None:
            axes.axhline(final.value, color="k", lw=0.8)
        else:
            axes.text(0.5, 0.5, "not converged", transform=axes.transAxes, color="#c1121f", alpha=0.5, ha="center")
        title = readable(name)
        axes.set_title(f"{title} / {found[0][1].unit}" if found[0][1].unit else title, fontsize=7)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("time used / ps", fontsize=7)
    for axes in panels[len(points) :]:
        axes.set_visible(False)
    return figure


def box_figure(topology: Topology, positions: Floats, cell: Floats) -> Figure:
    """The box seen along its third vector: bonds of the solvent in grey and pale colours, ions as balls on top.

    positions (n_atoms, 3) [Å], molecules whole; the molecules' centres are wrapped into the cell (3, 3). Hydrogen is
    left out; of a box of more than ``MOST_DRAWN`` atoms only a slab at its front is drawn.
    """
    figure = Figure(figsize=(6.0, 6.0), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.set_axis_off()
    centres = np.zeros((len(topology.molecule_names), 3))
    np.add.at(centres, topology.molecule, positions * topology.masses[:, None])
    centres /= topology.molecule_masses[:, None]
    inside = np.floor(centres @ np.linalg.inv(cell))
    positions = positions - (inside @ cell)[topology.molecule]
    depth = (positions - positions.min(axis=0))[:, 2]
    nearest = np.sort(depth)[-min(len(depth), MOST_DRAWN)]
    shown = (depth >= nearest) & (topology.numbers != HYDROGEN)
    corners = [np.zeros(3), cell[0], cell[0] + cell[1], cell[1], np.zeros(3)]
    axes.plot(*np.array(corners)[:, :2].T, color="0.6", lw=0.8)
    bonds = np.array([bond for bond in topology.bonds if shown[list(bond)].all()], dtype=np.int64).reshape(-1, 2)
    neutral = cations = anions = 0
    for name, molecules in topology.species.items():
        charge = topology.molecule_charges[molecules[0]]
        if charge > 0.0:
            colour, cations = CATIONS[cations % len(CATIONS)], cations + 1
        elif charge < 0.0:
            colour, anions = ANIONS[anions % len(ANIONS)], anions + 1
        else:
            colour, neutral = SOLVENTS[neutral % len(SOLVENTS)], neutral + 1
        member = np.isin(topology.molecule, molecules)
        atoms, mine = np.flatnonzero(shown & member), bonds[member[bonds[:, 0]]]
        layer, size = (3, 90.0 if charge > 0.0 else 28.0) if charge else (2, 5.0)
        lines = LineCollection(list(positions[mine][:, :, :2]), colors=colour, linewidths=1.6, zorder=layer)
        axes.add_collection(lines)
        order = atoms[np.argsort(depth[atoms])]
        edge = "white" if charge else colour
        x, y = positions[order, 0], positions[order, 1]
        axes.scatter(x, y, s=size, color=colour, edgecolors=edge, linewidths=0.5, zorder=layer, label=name)
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=5, frameon=False)
    for handle in legend.legend_handles:
        cast(PathCollection, handle).set_sizes([50.0])
    return figure


def with_interval(estimate: Estimate) -> str:
    """Return "value ± half the 95 % interval unit", or the value alone where there is no error bar."""
    if estimate.value is None:
        return "no value"
    if not estimate.stderr or not np.isfinite(estimate.stderr):
        return f"{estimate.value:.4g} {estimate.unit}".strip()
    return f"{format_with_error(estimate.value, NORMAL_95 * estimate.stderr)} {estimate.unit}".strip()


def _axes(x_label: str, y_label: str, *, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return figure, axes


def _stamp(figure: Figure) -> None:
    """Write across a figure that its data are not converged."""
    figure.text(0.5, 0.5, "not converged", fontsize=28, color="#c1121f", alpha=0.35, rotation=20, ha="center")


def _mark(axes: Axes, estimate: Estimate | None) -> None:
    """Draw an estimate as a line with its 95 % interval; say so where there is none."""
    interval = estimate.interval() if estimate is not None else None
    if estimate is None or estimate.value is None or interval is None:
        axes.plot([], [], " ", label="not converged: no value")
        _stamp(cast(Figure, axes.figure))
    else:
        axes.axhline(estimate.value, color="k", lw=1.0, label=with_interval(estimate))
        axes.axhspan(*interval, color="k", alpha=0.1)
    axes.legend()
