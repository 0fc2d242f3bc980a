"""What an electronic-structure method says about one structure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WITHOUT_DISPERSION = ("B3LYP/def2-SVPD",)  # levels of theory, as their names begin; all others contain it


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

    @property
    def contains_dispersion(self) -> bool:
        """Tell whether the level of theory describes dispersion; where it does not, the force field's comes on top."""
        return not self.level.startswith(WITHOUT_DISPERSION)
