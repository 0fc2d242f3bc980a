"""Recipes that make labelled structures of electrolytes: each call is one trajectory, GFN2-xTB its forces and labels.

A recipe takes a random generator, a ``Library`` of thermal conformers and an ``Outcome`` to fill. What they cover and
why: clusters from dynamics teach the wells, scans the way in and out of them, compressed and distorted structures the
walls, large clusters and periodic boxes the environment an atom has in a liquid.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from ase.calculators.calculator import CalculationFailed
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bamboo.errors import InputError
from bamboo.quantum.compositions import kind_of, random_liquid, random_pair, random_small
from bamboo.quantum.conformers import Library
from bamboo.quantum.dataset import Frame, round_positions
from bamboo.quantum.dynamics import langevin, prepare, relax
from bamboo.quantum.labels import Labels
from bamboo.quantum.probes import rotated
from bamboo.quantum.xtb import UnconvergedError, evaluate_atoms, label_xtb
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import (
    bond_graph,
    cut_cluster,
    formal_bonds,
    molecule_names,
    pack_box,
    pack_cluster,
)
from bamboo.system import System
from bamboo.units import KCAL_PER_MOL

BROKEN_SCALE, FUSED_SCALE = 1.45, 1.10  # a bond is broken beyond, a new one formed within, this many covalent radii
MAX_FORCE = 60.0  # eV/Å; beyond, a label says nothing a force field needs
MAX_SCAN_ENERGY = 150.0 * KCAL_PER_MOL  # above the separated pair
VDW_RADII = {1: 1.20, 3: 0.75, 6: 1.70, 7: 1.55, 8: 1.52, 9: 1.47, 15: 1.80, 16: 1.80}  # Bondi; Li+: ionic

FAILURES = (UnconvergedError, CalculationFailed)  # ours, and ASE's from within an optimiser or integrator
LINEAR_CARBONATES = ("DMC", "EMC", "DEC")
BURN_IN_STEPS = 60
KEEP_EVERY = 10
MIN_LITHIUM_DISTANCE = 2.7  # Å; in liquids, where an anion bridges two lithium ions, they come within 2.8
N_KEPT = (22, 16)  # frames per trajectory of clusters up to 30 atoms, and of larger ones


@dataclass
class Outcome:
    """What a recipe produced: frames, and how many structures it had to drop and why."""

    trajectory: str
    frames: list[Frame] = field(default_factory=list)
    unconverged: int = 0
    reacted: int = 0
    rejected: int = 0

    def add(
        self, system: System, labels: Labels, *, kind: str, sampling: str, temperature_K: float = float("nan")
    ) -> None:
        """Keep a frame unless its forces are beyond ``MAX_FORCE``."""
        if labels.forces is None or np.abs(labels.forces).max() > MAX_FORCE:
            self.rejected += 1
        else:
            self.frames.append(Frame(system, labels, kind, sampling, self.trajectory, temperature_K))


def is_intact(system: System, bonds: NDArray[np.int64]) -> bool:
    """Return whether the formal bonds, and no others, are there: no bond is broken, no two atoms have fused."""
    formal = {tuple(pair) for pair in bonds.tolist()}
    near = {tuple(pair) for pair in bond_graph(system, scale=FUSED_SCALE).tolist()}
    far = {tuple(pair) for pair in bond_graph(system, scale=BROKEN_SCALE).tolist()}
    return near <= formal <= far


def sample_dynamics(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Langevin dynamics of a small cluster at 300-800 K, a frame every 10 fs after a burn-in."""
    counts = random_small(generator)
    # Ions meet in many ways only when packed anew, so each trajectory is short and starts from its own packing.
    temperature_K = generator.uniform(300.0, 600.0) if generator.random() < 2 / 3 else generator.uniform(600.0, 800.0)
    system = pack_cluster(counts, seed=_seed(generator), tolerance_A=2.1, conformers=library.geometries)
    n_kept = N_KEPT[system.n_atoms > 30]
    _run_dynamics(system, molecule_names(counts), generator, outcome, temperature_K=float(temperature_K), n_kept=n_kept)


def sample_anion(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Langevin dynamics of an anion, alone or with Li+, at 300-600 K: few atoms, stiff bonds, many ways to meet."""
    counts = {str(generator.choice(["FSI", "PF6"], p=[0.7, 0.3])): 1} | ({"Li": 1} if generator.random() < 0.6 else {})
    system = pack_cluster(counts, seed=_seed(generator), tolerance_A=1.7, conformers=library.geometries)
    temperature_K = float(generator.uniform(300.0, 600.0))
    names = molecule_names(counts)
    _run_dynamics(system, names, generator, outcome, temperature_K=temperature_K, n_kept=N_KEPT[0])


def _run_dynamics(
    system: System,
    names: tuple[str, ...],
    generator: np.random.Generator,
    outcome: Outcome,
    *,
    temperature_K: float,
    n_kept: int,
    keep: Callable[[System, Labels], None] | None = None,
) -> None:
    """Relax, thermalise and sample; stops early when the electrons do not converge or a molecule reacts."""
    atoms, bonds, kind = prepare(system), formal_bonds(names), kind_of(names)
    try:
        relax(atoms, int(generator.integers(5, 12)))
        dynamics = langevin(atoms, temperature_K=temperature_K, generator=generator)
        dynamics.run(BURN_IN_STEPS)
        for _ in range(n_kept):
            dynamics.run(KEEP_EVERY)
            labels, snapshot = evaluate_atoms(atoms), replace(system, positions=atoms.positions.copy())
            if not is_intact(snapshot, bonds):
                outcome.reacted += 1
                return
            if keep is not None:
                keep(snapshot, labels)
            else:
                outcome.add(snapshot, labels, kind=kind, sampling="dynamics", temperature_K=temperature_K)
    except FAILURES:
        outcome.unconverged += 1


def sample_compressed(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Snapshots of a hot cluster with its molecules pushed together: centres scaled by 0.70-0.95."""
    counts = random_small(generator, min_molecules=2)
    names = molecule_names(counts)
    system = pack_cluster(counts, seed=_seed(generator), tolerance_A=2.1, conformers=library.geometries)

    def squeeze(snapshot: System, _: Labels) -> None:
        squeezed = scale_centres(snapshot, float(generator.uniform(0.70, 0.95)))
        _label_into(outcome, squeezed, kind=kind_of(names), sampling="compressed")

    _run_dynamics(system, names, generator, outcome, temperature_K=400.0, n_kept=10, keep=squeeze)


def sample_scan(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Rigid scan of a pair of molecules along a random line, from the repulsive wall to beyond the cutoff."""
    names = random_pair(generator)
    first, second = (_random_rotation(generator, library.draw(name, generator)) for name in names)
    direction = generator.normal(size=3)
    elements = molecule(names[0]).numbers
    polar = np.flatnonzero(np.isin(elements, (7, 8, 9)))
    if generator.random() < 0.5 and len(polar):  # half of the lines lead to an oxygen, nitrogen or fluorine atom
        direction = first[generator.choice(polar)]
    direction = direction / np.linalg.norm(direction)
    radii = [np.array([VDW_RADII[z] for z in molecule(name).numbers]) for name in names]

    def contact(shift: float) -> tuple[float, float]:
        distance = np.linalg.norm(first[:, None] - (second + shift * direction)[None], axis=2)
        return float((distance / (radii[0][:, None] + radii[1][None])).min()), float(distance.min())

    grid = np.arange(40.0, -0.01, -0.02)
    far = next(shift for shift in grid if contact(shift)[1] < 8.0)
    near = next((shift for shift in grid if contact(shift)[0] < 0.56), 0.0)
    shifts = near + (far - near) * np.linspace(0.0, 1.0, 16) ** 1.7
    systems = [_pair_system(names, first, second + shift * direction) for shift in shifts]
    separated = None
    for system in systems[::-1]:  # from outside in, so that the wall ends the scan
        labels = _label_or_count(outcome, system)
        if labels is None:
            continue
        separated = labels.energy if separated is None else separated
        if labels.energy - separated > MAX_SCAN_ENERGY:
            outcome.rejected += 1
            break
        outcome.add(system, labels, kind=kind_of(names), sampling="scan")


def sample_distorted(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Single molecules with strong random distortions, 0.08-0.15 Å per atom: the walls of bonds and angles."""
    name = str(generator.choice([n for n in library.names if molecule(n).n_atoms > 1]))
    for _ in range(16):
        positions = library.draw(name, generator)
        # rms displacement of an atom, not of a coordinate
        width = generator.uniform(0.08, 0.15) / np.sqrt(3.0)
        positions = positions + generator.normal(scale=width, size=positions.shape)
        _label_into(outcome, _single(name, positions), kind=kind_of((name,)), sampling="distorted")


def sample_rotated(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """A linear carbonate, one of its torsions at a random angle, slightly distorted: dynamics rarely gets beyond 60."""
    name = str(generator.choice(LINEAR_CARBONATES))
    for _ in range(8):
        positions = library.draw(name, generator)
        angle, side = float(generator.uniform(-180.0, 180.0)), int(generator.integers(2))
        positions = rotated(name, positions, angle, side=side)
        positions = positions + generator.normal(scale=0.03 / np.sqrt(3.0), size=positions.shape)
        _label_into(outcome, _single(name, positions), kind=kind_of((name,)), sampling="scan")


def sample_isolated(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Every molecule and ion alone: what far-apart fragments must become; a bare Li+ carries exactly 1 e."""
    for name in library.names:
        _label_into(outcome, _single(name, library.draw(name, generator)), kind=kind_of((name,)), sampling="distorted")


def _single(name: str, positions: NDArray[np.float64]) -> System:
    member = molecule(name)
    alone = np.zeros(member.n_atoms, dtype=np.int64)
    return System(member.numbers, positions, np.zeros((3, 3)), False, float(member.charge), alone)


def sample_large(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """Two clusters of 90-180 atoms, each a full first shell round an atom of a packed liquid; two frames of each."""
    counts, density = random_liquid(generator, n_atoms=500, scale=(0.85, 1.05))
    names = molecule_names(counts)
    box = _pack_liquid(counts, density, generator, library)
    if box is None or box.molecule is None:
        outcome.rejected += 1
        return
    charges = np.array([float(molecule(name).charge) for name in names])
    clusters: list[tuple[System, tuple[str, ...]]] = []
    for _ in range(30):
        # Ions are few, but their shells matter most: half of the cores, where there are any.
        ions = [m for m, charge in enumerate(charges) if charge != 0.0]
        centre = int(generator.choice(ions if ions and generator.random() < 0.5 else len(names)))
        atom = int(generator.choice(np.flatnonzero(box.molecule == centre)))
        try:
            cluster, kept = cut_cluster(box, [atom], radius_A=5.0, molecule_charges=charges)
        except InputError:
            continue  # a molecule touches the core through two images; another core will do
        if 90 <= cluster.n_atoms <= 180 and abs(cluster.total_charge) < 2.5:
            clusters.append((cluster, tuple(names[m] for m in kept)))
        if len(clusters) == 2:
            break
    outcome.rejected += 2 - len(clusters)
    for cluster, kept_names in clusters:
        _relax_and_shake(cluster, kept_names, generator, outcome, kind="large", n_steps=1)


def sample_periodic(generator: np.random.Generator, library: Library, outcome: Outcome) -> None:
    """A periodic box of 80-110 atoms at 0.85-1.15 of the experimental density; two frames after a short relaxation."""
    for _ in range(20):
        counts, density = random_liquid(
            generator, n_atoms=int(generator.integers(82, 100)), scale=(0.85, 1.15), max_solvents=2
        )
        box = _pack_liquid(counts, density, generator, library)
        if box is not None and 80 <= box.n_atoms <= 110:
            names = molecule_names(counts)
            return _relax_and_shake(box, names, generator, outcome, kind="periodic", n_steps=1)
    outcome.rejected += 1


def label_structure(
    system: System,
    outcome: Outcome,
    *,
    kind: str,
    sampling: str,
    temperature_K: float,
    method: Callable[[System], Labels] | None = None,
) -> None:
    """Label a given structure as it is, with GFN2-xTB where no other method is given."""
    labels = _label_or_count(outcome, system, method)
    if labels is not None:
        rounded = replace(system, positions=round_positions(system.positions))
        outcome.add(rounded, labels, kind=kind, sampling=sampling, temperature_K=temperature_K)


RECIPES: dict[str, Callable[[np.random.Generator, Library, Outcome], None]] = {
    "dynamics": sample_dynamics,
    "anion": sample_anion,
    "compressed": sample_compressed,
    "scan": sample_scan,
    "distorted": sample_distorted,
    "rotated": sample_rotated,
    "isolated": sample_isolated,
    "large": sample_large,
    "periodic": sample_periodic,
}


def scale_centres(system: System, scale: float) -> System:
    """Move molecules rigidly so that their centres are ``scale`` times as far from the centre of the cluster."""
    if system.molecule is None:
        raise InputError("scale_centres needs System.molecule, the molecule index of each atom.")
    n_atoms = np.bincount(system.molecule)
    sums = np.stack([np.bincount(system.molecule, weights=system.positions[:, axis]) for axis in range(3)], axis=1)
    centres = sums / n_atoms[:, None]
    shift = (scale - 1.0) * (centres - centres.mean(axis=0))
    return replace(system, positions=system.positions + shift[system.molecule])


def _pack_liquid(
    counts: dict[str, int], density: float, generator: np.random.Generator, library: Library
) -> System | None:
    """Pack with the widest contacts that fit, so that little relaxation is needed; None where nothing fits."""
    for tolerance_A in (2.3, 2.15, 2.0, 1.85):
        try:
            box = pack_box(
                counts,
                density_g_cm3=density,
                seed=_seed(generator),
                tolerance_A=tolerance_A,
                conformers=library.geometries,
                timeout_s=60.0,
            )
        except InputError:
            continue
        if _closest_lithium(box) > MIN_LITHIUM_DISTANCE:
            return box
    return None


def _closest_lithium(system: System) -> float:
    """Return the shortest distance between lithium ions [Å]: packing knows no charges and puts them side by side."""
    atoms = system.to_atoms()[np.flatnonzero(system.numbers == 3)]
    return float(min(neighbor_list("d", atoms, MIN_LITHIUM_DISTANCE + 1.0), default=np.inf))


def _relax_and_shake(
    system: System,
    names: tuple[str, ...],
    generator: np.random.Generator,
    outcome: Outcome,
    *,
    kind: str,
    n_steps: int,
) -> None:
    """Label a packed structure after a few relaxation steps, and once more after random displacements."""
    atoms, bonds = prepare(system), formal_bonds(names)
    try:
        relax(atoms, n_steps)
        for shaken in (False, True):
            if shaken:
                width = generator.uniform(0.03, 0.05) / np.sqrt(3.0)
                atoms.set_positions(atoms.positions + generator.normal(scale=width, size=atoms.positions.shape))
            labels, snapshot = evaluate_atoms(atoms), replace(system, positions=atoms.positions.copy())
            if is_intact(snapshot, bonds):
                outcome.add(snapshot, labels, kind=kind, sampling="packed")
            else:
                outcome.reacted += 1
    except FAILURES:
        outcome.unconverged += 1


def _label_into(outcome: Outcome, system: System, *, kind: str, sampling: str) -> None:
    labels = _label_or_count(outcome, system)
    if labels is not None:
        outcome.add(replace(system, positions=round_positions(system.positions)), labels, kind=kind, sampling=sampling)


def _label_or_count(
    outcome: Outcome, system: System, method: Callable[[System], Labels] | None = None
) -> Labels | None:
    try:
        return (method or label_xtb)(system)
    except FAILURES:
        outcome.unconverged += 1
        return None


def _seed(generator: np.random.Generator) -> int:
    return int(generator.integers(1, 2**31 - 1))


def _random_rotation(generator: np.random.Generator, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    quaternion = generator.normal(size=4)
    rotation: NDArray[np.float64] = Rotation.from_quat(quaternion / np.linalg.norm(quaternion)).as_matrix()
    rotated: NDArray[np.float64] = (positions - positions.mean(axis=0)) @ rotation.T
    return rotated


def _pair_system(names: tuple[str, str], first: NDArray[np.float64], second: NDArray[np.float64]) -> System:
    members = [molecule(name) for name in names]
    return System(
        numbers=np.concatenate([member.numbers for member in members]),
        positions=round_positions(np.concatenate([first, second])),
        cell=np.zeros((3, 3)),
        pbc=False,
        total_charge=float(sum(member.charge for member in members)),
        molecule=np.repeat([0, 1], [member.n_atoms for member in members]),
    )
