"""1. Energy, forces, charges and geometry of a structure with ASE: how strongly does ethylene carbonate hold Li+?

python examples/1_single_point.py
"""

import os

import ase
from ase.optimize import BFGS
from ase.units import kcal, mol

from bamboo import BambooCalculator
from bamboo.structure.molecules import molecule

SMOKE = bool(os.environ.get("SMOKE"))  # a quick look instead of a result


def relaxed_energy(atoms: ase.Atoms, charge: int) -> float:
    """Return the energy [eV] of a structure in its nearest minimum."""
    atoms.info["charge"] = charge  # of the whole structure, in e
    atoms.calc = BambooCalculator()  # the model "default"
    BFGS(atoms, logfile=None).run(fmax=0.02, steps=5 if SMOKE else 300)
    return float(atoms.get_potential_energy())


solvent = molecule("EC")
carbonate = ase.Atoms(solvent.symbols, solvent.positions)
lithium = ase.Atoms("Li", [[0.0, 0.0, 0.0]])

# start with Li+ on the axis of C=O, 1.9 Å beyond the oxygen
distances = carbonate.get_all_distances()
oxygens = [atom.index for atom in carbonate if atom.symbol == "O"]
carbons = [atom.index for atom in carbonate if atom.symbol == "C"]
carbon, oxygen = min(((c, o) for c in carbons for o in oxygens), key=lambda pair: distances[pair])  # C=O is shortest
axis = carbonate.positions[oxygen] - carbonate.positions[carbon]
complex_ = carbonate.copy()
complex_.append(ase.Atom("Li", carbonate.positions[oxygen] + 1.9 * axis / distances[carbon, oxygen]))

binding = relaxed_energy(complex_, 1) - relaxed_energy(carbonate, 0) - relaxed_energy(lithium, 1)
print(f"Li+ binds to EC with {binding / (kcal / mol):.1f} kcal/mol at {complex_.get_distance(oxygen, -1):.2f} Å")
print("charges / e:", " ".join(f"{a.symbol}{q:+.2f}" for a, q in zip(complex_, complex_.get_charges(), strict=True)))
print("largest force:", f"{abs(complex_.get_forces()).max():.3f} eV/Å")
