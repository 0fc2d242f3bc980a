"""Element facts: symbols, masses, covalent radii, all from ASE's tables."""

from collections.abc import Iterable

import numpy as np
from ase.data import atomic_masses, atomic_numbers, chemical_symbols, covalent_radii

MAX_ATOMIC_NUMBER = 86  # the embedding table has rows 0..86

ATOMIC_MASSES = np.asarray(atomic_masses, dtype=np.float64)  # amu, indexed by atomic number
COVALENT_RADII = np.asarray(covalent_radii, dtype=np.float64)  # Å, Cordero et al., Dalton Trans. 2832 (2008)


def symbols_of(numbers: Iterable[int]) -> list[str]:
    """Return the sorted, unique chemical symbols of atomic numbers, by atomic number."""
    return [chemical_symbols[number] for number in sorted({int(n) for n in numbers})]


def numbers_of(symbols: Iterable[str]) -> list[int]:
    """Return atomic numbers of chemical symbols."""
    return [atomic_numbers[symbol] for symbol in symbols]
