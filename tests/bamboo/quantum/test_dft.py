"""B3LYP labels: derivatives, invariances, charges, and PySCF's own implementation as the reference."""

import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bamboo.errors import InputError
from bamboo.quantum import campaign
from bamboo.quantum import dft as labeller
from bamboo.quantum.campaign import structure_jobs
from bamboo.quantum.dataset import Frame, read_frames, read_provenance, round_positions, write_frames
from bamboo.quantum.dft import DFTLabeller, DFTResult, label_dft
from bamboo.quantum.esp import fit_charges, potential_points
from bamboo.quantum.labels import Labels
from bamboo.quantum.xtb import UnconvergedError
from bamboo.system import System
from bamboo.units import BOHR, COULOMB_CONSTANT, DEBYE, HARTREE

pytest.importorskip("pyscf", reason="B3LYP labels need PySCF: pip install 'bamboo-md[qm]'")

# Experimental equilibrium geometry: r(OH) = 0.9572 Å, HOH 104.52°; Benedict et al., J. Chem. Phys. 24, 1139 (1956).
WATER = ([8, 1, 1], [[0.0, 0.0, 0.0], [0.7569503, 0.0, 0.5858823], [-0.7569503, 0.0, 0.5858823]])
BENT = ([8, 1, 1], [[0.05, -0.02, 0.01], [0.84, 0.11, 0.63], [-0.71, -0.07, 0.68]])  # no symmetry, stretched bonds
LITHIUM_FLUORIDE = ([3, 9], [[0.1, 0.2, -0.1], [0.9, 1.1, 0.8]])
HYDRATED_LITHIUM = ([8, 1, 1, 3], [*BENT[1], [0.02, 0.10, -1.80]])


def cluster(atoms: tuple[list[int], list[list[float]]], charge: float = 0.0) -> System:
    numbers, positions = np.array(atoms[0]), round_positions(np.array(atoms[1]))
    return System(numbers, positions, np.zeros((3, 3)), pbc=False, total_charge=charge)


def moved(system: System, rotation: np.ndarray, shift: np.ndarray) -> System:
    return replace(system, positions=system.positions @ rotation.T + shift)


@cache
def bent_water() -> DFTResult:
    return label_dft(cluster(BENT))


@cache
def hydrated_lithium() -> DFTResult:
    return label_dft(cluster(HYDRATED_LITHIUM, 1.0))


@pytest.mark.parametrize(("atoms", "atom", "axis"), [(BENT, 1, 0), (LITHIUM_FLUORIDE, 1, 2)])
def test_forces_are_the_derivative_of_the_energy(atoms, atom, axis):
    """F = -dE/dx on a grid so fine that its own response is below the tolerance."""
    system = cluster(atoms)
    forces = label_dft(system, grid_level=3).labels.forces
    energies, places = [], []
    for step in (-0.004, 0.004):
        positions = system.positions.copy()
        positions[atom, axis] += step
        places.append(round_positions(positions)[atom, axis])
        energies.append(label_dft(replace(system, positions=positions), grid_level=3).labels.energy)
    slope = -(energies[1] - energies[0]) / (places[1] - places[0])
    assert abs(slope) > 0.5
    assert forces[atom, axis] == pytest.approx(slope, abs=1.0e-3)


@pytest.mark.parametrize(("atoms", "charge"), [(LITHIUM_FLUORIDE, 0), (HYDRATED_LITHIUM, 1)])
def test_energy_gradient_and_dipole_agree_with_pyscf(atoms, charge):
    """PySCF's own energy and gradient on the same grid, without the shortcuts taken here."""
    from pyscf import dft, gto

    from bamboo.quantum.kohn_sham import quadrature_grid

    system = cluster(atoms, charge)
    molecule = gto.M(
        atom=list(zip(atoms[0], system.positions / BOHR, strict=True)),
        unit="Bohr", basis="def2-svpd", charge=charge, verbose=0,
    )  # fmt: skip
    reference = dft.RKS(molecule, xc="b3lyp").density_fit(auxbasis="def2-universal-jkfit")
    reference.grids = quadrature_grid(molecule, level=2)
    energy = reference.kernel()
    forces = -reference.nuc_grad_method().kernel() * HARTREE / BOHR
    labels = label_dft(system).labels
    assert labels.level == "B3LYP/def2-SVPD, RI, grid 2"
    assert labels.energy == pytest.approx(energy * HARTREE, abs=2.0e-7 * HARTREE)
    np.testing.assert_allclose(labels.forces, forces, atol=5.0e-4)
    np.testing.assert_allclose(labels.dipole, reference.dip_moment(unit="AU", verbose=0) * BOHR, atol=1.0e-4)


def test_potential_agrees_with_exact_integrals():
    """The fitted density stands in for the density: within 2 % on the points where charges are fitted."""
    from bamboo.quantum import kohn_sham

    system = cluster(BENT)
    molecule = kohn_sham.build_molecule(system.numbers.tolist(), system.positions / BOHR, charge=0, basis="def2-SVPD")
    mean_field = kohn_sham.solve(molecule, grid_level=1)
    points = potential_points(system.numbers, system.positions, spacing_A=1.0) / BOHR
    electrons = np.einsum("pmn,mn->p", molecule.intor("int1e_grids", grids=points), mean_field.make_rdm1())
    distances = np.linalg.norm(points[:, None] - system.positions / BOHR, axis=2)
    nuclei = (system.numbers / distances).sum(axis=1)
    exact = nuclei - electrons
    difference = kohn_sham.electrostatic_potential(mean_field, points) - exact
    assert np.sqrt(np.mean(difference**2)) < 0.02 * np.sqrt(np.mean(exact**2))


def test_guess_saves_cycles_and_leaves_the_energy():
    shift = np.array([[0.01, 0.0, 0.0], [0.0, -0.02, 0.01], [0.0, 0.01, 0.0]])
    near = replace(cluster(BENT), positions=cluster(BENT).positions + shift)
    plain, guided = bent_water(), label_dft(cluster(BENT), guess=label_dft(near).guess)
    assert guided.cycles < plain.cycles
    assert guided.labels.energy == pytest.approx(plain.labels.energy, abs=1.0e-6 * HARTREE)
    np.testing.assert_allclose(guided.labels.forces, plain.labels.forces, atol=1.0e-3)


def test_campaign_relabels_the_clusters_of_a_dataset(tmp_path):
    """Frames keep trajectory, kind and split; boxes are refused; densities are handed on."""
    run = "dynamics-1-00007"
    stretched = [replace(cluster(BENT), positions=cluster(BENT).positions * scale) for scale in (1.0, 1.02)]
    old = Labels("GFN2-xTB", -1.0, np.zeros((3, 3)))
    frames = [Frame(system, old, "neutral", "dynamics", run, 300.0) for system in stretched]
    write_frames(tmp_path / "gfn2.h5", frames)
    (job,) = structure_jobs(tmp_path / "gfn2.h5", method="dft")
    write_frames(tmp_path / "other.h5", frames[:1])
    (other,) = structure_jobs(tmp_path / "other.h5", method="dft")
    assert job.name.startswith(run + "/") and other.name.startswith(run + "/") and job.name != other.name
    outcome, _ = campaign._run_job(job)
    campaign._record(tmp_path, job, outcome, 1.0)
    first, second = read_frames(tmp_path / "shard-000.h5")
    assert (first.kind, first.split, first.temperature_K) == ("neutral", frames[0].split, 300.0)
    np.testing.assert_array_equal(second.system.positions, round_positions(stretched[1].positions))
    assert first.labels.level == "B3LYP/def2-SVPD, RI, grid 2"
    assert first.labels.energy == pytest.approx(bent_water().labels.energy, abs=1.0e-6 * HARTREE)
    assert "B3LYP" in read_provenance(tmp_path / "shard-000.h5")["method"]
    with pytest.raises(InputError, match="Did you mean 'dft'"):
        structure_jobs(tmp_path / "gfn2.h5", method="dtf")
    box = replace(cluster(BENT), cell=np.eye(3) * 9.0, pbc=True)
    write_frames(tmp_path / "box.h5", [Frame(box, old, "periodic", "packed", "periodic-1", 300.0)])
    with pytest.raises(InputError, match="cannot label periodic"):
        structure_jobs(tmp_path / "box.h5", method="dft")


def test_labeller_hands_the_density_on():
    label = DFTLabeller()
    label(cluster(BENT))
    assert label.last is not None
    first = label.last.cycles
    label(replace(cluster(BENT), positions=cluster(BENT).positions * 1.005))
    assert label.last.cycles < first
    label(cluster(LITHIUM_FLUORIDE))  # other atoms: starts afresh


def test_grid_is_fine_enough_for_a_lithium_ion_at_its_neighbour():
    """Level 2 against level 5, in the orientation that PySCF's default partition gets wrong by 38 meV/Å."""
    coarse, fine = (label_dft(cluster(LITHIUM_FLUORIDE), grid_level=level).labels for level in (2, 5))
    np.testing.assert_allclose(coarse.forces, fine.forces, atol=2.0e-3)
    assert coarse.energy == pytest.approx(fine.energy, abs=1.0e-5 * HARTREE)
    np.testing.assert_allclose(coarse.forces.sum(axis=0), 0.0, atol=2.0e-3)


def test_water_dipole_matches_experiment():
    """1.8546 D: Clough, Beers, Klein and Rothman, J. Chem. Phys. 59, 2254 (1973); B3LYP with diffuse functions: 2 %."""
    dipole = label_dft(cluster(WATER)).labels.dipole
    assert dipole[2] / DEBYE == pytest.approx(1.8546, rel=0.03)
    np.testing.assert_allclose(dipole[:2], 0.0, atol=1.0e-3)


@pytest.mark.parametrize(("result", "charge"), [(bent_water, 0.0), (hydrated_lithium, 1.0)])
def test_charges_sum_to_the_total_and_carry_the_dipole(result, charge):
    found = result()
    positions = cluster(BENT if charge == 0.0 else HYDRATED_LITHIUM).positions
    assert found.labels.charges.sum() == pytest.approx(charge, abs=1.0e-12)
    error = found.labels.charges @ positions - found.labels.dipole
    assert np.linalg.norm(error) < 0.2 * DEBYE
    assert found.dipole_error == pytest.approx(np.linalg.norm(error))
    assert found.fit.relative_rms < 0.25


def test_labels_turn_and_move_with_a_charged_cluster():
    """Energy and charges stay, forces turn, and the dipole of a charge Q moved by d grows by Q d."""
    rotation, shift = Rotation.from_rotvec([0.7, -0.4, 1.1]).as_matrix(), np.array([3.0, -2.0, 5.0])
    here, there = (
        hydrated_lithium().labels,
        label_dft(moved(cluster(HYDRATED_LITHIUM, 1.0), rotation, shift)).labels,
    )
    assert there.energy == pytest.approx(here.energy, abs=1.0e-5 * HARTREE)  # the grid does not turn
    np.testing.assert_allclose(there.forces, here.forces @ rotation.T, atol=2.0e-3)
    np.testing.assert_allclose(there.charges, here.charges, atol=2.0e-3)
    np.testing.assert_allclose(there.dipole, rotation @ here.dipole + 1.0 * shift, atol=1.0e-3)


def test_fit_recovers_point_charges_and_restraint_pulls_towards_zero():
    """The potential of known charges gives them back; a restraint only ever shortens the vector of charges."""
    generator = np.random.default_rng(5)
    numbers, positions = np.array([6, 8, 1, 3, 9]), generator.normal(scale=1.8, size=(5, 3))
    charges = np.array([0.9, -0.7, 0.1, 1.0, -0.3])
    points = potential_points(numbers, positions)
    potential = COULOMB_CONSTANT * (charges / np.linalg.norm(points[:, None] - positions, axis=2)).sum(axis=1)
    known = {"points": points, "potential": potential, "total_charge": 1.0}
    free = fit_charges(numbers, positions, **known, restraint=0.0)
    np.testing.assert_allclose(free.charges, charges, atol=1.0e-8)
    assert free.potential_rms < 1.0e-8
    tight = fit_charges(numbers, positions, **known, restraint=1.0)
    assert np.linalg.norm(tight.charges) < np.linalg.norm(charges)
    assert tight.charges.sum() == pytest.approx(1.0, abs=1.0e-12)


def test_points_turn_with_the_cluster_and_keep_their_distance():
    system = cluster(BENT)
    rotation = Rotation.from_rotvec([0.3, 1.2, -0.5]).as_matrix()
    points = potential_points(system.numbers, system.positions)
    turned = potential_points(system.numbers, system.positions @ rotation.T + 2.0)
    distances = np.linalg.norm(points[:, None] - system.positions, axis=2)
    assert (distances > [1.5, 1.2, 1.2]).all()
    assert distances.min(axis=1).max() < 2.8
    back = np.sort(np.linalg.norm(turned - 2.0, axis=1))
    np.testing.assert_allclose(back, np.sort(np.linalg.norm(points, axis=1)), atol=1.0e-8)


def test_unconverged_loop_goes_to_second_order_and_then_gives_up(monkeypatch):
    from bamboo.quantum import kohn_sham

    solve = kohn_sham.solve
    monkeypatch.setattr(kohn_sham, "solve", lambda *args, **names: solve(*args, **names, max_cycles=1))
    rescued = label_dft(cluster(BENT))
    assert rescued.labels.energy == pytest.approx(bent_water().labels.energy, abs=1.0e-6 * HARTREE)
    np.testing.assert_allclose(rescued.labels.forces, bent_water().labels.forces, atol=1.0e-3)
    monkeypatch.setattr(kohn_sham, "solve_second_order", lambda mean_field: mean_field)
    with pytest.raises(UnconvergedError, match="H2O1"):
        label_dft(cluster(BENT))


@pytest.mark.filterwarnings("ignore:Basis may be available")  # a hint of PySCF
def test_structures_that_cannot_be_labelled_are_refused(monkeypatch):
    box = System(np.array([8, 1, 1]), np.array(WATER[1]), np.eye(3) * 9.0, pbc=True)
    with pytest.raises(InputError, match="periodic"):
        label_dft(box)
    with pytest.raises(InputError, match="9 electrons"):
        label_dft(cluster(WATER, 1.0))
    with pytest.raises(InputError, match="whole number"):
        label_dft(cluster(WATER, 0.5))
    with pytest.raises(InputError, match="no basis"):
        label_dft(cluster(WATER), basis="def2-nothing")
    with pytest.raises(InputError, match="other atoms"):
        label_dft(cluster(LITHIUM_FLUORIDE), guess=bent_water().guess)
    monkeypatch.setitem(sys.modules, "pyscf", None)
    monkeypatch.delitem(sys.modules, "bamboo.quantum.kohn_sham")
    monkeypatch.delattr("bamboo.quantum.kohn_sham", raising=False)
    with pytest.raises(InputError, match=r"pip install 'bamboo-md\[qm\]'"):
        labeller.label_dft(cluster(WATER))
