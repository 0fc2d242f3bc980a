"""Which molecules a structure consists of: bonds from distances, names from the known molecules with the same graph."""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from bamboo.errors import InputError
from bamboo.structure.molecules import IONS, SOLVENTS, molecule
from bamboo.structure.packing import bond_graph, make_whole
from bamboo.system import System

Indices = NDArray[np.int64]


def bonded_groups(bonds: Indices, n_atoms: int) -> Indices:
    """Return the number of the group that bonds (n_bonds, 2) hold together, of each atom, (n_atoms,), from 0."""
    graph = coo_matrix((np.ones(len(bonds)), (bonds[:, 0], bonds[:, 1])), shape=(n_atoms, n_atoms))
    groups: Indices = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def recognise(system: System) -> tuple[tuple[str, ...], Indices]:
    """Return the name of every molecule and the order of atoms in which molecules stand together.

    Molecules follow in the order of their names' first appearance, atoms as in ``molecule(name)``; order (n_atoms,) are
    indices into the system. Raises InputError where a molecule is not known by name, or two of them touch.
    """
    bonds = bond_graph(system)
    if (bonds[:, 0] == bonds[:, 1]).any():
        raise InputError("The box is so small that an atom touches its own image.")
    component = bonded_groups(bonds, system.n_atoms)
    sorted_atoms = np.argsort(component, kind="stable")
    groups = np.split(sorted_atoms, np.flatnonzero(np.diff(component[sorted_atoms])) + 1)
    found: dict[str, list[Indices]] = {}
    for atoms in sorted(groups, key=lambda group: int(group[0])):
        symbols = tuple(chemical_symbols[k] for k in system.numbers[atoms])
        inside = bonds[np.isin(bonds[:, 0], atoms)]
        name, match = _identify(symbols, tuple(map(tuple, np.searchsorted(atoms, inside).tolist())))
        found.setdefault(name, []).append(atoms[list(match)])
    names = tuple(name for name, members in found.items() for _ in members)
    return names, np.concatenate([member for members in found.values() for member in members])


def recognised_system(system: System) -> tuple[dict[str, int], System]:
    """Return the counts of molecules and the system with its atoms in packing order, molecules whole and numbered."""
    names, order = recognise(system)
    sizes = [molecule(name).n_atoms for name in names]
    arranged = System(
        numbers=system.numbers[order],
        positions=system.positions[order],
        cell=system.cell,
        pbc=system.pbc,
        total_charge=float(sum(molecule(name).charge for name in names)),
        molecule=np.repeat(np.arange(len(names)), sizes),
    )
    return dict(Counter(names)), make_whole(arranged)


@cache
def _identify(symbols: tuple[str, ...], bonds: tuple[tuple[int, int], ...]) -> tuple[str, tuple[int, ...]]:
    """Return the known molecule with this graph, and for each of its atoms the index in ``symbols``."""
    target, formula = _graph(symbols, bonds), Counter(symbols)
    candidates = [molecule(name) for name, smiles in {**SOLVENTS, **IONS}.items() if _formula(smiles) == formula]
    # distances show more bonds than there are where atoms share a neighbour, S...S of the imides
    for known in sorted(candidates, key=lambda candidate: -len(candidate.bonds)):
        if match := target.GetSubstructMatch(_graph(known.symbols, known.bonds)):
            return known.name, tuple(match)
    text = "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in sorted(formula.items()))
    raise InputError(
        f"The structure holds a molecule {text} with {len(bonds)} bonds that is none of the known ones. Name it, "
        "`molecules: {NAME: SMILES}`; or two molecules touch, or one is broken."
    )


@cache
def _formula(smiles: str) -> Counter[str]:
    from rdkit import Chem

    return Counter(atom.GetSymbol() for atom in Chem.AddHs(Chem.MolFromSmiles(smiles)).GetAtoms())


def _graph(symbols: tuple[str, ...], bonds: tuple[tuple[int, int], ...]) -> Any:
    """RDKit molecule of atoms and single bonds: only who is bonded to whom counts."""
    from rdkit import Chem

    graph = Chem.RWMol()
    for symbol in symbols:
        atom = Chem.Atom(symbol)
        atom.SetNoImplicit(True)
        graph.AddAtom(atom)
    for i, j in bonds:
        graph.AddBond(int(i), int(j), Chem.BondType.SINGLE)
    graph.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(graph)
    return graph
