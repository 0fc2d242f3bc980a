"""Liquids labelled molecule by molecule and pair by pair: what networks that know clusters only do not see.

A box of liquid is out of reach of B3LYP, and a network that has learnt from small clusters invents forces in it. But a
liquid of neutral molecules is nearly the sum of its pairs: what three and more molecules add to the net force on one
is 1 to 7 % of it (GFN2-xTB, docs/quantum.md). So, with the energies of single molecules E(m) and pairs E(mn),

    E = sum_m E_t(m) + sum_near [X(mn) - X(m) - X(n) + D(mn)] + sum_far [E_t(mn) - E_t(m) - E_t(n)]

    E_t  a model that was tuned to clusters, which it knows best
    X    a cheap method that is sound for pairs of neutral molecules: GFN2-xTB, 20 ms each
    D    what the good method says beyond X: sums over pairs of atoms, fitted to labelled dimers (``PairDifference``)
    near, far   closest atoms nearer than ``NEAR``, ``FAR``

gives the forces. Where X has labelled the whole box, E = X(box) + sum_m [E_t(m) - X(m)] + sum_near D(mn) gives energy
and virial as well, many bodies included. Ions polarise: where there are any, the tuned model labels the box, and only
pairs of neutral molecules are put right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField
from bamboo.learn.lift import LIFTED
from bamboo.learn.samples import molecules_of
from bamboo.neighbors import find_neighbors, find_pairs
from bamboo.quantum.dataset import Frame, read_frames, round_positions, write_frames
from bamboo.quantum.labels import Labels
from bamboo.structure.packing import make_whole
from bamboo.system import Batch, System
from bamboo.terms.dispersion import Dispersion

Floats = NDArray[np.float64]
Cheap = Callable[[System], Labels]
NEAR, FAR = 6.0, 10.0  # Å between the closest atoms of two molecules; beyond FAR only what the model says of the box
TOUCHING = 3.6  # Å between the closest atoms of a pair to be labelled
DECAY = (3.0, 2.0)  # 1/Å, of the exponentials in D
KINDS = ((0, 1, 2), (1, 3, 4), (2, 4, 5))  # number of a pair of hydrogen, carbon, other
ORIGIN = 3.0  # Å, where they are 1
ARM = 2.0  # Å: torques on molecules count in the fit as forces at this distance
RIDGE = 1.0e-3
STRONG = 0.087  # eV/Å, 2 kcal/mol/Å
SAVE_EVERY = 10
CHUNK = 64  # clusters per evaluation
IONIC = (3, 15, 16)  # Li, P, S: elements of the ions


@dataclass(frozen=True, eq=False)
class PairDifference:
    """D(mn) = sum_(i in m, j in n) [s E_disp(r_ij) + sum_k c_(t k) exp(-DECAY_k (r_ij - ORIGIN))].

    t runs over pairs of hydrogen, carbon and anything else; E_disp is the dispersion of a pair, which the exponentials
    alone would have to stretch over: their tails come out wrong where dimers are few.

    coefficients  (6, 2) eV
    scale         s
    dispersion    term of the force field
    """

    coefficients: Floats
    scale: float
    dispersion: Dispersion

    def __call__(self, distance: torch.Tensor, number_i: torch.Tensor, number_j: torch.Tensor) -> torch.Tensor:
        """Return the energy of each pair of atoms, (n_pairs,) eV; distance (n_pairs,) Å."""
        terms = _terms(distance, number_i, number_j, dispersion=self.dispersion)
        return terms @ torch.from_numpy(np.append(self.coefficients.ravel(), self.scale))

    def unexplained(self, dimers: Sequence["Dimer"]) -> float:
        """Return the RMS force on a molecule of the dimers that D does not explain [eV/Å], per component."""
        left = []
        for dimer in dimers:
            features = _features(dimer, self.dispersion)[1]
            forces = dimer.forces - features @ np.append(self.coefficients.ravel(), self.scale)
            left.append(forces[: dimer.n_first].sum(0))
        return float(np.sqrt(np.mean(np.square(left))))


@dataclass(frozen=True, eq=False)
class Dimer:
    """Two molecules at two levels: what the good one says of their interaction beyond the cheap one.

    system    the pair; its first ``n_first`` atoms are one molecule
    energy    eV, of interaction
    forces    (n_atoms, 3) eV/Å, on the pair less those on the single molecules
    """

    system: System
    n_first: int
    energy: float
    forces: Floats


def _terms(
    distance: torch.Tensor, number_i: torch.Tensor, number_j: torch.Tensor, *, dispersion: Dispersion
) -> torch.Tensor:
    """Return the terms of D at coefficient 1, (n_pairs, 13) eV: the exponentials by kind of pair, the dispersion."""
    kinds = [torch.where(number == 1, 0, torch.where(number == 6, 1, 2)) for number in (number_i, number_j)]
    pair = torch.nn.functional.one_hot(torch.tensor(KINDS)[kinds[0], kinds[1]], 6).to(distance.dtype)
    values = torch.stack([torch.exp(-decay * (distance - ORIGIN)) for decay in DECAY], dim=-1)
    exponentials = (pair[:, :, None] * values[:, None, :]).flatten(1)
    return torch.cat([exponentials, dispersion(distance, number_i, number_j)[:, None]], dim=1)


def cut_dimers(systems: Sequence[System], count: int, *, seed: int) -> list[System]:
    """Return ``count`` pairs of neighbours (closer than ``TOUCHING``) from boxes, each followed by its two molecules.

    Boxes take turns; what is labelled of them is what ``dimers_of`` looks for.
    """
    generator = np.random.default_rng(seed)
    cut: list[System] = []
    for number in range(count):
        system = systems[number % len(systems)]
        group = molecules_of(system)
        whole = make_whole(System(system.numbers, system.positions, system.cell, pbc=True, molecule=group))
        members = [np.flatnonzero(group == m) for m in range(group.max() + 1)]
        ionic = {m for m, atoms in enumerate(members) if np.isin(whole.numbers[atoms], IONIC).any()}
        near = sorted(p for p in _molecule_pairs(whole, group, TOUCHING) if not {p[0], p[1]} & ionic)
        if not near:
            raise InputError("A box has no two neutral molecules that touch.")
        m, n, shift = near[generator.integers(len(near))]
        moves = [np.zeros(3), np.array(shift) @ whole.cell]
        pair = _cluster(whole, [members[m], members[n]], moves)
        pair = replace(pair, positions=round_positions(pair.positions - pair.positions.mean(0)))
        parts = [np.arange(len(members[m])), np.arange(len(members[m]), pair.n_atoms)]
        cut += [pair, *(_cluster(pair, [atoms], [np.zeros(3)]) for atoms in parts)]
    return cut


def dimers_of(frames: Sequence[Frame], force_field: ForceField, cheap: Cheap) -> list[Dimer]:
    """Return the pairs of neutral molecules among labelled frames whose single molecules are among them as well.

    Where the labels contain no dispersion, the force field's is added. Raises InputError where there is none.
    """
    known = {_key(frame.system.numbers, frame.system.positions): frame for frame in frames}
    found = []
    for frame in frames:
        group = molecules_of(frame.system)
        if frame.system.pbc or group.max() != 1 or (np.diff(group) < 0).any() or frame.labels.forces is None:
            continue
        first = int((group == 0).sum())
        parts = [known.get(_key(frame.system.numbers[k], frame.system.positions[k])) for k in (group == 0, group == 1)]
        if parts[0] is None or parts[1] is None:
            continue
        energy, forces = _beyond(frame, force_field, cheap)
        for rows, part in ((slice(0, first), parts[0]), (slice(first, None), parts[1])):
            single_energy, single_forces = _beyond(part, force_field, cheap)
            energy -= single_energy
            forces[rows] -= single_forces
        found.append(Dimer(frame.system, first, energy, forces))
    if not found:
        raise InputError("No frame holds two molecules that are labelled one by one as well; `data dimers` makes them.")
    return found


def _key(numbers: NDArray[np.int64], positions: Floats) -> bytes:
    return numbers.astype(np.uint8).tobytes() + round_positions(positions).tobytes()


def _beyond(frame: Frame, force_field: ForceField, cheap: Cheap) -> tuple[float, Floats]:
    """Return energy and forces of a label, with dispersion, less those of the cheap method."""
    low, high = cheap(frame.system), frame.labels
    if high.forces is None or low.forces is None:
        raise InputError(f"{frame.trajectory}: dimers and their molecules need forces at both levels.")
    energy, forces = high.energy - low.energy, high.forces - low.forces
    if not high.contains_dispersion:
        more = dispersion_of(force_field, frame.system)
        energy, forces = energy + more[0], forces + more[1]
    return energy, forces


def fit_difference(dimers: Sequence[Dimer], dispersion: Dispersion) -> PairDifference:
    """Fit D to energies and to forces and torques on the molecules of dimers, by least squares with a trace of ridge.

    Torques count as forces at ``ARM``, energies [eV] as forces [eV/Å]; a dimer whose largest value x exceeds ``STRONG``
    counts less, by 1 / sqrt(1 + (x / STRONG)^2); columns are scaled to one size for the ridge.
    """
    rows, targets = [], []
    for dimer in dimers:
        energy, forces = _features(dimer, dispersion)
        target = np.concatenate([[dimer.energy], _rigid(dimer, dimer.forces[..., None])[:, 0]])
        weight = 1.0 / np.hypot(1.0, np.abs(target).max() / STRONG)
        rows += [weight * energy[None], weight * _rigid(dimer, forces)]
        targets.append(weight * target)
    design, target = np.concatenate(rows), np.concatenate(targets)
    scale = np.sqrt((design**2).mean(0)) + 1.0e-12
    scaled = design / scale
    normal = scaled.T @ scaled + RIDGE * len(scaled) * np.eye(len(scale))
    *coefficients, factor = np.linalg.solve(normal, scaled.T @ target) / scale
    return PairDifference(np.reshape(coefficients, (6, len(DECAY))), float(factor), dispersion)


def _features(dimer: Dimer, dispersion: Dispersion) -> tuple[Floats, Floats]:
    """Return the energy of each term of D at coefficient 1, (13,), and its forces, (n_atoms, 3, 13)."""
    numbers = torch.from_numpy(dimer.system.numbers)
    i, j = (part.flatten() for part in torch.meshgrid(
        torch.arange(dimer.n_first), torch.arange(dimer.n_first, dimer.system.n_atoms), indexing="ij"
    ))  # fmt: skip
    positions = torch.from_numpy(dimer.system.positions).requires_grad_()
    distance = (positions[i] - positions[j]).norm(dim=-1)
    terms = _terms(distance, numbers[i], numbers[j], dispersion=dispersion).sum(0)
    gradients = [torch.autograd.grad(term, positions, retain_graph=True)[0] for term in terms]
    return terms.detach().numpy(), -torch.stack(gradients, dim=-1).numpy()


def _rigid(dimer: Dimer, forces: Floats) -> Floats:
    """Return the force on the first molecule and the torques on both over ``ARM``, (9, n); forces (n_atoms, 3, n)."""
    parts = [forces[: dimer.n_first].sum(0)]
    for rows in (slice(0, dimer.n_first), slice(dimer.n_first, None)):
        positions, mass = dimer.system.positions[rows], ATOMIC_MASSES[dimer.system.numbers[rows]]
        arm = positions - np.average(positions, axis=0, weights=mass)
        parts.append(np.cross(arm[:, None], forces[rows].transpose(0, 2, 1)).sum(0).T / ARM)
    return np.concatenate(parts)


def label_liquids(
    frames: Sequence[Frame],
    output: Path,
    *,
    force_field: ForceField,
    difference: PairDifference,
    cheap: Cheap,
    level: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[Frame]:
    """Label the boxes among frames, write them to a file and return them; what the file holds is not repeated.

    Labels of neutral boxes are taken for those of the cheap method. Written every ``SAVE_EVERY`` boxes.
    """
    boxes = [frame for frame in frames if frame.system.pbc]
    if not boxes:
        raise InputError("There are no periodic boxes to label.")
    made = read_frames(output) if output.exists() else []
    finished = {frame.trajectory for frame in made}
    for number, frame in enumerate(boxes):
        name = f"{frame.trajectory}/{number:05d}"
        if name not in finished:
            asked = frame.labels.forces is not None and not np.isin(frame.system.numbers, IONIC).any()
            system, labels = liquid_labels(
                frame.system, force_field=force_field, difference=difference, cheap=cheap,
                box=frame.labels if asked else None, level=level,
            )  # fmt: skip
            made.append(replace(frame, system=system, labels=labels, trajectory=name))
        if len(made) % SAVE_EVERY == 0 or number + 1 == len(boxes):
            write_frames(output, made, provenance={"method": "pairs of GFN2-xTB, put right by dimers; lifted"})
        if progress is not None:
            progress(number + 1, len(boxes))
    return made


def liquid_labels(
    system: System, *, force_field: ForceField, difference: PairDifference, cheap: Cheap, box: Labels | None, level: str
) -> tuple[System, Labels]:
    """Return a periodic box with whole molecules, and its labels as the module's text says, without dispersion.

    box    what the cheap method says of the whole box, where it was asked; without it, energy is nan, virial None
    level  of the good method; the labels are marked as lifted

    Raises InputError for a structure that is not periodic, and for ions in a box that the cheap method labelled.
    """
    if not system.pbc:
        raise InputError("Liquids are periodic boxes, got a cluster: label it by itself.")
    group = molecules_of(system)
    whole = make_whole(System(system.numbers, system.positions, system.cell, pbc=True, molecule=group))
    whole = System(whole.numbers, round_positions(whole.positions), whole.cell, pbc=True, molecule=group)
    members = [np.flatnonzero(group == m) for m in range(group.max() + 1)]
    neutral = np.array([not np.isin(whole.numbers[atoms], IONIC).any() for atoms in members])
    if box is not None and not neutral.all():
        raise InputError("A box with ions: what the cheap method says of it is not used. Leave its labels out.")
    evaluator = Evaluator(force_field)
    near, far = _molecule_pairs(whole, group, NEAR), _molecule_pairs(whole, group, FAR)
    near = {pair for pair in near if neutral[pair[0]] and neutral[pair[1]]}
    model = _Expansion(whole, members, lambda clusters: _by_model(evaluator, clusters), alone=neutral)
    other = _Expansion(whole, members, lambda clusters: _by_method(cheap, clusters), alone=neutral)
    own = evaluator.evaluate(Batch.from_systems([whole]))
    energy, forces, virial = _difference(whole, members, near, difference)
    if box is not None:
        energy += box.energy + model.energies.sum() - other.energies.sum()
        forces = forces + np.asarray(box.forces) + model.forces - other.forces
        virial = virial + np.asarray(box.virial) + (model.forces - other.forces).T @ whole.positions
    elif neutral.all():
        forces = forces + model.forces + other.pairs(near) + model.pairs(far - near)
    else:
        forces = forces + own.forces.double().cpu().numpy() + other.pairs(near) - model.pairs(near)
    spread = dispersion_of(force_field, whole)
    return whole, Labels(
        level + LIFTED,
        energy=float(energy - spread[0]) if box is not None else float("nan"),
        forces=forces - spread[1],
        charges=own.charges.double().cpu().numpy(),
        virial=virial - spread[2] if box is not None else None,
    )


class _Expansion:
    """Energies of the molecules alone, (n_molecules,) eV, their forces, (n_atoms, 3) eV/Å, and forces of pairs."""

    def __init__(
        self,
        system: System,
        members: Sequence[NDArray[np.int64]],
        ask: Callable[[list[System]], tuple[Floats, list[Floats]]],
        *,
        alone: NDArray[np.bool_],
    ) -> None:
        self.system, self.members, self.ask = system, members, ask
        self.forces, self.energies = np.zeros_like(system.positions), np.zeros(len(members))
        chosen = np.flatnonzero(alone).tolist()
        energies, forces = ask([_cluster(system, [members[m]], [np.zeros(3)]) for m in chosen])
        for m, energy, force in zip(chosen, energies, forces, strict=True):
            self.energies[m], self.forces[members[m]] = energy, force

    def pairs(self, pairs: set[tuple[int, int, tuple[int, int, int]]]) -> Floats:
        """Return what pairs add to the forces on single molecules, (n_atoms, 3) eV/Å."""
        total, ordered = np.zeros_like(self.forces), sorted(pairs)
        clusters = [
            _cluster(self.system, [self.members[m], self.members[n]], [np.zeros(3), np.array(shift) @ self.system.cell])
            for m, n, shift in ordered
        ]
        for (m, n, _), forces in zip(ordered, self.ask(clusters)[1], strict=True):
            first = len(self.members[m])
            total[self.members[m]] += forces[:first] - self.forces[self.members[m]]
            total[self.members[n]] += forces[first:] - self.forces[self.members[n]]
        return total


def _cluster(system: System, members: Sequence[NDArray[np.int64]], shifts: Sequence[Floats]) -> System:
    positions = np.concatenate([system.positions[atoms] + shift for atoms, shift in zip(members, shifts, strict=True)])
    return System(system.numbers[np.concatenate(members)], positions, np.zeros((3, 3)), pbc=False)


def _by_model(evaluator: Evaluator, clusters: list[System]) -> tuple[Floats, list[Floats]]:
    energies: list[Floats] = [np.zeros(0)]
    forces: list[Floats] = []
    for start in range(0, len(clusters), CHUNK):
        part = clusters[start : start + CHUNK]
        answer = evaluator.evaluate(Batch.from_systems(part))
        energies.append(answer.energy.double().cpu().numpy())
        ends = np.cumsum([cluster.n_atoms for cluster in part])[:-1]
        forces += np.split(answer.forces.double().cpu().numpy(), ends)
    return np.concatenate(energies), forces


def _by_method(cheap: Cheap, clusters: list[System]) -> tuple[Floats, list[Floats]]:
    labels = [cheap(cluster) for cluster in clusters]
    return np.array([label.energy for label in labels]), [np.asarray(label.forces) for label in labels]


def _molecule_pairs(
    system: System, group: NDArray[np.int64], cutoff: float
) -> set[tuple[int, int, tuple[int, int, int]]]:
    """Return (m, n, shift): molecule n, moved by shift @ cell, has an atom closer than the cutoff to one of m."""
    found = find_pairs(Batch.from_systems([system]), cutoff, full=True)
    i, j = found.index.numpy()
    triples = np.unique(np.column_stack([group[i], group[j], found.shift.numpy().astype(np.int64)]), axis=0)
    return {
        (m, n, (a, b, c))
        for m, n, a, b, c in triples.tolist()
        if m < n or (m == n and (a, b, c) > (0, 0, 0))  # each once; a molecule and itself is no pair
    }


def _difference(
    system: System,
    members: Sequence[NDArray[np.int64]],
    pairs: set[tuple[int, int, tuple[int, int, int]]],
    difference: PairDifference,
) -> tuple[float, Floats, Floats]:
    """Return energy, forces, virial of D over pairs of molecules."""
    first, second, moved = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros((0, 3))]
    for m, n, shift in sorted(pairs):
        a, b = (part.ravel() for part in np.meshgrid(members[m], members[n], indexing="ij"))
        first.append(a)
        second.append(b)
        moved.append(np.tile(np.array(shift) @ system.cell, (len(a), 1)))
    i, j = np.concatenate(first), np.concatenate(second)
    between = torch.from_numpy(system.positions[j] + np.concatenate(moved) - system.positions[i]).requires_grad_()
    numbers = torch.from_numpy(system.numbers)
    energy = difference(between.norm(dim=-1), numbers[i], numbers[j]).sum()
    gradient = torch.autograd.grad(energy, between)[0].numpy()
    forces = np.zeros_like(system.positions)
    np.add.at(forces, i, gradient)
    np.add.at(forces, j, -gradient)
    return float(energy.detach()), forces, -gradient.T @ between.detach().numpy()


def dispersion_of(force_field: ForceField, system: System) -> tuple[float, Floats, Floats]:
    """Return energy [eV], forces (n_atoms, 3) [eV/Å] and virial (3, 3) [eV] of a force field's dispersion."""
    batch = Batch.from_systems([system])
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    positions = batch.positions.clone().requires_grad_()
    neighbors = find_neighbors(batch, force_field.config.network.cutoff, force_field.config.dispersion.cutoff)
    terms = force_field.fixed_terms(
        batch, positions + positions @ strain, batch.cell + batch.cell @ strain, neighbors=neighbors
    )
    energy = terms["dispersion"].sum()
    gradient, strain_gradient = torch.autograd.grad(energy, (positions, strain))
    return float(energy.detach()), -gradient.numpy(), -strain_gradient.numpy()
