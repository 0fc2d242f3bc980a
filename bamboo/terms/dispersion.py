"""Pairwise D3-CSO dispersion (Schroeder, Creon, Schwabe, JCTC 11, 3163 (2015)).

E_ij = -C6_ij / (r^6 + a4^6) (s6 + a1 / (1 + exp(k (r - a2 R_ij)))),  C6_ij = sqrt(C6_i C6_j), one C6 per element,
R_ij = sqrt(R_i R_j) with R_i = sqrt(C8_i / C6_i) in Å.

Ours: switched smoothly to zero over the last fifth before the cutoff, energy and force, and the missing tail beyond
added analytically, so that neither density nor pressure depends on the cutoff. The tail takes every periodic box for a
uniform liquid: for slabs, pores or a molecule in vacuum it is wrong (too much attraction, spread over the empty part);
clusters have none.
Published (2024 checkpoint): the pair energy is shifted by +C6_ij / r_c^6 and cut, which leaves a step.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from bamboo import units
from bamboo.elements import MAX_ATOMIC_NUMBER
from bamboo.errors import InputError

ROWS = MAX_ATOMIC_NUMBER + 1
_gauss_legendre = cache(np.polynomial.legendre.leggauss)  # asked at every rebuild of neighbour lists


def smooth_step(x: torch.Tensor) -> torch.Tensor:
    """Return 6x^5 - 15x^4 + 10x^3 clamped to [0, 1]: value, slope and curvature are continuous."""
    x = x.clamp(0.0, 1.0)
    return x * x * x * (x * (6.0 * x - 15.0) + 10.0)


@dataclass(frozen=True)
class DispersionConfig:
    """Shape of the dispersion energy; lengths in Å.

    s6, a1, a2       as in the formula above
    damping_length   a4, fitted: with it B3LYP/def2-SVPD gives the wB97M-V curves of two EMC and of EMC with Li+
                     (Zheng et al. 2025) within 0.65 kcal/mol RMS, see `bamboo-md data damping`; originally 6.25 bohr
    steepness        k [1/Å]; the original formula has r in bohr, hence 1/bohr
    cutoff           no pairs beyond
    smooth           True: switched off over the last fifth of the cutoff, with tail correction; False: shifted by
                     +C6/cutoff^6 and cut, as published in 2024
    """

    s6: float = 1.0
    a1: float = 0.86
    a2: float = 2.5
    damping_length: float = 6.96 * units.BOHR
    steepness: float = 1.0 / units.BOHR
    cutoff: float = 10.0
    smooth: bool = True

    def __post_init__(self) -> None:
        for name in ("damping_length", "steepness", "cutoff"):
            if not getattr(self, name) > 0:
                raise InputError(f"dispersion.{name} = {getattr(self, name)}, expected a positive number.")


class Dispersion(nn.Module):
    """The dispersion energy; ``c6`` (87,) eV Å^6 and ``radius`` (87, 87) Å are tables by atomic number."""

    SWITCH_START = 0.8  # of the cutoff

    def __init__(self, config: DispersionConfig) -> None:
        super().__init__()
        self.config = config
        self.c6: torch.Tensor
        self.radius: torch.Tensor
        self.register_buffer("c6", torch.zeros(ROWS, dtype=torch.float64))
        self.register_buffer("radius", torch.ones(ROWS, ROWS, dtype=torch.float64))

    def pair_energy(self, distance: torch.Tensor, c6: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """Return the energy of pairs without any cutoff [eV]."""
        shape = self.config
        damping = shape.s6 + shape.a1 * torch.sigmoid(-shape.steepness * (distance - shape.a2 * radius))
        return -c6 / (distance**6 + shape.damping_length**6) * damping

    def forward(self, distance: torch.Tensor, number_i: torch.Tensor, number_j: torch.Tensor) -> torch.Tensor:
        """Return the energy of pairs [eV], zero beyond the cutoff; distance (n_pairs,) Å."""
        c6 = (self.c6[number_i] * self.c6[number_j]).sqrt()
        energy = self.pair_energy(distance, c6, self.radius[number_i, number_j])
        cutoff = self.config.cutoff
        if self.config.smooth:
            start = self.SWITCH_START * cutoff
            return energy * (1.0 - smooth_step((distance - start) / (cutoff - start)))
        return (energy + c6 / cutoff**6) * (distance < cutoff)

    def tail_energy(self, numbers: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        """Return the energy [eV] that the cutoff leaves out in a uniform liquid of this composition; 0 if not smooth.

        E_tail = 1/(2V) sum_ij integral 4 pi r^2 (E_ij - E_ij switched) dr; numbers (n,), volume () Å^3.
        """
        if not self.config.smooth:
            return torch.zeros_like(volume)
        elements, counts = torch.unique(numbers, return_counts=True)
        weights = counts.to(volume.dtype)
        pairs: torch.Tensor = weights @ self._tail_integrals(elements) @ weights
        return pairs / (2.0 * volume)

    def _tail_integrals(self, elements: torch.Tensor) -> torch.Tensor:
        """Return integral 4 pi r^2 (E - E switched) dr [eV Å^3] for each pair of elements, by quadrature in 1/r."""
        cutoff = self.config.cutoff
        nodes, node_weights = _gauss_legendre(200)
        inverse = torch.as_tensor((nodes + 1.0) / 2.0, device=self.c6.device) / (self.SWITCH_START * cutoff)
        weight = torch.as_tensor(node_weights / 2.0, device=self.c6.device) / (self.SWITCH_START * cutoff)
        distance = (1.0 / inverse)[:, None, None]
        first, second = elements[:, None], elements[None, :]
        c6 = (self.c6[first] * self.c6[second]).sqrt()[None]
        start = self.SWITCH_START * cutoff
        removed = smooth_step((distance - start) / (cutoff - start))
        energy = self.pair_energy(distance, c6, self.radius[first, second][None]) * removed
        return (4.0 * torch.pi * weight[:, None, None] * distance**4 * energy).sum(0)
