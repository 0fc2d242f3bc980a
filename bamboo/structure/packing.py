"""Boxes and clusters of molecules: packing with Packmol, bond graphs, and cutting clusters out of liquids.

Packmol: Martinez et al., J. Comput. Chem. 30, 2157 (2009), doi 10.1002/jcc.21224.
"""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packmol.cli import get_binary_path
from vesin import NeighborList

from bamboo.elements import COVALENT_RADII
from bamboo.errors import InputError
from bamboo.structure.molecules import Molecule, molecule
from bamboo.system import System
from bamboo.units import GRAM_PER_CM3

Conformers = Mapping[str, Sequence[NDArray[np.float64]]]

BOND_SCALE = 1.25  # two atoms are bonded below this multiple of the sum of their covalent radii
MONATOMIC_IONS = (3, 11, 19, 37, 55)  # alkali cations: coordinated, never bonded
MOLECULAR_VOLUME_A3_PER_ATOM = 10.5  # liquids of carbonates hold one atom in 10-12 Å^3


def pack_box(
    counts: Mapping[str, int],
    *,
    density_g_cm3: float,
    seed: int,
    tolerance_A: float = 2.0,
    conformers: Conformers | None = None,
    timeout_s: float = 120.0,
) -> System:
    """Pack molecules into a cubic periodic box of the given density.

    counts       how many of each known molecule; molecules follow in this order (see ``molecule_names``)
    tolerance_A  smallest distance between atoms of different molecules, also through the periodic boundary
    conformers   geometries (n_atoms, 3) per molecule name, one drawn at random for each copy; default: the built-in one

    Raises InputError where Packmol finds no packing within the time: the box is too full for the tolerance.
    """
    if not density_g_cm3 > 0.0:
        raise InputError(f"density_g_cm3 is {density_g_cm3}, expected a positive number.")
    members = _members(counts)
    mass = sum(member.molar_mass for member in members)
    length = float((mass / (density_g_cm3 * GRAM_PER_CM3)) ** (1.0 / 3.0))
    region = f"pbc 0. 0. 0. {length:.8f} {length:.8f} {length:.8f}", f"inside box 0. 0. 0. {3 * (f'{length:.8f} ')}"
    what = f"{len(members)} molecules at {density_g_cm3:.3f} g/cm3 in a box of {length:.2f} Å"
    shapes = _draw_conformers(members, conformers, seed=seed)
    positions = _run_packmol(
        members, shapes, region, seed=seed, tolerance_A=tolerance_A, timeout_s=timeout_s, what=what
    )
    system = _assemble(members, positions, cell=length * np.eye(3), pbc=True)
    _check_contacts(system, tolerance_A=tolerance_A, what=what)
    return system


def pack_cluster(
    counts: Mapping[str, int],
    *,
    seed: int,
    tolerance_A: float = 2.0,
    radius_A: float | None = None,
    conformers: Conformers | None = None,
    timeout_s: float = 60.0,
) -> System:
    """Pack molecules into a sphere, without periodicity; arguments as in ``pack_box``.

    radius_A  radius of the sphere that holds all atoms; default: liquid density, enlarged until the packing succeeds.
    """
    members = _members(counts)
    shapes = _draw_conformers(members, conformers, seed=seed)
    extent = max(float(np.linalg.norm(shape - shape.mean(axis=0), axis=1).max()) for shape in shapes)
    n_atoms = sum(member.n_atoms for member in members)
    liquid = (3.0 * MOLECULAR_VOLUME_A3_PER_ATOM * n_atoms / (4.0 * np.pi)) ** (1.0 / 3.0)
    radii = [radius_A] if radius_A else [max(liquid, extent) * scale + 0.1 for scale in (1.0, 1.15, 1.3, 1.6, 2.0)]
    for radius in radii:
        what = f"{len(members)} molecules in a sphere of radius {radius:.2f} Å"
        region = "", f"inside sphere 0. 0. 0. {radius:.6f}"
        try:
            positions = _run_packmol(
                members, shapes, region, seed=seed, tolerance_A=tolerance_A, timeout_s=timeout_s, what=what
            )
            system = _assemble(members, positions, cell=np.zeros((3, 3)), pbc=False)
            _check_contacts(system, tolerance_A=tolerance_A, what=what)
        except InputError:
            if radius == radii[-1]:
                raise
        else:
            return system
    raise AssertionError("unreachable: the last radius either returns or raises")


def molecule_names(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the name of each molecule of a packed system, (n_molecules,), in the order of ``System.molecule``."""
    return tuple(name for name, count in counts.items() for _ in range(count))


def bond_graph(system: System, *, scale: float = BOND_SCALE) -> NDArray[np.int64]:
    """Find covalent bonds from distances, through the periodic boundary.

    A pair is bonded where r < scale (R_i + R_j), R covalent radii (Cordero 2008); alkali cations never bond.
    Returns (n_bonds, 2), each pair (smaller, larger), sorted and unique.
    """
    radii = COVALENT_RADII[system.numbers]
    cutoff = 2.0 * scale * float(radii.max())
    i, j, distance = _pairs(system, cutoff)
    alkali = np.isin(system.numbers, MONATOMIC_IONS)
    bonded = (distance < scale * (radii[i] + radii[j])) & ~alkali[i] & ~alkali[j]
    pairs = np.sort(np.stack([i[bonded], j[bonded]], axis=1), axis=1)
    return np.unique(pairs, axis=0).astype(np.int64)


def formal_bonds(names: Sequence[str]) -> NDArray[np.int64]:
    """Return the bonds that the named molecules have when intact, (n_bonds, 2), sorted as ``bond_graph`` sorts them."""
    pairs, offset = [np.zeros((0, 2), dtype=np.int64)], 0
    for name in names:
        member = molecule(name)
        if member.bonds:
            pairs.append(np.array(member.bonds, dtype=np.int64) + offset)
        offset += member.n_atoms
    return np.unique(np.concatenate(pairs), axis=0)


def cut_cluster(
    system: System,
    core: Sequence[int] | NDArray[np.int64],
    *,
    radius_A: float,
    molecule_charges: NDArray[np.float64],
) -> tuple[System, NDArray[np.int64]]:
    """Cut the whole molecules around some atoms of one molecule out of a liquid.

    A molecule belongs to the cluster when any of its atoms is within ``radius_A`` of any core atom.
    Each molecule is made whole and placed at the image that touches the core.

    core              (n_core,) indices of atoms of one molecule: one atom, or all of them
    molecule_charges  (n_molecules,) formal charge of each molecule [e]; their sum is the cluster's total charge

    Returns the cluster (``molecule`` renumbered from 0, the core's first) and the indices (n_kept,) of its molecules in
    ``system``. Raises InputError where ``system.molecule`` is missing or two images of a molecule would be needed.
    """
    if system.molecule is None:
        raise InputError("cut_cluster needs System.molecule, the molecule index of each atom.")
    core = np.atleast_1d(np.asarray(core, dtype=np.int64))
    if len(core) == 0 or core.min() < 0 or core.max() >= system.n_atoms or len(set(system.molecule[core])) != 1:
        raise InputError(f"core is {core}, expected indices of atoms of one molecule, in 0..{system.n_atoms - 1}.")
    centre = int(system.molecule[core[0]])
    whole = make_whole(system)
    images = {centre: np.zeros(3)}
    for atom, shift in _neighbour_images(whole, radius_A, core):
        index = int(system.molecule[atom])
        if index in images and not np.array_equal(images[index], shift):
            raise InputError(
                f"Molecule {index} touches the core through two images: {radius_A} Å is too wide for the box."
            )
        images.setdefault(index, shift)
    kept = np.array([centre, *sorted(set(images) - {centre})], dtype=np.int64)
    members = {m: np.flatnonzero(system.molecule == m) for m in kept}
    atoms = np.concatenate([members[m] for m in kept])
    moved = np.concatenate([whole.positions[members[m]] + images[m] @ system.cell for m in kept])
    cluster = System(
        numbers=system.numbers[atoms],
        positions=moved - whole.positions[core].mean(axis=0),
        cell=np.zeros((3, 3)),
        pbc=False,
        total_charge=float(molecule_charges[kept].sum()),
        molecule=np.repeat(np.arange(len(kept)), [len(members[m]) for m in kept]),
    )
    return cluster, kept


def make_whole(system: System) -> System:
    """Return the system with every molecule's atoms in one piece, following its bonds through the boundary."""
    if system.molecule is None:
        raise InputError("make_whole needs System.molecule, the molecule index of each atom.")
    if not system.pbc:
        return system
    inverse = np.linalg.inv(system.cell)
    positions = system.positions.copy()
    neighbours: dict[int, list[int]] = {}
    for a, b in bond_graph(system):
        neighbours.setdefault(int(a), []).append(int(b))
        neighbours.setdefault(int(b), []).append(int(a))
    placed = np.zeros(system.n_atoms, dtype=bool)
    for start in range(system.n_atoms):
        queue = [] if placed[start] else [start]
        placed[start] = True
        while queue:
            atom = queue.pop()
            for other in neighbours.get(atom, []):
                if not placed[other]:
                    gap = positions[other] - positions[atom]
                    positions[other] -= np.round(gap @ inverse) @ system.cell
                    placed[other] = True
                    queue.append(other)
    return System(system.numbers, positions, system.cell, True, system.total_charge, system.molecule)


def min_intermolecular_distance(system: System, *, cutoff_A: float = 6.0) -> float:
    """Return the smallest distance [Å] between atoms of different molecules, also through the boundary."""
    if system.molecule is None:
        raise InputError("min_intermolecular_distance needs System.molecule, the molecule index of each atom.")
    i, j, distance = _pairs(system, cutoff_A)
    different = system.molecule[i] != system.molecule[j]
    return float(distance[different].min()) if different.any() else float("inf")


def _members(counts: Mapping[str, int]) -> list[Molecule]:
    members = [molecule(name) for name in molecule_names(counts)]
    if not members or min(counts.values()) < 0:
        raise InputError(f"counts is {dict(counts)}, expected at least one molecule and no negative number.")
    return members


def _draw_conformers(members: list[Molecule], conformers: Conformers | None, *, seed: int) -> list[NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    shapes = []
    for member in members:
        choices = conformers.get(member.name) if conformers else None
        shapes.append(choices[int(generator.integers(len(choices)))] if choices else member.positions)
    return shapes


def _run_packmol(
    members: list[Molecule],
    shapes: list[NDArray[np.float64]],
    region: tuple[str, str],
    *,
    seed: int,
    tolerance_A: float,
    timeout_s: float,
    what: str,
) -> NDArray[np.float64]:
    """Write one structure block per molecule, run Packmol in a temporary folder, and read the packed positions."""
    header, constraint = region
    lines = [f"tolerance {tolerance_A}", "filetype xyz", "output packed.xyz", f"seed {seed % 2**31}", header]
    with tempfile.TemporaryDirectory() as folder:
        for k, (member, shape) in enumerate(zip(members, shapes, strict=True)):
            _write_xyz(Path(folder) / f"{k}.xyz", member.symbols, shape)
            lines += [f"structure {k}.xyz", "  number 1", f"  {constraint}", "end structure"]
        (Path(folder) / "pack.inp").write_text("\n".join(lines) + "\n")
        command = [str(get_binary_path()), "-i", "pack.inp"]
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"Packmol did not fit {what} in {timeout_s:.0f} s. Lower the density or tolerance."
            ) from None
        # Packmol writes its best attempt even when it fails, so the file alone proves nothing.
        if result.returncode != 0 or "Success" not in result.stdout:
            raise InputError(
                f"Packmol could not fit {what}, tolerance {tolerance_A} Å. Lower the density or tolerance."
            )
        return np.loadtxt(Path(folder) / "packed.xyz", skiprows=2, usecols=(1, 2, 3), ndmin=2)


def _write_xyz(path: Path, symbols: Sequence[str], positions: NDArray[np.float64]) -> None:
    rows = [f"{symbol} {x:.8f} {y:.8f} {z:.8f}" for symbol, (x, y, z) in zip(symbols, positions, strict=True)]
    path.write_text("\n".join([str(len(rows)), "", *rows]) + "\n")


def _assemble(
    members: list[Molecule], positions: NDArray[np.float64], *, cell: NDArray[np.float64], pbc: bool
) -> System:
    return System(
        numbers=np.concatenate([member.numbers for member in members]),
        positions=positions,
        cell=cell,
        pbc=pbc,
        total_charge=float(sum(member.charge for member in members)),
        molecule=np.repeat(np.arange(len(members)), [member.n_atoms for member in members]),
    )


def _check_contacts(system: System, *, tolerance_A: float, what: str) -> None:
    closest = min_intermolecular_distance(system, cutoff_A=tolerance_A + 1.0)
    if closest < tolerance_A - 0.05:  # Packmol stops within 0.01 Å of its tolerance
        raise InputError(f"Packing {what} left two molecules {closest:.2f} Å apart, expected {tolerance_A} Å.")


def _pairs(system: System, cutoff: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    finder = NeighborList(cutoff=cutoff, full_list=False)
    box = system.cell if system.pbc else np.eye(3)
    i, j, distance = finder.compute(points=system.positions, box=box, periodic=system.pbc, quantities="ijd")
    return np.asarray(i, np.int64), np.asarray(j, np.int64), np.asarray(distance)


def _neighbour_images(system: System, cutoff: float, core: NDArray[np.int64]) -> list[tuple[int, NDArray[np.float64]]]:
    """Atoms within the cutoff of core atoms, each with the image shift (3,) that brings it there."""
    finder = NeighborList(cutoff=cutoff, full_list=True)
    box = system.cell if system.pbc else np.eye(3)
    i, j, shift = finder.compute(points=system.positions, box=box, periodic=system.pbc, quantities="ijS")
    of_core = np.isin(i, core)
    return list(zip(np.asarray(j)[of_core].tolist(), np.asarray(shift, dtype=np.float64)[of_core], strict=True))
