"""The recipe of a run: which stages, and what each means for the engine."""

from collections.abc import Sequence
from typing import Any

from bamboo.system import System
from bamboo.units import BAR, FEMTOSECOND, GRAM_PER_CM3, PICOSECOND
from md.config import NPT, NVE, NVT, Minimise, RunConfig, Stage
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.guards import (
    CommitteeAgreement,
    DensityRange,
    Guard,
    IntactMolecules,
    MaximumTemperature,
    MinimumDistance,
)
from md.engine.integrators import (
    Integrator,
    Langevin,
    NoseHooverChain,
    StochasticVelocityRescaling,
    Thermostat,
    VelocityVerlet,
)
from md.engine.state import Evaluator, PerReplica
from md.quantities import quantity_text
from md.topology import Ensemble

Dynamics = NVE | NVT | NPT

THERMOSTATS: dict[str, type[Thermostat]] = {
    "svr": StochasticVelocityRescaling,
    "nhc": NoseHooverChain,
    "langevin": Langevin,
}
PACKING_FRACTION = 0.85  # of the estimated density: Packmol succeeds and no molecules interlock
WARM_UP_START_K = 50.0
TRANSPORT = {"viscosity", "conductivity", "diffusion"}


def default_stages(config: RunConfig) -> tuple[Stage, ...]:
    """Return the standard protocol: relax, warm up, density at constant pressure, transport at the mean volume.

    Warm-up: Langevin from 50 K at 0.5 fs, because a packed box releases heat. NPT: stochastic cell rescaling, which
    does not oscillate from a dilute start. NVT: velocity rescaling with tau = 1 ps, which leaves the dynamics alone.
    Where there are several temperatures the warm-up ends at the lowest: the next thermostat soon does the rest.
    """
    coldest = min(config.temperatures_K)
    start, target = (
        quantity_text(value, dimension="temperature") for value in (min(WARM_UP_START_K, coldest), coldest)
    )
    warm_up = NVT.model_validate(
        {
            "kind": "nvt",
            "name": "warm-up",
            "time": "10 ps",
            "timestep": "0.5 fs",
            "temperature": [start, target],
            "thermostat": "langevin",
            "damping": "0.1 ps",
        }
    )
    npt = NPT.model_validate({"kind": "npt", "time": "500 ps"})
    stages: list[Stage] = [Minimise(kind="minimise"), warm_up, npt]
    if TRANSPORT & set(config.properties):
        stages.append(NVT.model_validate({"kind": "nvt", "time": "2 ns", "volume": "mean"}))
    return tuple(stages)


def resolve(config: RunConfig) -> RunConfig:
    """Return the configuration with its stages written out."""
    return config if config.stages else config.model_copy(update={"stages": default_stages(config)})


def stage_name(index: int, stage: Stage) -> str:
    """Return the name of a stage and of its folder, ``03-npt``."""
    return f"{index + 1:02d}-{stage.name or stage.kind}"


def temperatures(stage: Dynamics, *, temperature_K: PerReplica) -> tuple[PerReplica, PerReplica]:
    """Return the temperature of the bath at the start and at the end of a stage [K]: its own, or those of the run."""
    return stage.temperature or (temperature_K, temperature_K)


def n_steps(stage: Dynamics) -> int:
    """Return the number of steps of a stage."""
    return max(1, round(stage.time / stage.timestep))


def stride(every: float, stage: Dynamics) -> int:
    """Return the number of steps between records that are ``every`` [internal time] apart."""
    return max(1, round(every / stage.timestep))


def integrator(stage: Dynamics, *, temperature_K: PerReplica, pressure: float) -> Integrator:
    """Return the integrator of a stage; pressure in eV/Å^3."""
    timestep_fs = stage.timestep / FEMTOSECOND
    if isinstance(stage, NVE):
        return VelocityVerlet(timestep_fs=timestep_fs)
    start, end = temperatures(stage, temperature_K=temperature_K)
    common: dict[str, Any] = {
        "timestep_fs": timestep_fs,
        "temperature_K": end,
        "thermostat_time_fs": stage.damping / FEMTOSECOND,
    }
    if stage.temperature is not None and start != end:
        common |= {"ramp_from_K": start, "ramp_ps": stage.time / PICOSECOND}
    if isinstance(stage, NPT):
        target = stage.pressure if stage.pressure is not None else pressure
        common |= {"pressure_bar": target / BAR, "barostat_time_fs": stage.barostat_damping / FEMTOSECOND}
        if stage.barostat == "mtk":
            return MartynaTobiasKlein(**common, coupling=stage.coupling)
        return StochasticCellRescaling(**common)
    return THERMOSTATS[stage.thermostat](**common)


def ensemble(stage: Dynamics, *, pressure: float) -> Ensemble:
    """Return what the analysis must know about how a stage was generated; pressure in eV/Å^3."""
    if isinstance(stage, NVE):
        return Ensemble("nve")
    thermostat_time_ps = stage.damping / PICOSECOND
    if isinstance(stage, NVT):
        return Ensemble("nvt", thermostat=stage.thermostat, thermostat_time_ps=thermostat_time_ps)
    target = stage.pressure if stage.pressure is not None else pressure
    thermostat = "svr" if stage.barostat == "c-rescale" else "nhc"
    return Ensemble(
        "npt",
        thermostat=thermostat,
        barostat=stage.barostat,
        thermostat_time_ps=thermostat_time_ps,
        pressure_bar=target / BAR,
    )


def transport_objection(config: RunConfig, stage: Dynamics) -> str | None:
    """Return why transport cannot be taken from a stage, None where it can."""
    return ensemble(stage, pressure=config.target_pressure).transport_objection


def guards(
    config: RunConfig,
    stage: Dynamics,
    *,
    systems: Sequence[System],
    temperature_K: PerReplica,
    committee: Sequence[Evaluator] = (),
) -> list[Guard]:
    """Return the guards of a stage.

    systems        as packed, whose bonds must stay
    temperature_K  of the run
    committee      the other models, which must agree
    """
    limits = config.guards
    hottest = temperature_K if stage.temperature is None else max(stage.temperature)
    watched: list[Guard] = [
        MaximumTemperature(temperature_K=hottest, factor=limits.max_temperature),
        DensityRange(
            minimum_g_cm3=limits.density[0] / GRAM_PER_CM3,
            maximum_g_cm3=limits.density[1] / GRAM_PER_CM3,
        ),
        MinimumDistance(distance=limits.min_distance),
    ]
    if limits.broken_bonds == "stop":
        watched.append(IntactMolecules(systems=systems))
    if committee:
        watched.append(CommitteeAgreement(others=committee, limit=limits.disagreement))
    return watched
