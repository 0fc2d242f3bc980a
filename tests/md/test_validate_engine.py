"""The long checks of docs/validate_engine.py, in short."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bamboo.system import System
from md.analysis.estimate import Estimate
from md.engine.state import MDState

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> Callable[[str], ModuleType]:
    """Return a function that imports a module of the folder docs."""
    if str(DOCS) not in sys.path:
        sys.path.insert(0, str(DOCS))
    return importlib.import_module


def test_runs_of_the_shipped_model_survive_kills() -> None:
    """In a process of its own: it forks, and the threads of this one would not survive that."""
    code = "import json, validate_engine; print(json.dumps(validate_engine.kills(2)))"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(DOCS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    (row,) = json.loads(done.stdout)
    assert row["verdict"] == "yes", row


def test_pressure_and_integrator_of_the_shipped_model(script) -> None:
    assert [row["verdict"] for row in script("validate_engine").model_checks()] == ["yes", "yes"]


def test_terms(script) -> None:
    terms = script("validate_terms")
    assert [row["verdict"] for row in [*terms.madelung(), terms.dispersion()]] == ["yes"] * 4


def test_energy_is_conserved_to_second_order(script) -> None:
    assert {row["verdict"] for row in script("validate_ensembles").conservation(300)} == {"yes"}


def test_a_wrong_ensemble_is_seen(script) -> None:
    """Exponential energies at two temperatures have the ratio that is asked for; half the difference does not."""
    ensembles, generator = script("validate_ensembles"), np.random.default_rng(1)
    samples = [generator.gamma(30.0, kT, size=(32, 300)) for kT in (1.0, 1.05)]
    expected = 1.0 - 1.0 / 1.05
    assert ensembles.ratio_row("right", samples, expected)["verdict"] == "yes"
    assert ensembles.ratio_row("wrong", samples, 2.0 * expected)["verdict"] == "NO"


def test_a_wrong_error_bar_is_seen(script) -> None:
    coverage = script("validate_error_bars").coverage
    runs = {
        "always": lambda seed: {"always": (Estimate(1.0, 1.0, "", None, ""), 0.0)},
        "none": lambda seed: {"none": (Estimate(None, None, "", None, "", ("short",)), 0.0)},
        "never": lambda seed: {"never": (Estimate(3.0, 1.0, "", None, ""), 0.0)},
    }
    mean, always, none, never = coverage(40, {"mean": script("validate_error_bars").mean_run} | runs)
    assert mean["verdict"] == "yes" and always["verdict"] == never["verdict"] == none["verdict"] == "NO"
    assert none["measured"].endswith("40 without value")


def test_a_literature_value_is_met_or_not(script) -> None:
    beside = script("validate_transport").beside
    for value, stderr, verdict in ((33.0, 1.0, "yes"), (39.0, 1.0, "NO"), (33.0, 5.0, "NO"), (None, None, "NO")):
        found = Estimate(value, stderr, "mPa s", 10.0, "", ("short",) if value is None else ())
        row = beside("eta", found, 3.2, 0.1, "source", unit="eta*", size=10.0)
        assert row["verdict"] == verdict, row


def shaken(box: System) -> System:
    positions = box.positions + np.random.default_rng(0).normal(scale=0.2, size=box.positions.shape)
    return System(box.numbers, positions, box.cell, True, molecule=box.molecule)


def evaluated(box: System, potential: object) -> MDState:
    state = MDState.from_systems([box], temperature_K=0.0, seed=0)
    state.evaluate(potential)
    return state


@pytest.mark.parametrize("name", ["argon", "salt"])
def test_potentials_of_the_reference_liquids(script, name: str) -> None:
    """Forces and virial against differences of energies; cutoffs where no pair crosses them."""
    liquids = script("reference_liquids")
    liquid = liquids.argon(cells=4) if name == "argon" else liquids.molten_salt()
    potential, box = (liquid.potential, shaken(liquid.box)) if name == "argon" else (
        liquids.MoltenSalt(accuracy=4.5), shaken(liquid.box)
    )  # fmt: skip
    state = evaluated(box, potential)
    for atom, axis in ((3, 0), (100, 2)):
        energies = []
        for step in (1.0e-4, -1.0e-4):
            positions = box.positions.copy()
            positions[atom, axis] += step
            moved = System(box.numbers, positions, box.cell, True, molecule=box.molecule)
            energies.append(float(evaluated(moved, potential).energy[0]))
        assert float(state.forces[atom, axis]) == pytest.approx(-(energies[0] - energies[1]) / 2.0e-4, abs=2e-5)
    if name == "salt":  # the truncated Lennard-Jones potential jumps where pairs cross its cutoff
        energies = []
        for scale in (1.0 + 1.0e-5, 1.0 - 1.0e-5):
            moved = MDState.from_systems([box], temperature_K=0.0, seed=0)
            moved.scale_box(torch.tensor([scale], dtype=torch.float64))
            moved.evaluate(potential)
            energies.append(float(moved.energy[0]))
        slope = -(energies[0] - energies[1]) / 2.0e-5
        assert float(state.virial[0].trace()) == pytest.approx(slope, rel=1e-4)


def test_rock_salt_of_the_rigid_ions_is_that_of_their_makers(script) -> None:
    """Lattice constant 5.64 Å within 1 %, and 8.0 to 8.1 eV per ion pair, as crystal data were fitted."""
    liquids = script("reference_liquids")
    edges = np.array([5.5, 5.6, 5.7])
    energies = [
        float(evaluated(liquids.fcc_box((11, 17), cells=4, lattice=edge), liquids.MoltenSalt()).energy[0]) / 256.0
        for edge in edges
    ]
    a, b, _ = np.polyfit(edges, energies, 2)
    assert -b / (2.0 * a) == pytest.approx(5.64, rel=0.01)
    assert -8.1 < min(energies) < -8.0


def test_reference_liquids_go_on_where_they_stopped(script, tmp_path: Path) -> None:
    """A run in two pieces records what one in one piece does."""
    import dataclasses

    liquids = script("reference_liquids")
    liquid = dataclasses.replace(liquids.argon(cells=3, n_replicas=2), melt_ps=0.1)
    liquid.simulate(tmp_path / "pieces", length_ps=0.6)
    _, pieces = liquid.simulate(tmp_path / "pieces", length_ps=1.2)
    trajectories, whole = liquid.simulate(tmp_path / "whole", length_ps=1.2)
    np.testing.assert_array_equal(pieces.pressure, whole.pressure)
    assert len(trajectories) == 2 and sqrt(float(whole.temperature_K.var())) > 0.0
