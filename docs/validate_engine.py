"""Long checks of the MD engine and its analysis; writes docs/validation.md.

    python docs/validate_engine.py                    all sections, some 20 minutes on one core
    python docs/validate_engine.py kills --number 50  one section; the numbers of the others are kept

Every row is a measured number beside the one that theory demands. The tests run the same functions, shorter.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from io import StringIO
from math import exp, sqrt
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from ase import Atoms
from ase.md.verlet import VelocityVerlet as AseVerlet
from rich.console import Console
from scipy.signal import lfilter

from bamboo import BambooCalculator, units
from bamboo.checkpoint import load
from bamboo.errors import BambooError
from bamboo.evaluator import Evaluator
from bamboo.structure.packing import pack_box
from md.analysis.conductivity import conductivity, green_kubo_conductivity
from md.analysis.diffusion import self_diffusion
from md.analysis.estimate import Estimate
from md.analysis.statistics import series_mean
from md.analysis.viscosity import viscosity
from md.config import RunConfig, load_config
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.integrators import Langevin, NoseHooverChain, StochasticVelocityRescaling, VelocityVerlet
from md.engine.simulation import Simulation
from md.engine.state import MDState
from md.model import Model, load_model
from md.trajectory import THERMO, Ensemble, ThermoSeries, Topology, Trajectory, open_file
from md.workflows import run

HERE = Path(__file__).parent
Row = dict[str, str]


def row(check: str, measured: str, expected: str, *, passed: bool) -> Row:
    return {"check": check, "measured": measured, "expected": expected, "verdict": "yes" if passed else "NO"}


def toys() -> Any:
    """The analytic potentials of the engine's tests."""
    path = HERE.parent / "tests/md/engine/conftest.py"
    spec = importlib.util.spec_from_file_location("toys", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- exact restart -----------------------------------------------------------------------------------------------

SMALL_RUN = """\
composition: {counts: {DMC: 2, Li: 1, PF6: 1}}
build: {seed: 1, density: 0.6 g/cm3}
properties: [density]
stages:
  - {kind: minimise, steps: 20}
  - {kind: nvt, time: 20 fs, timestep: 0.5 fs, thermostat: langevin, damping: 100 fs, temperature: [50 K, 298 K]}
  - {kind: npt, time: 50 fs}
  - {kind: nvt, time: 50 fs, volume: mean, thermostat: nhc}
output: {trajectory_every: 3 fs, thermo_every: 7 fs, transport_every: 2 fs}
checkpoint: {every: 0.02 s}
"""


def kills(number: int, *, seed: int = 1) -> list[Row]:
    """Kill runs of the shipped model at random moments, start them again until they end, compare with one undisturbed.

    Four in five by SIGKILL, the rest by SIGTERM, after which the process leaves with a checkpoint and exit code
    75; outside dynamics (packing, analysis) SIGTERM kills, and counts as such. It forks: call it where no threads run.
    """
    generator = random.Random(seed)
    model = load_model(RunConfig(electrolyte="DMC"))  # once, not in every child
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the undisturbed run saves its state at the end of stages only: what is saved when must not matter
        (folder / "run.yaml").write_text(SMALL_RUN.replace("0.02 s", "1000 s"))
        begun = time.monotonic()
        assert _child(model, folder / "whole") == 0
        (folder / "run.yaml").write_text(SMALL_RUN)
        duration = time.monotonic() - begun
        killed = terminated = runs = unequal = 0
        while killed + terminated < number:
            runs += 1
            while True:
                term = generator.random() < 0.2
                number_sent = signal.SIGTERM if term else signal.SIGKILL
                code = _child(model, folder / f"run-{runs}", delay=generator.uniform(0.0, duration), number=number_sent)
                if code == 0:
                    break
                terminated += code == 75
                killed += code in (-signal.SIGKILL, -signal.SIGTERM)  # before the run began, SIGTERM simply kills
                if code not in (75, -signal.SIGKILL, -signal.SIGTERM):
                    raise RuntimeError(f"a restarted run left with code {code}")
            unequal += not _same(folder / "whole", folder / f"run-{runs}")
    what = f"restart: {killed} kills at random moments and {terminated} SIGTERM with exit code 75, {runs} runs"
    return [row(what, f"{runs - unequal} of {runs} end bit for bit equal", "all", passed=unequal == 0)]


def _child(model: Model, folder: Path, *, delay: float = 0.0, number: signal.Signals | None = None) -> int:
    """Run in a forked process, send it a signal after a delay, return its exit code (negative: killed by a signal)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            console = Console(file=StringIO(), force_terminal=False)
            try:
                run(load_config(folder.parent / "run.yaml"), folder, model=model, console=console)
                code = 0
            except BambooError as error:
                code = error.exit_code
        finally:
            os._exit(code)
    end = time.monotonic() + delay
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if number is not None and time.monotonic() >= end:
            os.kill(pid, number)
            number = None
        time.sleep(0.002)


def _same(first: Path, second: Path) -> bool:
    """Tell whether two runs wrote the same trajectories, series, tables and final state."""
    from safetensors.numpy import load_file

    for path in sorted(first.glob("stages/*/*")):
        other = second / path.relative_to(first)
        if path.suffix == ".csv":
            if path.read_bytes() != other.read_bytes():
                return False
        elif path.suffix == ".h5":
            with h5py.File(path) as a, open_file(other) as b:
                if any(not np.array_equal(a[name][:], b[name][:]) for name in a):
                    return False
    states = []
    for folder in (first, second):
        newest = max(folder.glob("restart/*.json"), key=lambda path: json.loads(path.read_text())["serial"])
        states.append(load_file(newest.with_suffix(".safetensors")))
    return all(np.array_equal(states[0][name], states[1][name], equal_nan=True) for name in states[0])


# -- ensembles ---------------------------------------------------------------------------------------------------


def ensembles(n_steps: int = 600, *, n_replicas: int = 16) -> list[Row]:
    """Argon at two temperatures and two pressures: the ratio of histograms must be exp(-dbeta E), exp(-beta dP V)."""
    rows = []
    for kind in (StochasticVelocityRescaling, NoseHooverChain, Langevin):
        samples = [
            _argon(kind(timestep_fs=5.0, temperature_K=t, thermostat_time_fs=200.0), n_steps, n_replicas, "energy")
            for t in (95.0, 100.0)
        ]
        expected = (1.0 / 95.0 - 1.0 / 100.0) / units.BOLTZMANN
        rows.append(_ratio_row(f"two temperatures, {kind.__name__}: slope / d(1/kT)", samples, expected))
    for barostat in (StochasticCellRescaling, MartynaTobiasKlein):
        samples = []
        for pressure_bar in (200.0, 400.0):
            integrator = barostat(
                timestep_fs=5.0, temperature_K=100.0, pressure_bar=pressure_bar, thermostat_time_fs=200.0,
                barostat_time_fs=500.0,
            )  # fmt: skip
            samples.append(_argon(integrator, n_steps, n_replicas, "volume"))
        expected = -200.0 * units.BAR / (units.BOLTZMANN * 100.0)
        rows.append(_ratio_row(f"two pressures, {barostat.__name__}: slope / (-dP/kT)", samples, expected))
    return rows


def _argon(integrator: Any, n_steps: int, n_replicas: int, name: str) -> np.ndarray:
    """Series (n_replicas, n_samples) of energy or volume of 32 argon atoms, every tenth step, after a third."""
    toy = toys()
    box = toy.argon_box(lattice=5.4)
    state = MDState.from_systems([box] * n_replicas, temperature_K=integrator.temperature_K, seed=7)
    simulation = Simulation(state, toy.LennardJones(), integrator=integrator)
    simulation.run(n_steps // 2)
    values = []
    for _ in range(n_steps // 10):
        simulation.run(10)
        values.append(getattr(state, name).numpy().copy())
    return np.array(values).T


def _ratio_row(what: str, samples: list[np.ndarray], expected: float) -> Row:
    """Slope of the log ratio of two distributions by logistic regression; its error from leaving out replicas."""
    n_groups = min(16, len(samples[0]))
    groups = np.array_split(np.arange(len(samples[0])), n_groups)
    slope = _logistic_slope(samples)
    without = [_logistic_slope([np.delete(s, g, axis=0) for s in samples]) for g in groups]
    stderr = sqrt((n_groups - 1) * float(np.var(without)))
    ratio, error = slope / expected, stderr / abs(expected)
    return row(what, f"{ratio:.3f} ± {error:.3f}", "1", passed=abs(ratio - 1.0) < 3.0 * error)


def _logistic_slope(samples: list[np.ndarray]) -> float:
    x = np.concatenate([s.ravel() for s in samples])
    y = np.concatenate([np.zeros(samples[0].size), np.ones(samples[1].size)])
    scale = x.std()
    design = np.stack([np.ones_like(x), (x - x.mean()) / scale], axis=1)
    weights = np.zeros(2)
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-design @ weights))
        weights += np.linalg.solve((design * (p * (1.0 - p))[:, None]).T @ design, design.T @ (y - p))
    return float(weights[1] / scale)


def equipartition(n_steps: int = 600) -> list[Row]:
    """Kinetic temperature of light and heavy atoms of one liquid under each thermostat."""
    toy = toys()
    box = toy.argon_box()
    numbers = np.where(np.arange(box.n_atoms) % 2 == 0, 18, 6)
    rows = []
    for kind in (StochasticVelocityRescaling, NoseHooverChain, Langevin):
        box = type(box)(numbers, box.positions, box.cell, True, molecule=box.molecule)
        state = MDState.from_systems([box] * 16, temperature_K=100.0, seed=3)
        simulation = Simulation(
            state, toy.LennardJones(), integrator=kind(timestep_fs=4.0, temperature_K=100.0, thermostat_time_fs=200.0)
        )
        simulation.run(n_steps // 3)
        light = torch.from_numpy(np.tile(numbers == 6, 16))
        series = []
        for _ in range(n_steps // 10):
            simulation.run(10)
            per_atom = (state.momenta**2).sum(dim=1) / state.masses / (3.0 * units.BOLTZMANN)
            series.append([state.sum_by_replica(torch.where(light == k, per_atom, 0.0)).numpy() for k in (True, False)])
        # of the 3 momenta of the centre of mass that are missing, each kind lacks its share by mass
        masses = np.where(numbers == 6, 12.011, 39.95)
        for index, (name, member) in enumerate((("light", numbers == 6), ("heavy", numbers == 18))):
            freedom = member.sum() - (masses[member].sum() / masses.sum() if state.centre_of_mass_fixed else 0.0)
            mean = series_mean(np.array(series)[:, index].T / freedom)
            text = f"{mean.value:.2f} ± {mean.stderr:.2f} K"
            rows.append(
                row(
                    f"equipartition, {kind.__name__}, {name} atoms",
                    text,
                    "100 K",
                    passed=abs(mean.value - 100.0) < 3.0 * mean.stderr,
                )
            )
    return rows


# -- the shipped model -------------------------------------------------------------------------------------------


def model_checks() -> list[Row]:
    """Pressure against -dE/dV, and one NVE run through ASE's integrator and ours."""
    box = pack_box({"DMC": 6, "EC": 2, "Li": 1, "PF6": 1}, density_g_cm3=0.9, seed=2)
    evaluator = Evaluator(load("default", dtype=torch.float64))
    state = MDState.from_systems([box], temperature_K=0.0, seed=1)
    state.evaluate(evaluator)
    analytic = float(state.pressure()[0])
    energies = []
    for sign in (1.0, -1.0):
        moved = MDState.from_systems([box], temperature_K=0.0, seed=1)
        moved.scale_box(torch.tensor([(1.0 + sign * 1.0e-5) ** (1.0 / 3.0)], dtype=torch.float64))
        moved.evaluate(evaluator)
        energies.append(float(moved.energy[0]))
    numeric = -(energies[0] - energies[1]) / (2.0e-5 * box.volume)
    gap = abs(numeric - analytic) / units.BAR
    what = f"pressure of a packed box, {analytic / units.BAR:.0f} bar, against -dE/dV"
    rows = [row(what, f"off by {gap:.2g} bar", "< 0.01 bar", passed=gap < 0.01)]
    state = MDState.from_systems([box], temperature_K=100.0, seed=1)
    atoms = Atoms(box.numbers, box.positions, cell=box.cell, pbc=True, momenta=state.momenta.numpy())
    atoms.info["charge"] = 0
    atoms.calc = BambooCalculator("default", dtype="float64")
    Simulation(state, evaluator, integrator=VelocityVerlet(timestep_fs=0.5)).run(100)
    AseVerlet(atoms, timestep=0.5 * units.FEMTOSECOND).run(100)
    gap = float(np.abs(atoms.positions - state.batch.positions.numpy()).max())
    rows.append(
        row("50 fs NVE, ASE's VelocityVerlet and ours: positions", f"within {gap:.0e} Å", "< 1e-4 Å", passed=gap < 1e-4)
    )
    return rows


# -- error bars --------------------------------------------------------------------------------------------------


def coverage(number: int = 200) -> list[Row]:
    """How often the 95 % interval of each property holds the truth, over synthetic runs with known answers."""
    rows = []
    for name, synthetic in (("mean of a series", _mean_run), ("viscosity, Green-Kubo", _viscosity_run),
                            ("self-diffusion, conductivity, Nernst-Einstein", _ion_run),
                            ("conductivity, Green-Kubo", _current_run)):  # fmt: skip
        found: dict[str, list[bool | None]] = {}
        for seed in range(number):
            for key, (estimate, truth) in synthetic(seed).items():
                interval = estimate.interval()
                found.setdefault(key, []).append(None if interval is None else interval[0] <= truth <= interval[1])
        for key, hits in found.items():
            valued = [hit for hit in hits if hit is not None]
            share = sum(valued) / max(len(valued), 1)
            text = f"{100.0 * share:.1f} % of {len(valued)}; {len(hits) - len(valued)} without value"
            rows.append(row(f"coverage, {key or name}", text, "90-99 %", passed=0.9 <= share <= 0.99))
    return rows


def _ou(shape: tuple[int, ...], tau: float, seed: int) -> np.ndarray:
    """Ornstein-Uhlenbeck series along the first axis, unit variance, correlation time tau in samples."""
    decay = exp(-1.0 / tau)
    noise = np.random.default_rng(seed).standard_normal(shape) * sqrt(1.0 - decay**2)
    noise[0] /= sqrt(1.0 - decay**2)
    return np.asarray(lfilter([1.0], [1.0, -decay], noise, axis=0))


def _mean_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    mean = series_mean(_ou((4000, 2), 20.0, seed).T)
    return {"mean of a correlated series": (Estimate(mean.value, mean.stderr, "", mean.n_effective, ""), 0.0)}


def _thermo(seed: int) -> ThermoSeries:
    """10 ps to 200 correlation times of stress and current in a box of 20 nm^3 at 300 K, every 5 fs."""
    n = 10_000
    series: dict[str, np.ndarray] = {name: np.zeros((n, 1, *column.shape)) for name, column in THERMO.items()}
    xy, yz, zx, difference, axial = 1.0e-3 * np.moveaxis(_ou((n, 1, 5), 10.0, seed), -1, 0)
    zz = 2.0 * axial / sqrt(3.0)
    xx, yy = -0.5 * zz + difference, -0.5 * zz - difference
    rows = [[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]]
    series["pressure"] = np.stack([np.stack(r, axis=-1) for r in rows], axis=-2)
    series["charge_current"] = _ou((n, 1, 3), 10.0, seed + 10**6)
    series |= {"temperature_K": np.full((n, 1), 300.0), "volume": np.full((n, 1), 2.0e4)}
    return ThermoSeries(ensemble=Ensemble("nve"), time_ps=0.005 * np.arange(n), step=np.arange(n), **series)


TAU = 10.0 * 0.005 * units.PICOSECOND  # of stress and current
KT = units.BOLTZMANN * 300.0


def _viscosity_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    truth = 2.0e4 / KT * 1.0e-6 * TAU / units.MILLIPASCAL_SECOND
    return {"viscosity, Green-Kubo": (viscosity(_thermo(seed))["viscosity"], truth)}


def _current_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    truth = TAU / (2.0e4 * KT) / units.MILLISIEMENS_PER_CENTIMETRE
    estimate = green_kubo_conductivity(_thermo(seed))["conductivity_green_kubo"]
    return {"conductivity, Green-Kubo": (estimate, truth)}


def _ion_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """Four replicas of 2 x 20 independent walkers, 0.2 and 0.6 Å^2/ps, beside a heavy wall that holds the centre."""
    names = ("Li",) * 20 + ("F",) * 20 + ("C",) * 2
    n, d = len(names), np.array([0.2] * 20 + [0.6] * 20 + [0.0] * 2)
    charges = np.array([1.0] * 20 + [-1.0] * 20 + [0.0] * 2)
    topology = Topology(
        numbers=np.array([3] * 20 + [9] * 20 + [6] * 2), masses=np.array([7.0] * 40 + [1.0e9] * 2),
        molecule=np.arange(n), molecule_names=names, molecule_charges=charges,
    )  # fmt: skip
    trajectories = []
    for replica in range(4):
        generator = np.random.default_rng([seed, replica])
        steps = generator.standard_normal((2000, n, 3)) * np.sqrt(2.0 * d)[:, None]
        trajectories.append(
            Trajectory.from_arrays(
                np.cumsum(steps, axis=0),
                topology,
                time_ps=np.arange(2000.0),
                cells=30.0 * np.eye(3),
                ensemble=Ensemble("nve"),
            )
        )
    results = conductivity(trajectories, temperature_K=300.0)
    diffusion = self_diffusion(trajectories, temperature_K=300.0)
    per_time = 1.0 / units.PICOSECOND
    sigma = float((charges**2 * d).sum()) * per_time / (27000.0 * KT) / units.MILLISIEMENS_PER_CENTIMETRE
    return {
        "self-diffusion, Einstein": (diffusion["diffusion_Li_box"], 0.2 * per_time / units.CM2_PER_SECOND),
        "conductivity, Einstein": (results["conductivity"], sigma),
        "conductivity, Nernst-Einstein": (results["conductivity_nernst_einstein"], sigma),
        "ionicity": (results["ionicity"], 1.0),
        "transference number": (results["transference_Li_solvent"], 0.25),
    }


# -- the page ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[str, Callable[..., list[Row]]]] = {
    "kills": ("Exact restart (shipped model, native engine)", lambda n: kills(n or 50)),
    "ensembles": ("Ensembles (argon)", lambda n: ensembles(n or 600)),
    "equipartition": ("Equipartition (argon, half of it with the mass of carbon)", lambda n: equipartition(n or 600)),
    "model": ("The shipped model", lambda n: model_checks()),
    "coverage": ("Error bars: 95 % intervals over synthetic runs", lambda n: coverage(n or 200)),
}


def write_page(results: dict[str, Any]) -> None:
    lines = ["# Validation of the engine and the analysis", "", "Made by `python docs/validate_engine.py`.", ""]
    for key, (title, _) in SECTIONS.items():
        if key in results:
            lines += [f"## {title}", "", "| check | measured | expected | passed |", "|---|---|---|---|"]
            lines += [f"| {r['check']} | {r['measured']} | {r['expected']} | {r['verdict']} |" for r in results[key]]
            lines.append("")
    (HERE / "validation.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--number", type=int, default=0, help="kills, synthetic runs, or steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = HERE / "validation.json"
    for key in arguments.sections or SECTIONS:
        rows = SECTIONS[key][1](arguments.number)
        results = json.loads(store.read_text()) if store.exists() else {}
        store.write_text(json.dumps(results | {key: rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write_page(results | {key: rows})
        for each in rows:
            print(" | ".join(each.values()), flush=True)


if __name__ == "__main__":
    main()
