"""Make ``bamboo/terms/d3_table.json``: one D3 C6 coefficient and radius per element, for electrolyte molecules.

Run from the root of the repository, with ``dftd3`` and RDKit installed:

    python data/dispersion/make_d3_table.py

For every atom of every molecule below, the package ``dftd3`` gives the pair energy with the atom's own copy in a second
molecule so far away that neither changes the other's coordination numbers. Without damping that energy is -C6 / r^6
(s6 = 1, s8 = 0) or -C8 / r^8 (s6 = 0, s8 = 1), C8 / C6 = R^2 (Grimme et al., J. Chem. Phys. 132, 154104 (2010);
J. Comput. Chem. 32, 1456 (2011)). An element gets the square of the mean of sqrt(C6) over its atoms: the energy of two
molecules, a sum over sqrt(C6_i C6_j), then averages right. Cations of the alkali metals get none: D3 knows the neutral
atoms only (Li: 1128 against 0.1 Hartree bohr^6 for the ion).
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from dftd3.interface import DispersionModel, RationalDampingParam
from numpy.typing import NDArray

from bamboo import units
from bamboo.structure.molecules import IONS, SOLVENTS, Molecule, molecule, molecule_from_smiles

TABLE = Path(__file__).parents[2] / "bamboo" / "terms" / "d3_table.json"
CATIONS = ("Li", "Na", "K")
SILANES = {"trimethylsilyl methyl ether": "C[Si](C)(C)OC", "tetramethylsilane": "C[Si](C)(C)C"}
SEPARATION = 100.0  # Å


def pair_energies(
    first: Molecule, second: Molecule, *, power: int, separation: float = SEPARATION
) -> NDArray[np.float64]:
    """Return the undamped -C_power / r^power of each atom of one molecule with each of the other, (n, m) eV."""
    n = first.n_atoms
    positions = np.vstack([first.positions, second.positions + np.array([separation, 0.0, 0.0])])
    model = DispersionModel(np.concatenate([first.numbers, second.numbers]), positions / units.BOHR)
    model.set_realspace_cutoff(10.0 * separation, 0.0, 40.0)  # bohr: pairs, triples, coordination numbers
    shape = RationalDampingParam(s6=float(power == 6), s8=float(power == 8), s9=0.0, a1=0.0, a2=0.0)
    halves = model.get_pairwise_dispersion(shape)["additive pairwise energy"]  # half of the energy in (i, j) and (j, i)
    return np.asarray(2.0 * halves[:n, n:] * units.HARTREE)


def atomic_c6(of: Molecule) -> NDArray[np.float64]:
    """Return C6 of each atom with its like, (n_atoms,) eV Å^6."""
    return -np.diag(pair_energies(of, of, power=6)) * SEPARATION**6


def radius(element: str) -> float:
    """Return R = sqrt(C8 / C6) of two like atoms, Å; in D3 it depends on the element alone."""
    atom = Molecule(element, (element,), np.zeros((1, 3)), charge=0, bonds=(), smiles=f"[{element}]")
    ratio = pair_energies(atom, atom, power=8) / pair_energies(atom, atom, power=6) * SEPARATION**2
    return float(np.sqrt(ratio[0, 0]))


def make_table() -> dict[str, object]:
    """Return the table as it is written."""
    names = [*SOLVENTS, *(ion for ion in IONS if ion not in CATIONS)]
    molecules = [molecule(name) for name in names]
    molecules += [molecule_from_smiles(smiles, name=name) for name, smiles in SILANES.items()]
    found: dict[str, list[float]] = defaultdict(list)
    for each in molecules:
        for symbol, c6 in zip(each.symbols, atomic_c6(each), strict=True):
            found[symbol].append(float(c6))
    elements = {
        symbol: {
            "c6": round(float(np.mean(np.sqrt(values))) ** 2, 4),
            "c6_range": [round(min(values), 4), round(max(values), 4)],
            "radius": round(radius(symbol), 6),
            "n_atoms": len(values),
        }
        for symbol, values in found.items()
    }
    for symbol in CATIONS:
        elements[symbol] = {"c6": 0.0, "c6_range": [0.0, 0.0], "radius": round(radius(symbol), 6), "n_atoms": 0}
    return {
        "units": {"c6": "eV Å^6", "radius": "Å"},
        "method": "D3 reference C6 at the coordination numbers of the molecules below; (mean of sqrt(C6))^2 per"
        " element; radius = sqrt(C8/C6) of two like atoms; unlike pairs: geometric means; none on alkali cations",
        "source": f"dftd3 {version('dftd3')} (s-dftd3), by data/dispersion/make_d3_table.py",
        "reference": "Grimme, Antony, Ehrlich, Krieg, J. Chem. Phys. 132, 154104 (2010)",
        "molecules": [each.name for each in molecules],
        "elements": dict(sorted(elements.items())),
    }


if __name__ == "__main__":
    TABLE.write_text(json.dumps(make_table(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {TABLE}")
