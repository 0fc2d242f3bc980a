"""What an electronic-structure method says about one structure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Labels:
    """Quantum labels of one ``System``; a label the method does not give is None.

    level    name of the method, for example "GFN2-xTB" or "B3LYP/def2-SVPD"
    energy   eV, total energy of the method (no reference energies removed)
    forces   (n_atoms, 3) eV/Å
    charges  (n_atoms,) e
    dipole   (3,) e Å, about the origin of the coordinates; clusters only
    virial   (3, 3) eV, -dE/dstrain; periodic boxes only (a cluster's follows from its forces)
    """

    level: str
    energy: float
    forces: NDArray[np.float64] | None = None
    charges: NDArray[np.float64] | None = None
    dipole: NDArray[np.float64] | None = None
    virial: NDArray[np.float64] | None = None
