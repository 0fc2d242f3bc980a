"""2. Molecular dynamics in ASE: its integrator, its trajectory file, our forces.

python examples/2_ase_md.py

For long runs `bamboo-md run` (example 3) is much faster, restarts exactly and computes the properties.
"""

import os

from ase.io import Trajectory
from ase.md.bussi import Bussi
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import FIRE
from ase.units import fs

from bamboo import BambooCalculator
from bamboo.structure.packing import pack_box

SMOKE = bool(os.environ.get("SMOKE"))

# 1 LiPF6 and a dozen solvents, about 1 mol/kg; a box of 12 Å is as small as the cutoffs allow to be sensible
box = pack_box({"EC": 4, "DMC": 7, "Li": 1, "PF6": 1}, density_g_cm3=1.1, seed=1)
atoms = box.to_atoms()
atoms.calc = BambooCalculator()
print(f"{len(atoms)} atoms in a box of {atoms.cell.lengths()[0]:.2f} Å")

FIRE(atoms, logfile=None).run(fmax=0.5, steps=20 if SMOKE else 200)
thermalize_momenta(atoms, temperature_K=298.0)
dynamics = Bussi(atoms, timestep=0.5 * fs, temperature_K=298.0, taut=100.0 * fs)
dynamics.attach(Trajectory("ase_md.traj", "w", atoms).write, interval=20)


def report() -> None:
    """Print where the run is."""
    energy = atoms.get_potential_energy() / len(atoms)
    print(f"{dynamics.nsteps * 0.5:8.1f} fs  {atoms.get_temperature():6.0f} K  {energy:10.4f} eV/atom")


dynamics.attach(report, interval=10 if SMOKE else 200)
dynamics.run(20 if SMOKE else 4000)
