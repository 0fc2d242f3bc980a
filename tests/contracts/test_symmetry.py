"""Physical symmetries of every term, of the whole field and of every engine."""

import numpy as np
import pytest
import torch
from e3nn import o3

from bamboo.system import System

TERMS = ("network", "electrostatic", "electronegativity", "dispersion", "repulsion", "all")
CHARGED = ("electrostatic", "electronegativity", "all")
EXACT = 1e-9  # relative to the largest value, double precision
# The charge mesh is no symmetry of space: a translation relative to it changes energy [eV] and force [eV/Å] a little.
MESH_ENERGY, MESH_FORCE = 2e-4, 2e-4


@pytest.fixture(params=TERMS)
def term(request):
    return request.param


@pytest.fixture(params=["cluster", "box"])
def system(request, make_cluster, make_box, term):
    charge = 1.0 if term in CHARGED else 0.0
    if request.param == "cluster":
        return make_cluster(3, total_charge=charge)
    return make_box(3, total_charge=0.0)


def assert_close(actual, expected, *, tolerance=EXACT):
    expected = torch.as_tensor(expected)
    scale = max(1.0, float(expected.abs().max()))
    error = float((actual - expected).abs().max()) / scale
    assert error < tolerance, f"differs by {error:.2e} of the largest value"


def assert_alive(output, term):
    """A symmetry of zeros would prove nothing."""
    assert float(output.forces.abs().max()) > 1e-2, term


def orthogonal(seed, *, reflect):
    torch.manual_seed(seed)
    matrix = o3.rand_matrix(dtype=torch.float64).numpy()
    return -matrix if reflect else matrix


@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
def test_rotation_and_reflection(evaluate, make_force_field, moved, system, term, reflect):
    field, matrix = make_force_field(term), orthogonal(1, reflect=reflect)
    before, after = evaluate(field, system), evaluate(field, moved(system, matrix=matrix))
    matrix = torch.from_numpy(matrix)
    assert_alive(before, term)
    assert_close(after.energy, before.energy)
    assert_close(after.forces, before.forces @ matrix)
    assert_close(after.virial, matrix.T @ before.virial @ matrix)
    assert_close(after.charges, before.charges)
    assert_close(after.dipole, before.dipole @ matrix)
    for name, value in before.terms.items():
        assert_close(after.terms[name], value)


def test_translation(evaluate, make_force_field, moved, system, term):
    field, shift = make_force_field(term), np.array([11.3, -4.7, 0.61])
    before, after = evaluate(field, system), evaluate(field, moved(system, shift=shift))
    meshed = system.pbc and term in CHARGED
    assert_alive(before, term)
    assert_close(after.energy, before.energy, tolerance=MESH_ENERGY if meshed else EXACT)
    assert_close(after.forces, before.forces, tolerance=MESH_FORCE if meshed else EXACT)
    assert_close(after.charges, before.charges)
    net = after.forces.sum(0)
    assert_close(net, torch.zeros(3), tolerance=MESH_FORCE if meshed else EXACT)


def test_permutation(evaluate, make_force_field, moved, system, term):
    field, order = make_force_field(term), np.random.default_rng(0).permutation(system.n_atoms)
    before, after = evaluate(field, system), evaluate(field, moved(system, order=order))
    assert_alive(before, term)
    assert_close(after.energy, before.energy)
    assert_close(after.forces, before.forces[order])
    assert_close(after.virial, before.virial)
    assert_close(after.charges, before.charges[order])


def test_wrapped_images(evaluate, make_force_field, make_box, term):
    field, box = make_force_field(term), make_box(4)
    images = np.random.default_rng(0).integers(-3, 4, (box.n_atoms, 3))
    imaged = System(box.numbers, box.positions + images @ box.cell, box.cell, pbc=True)
    before, after = evaluate(field, box), evaluate(field, imaged)
    assert_alive(before, term)
    assert_close(after.energy, before.energy)
    assert_close(after.forces, before.forces)
    assert_close(after.virial, before.virial)


def test_equivalent_cells(evaluate, make_force_field, make_box):
    """Another choice of lattice vectors, even left-handed, describes the same crystal (on another charge mesh)."""
    field, box = make_force_field("all"), make_box(4)
    change = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 1]])  # determinant -1
    other = System(box.numbers, box.positions, change @ box.cell, pbc=True)
    before, after = evaluate(field, box), evaluate(field, other)
    assert_close(after.energy, before.energy, tolerance=MESH_ENERGY)
    assert_close(after.forces, before.forces, tolerance=MESH_FORCE)
    assert_close(after.virial, before.virial, tolerance=MESH_ENERGY)


def repeated(box, times):
    shifts = np.array([[a, b, c] for a in range(times[0]) for b in range(times[1]) for c in range(times[2])])
    positions = (box.positions[None] + (shifts @ box.cell)[:, None]).reshape(-1, 3)
    cell = np.array(times)[:, None] * box.cell
    return System(np.tile(box.numbers, len(shifts)), positions, cell, pbc=True)


@pytest.mark.parametrize("times", [(2, 1, 1), (1, 2, 2)])
def test_supercell(evaluate, make_force_field, make_box, term, times, engine):
    """N copies of a neutral cell have N times the energy and virial, although the cell is smaller than the cutoffs."""
    field, box = make_force_field(term), make_box(5)
    one, many = evaluate(field, box), evaluate(field, repeated(box, times))
    n = int(np.prod(times))
    # the reference doubles its mesh with the cell, the other engines take the next handy size
    tolerance = EXACT if engine == "reference" or term not in CHARGED else 1e-5
    assert_alive(one, term)
    assert_close(many.energy / n, one.energy, tolerance=tolerance)
    assert_close(many.virial / n, one.virial, tolerance=tolerance)
    assert_close(many.forces.view(n, -1, 3), one.forces.expand(n, -1, 3), tolerance=tolerance)
    assert_close(many.charges.view(n, -1), one.charges.expand(n, -1))
    for name, value in one.terms.items():
        assert_close(many.terms[name] / n, value, tolerance=tolerance)


def test_supercell_of_a_box_of_usual_size(evaluate, make_force_field, make_box):
    field = make_force_field("all")
    box = make_box(6, n_atoms=60, cell=np.eye(3) * 12.0)
    one, many = evaluate(field, box), evaluate(field, repeated(box, (2, 2, 2)))
    assert_close(many.energy / 8, one.energy, tolerance=1e-5)
    assert_close(many.virial / 8, one.virial, tolerance=1e-5)
    assert_close(many.forces.view(8, -1, 3), one.forces.expand(8, -1, 3), tolerance=1e-5)


def test_batch_equals_singles(evaluate, make_force_field, make_cluster, make_box, term):
    field = make_force_field(term)
    lone = System(np.array([3]), np.array([[1.0, 2.0, 3.0]]), np.zeros((3, 3)), pbc=False, total_charge=1.0)
    systems = [make_cluster(1, total_charge=-1.0), make_box(1), lone, make_box(2), make_cluster(2)]
    together = evaluate(field, *systems)
    start = 0
    for k, system in enumerate(systems):
        alone, stop = evaluate(field, system), start + system.n_atoms
        assert_close(together.energy[k], alone.energy[0])
        assert_close(together.forces[start:stop], alone.forces)
        assert_close(together.virial[k], alone.virial[0])
        assert_close(together.charges[start:stop], alone.charges)
        assert_close(together.dipole[k], alone.dipole[0])
        assert_close(together.raw_charge[k], alone.raw_charge[0])
        for name, value in alone.terms.items():
            assert_close(together.terms[name][k], value[0])
        start = stop


def test_extensive(evaluate, make_force_field, make_cluster):
    """Two clusters so far apart that they do not see each other, apart from Coulomb's law between their charges."""
    field, cluster = make_force_field("network"), make_cluster(1, total_charge=0.0)
    far = cluster.positions + np.array([60.0, 0.0, 0.0])
    pair = System(np.tile(cluster.numbers, 2), np.vstack([cluster.positions, far]), np.zeros((3, 3)), pbc=False)
    one, two = evaluate(field, cluster), evaluate(field, pair)
    assert_close(two.energy, 2.0 * one.energy)
    assert_close(two.forces, torch.cat([one.forces, one.forces]))


def test_terms_add_up(evaluate, make_force_field, system):
    output = evaluate(make_force_field("all"), system)
    assert_close(torch.stack(list(output.terms.values())).sum(0), output.energy)
