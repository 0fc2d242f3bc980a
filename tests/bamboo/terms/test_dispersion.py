"""D3-CSO against the independent implementation in ``dftd3``; switch and tail against integrals."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from bamboo import units
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.structure.molecules import molecule
from bamboo.system import Batch, System
from bamboo.terms.dispersion import Dispersion, DispersionConfig, smooth_step


def argon(**options):
    """Return the dispersion of one made-up element (18): C6 = 40 eV Å^6, R = 3.4 Å."""
    dispersion = Dispersion(DispersionConfig(**options))
    dispersion.c6[18], dispersion.radius[18, 18] = 40.0, 3.4
    return dispersion


@pytest.mark.parametrize(("a1", "a4"), [(0.86, 6.25), (0.86, 7.75), (0.3, 5.0)])
def test_pair_energy_equals_dftd3(a1, a4):
    """Two EC molecules at five distances: same C6 and R0 in, same pair energies out."""
    interface = pytest.importorskip("dftd3.interface")
    ec = molecule("EC")
    ours = Dispersion(DispersionConfig(a1=a1, damping_length=a4 * units.BOHR))
    for separation in (2.0, 3.5, 5.0, 8.0, 20.0):
        positions = np.vstack([ec.positions, ec.positions @ np.diag([1.0, -1.0, -1.0]) + [0.3, 0.2, separation]])
        model = interface.DispersionModel(np.tile(ec.numbers, 2), positions / units.BOHR)
        model.set_realspace_cutoff(1000.0, 0.0, 40.0)

        def energies(parameters, model=model):
            return 2.0 * model.get_pairwise_dispersion(parameters)["additive pairwise energy"] * units.HARTREE

        def undamped(order):
            return interface.RationalDampingParam(s6=float(order == 6), s8=float(order == 8), s9=0.0, a1=0.0, a2=0.0)

        i, j = np.triu_indices(len(positions), k=1)
        distance = np.linalg.norm(positions[i] - positions[j], axis=1)
        c6 = -energies(undamped(6))[i, j] * distance**6
        c8 = -energies(undamped(8))[i, j] * distance**8
        oracle = energies(interface.CSODampingParam(s6=1.0, s9=0.0, a1=a1, a2=2.5, a4=a4))[i, j]
        result = ours.pair_energy(*(torch.from_numpy(array) for array in (distance, c6, np.sqrt(c8 / c6))))
        assert abs(oracle).max() > 1e-3
        np.testing.assert_allclose(result.numpy(), oracle, rtol=1e-7)


def test_published_shape():
    """Gong et al. 2025: -C6/(r^6 + 4.5^6) (0.85 + 0.82 / (1 + exp(r - 2.5 R))) + C6 / 10^6, lengths in Å."""
    shape = DispersionConfig(s6=0.85, a1=0.82, damping_length=4.5, steepness=1.0, smooth=False)
    dispersion = Dispersion(shape)
    dispersion.c6[6], dispersion.c6[8] = 20.0, 10.0
    dispersion.radius[6, 8] = dispersion.radius[8, 6] = 1.5
    r = np.array([2.0, 3.75, 9.9, 10.1])
    c6 = np.sqrt(200.0)
    expected = -c6 / (r**6 + 4.5**6) * (0.85 + 0.82 / (1 + np.exp(r - 3.75))) + c6 / 10.0**6
    expected[3] = 0.0
    result = dispersion(torch.from_numpy(r), torch.full((4,), 6), torch.full((4,), 8))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)
    assert float(dispersion.tail_energy(torch.tensor([6, 8]), torch.tensor(100.0))) == 0.0


def test_geometric_mean_of_c6():
    dispersion = Dispersion(DispersionConfig())
    dispersion.c6[6], dispersion.c6[8] = 9.0, 4.0
    pair = [float(dispersion(torch.tensor([5.0]), torch.tensor([a]), torch.tensor([b]))) for a, b in ((6, 6), (6, 8))]
    assert pair[1] / pair[0] == pytest.approx(6.0 / 9.0, rel=1e-6)


def test_smooth_step():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    assert smooth_step(x).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    for end in (0.0, 1.0):  # value, slope and curvature continue into the constants outside
        inside = torch.tensor(abs(end - 1e-4), dtype=torch.float64, requires_grad=True)
        value = smooth_step(inside)
        (slope,) = torch.autograd.grad(value, inside, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, inside)
        assert float(value.detach()) == pytest.approx(end, abs=1e-10)
        assert float(slope.detach()) < 1e-6
        assert abs(float(curvature)) < 1e-2


def test_switch_starts_late_and_ends_at_the_cutoff():
    dispersion, pair = argon(cutoff=9.0), torch.full((4,), 18)
    distance = torch.tensor([7.1, 7.3, 8.9, 9.0], dtype=torch.float64)
    plain = dispersion.pair_energy(distance, torch.tensor(40.0), torch.tensor(3.4, dtype=torch.float64))
    ratio = (dispersion(distance, pair, pair) / plain).tolist()
    assert ratio[0] == pytest.approx(1.0, rel=1e-6)
    assert 0 < ratio[2] < 1e-2 < 0.9 < ratio[1] < 1.0
    assert ratio[3] == 0.0


@pytest.mark.parametrize("cutoff", [6.0, 10.0])
def test_tail_equals_the_integral_of_what_the_switch_removes(cutoff):
    dispersion = argon(cutoff=cutoff)
    dispersion.c6[6], dispersion.radius[6, 6] = 12.0, 2.8
    dispersion.radius[6, 18] = dispersion.radius[18, 6] = 3.1
    numbers, volume = torch.tensor([18, 6, 18, 18, 6]), 321.0

    def removed(r, a, b):
        pair = torch.tensor([a]), torch.tensor([b])
        c6 = (dispersion.c6[a] * dispersion.c6[b]).sqrt()
        distance = torch.tensor([r], dtype=torch.float64)
        full = dispersion.pair_energy(distance, c6, dispersion.radius[a, b])
        return float(4 * np.pi * r**2 * (full - dispersion(distance, *pair)))

    expected = 0.0
    for a, b, count in ((18, 18, 9), (18, 6, 12), (6, 6, 4)):
        inner = quad(removed, 0.8 * cutoff, cutoff, args=(a, b), epsrel=1e-10)[0]
        expected += count * (inner + quad(removed, cutoff, np.inf, args=(a, b), epsrel=1e-10)[0]) / (2 * volume)
    tail = dispersion.tail_energy(numbers, torch.tensor(volume, dtype=torch.float64))
    assert float(tail) == pytest.approx(expected, rel=1e-6)
    assert float(tail) < 0


def test_energy_and_pressure_of_a_uniform_gas_do_not_depend_on_the_cutoff(make_force_field):
    """E = N^2 / (2 V) integral 4 pi r^2 E(r) dr and P = E / V for atoms thrown at random, whatever the cutoff."""
    n_atoms, edge = 400, 26.0
    rng = np.random.default_rng(0)
    energies, pressures = {6.0: [], 9.0: [], 12.0: []}, {6.0: [], 9.0: [], 12.0: []}
    boxes = []
    for _ in range(4):
        positions = rng.random((n_atoms, 3)) * edge
        boxes.append(System(np.full(n_atoms, 17), positions, np.eye(3) * edge, pbc=True))
    for cutoff in energies:
        field = make_force_field("dispersion", dispersion={"cutoff": cutoff}, network={"cutoff": 0.5})
        for box in boxes:
            energy, virial = _dispersion_of(field, box)
            energies[cutoff].append(energy)
            pressures[cutoff].append(virial.trace() / (3 * box.volume))
    pair = field.dispersion

    def integrand(r):
        c6 = pair.c6[17]
        return float(4 * np.pi * r**2 * pair.pair_energy(torch.tensor(r, dtype=torch.float64), c6, pair.radius[17, 17]))

    expected = n_atoms**2 / (2 * edge**3) * quad(integrand, 0, np.inf, limit=200)[0]
    for cutoff, values in energies.items():
        error = np.std(values, ddof=1) / len(values) ** 0.5
        # N (N - 1) pairs of different atoms inside the cutoff, against N^2 in a continuum
        assert np.mean(values) == pytest.approx(expected, abs=4 * error + 1.5 * abs(expected) / n_atoms), cutoff
        assert error < 0.03 * abs(expected)
        # the energy of a uniform gas is proportional to 1 / V, so P = -dE/dV = E / V
        error = np.std(pressures[cutoff], ddof=1) / len(values) ** 0.5
        assert np.mean(pressures[cutoff]) == pytest.approx(
            expected / edge**3, abs=4 * error + 1e-2 * abs(expected) / edge**3
        )
    # the same boxes: what is left of the dependence is the granularity of the gas between 5 and 12 Å
    assert np.mean(energies[6.0]) == pytest.approx(np.mean(energies[12.0]), rel=0.03)


def _dispersion_of(field, box):
    """Return energy and virial of the dispersion alone: a random gas overlaps, no engine would take it."""
    from bamboo.neighbors import find_neighbors

    batch = Batch.from_systems([box])
    neighbors = find_neighbors(batch, 0.5, field.config.dispersion.cutoff)
    strain = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    positions = batch.positions + batch.positions @ strain[0]
    cell = batch.cell + batch.cell @ strain
    energy = field.fixed_terms(batch, positions, cell, neighbors=neighbors)["dispersion"]
    (slope,) = torch.autograd.grad(energy.sum(), strain)
    return energy.item(), -slope[0].numpy()


@pytest.mark.parametrize("bad", [{"cutoff": 0.0}, {"cutoff": float("nan")}, {"damping_length": -1.0}, {"steepness": 0}])
def test_impossible_shapes_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DispersionConfig(**bad)


def test_dispersion_alone_binds_two_argon_atoms_in_the_field(make_force_field):
    field = make_force_field("dispersion")
    pair = System(np.array([17, 17]), np.array([[0.0, 0, 0], [0, 0, 4.0]]), np.zeros((3, 3)), pbc=False)
    output = Evaluator(field).evaluate(Batch.from_systems([pair]))
    expected = field.dispersion(torch.tensor([4.0]).double(), torch.tensor([17]), torch.tensor([17]))
    assert float(output.terms["dispersion"]) == pytest.approx(float(expected), rel=1e-12)
    assert float(output.forces[0, 2]) > 0 > float(output.forces[1, 2])
