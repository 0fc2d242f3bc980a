"""The mesh of the native P3M: how many nodes, and the part of its influence function that depends on them alone."""

import numpy as np
import torch
from numpy.typing import NDArray

# Å, largest distance between nodes when the mesh is chosen; forces are then right to 0.002 kcal/mol/Å (tests)
SPACING = 0.53
# the mesh is kept while the spacing stays between these, lest a breathing box change its mesh back and forth
SMALLEST, LARGEST = 0.8 * SPACING, 1.05 * SPACING
ORDER = 8  # of the B-splines; source/mesh.h


def good_size(least: int) -> int:
    """Return the smallest even number >= least, and >= twice the spline's order, whose prime factors are 2, 3 and 5."""
    size = max(least, 2 * ORDER)
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1 and size % 2 == 0:
            return size
        size += 1


def influence_factor(size: int) -> NDArray[np.float64]:
    """Return c(m) = [sinc^p(m/K) / sum_s sinc^2p(m/K + s)]^2 for m = 0 .. K-1, p = ORDER, K = size.

    It undoes the two B-spline assignments of the mesh so that the energy error is smallest.
    """
    wave = np.fft.fftfreq(size)
    aliases = sum(np.sinc(wave + shift) ** (2 * ORDER) for shift in range(-4, 5))
    factor: NDArray[np.float64] = (np.sinc(wave) ** ORDER / aliases) ** 2
    return factor


class MeshPlan:
    """The mesh of one box: ``size`` (3,) int32, ``nodes`` (size) float64 for the charges, ``influence`` per axis."""

    def __init__(self) -> None:
        self.size = np.zeros(3, dtype=np.int32)
        self.nodes = torch.zeros(0, dtype=torch.float64)
        self.influence: list[NDArray[np.float64]] = []

    def fit(self, cell: NDArray[np.float64]) -> None:
        """Choose the number of nodes for a cell (3, 3) [Å]; keep the present one while its spacing is acceptable."""
        length = np.linalg.norm(cell, axis=1)
        spacing = length / np.maximum(self.size, 1)
        if ((spacing > SMALLEST) & (spacing < LARGEST)).all():
            return
        self.size = np.array([good_size(int(np.ceil(side / SPACING))) for side in length], dtype=np.int32)
        self.nodes = torch.zeros(tuple(self.size.tolist()), dtype=torch.float64)
        self.influence = [influence_factor(int(size)) for size in self.size]
