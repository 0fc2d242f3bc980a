"""Long checks of the force field, the MD engine and the analysis; writes docs/validation.md.

    python docs/validate_engine.py                    all sections, some 40 minutes on one idle core
    python docs/validate_engine.py kills --number 50  one section; the numbers of the others are kept

Every row is a measured number beside the one that theory, another program or the literature demands. The tests run the
same functions, shorter. `argon` and `salt` go on where they were stopped.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from ase import Atoms
from ase.md.verlet import VelocityVerlet as AseVerlet
from rich.console import Console
from validate_ensembles import conservation, constant_pressure, ensembles, equipartition
from validate_error_bars import AVERAGES, TRANSPORT, coverage
from validate_terms import terms
from validate_transport import argon_rows, salt_rows
from validation_rows import Row, row

from bamboo import BambooCalculator, units
from bamboo.checkpoint import load
from bamboo.errors import BambooError
from bamboo.evaluator import Evaluator
from bamboo.structure.packing import pack_box
from md.config import RunConfig, load_config
from md.engine.integrators import VelocityVerlet
from md.engine.simulation import Simulation
from md.engine.state import MDState
from md.model import Model, load_model
from md.trajectory import open_file
from md.workflows import run

HERE = Path(__file__).parent


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


# -- the page ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[str, Callable[..., list[Row]]]] = {
    "terms": ("Terms of the force field", lambda n: terms()),
    "model": ("The shipped model in the engine", lambda n: model_checks()),
    "kills": ("Exact restart (shipped model, native engine)", lambda n: kills(n or 50)),
    "conservation": ("Conservation of energy (argon)", lambda n: conservation(n or 2000)),
    "equipartition": ("Equipartition (argon, half of it with the mass of carbon)", lambda n: equipartition(n or 3000)),
    "ensembles": ("Ratios of two ensembles (argon)", lambda n: ensembles(n or 3000)),
    "pressure": ("Constant pressure (ideal gas, argon)", lambda n: constant_pressure(n or 4000)),
    "averages": ("Error bars of averages: 95 % intervals over synthetic runs", lambda n: coverage(n or 400, AVERAGES)),
    "coverage": (
        "Error bars of transport: 95 % intervals over synthetic runs",
        lambda n: coverage(n or 200, TRANSPORT),
    ),
    "argon": ("A viscosity from the literature (Lennard-Jones liquid)", lambda n: argon_rows(n or 1000)),
    "salt": ("A conductivity from the literature (molten NaCl)", lambda n: salt_rows(n or 55)),
}


def write_page(results: dict[str, Any]) -> None:
    lines = [
        "# Validation of the force field, the engine and the analysis",
        "",
        "Made by `python docs/validate_engine.py`.",
        "",
    ]
    for key, (title, _) in SECTIONS.items():
        if key in results:
            lines += [f"## {title}", "", "| check | measured | expected | passed |", "|---|---|---|---|"]
            lines += [f"| {r['check']} | {r['measured']} | {r['expected']} | {r['verdict']} |" for r in results[key]]
            lines.append("")
    (HERE / "validation.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--number", type=int, default=0, help="kills, synthetic runs, steps, or ps")
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
