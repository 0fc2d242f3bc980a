"""The pressure of molecules as rigid bodies, against its definition written out molecule by molecule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import md.liquid
from bamboo import checkpoint
from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.structure.molecules import define, molecule
from bamboo.system import System
from md.engine import restart
from md.engine.state import MDState
from md.liquid import HYDROGEN_MASS, Box, MolecularRecorder, Stage, as_rigid, heavy_hydrogens, simulate
from md.recording import Portion, build_topology
from md.topology import Ensemble
from md.trajectory import ThermoSeries


def test_molecular_pressure_is_that_of_centres_of_mass() -> None:
    """P V = (sum_m P_m^2 / M_m + sum_m R_m F_m) / 3 for an open set of molecules, whose virial is sum_i r_i F_i."""
    generator = np.random.default_rng(3)
    molecule = np.array([0, 0, 0, 1, 1, 2])
    positions = generator.uniform(0.0, 8.0, size=(6, 3))
    system = System(np.array([8, 1, 1, 6, 8, 3]), positions, 9.0 * np.eye(3), pbc=True, molecule=molecule)
    state = MDState.from_systems([system], temperature_K=300.0, seed=1)
    # forces that turn no molecule keep the virial symmetric: along the arms inside, plus a push on the whole
    forces = generator.normal(size=(3, 3))[molecule] / state.masses.numpy().mean()
    state.forces, mass = torch.from_numpy(forces), state.masses.numpy()
    state.virial = torch.from_numpy((positions.T @ forces)[None])
    expected = 0.0
    for m in range(3):
        inside = molecule == m
        centre = mass[inside] @ positions[inside] / mass[inside].sum()
        momentum = state.momenta.numpy()[inside].sum(0)
        expected += momentum @ momentum / mass[inside].sum() + centre @ forces[inside].sum(0)
    assert float(as_rigid(state).pressure()[0]) == pytest.approx(expected / 3.0 / 9.0**3, rel=1.0e-10)
    assert float(state.pressure()[0]) != pytest.approx(expected / 3.0 / 9.0**3, rel=1.0e-2)


def test_heavy_hydrogens_take_their_mass_from_the_atom_that_bears_them() -> None:
    known = molecule("DMC")
    positions = np.concatenate([known.positions, known.positions + np.array([6.0, 0.0, 0.0])])
    numbers = np.concatenate([known.numbers, known.numbers])
    index = np.repeat([0, 1], known.n_atoms)
    system = System(numbers, positions, 14.0 * np.eye(3), pbc=True, molecule=index)
    masses, usual = heavy_hydrogens(system).numpy(), ATOMIC_MASSES[numbers]
    assert masses[numbers == 1] == pytest.approx(HYDROGEN_MASS)
    assert np.bincount(index, weights=masses) == pytest.approx(np.bincount(index, weights=usual), rel=1e-12)
    methyl = (numbers == 6) & (masses < usual - 0.1)
    assert methyl.sum() == 4  # two methyl groups each; the carbonyl carbon keeps its mass, as do the oxygens
    assert masses[methyl] == pytest.approx(usual[methyl] - 3.0 * (HYDROGEN_MASS - ATOMIC_MASSES[1]))
    assert masses[numbers == 8] == pytest.approx(usual[numbers == 8])


def test_a_box_goes_on_from_where_another_run_left_it(
    tmp_path: Path, argon_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither packed nor squeezed nor relaxed: the first frame is the last one, but for a short warm-up."""
    monkeypatch.setattr(md.liquid, "guards", lambda *_: [])
    define("argon", "[Ar]")
    evaluator = Evaluator(checkpoint.load(argon_model(tmp_path / "argon.safetensors")))
    box = Box("argon", 340.0, 24, 1, 0.9)
    simulate(box, [Stage("nvt", 0.1)], evaluator, tmp_path / "first")
    last = restart.load(tmp_path / "first" / "restart")
    assert last is not None
    monkeypatch.setattr(md.liquid, "WARM_UP_STEPS", 0)
    for forbidden in ("pack_box", "minimise", "squeeze"):
        monkeypatch.setattr(md.liquid, forbidden, lambda *_, **__: pytest.fail("began anew"))
    following = replace(box, seed=2, after=str(tmp_path / "first"))
    simulate(following, [], evaluator, tmp_path / "second")
    first = restart.load(tmp_path / "second" / "restart")
    assert first is not None
    np.testing.assert_allclose(first.state.batch.positions, last.state.batch.positions, atol=1.0e-7)
    np.testing.assert_allclose(first.state.batch.cell, last.state.batch.cell, atol=1.0e-7)
    assert not torch.equal(first.state.momenta, last.state.momenta)
    with pytest.raises(InputError, match="no state to go on from"):
        simulate(replace(following, after=str(tmp_path / "nothing")), [], evaluator, tmp_path / "third")


def test_the_record_of_molecules_holds_their_pressure_and_the_temperature_of_all_atoms(tmp_path: Path) -> None:
    known = molecule("DMC")
    system = System(known.numbers, known.positions, 9.0 * np.eye(3), pbc=True, molecule=np.zeros(12, dtype=np.int64))
    state = MDState.from_systems([system], temperature_K=300.0, seed=1)
    state.energy = state.conserved_energy = torch.zeros(1, dtype=torch.float64)
    state.virial = torch.zeros((1, 3, 3), dtype=torch.float64)
    state.charges = torch.zeros(12, dtype=torch.float64)
    state.forces = torch.randn((12, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    recorder = MolecularRecorder(
        [Portion(tmp_path, build_topology(system, {"DMC": 1}), slice(0, 1))], ensemble=Ensemble("nve"), stride=1
    )
    recorder.truncate(-1)
    recorder.report(state)
    recorder.close()
    series = ThermoSeries.read(tmp_path / "molecular" / "thermo.h5")
    np.testing.assert_allclose(series.pressure[0, 0], as_rigid(state).pressure_tensor()[0], rtol=1e-6)
    assert not np.allclose(series.pressure[0, 0], state.pressure_tensor()[0], rtol=1e-2)
    assert series.temperature_K[0, 0] == pytest.approx(float(state.temperature_K()[0]), rel=1e-6)
