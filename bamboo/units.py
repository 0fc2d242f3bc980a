"""Units and physical constants, the only place where numbers convert anything.

Internal units everywhere: length Å, energy eV, mass amu (Dalton), charge e; the time unit that follows is
Å sqrt(amu/eV) = 10.1805 fs. They are ASE's units and taken from ``ase.units``, so that a script that mixes ASE and
bamboo sees one set of constants (CODATA 2014).

A factor is the size of one unit in internal units: ``length_A = length_bohr * BOHR``; divide to convert back.
Names without a unit suffix hold internal units; names that carry one (``temperature_K``) hold that unit.
"""

from math import pi

from ase import units as _ase

# energy
EV = 1.0
HARTREE = float(_ase.Hartree)
KCAL_PER_MOL = float(_ase.kcal / _ase.mol)
KJ_PER_MOL = float(_ase.kJ / _ase.mol)
BOLTZMANN = float(_ase.kB)  # eV/K

# length
ANGSTROM = 1.0
BOHR = float(_ase.Bohr)
NANOMETRE = 10.0
CENTIMETRE = 1.0e8

# time
FEMTOSECOND = float(_ase.fs)
PICOSECOND = 1.0e3 * FEMTOSECOND
NANOSECOND = 1.0e6 * FEMTOSECOND

# temperature, kept in K
CELSIUS_ZERO_K = 273.15

# mass
GRAM = float(_ase.kg) * 1.0e-3

# dipole
DEBYE = float(_ase.Debye)  # e Å

# pressure, viscosity, conductivity
PASCAL = float(_ase.Pascal)
BAR = 1.0e5 * PASCAL
SECOND = 1.0e15 * FEMTOSECOND
MILLIPASCAL_SECOND = 1.0e-3 * PASCAL * SECOND
VOLT = 1.0  # eV/e
AMPERE = float(_ase.C) / SECOND
SIEMENS_PER_METRE = AMPERE / VOLT / (10.0e9)  # 1 m = 1e10 Å
MILLISIEMENS_PER_CENTIMETRE = 0.1 * SIEMENS_PER_METRE

# derived constants
MOLE = float(_ase.mol)
GRAM_PER_CM3 = GRAM / CENTIMETRE**3  # amu/Å^3
CM2_PER_SECOND = CENTIMETRE**2 / SECOND
# k_e = e^2/(4 pi eps0), eV Å / e^2
COULOMB_CONSTANT = float(_ase._e / (4.0 * pi * _ase._eps0) * 1.0e10)
