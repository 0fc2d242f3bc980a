"""Forces and virial are the derivatives of the energy, for every term, the whole field and every engine."""

import numpy as np
import pytest
import torch

from bamboo.neighbors import find_neighbors
from bamboo.system import Batch, System
from bamboo.terms import electrostatics

TERMS = ("network", "electrostatic", "electronegativity", "dispersion", "repulsion", "all")
CHARGED = ("electrostatic", "electronegativity", "all")
# five-point stencil: f'(0) = sum_k w_k f(k h) / h, error h^4 f^(5) / 30
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
STEP = 5e-4


def strained(system, displacement, strain):
    cell = system.cell + system.cell @ strain
    positions = system.positions + displacement
    positions = positions + positions @ strain
    return System(system.numbers, positions, cell, pbc=system.pbc, total_charge=system.total_charge)


def slopes(evaluate, field, system, directions):
    """Return dE along each (displacement, strain) direction by finite differences, all in one batch."""
    steps = [weight for _, weight in STENCIL]
    systems = [strained(system, k * STEP * d, k * STEP * s) for d, s in directions for k, _ in STENCIL]
    energy = evaluate(field, *systems).energy.view(len(directions), len(STENCIL))
    return (energy @ torch.tensor(steps, dtype=torch.float64)) / STEP


def directions_of(system, *, seed=0):
    """Two random displacements of all atoms, and two strains, neither symmetric nor volume conserving."""
    rng = np.random.default_rng(seed)
    still, none = np.zeros((system.n_atoms, 3)), np.zeros((3, 3))
    moves = [(rng.uniform(-1, 1, (system.n_atoms, 3)), none) for _ in range(2)]
    strains = [(still, rng.uniform(-0.2, 0.2, (3, 3))) for _ in range(2)]
    return [*moves, *strains]


def predicted(output, directions):
    forces, virial = output.forces.numpy(), output.virial[0].numpy()
    return torch.tensor([-(forces * d).sum() - (virial * s).sum() for d, s in directions])


@pytest.mark.parametrize("kind", ["cluster", "box", "charged box"])
@pytest.mark.parametrize("term", TERMS)
def test_forces_and_virial_are_the_gradient(evaluate, make_force_field, make_cluster, make_box, term, kind):
    charge = 1.0 if term in CHARGED else 0.0
    if kind == "charged box" and not charge:
        pytest.skip("no charges in this term")
    system = make_cluster(7, total_charge=charge) if kind == "cluster" else make_box(7)
    if kind == "charged box":
        system = System(system.numbers, system.positions, system.cell, pbc=True, total_charge=-1.0)
    field, directions = make_force_field(term), directions_of(system)
    expected = slopes(evaluate, field, system, directions)
    actual = predicted(evaluate(field, system), directions)
    assert float(expected.abs().max()) > 0.02, "nothing to differentiate"
    error = float((actual - expected).abs().max())
    assert error < 1e-7 * max(1.0, float(expected.abs().max())), f"off by {error:.1e} eV/Å"


@pytest.mark.parametrize("attention", ["get", "gedt"])
def test_both_attentions(evaluate, make_force_field, make_cluster, attention):
    system, field = make_cluster(8), make_force_field("all", attention=attention)
    directions = directions_of(system)
    expected = slopes(evaluate, field, system, directions)
    actual = predicted(evaluate(field, system), directions)
    assert float((actual - expected).abs().max()) < 1e-7 * float(expected.abs().max())


@pytest.mark.parametrize("term", TERMS)
def test_virial_is_symmetric(evaluate, make_force_field, make_box, make_cluster, term):
    """No torque acts on an isolated cluster, and none on a crystal apart from the coarseness of the charge mesh."""
    field = make_force_field(term)
    for system in (make_cluster(9), make_box(9)):
        virial = evaluate(field, system).virial[0]
        assert float((virial - virial.T).abs().max()) < 1e-9 * max(1.0, float(virial.abs().max()))


def test_virial_of_a_cluster_follows_from_its_forces(evaluate, make_force_field, make_cluster):
    system = make_cluster(9)
    output = evaluate(make_force_field("all"), system)
    expected = torch.from_numpy(system.positions).T @ output.forces
    assert float((output.virial[0] - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_pressure_is_minus_dE_dV(evaluate, make_force_field, make_box):
    """trace(virial) / (3 V) = -dE/dV when atoms and cell are scaled together."""
    system, field = make_box(10), make_force_field("all")
    volumes, energies = [], []
    for scale in (1.0 - 1e-4, 1.0 + 1e-4):
        box = System(system.numbers, system.positions * scale, system.cell * scale, pbc=True)
        volumes.append(box.volume)
        energies.append(float(evaluate(field, box).energy[0]))
    expected = -(energies[1] - energies[0]) / (volumes[1] - volumes[0])
    pressure = float(evaluate(field, system).virial[0].trace()) / (3.0 * system.volume)
    assert abs(expected) > 1e-4
    assert pressure == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["cluster", "box"])
def test_frozen_leaves_out_the_charge_response_alone(evaluate, make_force_field, make_cluster, make_box, kind, engine):
    """F_full = F_frozen - sum_j (dE/dq_j) (dq_j/dr): dq/dr by finite differences, dE/dq from the energy terms."""
    system = make_cluster(11) if kind == "cluster" else make_box(11)
    full_field, frozen_field = make_force_field("all"), make_force_field("all", charge_response="frozen")
    full, frozen = evaluate(full_field, system), evaluate(frozen_field, system)
    assert torch.equal(full.energy, frozen.energy)
    assert torch.equal(full.charges, frozen.charges)
    slope = _slope_in_charges(full_field.cpu(), system, full.charges)
    directions = directions_of(system)
    for index, (displacement, strain) in enumerate(directions):
        copies = [strained(system, k * STEP * displacement, k * STEP * strain) for k, _ in STENCIL]
        charges = evaluate(full_field, *copies).charges.view(len(STENCIL), -1)
        dq = (torch.tensor([w for _, w in STENCIL], dtype=torch.float64) @ charges) / STEP
        response = float(slope @ dq)
        difference = float((predicted(full, directions) - predicted(frozen, directions))[index])
        assert abs(response) > 1e-3
        precision = 1e-7 if engine == "reference" else 1e-6  # dE/dq is worked out on the reference's mesh
        assert difference == pytest.approx(response, abs=precision * max(1.0, abs(response)))


def _slope_in_charges(field, system, charges):
    """Return dE/dq_j (n_atoms,) of Coulomb energy, electronegativity and hardness at fixed positions."""
    batch = Batch.from_systems([system])
    q = charges.clone().requires_grad_()
    cutoff = field.config.network.cutoff
    if system.pbc:
        pairs = find_neighbors(batch, cutoff, 0.0).edges
        i, j = pairs.index
        distance = pairs.vectors(batch.positions, batch.cell, system_index=batch.system_index).norm(dim=1)
        energy = 0.5 * electrostatics.real_space_energy(q[i] * q[j], distance, cutoff).sum()
        energy = energy + electrostatics.reciprocal_energy(q, batch.positions, batch.cell[0], cutoff=cutoff)
    else:
        i, j = torch.triu_indices(len(q), len(q), offset=1)
        distance = (batch.positions[j] - batch.positions[i]).norm(dim=1)
        energy = electrostatics.damped_coulomb(q[i] * q[j], distance).sum()
    embedding = field.embedding(batch.numbers)
    chi = field.electronegativity_head(embedding)[:, 0] + field.reference_electronegativity[batch.numbers]
    hardness = field.hardness_head(embedding)[:, 0]
    energy = energy + (chi**2 * q + hardness**2 * q**2).sum()
    return torch.autograd.grad(energy, q)[0].detach()


@pytest.mark.parametrize("charge_response", ["full", "frozen"])
@pytest.mark.parametrize("kind", ["cluster", "box"])
def test_training_sees_right_second_derivatives(make_force_field, make_cluster, make_box, kind, charge_response):
    """d/dtheta of a loss made of energy, forces, virial, charges, dipole, against differences in the parameters."""
    system = make_cluster(12) if kind == "cluster" else make_box(12)
    field = make_force_field("all", charge_response=charge_response)
    batch = Batch.from_systems([system])
    neighbors = find_neighbors(batch, field.config.network.cutoff, field.config.dispersion.cutoff)
    torch.manual_seed(0)
    parameters = [p for p in field.parameters() if p.requires_grad]
    weights = {
        "energy": torch.randn(1), "forces": torch.randn(system.n_atoms, 3), "virial": torch.randn(1, 3, 3),
        "charges": torch.randn(system.n_atoms), "dipole": torch.randn(1, 3), "raw_charge": torch.randn(1),
    }  # fmt: skip
    directions = [[torch.randn_like(p) * p.detach().abs().mean() for p in parameters] for _ in range(3)]

    def losses():
        output = field(batch, neighbors, create_graph=True)
        return torch.stack([(weight * getattr(output, name)).sum() for name, weight in weights.items()])

    values = losses()
    exact = []
    for value in values:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        exact.append([
            float(sum((g.detach() * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None))
            for direction in directions
        ])  # fmt: skip
    for k, direction in enumerate(directions):
        found = torch.zeros(len(weights), dtype=torch.float64)
        for step, weight in STENCIL:
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += step * STEP * d
            found += weight * losses().detach() / STEP
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p -= step * STEP * d
        for name, expected, actual in zip(weights, found.tolist(), [row[k] for row in exact], strict=True):
            assert abs(expected) > 1e-3, f"{name} does not depend on the parameters"
            assert actual == pytest.approx(expected, rel=1e-6, abs=1e-7), name
