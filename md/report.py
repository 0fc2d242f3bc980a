"""Figures of a run: what the numbers in properties.json rest on, to be looked at before they are believed."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bamboo import units
from md.analysis.diffusion import barycentric_centres, mean_squared_displacement
from md.analysis.estimate import Estimate
from md.analysis.statistics import autocovariance, equilibration_start
from md.analysis.structure import radial_distribution
from md.analysis.viscosity import deviatoric_components
from md.config import NPT, RunConfig
from md.results import StageData, has_element, monatomic_cations, production, stage_data
from md.run_folder import RunFolder
from md.trajectory import ThermoSeries

LONGEST_POINTS = 4000  # drawn per curve; more are thinned out


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
        figures |= _of_frames(data)
    return _saved(folder, figures)


def frame_figures(folder: RunFolder, data: StageData) -> list[Path]:
    """Draw what frames alone support and return the files."""
    return _saved(folder, _of_frames(data))


def _of_frames(data: StageData) -> dict[str, Figure]:
    topology = data.trajectories[0].topology
    figures = {"msd": msd_figure(data)}
    if has_element(topology, "O"):
        figures |= {f"rdf-{cation}-O": rdf_figure(data, cation) for cation in monatomic_cations(topology)}
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


def _axes(x_label: str, y_label: str, *, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return figure, axes


def _mark(axes: Axes, estimate: Estimate | None) -> None:
    """Draw an estimate as a line with its 95 % interval; say so where there is none."""
    interval = estimate.interval() if estimate is not None else None
    if estimate is None or estimate.value is None or interval is None:
        axes.plot([], [], " ", label="not converged: no value")
    else:
        axes.axhline(estimate.value, color="k", lw=1.0, label=str(estimate))
        axes.axhspan(*interval, color="k", alpha=0.1)
    axes.legend()
