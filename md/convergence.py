"""Which part of a run the properties rest on, and what they would have been had it ended earlier."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from md.analysis.conductivity import conductivity
from md.analysis.density import SHORTEST_PS, density
from md.analysis.diffusion import self_diffusion
from md.analysis.estimate import Estimate, format_time
from md.analysis.statistics import equilibration_start
from md.config import NPT, Property, RunConfig
from md.results import FEWEST_FRAMES, StageData, production, stage_data
from md.run_folder import RunFolder
from md.trajectory import THERMO, ThermoSeries, Trajectory

N_RUNNING = 8  # lengths at which the density is estimated
COARSE = (0.25, 0.5, 0.75, 1.0)  # shares of a run at which transport is, whose analysis costs more
FINEST = 2000  # samples kept per running estimate of the density

Points = list[tuple[float, Estimate]]  # simulated time behind an estimate [ps], the estimate


@dataclass(frozen=True)
class Window:
    """The part of a stage that some properties rest on: what precedes ``start_ps`` is discarded.

    judged    the series whose stationarity decided where it begins
    start_ps  on the clock of the stage, which begins at zero; its end where nothing of it could be used
    found     False where the series drifts to the end of the stage
    """

    stage: str
    judged: Literal["density", "potential energy"]
    start_ps: float
    end_ps: float
    found: bool

    @property
    def length_ps(self) -> float:
        """Simulated time that is used [ps]."""
        return self.end_ps - self.start_ps

    def __str__(self) -> str:
        what = "density" if self.judged == "density" else "transport and structure"
        if self.judged == "density" and not self.found:
            return f"{what}: nothing of {self.stage} is used, its density drifts to the end"
        used = f"{what}: from {self.stage}, {format_time(self.length_ps)} of it used"
        if self.start_ps > 0.0:
            used += f", first {format_time(self.start_ps)} discarded"
        return used if self.found else f"{used}, though its potential energy drifts to the end"


def density_window(folder: RunFolder, config: RunConfig) -> tuple[StageData, Window] | None:
    """Return the stage that the density comes from, and the part that is used; None where there is none yet."""
    data = stage_data(folder, config, suits=lambda stage: isinstance(stage, NPT))
    if data is None or data.thermo.n_samples < 2:
        return None
    time_ps = data.thermo.time_ps
    start = equilibration_start(data.thermo.density_g_cm3.T)
    used = time_ps[-1 if start is None else start]
    return data, Window(data.name, "density", float(used), float(time_ps[-1]), start is not None)


def production_window(folder: RunFolder, config: RunConfig) -> tuple[StageData, Window] | None:
    """Return the part of the stage that transport and structure come from, and where it begins."""
    used = production(folder, config)
    if used is None or used.thermo.n_samples < 2:
        return None
    time_ps = used.thermo.time_ps
    return used, Window(used.name, "potential energy", float(time_ps[0]), float(time_ps[-1]), not used.drifts)


def running_estimates(
    config: RunConfig,
    *,
    npt: tuple[StageData, Window] | None,
    used: tuple[StageData, Window] | None,
) -> dict[str, Points]:
    """Return density and transport at growing lengths of the run, by the same analysis as the final one.

    npt, used  from ``density_window`` and ``production_window``
    Only lengths that give a value with an error bar are kept, and properties with at least two of them.
    """
    points: dict[str, Points] = {}
    if npt is not None and npt[1].found and "density" in config.properties:
        series = _thinned(npt[0].thermo.since(npt[1].start_ps))
        _collect(points, [k / N_RUNNING for k in range(1, N_RUNNING + 1)], series, lambda t: density(_until(series, t)))
    if used is not None:
        data, asked = used[0], set(config.properties)
        _collect(points, COARSE, data.thermo, lambda end_ps: _transport(asked, data, end_ps=end_ps))
    return {name: found for name, found in points.items() if len(found) > 1}


def _collect(
    points: dict[str, Points],
    shares: list[float] | tuple[float, ...],
    series: ThermoSeries,
    estimates: Callable[[float], dict[str, Estimate]],
) -> None:
    begin, end = float(series.time_ps[0]), float(series.time_ps[-1])
    for share in shares:
        for name, estimate in estimates(begin + share * (end - begin)).items():
            if estimate.interval() is not None:
                points.setdefault(name, []).append((share * (end - begin), estimate))


def _transport(asked: set[Property], data: StageData, *, end_ps: float) -> dict[str, Estimate]:
    """Return the transport that displacements up to a time give.

    Green-Kubo integrals and structure are left out: each costs as much as the whole report.
    """
    trajectories = [_frames_until(trajectory, end_ps) for trajectory in data.trajectories]
    length_ps = end_ps - float(data.thermo.time_ps[0])
    if length_ps < SHORTEST_PS or min(trajectory.n_frames for trajectory in trajectories) < FEWEST_FRAMES:
        return {}
    temperature_K = float(data.thermo.temperature_K.mean())
    found: dict[str, Estimate] = {}
    if "conductivity" in asked and trajectories[0].topology.molecule_charges.any():
        found |= conductivity(trajectories, temperature_K=temperature_K)
    if "diffusion" in asked:
        found |= self_diffusion(trajectories, temperature_K=temperature_K)
    return found


def _until(series: ThermoSeries, end_ps: float) -> ThermoSeries:
    n_samples = int(np.searchsorted(series.time_ps, end_ps * (1.0 + 1.0e-9), side="right"))
    return replace(series, **{name: getattr(series, name)[:n_samples] for name in (*THERMO, "time_ps", "step")})


def _thinned(series: ThermoSeries) -> ThermoSeries:
    step = max(1, series.n_samples // FINEST)
    return replace(series, **{name: getattr(series, name)[::step] for name in (*THERMO, "time_ps", "step")})


def _frames_until(trajectory: Trajectory, end_ps: float) -> Trajectory:
    n_frames = int(np.searchsorted(trajectory.time_ps, end_ps * (1.0 + 1.0e-9), side="right"))
    cells = None if trajectory.cells is None else trajectory.cells[:n_frames]
    return replace(trajectory, time_ps=trajectory.time_ps[:n_frames], step=trajectory.step[:n_frames], cells=cells)
