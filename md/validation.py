"""The tests of a model in a liquid that no table of force errors can replace: ``bamboo-md validate MODEL``.

Energy conservation (NVE), stability (NPT at 298 K, NVT at 350 K, several seeds) and the mean pressure at the estimated
experimental density, for a real electrolyte. The numbers of the README come from here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bamboo import checkpoint
from bamboo.errors import GuardError, InputError
from bamboo.evaluator import Evaluator
from bamboo.structure.packing import pack_box
from bamboo.units import BAR, PICOSECOND
from md.composition import parse_composition, realise
from md.engine.barostats import StochasticCellRescaling
from md.engine.guards import DensityRange, Guard, IntactMolecules, MaximumTemperature, MinimumDistance
from md.engine.integrators import Integrator, Langevin, StochasticVelocityRescaling, VelocityVerlet
from md.engine.minimiser import minimise
from md.engine.simulation import Simulation
from md.engine.state import MDState
from md.harvest import squeeze

MILLI = 1.0e-3


@dataclass(frozen=True)
class ValidationConfig:
    """What to run.

    electrolyte      composition text
    n_atoms          size of the stability boxes; conservation_atoms that of the energy-conservation box
    seeds            independent boxes
    npt_ps, nvt_ps   lengths of the stability runs at 298 and 350 K
    conservation_ps  length of the NVE runs
    """

    electrolyte: str = "1 m LiPF6 in EC:DMC 30:70 wt"
    n_atoms: int = 320
    conservation_atoms: int = 130
    seeds: tuple[int, ...] = (1, 2, 3)
    npt_ps: float = 2.0
    nvt_ps: float = 2.0
    conservation_ps: float = 2.0


@dataclass
class ValidationReport:
    """Results, all in the units of their names; ``stopped`` lists guard trips, empty where all runs were sound.

    Of the total energy in NVE: drift, its slope; fluctuation, the standard deviation about that slope; deviation, the
    standard deviation about its mean. By seed: mean pressure at the estimated experimental density, over a stage too
    short to equilibrate (its error is the scatter over seeds), and the density at the end of the NPT stage.
    """

    model: str
    electrolyte: str
    drift_meV_atom_ps: dict[str, float] = field(default_factory=dict)
    fluctuation_meV_atom: dict[str, float] = field(default_factory=dict)
    deviation_meV_atom: dict[str, float] = field(default_factory=dict)
    pressure_bar: dict[str, float] = field(default_factory=dict)
    density_after_npt_g_cm3: dict[str, float] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def validate(
    model: str, config: ValidationConfig | None = None, *, say: Callable[[str], None] = print
) -> ValidationReport:
    """Run all checks and return their numbers; guard trips are recorded, not raised."""
    config = config or ValidationConfig()
    report = ValidationReport(model=model, electrolyte=config.electrolyte)
    # what the user got wrong is raised here: below, an InputError means that a box fell apart
    checkpoint.load(model)
    realise(parse_composition(config.electrolyte), n_atoms=config.n_atoms)

    def attempt(name: str, check: Callable[[], None]) -> None:
        try:
            check()
        except (GuardError, InputError) as error:
            report.stopped.append(f"{name}: {error}")
            say(report.stopped[-1])

    attempt("energy conservation", partial(measure_conservation, model, config, report, say=say))
    for seed in config.seeds:
        attempt(f"seed {seed}", partial(_stability, model, config, seed, report=report, say=say))
    return report


def _prepare(
    model: str, config: ValidationConfig, seed: int, *, n_atoms: int
) -> tuple[MDState, Evaluator, list[Guard]]:
    """Return a packed box relaxed, warmed to 298 K and brought to the estimated experimental density."""
    realised = realise(parse_composition(config.electrolyte), n_atoms=n_atoms)
    system = pack_box(realised.counts, density_g_cm3=0.85 * realised.density_g_cm3, seed=seed)
    evaluator = Evaluator(checkpoint.load(model))
    state = MDState.from_systems([system], temperature_K=298.0, seed=seed)
    minimise(state, evaluator, max_steps=100)
    state.draw_momenta(298.0)
    guards: list[Guard] = [
        MaximumTemperature(temperature_K=350.0),
        MinimumDistance(distance=0.6),
        DensityRange(minimum_g_cm3=0.3, maximum_g_cm3=2.5),
        IntactMolecules(systems=[system], stride=200),
    ]
    warm = Langevin(timestep_fs=0.5, temperature_K=298.0, thermostat_time_fs=50.0)
    simulation = Simulation(state, evaluator, integrator=warm, guards=guards, stage="warm-up")
    squeeze(simulation, realised.density_g_cm3)
    simulation.run(1000)
    return state, evaluator, guards


def measure_conservation(
    model: str, config: ValidationConfig, report: ValidationReport, *, say: Callable[[str], None]
) -> None:
    """Total energy in NVE from one start: exact forces at two timesteps, and with the charges held fixed."""
    state, _, _ = _prepare(model, config, config.seeds[0], n_atoms=config.conservation_atoms)
    momenta, batch = state.momenta, state.batch
    for label, response, timestep_fs in (("full 0.5 fs", "full", 0.5), ("full 0.25 fs", "full", 0.25),
                                         ("frozen 0.5 fs", "frozen", 0.5)):  # fmt: skip
        evaluator = Evaluator(checkpoint.load(model, charge_response=response))
        state.batch, state.momenta = batch, momenta
        integrator = VelocityVerlet(timestep_fs=timestep_fs)
        simulation = Simulation(state, evaluator, integrator=integrator, stage=f"NVE {label}")
        energies, every = [], round(2.0 / timestep_fs)
        n_samples = round(config.conservation_ps * 1000.0 / 2.0)
        for _ in range(n_samples):
            simulation.run(every)
            energies.append(float(integrator.conserved_energy(state)[0]) / state.batch.n_atoms / MILLI)
        time_ps = np.arange(len(energies)) * 2.0e-3
        slope, _ = np.polyfit(time_ps, energies, 1)
        report.drift_meV_atom_ps[label] = float(slope)
        report.fluctuation_meV_atom[label] = float(np.std(np.asarray(energies) - slope * time_ps))
        report.deviation_meV_atom[label] = float(np.std(energies))
        fluctuation = report.fluctuation_meV_atom[label]
        say(f"NVE {label}: drift {slope:+.4f} meV/atom/ps, fluctuation {fluctuation:.4f} meV/atom")


def _stability(
    model: str, config: ValidationConfig, seed: int, *, report: ValidationReport, say: Callable[[str], None]
) -> None:
    """NVT at the experimental density for the pressure, then NPT at 298 K, then NVT at 350 K, under guards."""
    state, evaluator, guards = _prepare(model, config, seed, n_atoms=config.n_atoms)

    def simulate(integrator: Integrator, duration_ps: float, stage: str) -> np.ndarray:
        simulation = Simulation(state, evaluator, integrator=integrator, guards=guards, stage=f"{stage}, seed {seed}")
        steps = round(duration_ps * PICOSECOND / integrator.timestep)
        pressures = []
        for _ in range(steps // 10):
            simulation.run(10)
            pressures.append(float(state.pressure()[0]) / BAR)
        return np.asarray(pressures)

    thermostat = StochasticVelocityRescaling(timestep_fs=1.0, temperature_K=298.0, thermostat_time_fs=100.0)
    pressure = float(simulate(thermostat, config.nvt_ps, "NVT 298 K").mean())
    report.pressure_bar[f"seed {seed}"] = pressure
    barostat = StochasticCellRescaling(
        timestep_fs=1.0, temperature_K=298.0, thermostat_time_fs=100.0, pressure_bar=1.0, barostat_time_fs=500.0
    )
    simulate(barostat, config.npt_ps, "NPT 298 K")
    density = float(state.density_g_cm3[0])
    report.density_after_npt_g_cm3[f"seed {seed}"] = density
    hot = StochasticVelocityRescaling(timestep_fs=1.0, temperature_K=350.0, thermostat_time_fs=100.0)
    simulate(hot, config.nvt_ps, "NVT 350 K")
    say(
        f"seed {seed}: sound; pressure at the experimental density {pressure:.0f} bar, density after "
        f"{config.npt_ps:g} ps of NPT {density:.3f} g/cm3 (neither equilibrated)"
    )
