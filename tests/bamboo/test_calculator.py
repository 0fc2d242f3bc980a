"""Through ASE: results and their signs, recalculation, optimisers and dynamics, and every kind of bad structure."""

import io

import ase
import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from bamboo import checkpoint, units
from bamboo.calculator import BambooCalculator
from bamboo.errors import BambooError, InputError, UnknownElementError
from bamboo.evaluator import Evaluator
from bamboo.structure.molecules import molecule
from bamboo.system import Batch, System


@pytest.fixture(scope="module")
def model(make_force_field, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "lively.safetensors"
    checkpoint.save(make_force_field(seed=3), path)
    return path


@pytest.fixture
def calculator(model):
    return BambooCalculator(model, dtype="float64")


@pytest.fixture
def ec():
    member = molecule("EC")
    return ase.Atoms(member.symbols, member.positions)


@pytest.fixture
def crystal(ec):
    """Two molecules of EC in a skewed box of 7 Å."""
    pair = ec.copy()
    second = ec.copy()
    second.rotate(70, "x")
    second.translate([0.4, 3.4, 3.1])
    pair += second
    pair.set_cell([[7.5, 0, 0], [1.0, 7.2, 0], [-0.7, 0.9, 7.4]])
    pair.pbc = True
    return pair


def test_results_are_those_of_the_field(calculator, crystal):
    crystal.calc = calculator
    batch = Batch.from_systems([System.from_atoms(crystal)])
    output = Evaluator(calculator.evaluator.force_field).evaluate(batch)
    assert crystal.get_potential_energy() == pytest.approx(float(output.energy), abs=1e-9)
    assert crystal.get_potential_energy(force_consistent=True) == crystal.get_potential_energy()
    np.testing.assert_allclose(crystal.get_forces(), output.forces.numpy(), atol=1e-9)
    np.testing.assert_allclose(crystal.get_charges(), output.charges.numpy(), atol=1e-12)
    assert sum(calculator.results["terms"].values()) == pytest.approx(crystal.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError):
        crystal.get_dipole_moment()


def test_stress_has_the_sign_and_the_order_of_ase(calculator, crystal):
    """stress = dE/dstrain / V in the order xx, yy, zz, yz, xz, xy, by finite strain of the whole structure."""
    crystal.calc = calculator
    stress, volume = crystal.get_stress(), crystal.get_volume()
    voigt = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    for index, (a, b) in enumerate(voigt):
        energies = []
        for step in (-1e-5, 1e-5):
            strain = np.eye(3)
            strain[a, b] += step / 2
            strain[b, a] += step / 2
            strained = crystal.copy()
            strained.set_cell(crystal.cell.array @ strain, scale_atoms=True)
            strained.calc = calculator
            energies.append(strained.get_potential_energy())
        assert stress[index] * volume == pytest.approx((energies[1] - energies[0]) / 2e-5, rel=1e-4, abs=2e-4)
    assert np.abs(stress).max() * volume > 1.0


def test_forces_of_a_cluster_by_finite_differences(calculator, ec):
    ec.calc = calculator
    forces = ec.get_forces()
    for atom, axis in ((0, 0), (5, 2), (9, 1)):
        energies = []
        for step in (-1e-4, 1e-4):
            ec.positions[atom, axis] += step
            energies.append(ec.get_potential_energy())
            ec.positions[atom, axis] -= step
        assert forces[atom, axis] == pytest.approx((energies[0] - energies[1]) / 2e-4, rel=1e-5, abs=1e-5)


def test_dipole_of_a_cluster(calculator, ec):
    ec.calc = calculator
    np.testing.assert_allclose(ec.get_dipole_moment(), ec.get_charges() @ ec.positions, atol=1e-10)
    with pytest.raises(PropertyNotImplementedError):
        ec.get_stress()


def test_total_charge(calculator, ec):
    ec.calc = calculator
    neutral = ec.get_potential_energy()
    assert ec.get_charges().sum() == pytest.approx(0.0, abs=1e-12)
    ec.info["charge"] = -1
    assert ec.get_potential_energy() != pytest.approx(neutral, abs=1e-3)
    assert ec.get_charges().sum() == pytest.approx(-1.0)
    ec.info["charge"] = 0
    assert ec.get_potential_energy() == pytest.approx(neutral)
    del ec.info["charge"]
    assert ec.get_potential_energy() == pytest.approx(neutral)


def test_nothing_is_calculated_twice(calculator, ec, monkeypatch):
    calls, evaluate = [], calculator.evaluator.evaluate
    monkeypatch.setattr(calculator.evaluator, "evaluate", lambda batch: calls.append(1) or evaluate(batch))
    ec.calc = calculator
    ec.get_forces(), ec.get_potential_energy(), ec.get_charges(), ec.get_dipole_moment()
    ec.info["label"] = "does not matter"
    ec.get_forces()
    assert len(calls) == 1
    for change in (
        lambda: ec.positions.__iadd__(0.1),
        lambda: ec.info.update(charge=1.0),
        lambda: ec.set_chemical_symbols(["N", *ec.get_chemical_symbols()[1:]]),
        lambda: (ec.set_cell([20, 20, 20]), ec.set_pbc(True)),
        lambda: ec.set_cell([21, 20, 20]),
    ):
        change()
        before = len(calls)
        ec.get_forces()
        ec.get_forces()
        assert len(calls) == before + 1


def test_one_calculator_for_many_structures(model, calculator, ec, crystal):
    expected = []
    for atoms in (ec, crystal):
        atoms.calc = BambooCalculator(model, dtype="float64")
        expected.append(atoms.get_potential_energy())
    ec.calc = crystal.calc = calculator
    assert [ec.get_potential_energy(), crystal.get_potential_energy()] == pytest.approx(expected)
    assert [ec.get_potential_energy(), crystal.get_potential_energy()] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda a: a.set_pbc([True, True, False]), InputError, "partly periodic"),
        (lambda a: a.__delitem__(slice(None)), InputError, "no atoms"),
        (lambda a: a.positions.__setitem__((2, 1), np.nan), InputError, "atom 2 is not finite"),
        (lambda a: a.positions.__setitem__(3, a.positions[1] + 0.01), InputError, "overlapping"),
        (lambda a: a.set_cell([7, 7, 0]), InputError, "three independent cell vectors"),
        (lambda a: a.set_atomic_numbers([18] * len(a)), UnknownElementError, "does not know Ar"),
        (lambda a: a.set_atomic_numbers([92] * len(a)), UnknownElementError, "92"),
        (lambda a: a.set_atomic_numbers([0] * len(a)), UnknownElementError, "0"),
        (lambda a: a.info.update(charge="plus"), InputError, "info\\['charge'\\]"),
        (lambda a: a.info.update(charge=np.nan), InputError, "total_charge"),
        (lambda a: a.set_cell(np.eye(3)), InputError, "atoms/Å|overlapping"),
    ],
)
def test_broken_structures(calculator, crystal, break_it, error, message):
    crystal.calc = calculator
    good = crystal.get_potential_energy()
    broken = crystal.copy()
    broken.calc = calculator
    break_it(broken)
    for _ in range(2):  # the second time, too
        with pytest.raises(error, match=message) as caught:
            broken.get_potential_energy()
        assert isinstance(caught.value, BambooError)
        assert caught.value.exit_code == (3 if error is UnknownElementError else 2)
    assert crystal.get_potential_energy() == pytest.approx(good)  # the calculator survives


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"charge_response": "half"}, "charge_response"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"skin": -0.1}, "skin"),
        ({"engine": "steam"}, "engine is 'steam'"),
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(InputError, match=message):
        BambooCalculator(model, **options)


def test_unknown_model():
    with pytest.raises(InputError, match="No model 'deflaut'"):
        BambooCalculator("deflaut")


def test_ase_optimises_atoms_and_cell(calculator, crystal):
    crystal.calc = calculator
    before = crystal.get_potential_energy()
    BFGS(FrechetCellFilter(crystal), logfile=None, maxstep=0.05).run(fmax=0.5, steps=25)
    assert crystal.get_potential_energy() < before - 0.05


def test_ase_dynamics_conserves_energy(make_force_field, tmp_path, crystal):
    """Exact forces of a smooth energy: the fluctuation of the total energy falls with the square of the time step."""
    field = make_force_field(seed=3)
    with torch.no_grad():  # calm the random field down, so that nothing collapses
        field.energy_head[4].weight *= 0.02
        field.charge_head[4].weight *= 0.05
        field.reference_charge *= 0.1
    checkpoint.save(field, tmp_path / "calm.safetensors")
    crystal.calc = BambooCalculator(tmp_path / "calm.safetensors", dtype="float64")
    start = crystal.get_positions()
    drifts = []
    for step_fs, n_steps in ((0.2, 20), (0.1, 40)):
        crystal.set_positions(start)
        speed = np.sqrt(units.BOLTZMANN * 150.0 / crystal.get_masses())[:, None]
        crystal.set_velocities(speed * np.random.default_rng(0).normal(size=(len(crystal), 3)))
        total = []
        dynamics = VelocityVerlet(crystal, timestep=step_fs * units.FEMTOSECOND)
        dynamics.attach(lambda total=total: total.append(crystal.get_total_energy()))
        dynamics.run(n_steps)
        drifts.append(np.std(total))
    kinetic = crystal.get_kinetic_energy()
    assert drifts[0] < 1e-3 * kinetic
    assert drifts[1] == pytest.approx(0.25 * drifts[0], rel=0.1)


def test_frozen_charges_are_an_option(model, crystal):
    forces = []
    for response in ("full", "frozen", None):
        crystal.calc = BambooCalculator(model, charge_response=response)
        forces.append(crystal.get_forces())
    assert np.abs(forces[0] - forces[1]).max() > 1e-3
    assert np.abs(forces[0] - forces[2]).max() < 1e-5  # the file says full


def test_results_survive_a_file(calculator, ec):
    ec.calc = calculator
    energy, forces = ec.get_potential_energy(), ec.get_forces()
    text = io.StringIO()
    write(text, ec, format="extxyz")
    text.seek(0)
    again = read(text, format="extxyz")
    assert again.get_potential_energy() == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(again.get_forces(), forces, atol=1e-6)


def test_torch_settings_are_left_alone(calculator, ec):
    ec.calc = calculator
    threads = torch.get_num_threads()
    ec.get_forces()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)
    assert torch.is_grad_enabled()
