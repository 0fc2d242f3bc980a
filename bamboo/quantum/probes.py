"""Structures whose energies show at a glance whether a level of theory or a model is right.

Rigid binding curves of Li+ with carbonyl oxygens from two directions and with PF6-, stacked solvent dimers, lithium
with one to four solvents, rotations of linear carbonates. The trajectory of a frame says what it is:

    monomer:EC/0             a molecule alone, in the geometry that it has in the curves
    pair:EC+Li:tilted/2.00   two molecules at a distance of 2.00 Å
    shell:Li+EC/3            lithium with three molecules, relaxed together
    rotation:DMC/45          a torsion set to 45 degrees

Monomers and shells are relaxed with GFN2-xTB, everything else is built from them. Labelled frames have the number of
the structure appended: ``pair:EC+Li:tilted/2.00/00017``.
"""

from collections.abc import Iterator

import ase
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bamboo.errors import InputError
from bamboo.quantum.compositions import kind_of
from bamboo.quantum.dataset import round_positions
from bamboo.quantum.dynamics import prepare, relax
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import pack_cluster
from bamboo.system import System

LITHIUM_DISTANCES = (1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2, 2.5, 3.0, 4.0, 5.0, 7.0)  # Å, Li to carbonyl O
ANION_DISTANCES = (2.1, 2.3, 2.5, 2.7, 3.0, 3.5, 4.0, 5.0, 7.0)  # Å, Li to P
DIMER_DISTANCES = (2.9, 3.1, 3.3, 3.6, 4.0, 5.0, 6.5)  # Å, between the planes of two stacked molecules
DIRECTIONS = {"straight": 0.0, "tilted": 60.0}  # degrees from the C=O axis, in the plane of the carbonate group
ROTATIONS = tuple(range(0, 181, 20))  # degrees
CURVED, DIMERS, SHELLS = ("EC", "DMC", "EMC"), (("EC", "EC"), ("DMC", "DMC"), ("EC", "DMC")), ("EC", "DMC")

Positions = NDArray[np.float64]


def probe_structures() -> Iterator[ase.Atoms]:
    """Yield all probes, to be written as extended XYZ for ``bamboo-md data label``."""
    monomers = {name: _relaxed((name,), molecule(name).positions) for name in ("EC", "DMC", "EMC", "PF6", "Li")}
    for name, positions in monomers.items():
        yield _structure((name,), positions, f"monomer:{name}/0")
    for name in CURVED:
        for direction, angle in DIRECTIONS.items():
            for distance in LITHIUM_DISTANCES:
                lithium = carbonyl_site(name, monomers[name], distance, angle=angle)
                yield _structure(
                    (name, "Li"), np.vstack([monomers[name], lithium]), _pair(name, "Li", direction, distance)
                )
    for distance in ANION_DISTANCES:
        lithium = _face_site(monomers["PF6"], distance)
        yield _structure(("Li", "PF6"), np.vstack([lithium, monomers["PF6"]]), _pair("Li", "PF6", "face", distance))
    for first, second in DIMERS:
        for distance in DIMER_DISTANCES:
            stacked = np.vstack([_flat(first, monomers[first]), _stacked(second, monomers[second], distance)])
            yield _structure((first, second), stacked, _pair(first, second, "stacked", distance))
    for name in SHELLS:
        for count in (1, 2, 3, 4):
            names = ("Li",) + count * (name,)
            packed = pack_cluster({"Li": 1, name: count}, seed=1, tolerance_A=1.9)
            yield _structure(names, _relaxed(names, packed.positions, steps=300), f"shell:Li+{name}/{count}")
    for name in ("DMC", "EMC"):
        for angle in ROTATIONS:
            yield _structure((name,), rotated(name, monomers[name], float(angle)), f"rotation:{name}/{angle}")


def _pair(first: str, second: str, direction: str, distance: float) -> str:
    return f"pair:{first}+{second}:{direction}/{distance:.2f}"


def _system(names: tuple[str, ...], positions: Positions) -> System:
    parts = [molecule(name) for name in names]
    return System(
        numbers=np.concatenate([part.numbers for part in parts]),
        positions=round_positions(positions),
        cell=np.zeros((3, 3)),
        pbc=False,
        total_charge=float(sum(part.charge for part in parts)),
        molecule=np.repeat(np.arange(len(parts)), [part.n_atoms for part in parts]),
    )


def _structure(names: tuple[str, ...], positions: Positions, trajectory: str) -> ase.Atoms:
    atoms = _system(names, positions).to_atoms()
    atoms.info |= {"kind": kind_of(names), "sampling": "scan", "trajectory": trajectory}
    return atoms


def _relaxed(names: tuple[str, ...], positions: Positions, *, steps: int = 200) -> Positions:
    atoms = prepare(_system(names, positions))
    if len(atoms) > 1:
        relax(atoms, steps)
    return np.asarray(atoms.positions)


def _carbonate(name: str) -> tuple[int, int, list[int]]:
    """Return the carbonyl carbon of a molecule, its terminal oxygen, and its two ether oxygens."""
    chosen = molecule(name)
    near: dict[int, set[int]] = {atom: set() for atom in range(chosen.n_atoms)}
    for a, b in chosen.bonds:
        near[a].add(b)
        near[b].add(a)
    for atom, partners in near.items():
        oxygens = sorted(partner for partner in partners if chosen.symbols[partner] == "O")
        if chosen.symbols[atom] == "C" and len(oxygens) == 3:
            terminal = next(oxygen for oxygen in oxygens if len(near[oxygen]) == 1)
            return atom, terminal, [oxygen for oxygen in oxygens if oxygen != terminal]
    raise InputError(f"{name} has no carbonate group.")


def _unit(vector: Positions) -> Positions:
    return np.asarray(vector / np.linalg.norm(vector))


def carbonyl_site(name: str, positions: Positions, distance: float, *, angle: float) -> Positions:
    """Return the point at a distance [Å] from the carbonyl O, off C=O by an angle [degrees] in the group's plane."""
    carbon, oxygen, ethers = _carbonate(name)
    axis = _unit(positions[oxygen] - positions[carbon])
    side = positions[ethers[0]] - positions[carbon]
    side = _unit(side - (side @ axis) * axis)
    radians = np.deg2rad(angle)
    return np.asarray(positions[oxygen] + distance * (np.cos(radians) * axis + np.sin(radians) * side))


def _face_site(anion: Positions, distance: float) -> Positions:
    """Return the point at a distance [Å] from the phosphorus of PF6-, above the centre of three fluorines."""
    fluorines = anion[1:] - anion[0]
    others = [f for f in fluorines[1:] if abs(_unit(f) @ _unit(fluorines[0])) < 0.5]  # not the one opposite
    first = others[0]
    second = next(f for f in others[1:] if abs(_unit(f) @ _unit(first)) < 0.5)
    return np.asarray(anion[0] + distance * _unit(_unit(fluorines[0]) + _unit(first) + _unit(second)))


def _flat(name: str, positions: Positions) -> Positions:
    """Return the molecule with its carbonate group in the plane z = 0, C=O along x, the carbon at the origin."""
    carbon, oxygen, ethers = _carbonate(name)
    x = _unit(positions[oxygen] - positions[carbon])
    z = _unit(np.cross(x, positions[ethers[0]] - positions[carbon]))
    return np.asarray((positions - positions[carbon]) @ np.stack([x, np.cross(z, x), z]).T)


def _stacked(name: str, positions: Positions, distance: float) -> Positions:
    """Return the molecule in a plane above ``_flat``, its C=O pointing the other way."""
    flat = _flat(name, positions) * np.array([-1.0, -1.0, 1.0])
    return np.asarray(flat + np.array([0.0, 0.0, distance]))


def rotated(name: str, positions: Positions, angle: float, *, side: int = 0) -> Positions:
    """Return the molecule with the torsion O=C-O-C of an ether oxygen (0 or 1) set to an angle [degrees]; 0 is cis."""
    _, carbon, ether, _ = _ester(name, side)
    bonds = [pair for pair in molecule(name).bonds if set(pair) != {carbon, ether}]
    moving, grown = {ether}, True
    while grown:
        grown = False
        for a, b in bonds:
            if (a in moving) != (b in moving):
                moving |= {a, b}
                grown = True
    axis = _unit(positions[ether] - positions[carbon])
    turn = Rotation.from_rotvec(np.deg2rad(angle - ester_torsion(name, positions, side=side)) * axis)
    members = sorted(moving)
    turned = positions.copy()
    turned[members] = turn.apply(positions[members] - positions[carbon]) + positions[carbon]
    return turned


def ester_torsion(name: str, positions: Positions, *, side: int) -> float:
    """Return the torsion O=C-O-C [degrees] of an ether oxygen (0 or 1) of a linear carbonate."""
    return _torsion(positions[list(_ester(name, side))])


def _ester(name: str, side: int) -> tuple[int, int, int, int]:
    """Return the atoms of a torsion: terminal oxygen, carbonyl carbon, ether oxygen, alkyl carbon."""
    carbon, oxygen, ethers = _carbonate(name)
    ether = ethers[side]
    alkyl = next(b if a == ether else a for a, b in molecule(name).bonds if ether in (a, b) and carbon not in (a, b))
    return oxygen, carbon, ether, alkyl


def _torsion(four: Positions) -> float:
    """Return the torsion of four atoms [degrees]."""
    first, axis, last = four[1] - four[0], _unit(four[2] - four[1]), four[3] - four[2]
    n1, n2 = np.cross(first, axis), np.cross(axis, last)
    return float(np.rad2deg(np.arctan2(np.cross(n1, n2) @ axis, n1 @ n2)))
