"""Analytic potentials with the one method the engine asks for, and small boxes to run them on."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bamboo.system import Batch, System


@dataclass
class Output:
    energy: torch.Tensor
    forces: torch.Tensor
    virial: torch.Tensor
    charges: torch.Tensor


def output(batch, energy, forces, virial):
    return Output(energy, forces, virial, torch.zeros(batch.n_atoms, dtype=torch.float64))


def per_system(batch, values):
    total = torch.zeros((batch.n_systems, *values.shape[1:]), dtype=torch.float64)
    return total.index_add_(0, batch.system_index, values)


class IdealGas:
    def evaluate(self, batch: Batch) -> Output:
        zeros = torch.zeros_like(batch.positions)
        return output(batch, zeros.new_zeros(batch.n_systems), zeros, zeros.new_zeros(batch.n_systems, 3, 3))


class ElasticFrame:
    """E = sum_a k_a/2 ln(L_a/L0_a)^2 of an orthorhombic cell, which holds an ideal gas."""

    def __init__(self, stiffness: list[float], lengths: list[float]) -> None:
        self.stiffness = torch.tensor(stiffness, dtype=torch.float64)
        self.lengths = torch.tensor(lengths, dtype=torch.float64)

    def evaluate(self, batch: Batch) -> Output:
        strain = (batch.cell.diagonal(dim1=1, dim2=2) / self.lengths).log()
        energy = 0.5 * (self.stiffness * strain**2).sum(dim=1)
        return output(batch, energy, torch.zeros_like(batch.positions), torch.diag_embed(-self.stiffness * strain))


class Tether:
    """E = k/2 sum |r|^2: every atom an independent three-dimensional oscillator about the origin."""

    def __init__(self, stiffness: float) -> None:
        self.stiffness = stiffness

    def evaluate(self, batch: Batch) -> Output:
        forces = -self.stiffness * batch.positions
        energy = per_system(batch, 0.5 * self.stiffness * (batch.positions**2).sum(dim=1))
        return output(batch, energy, forces, per_system(batch, forces[:, :, None] * batch.positions[:, None, :]))


class Spring:
    """E = k/2 (|r_1 - r_0| - length)^2 for atoms 0-1, 2-3, ..."""

    def __init__(self, stiffness: float, length: float) -> None:
        self.stiffness, self.length = stiffness, length

    def evaluate(self, batch: Batch) -> Output:
        vector = batch.positions[1::2] - batch.positions[0::2]
        distance = vector.norm(dim=1, keepdim=True)
        pull = self.stiffness * (distance - self.length) * vector / distance
        forces = torch.zeros_like(batch.positions)
        forces[0::2], forces[1::2] = pull, -pull
        pair_energy = torch.zeros(batch.n_atoms, dtype=torch.float64)
        pair_energy[0::2] = 0.5 * self.stiffness * (distance[:, 0] - self.length) ** 2
        virial = per_system(batch, forces[:, :, None] * batch.positions[:, None, :])
        return output(batch, per_system(batch, pair_energy), forces, virial)


class LennardJones:
    """Argon, switched smoothly to zero between two radii, all pairs with their 27 nearest images."""

    def __init__(self, epsilon: float = 0.0103, sigma: float = 3.4, start: float = 4.5, cutoff: float = 6.0) -> None:
        self.epsilon, self.sigma, self.start, self.cutoff = epsilon, sigma, start, cutoff
        grid = torch.arange(-1.0, 2.0, dtype=torch.float64)
        self.images = torch.cartesian_prod(grid, grid, grid)

    def pairs(self, batch: Batch) -> torch.Tensor:
        same = batch.system_index[:, None] == batch.system_index[None, :]
        return same.nonzero().T

    def evaluate(self, batch: Batch) -> Output:
        i, j = self.pairs(batch)
        system = batch.system_index[i]
        vector = batch.positions[j] - batch.positions[i]
        inverse = torch.linalg.inv(batch.cell)[system]
        wrap = torch.round((vector[:, None, :] @ inverse)[:, 0])
        images = vector[:, None, :] + (self.images - wrap[:, None, :]) @ batch.cell[system]
        squared = (images**2).sum(dim=2)
        close = (squared < self.cutoff**2) & (squared > 1.0e-8)
        pair, _ = close.nonzero(as_tuple=True)
        energy, slope = self.pair_energy(squared[close])  # slope: derivative by r^2
        pull = slope[:, None] * images[close]  # half of dE/dr_ij, for the pair is found from both ends
        forces = torch.zeros_like(batch.positions).index_add_(0, i[pair], 2.0 * pull)
        virial = torch.zeros_like(batch.cell).index_add_(0, system[pair], -pull[:, :, None] * images[close][:, None, :])
        total = torch.zeros(batch.n_systems, dtype=torch.float64).index_add_(0, system[pair], 0.5 * energy)
        return output(batch, total, forces, virial)

    def pair_energy(self, squared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sixth = (self.sigma**2 / squared) ** 3
        bare = 4.0 * self.epsilon * (sixth**2 - sixth)
        bare_slope = 12.0 * self.epsilon * (sixth - 2.0 * sixth**2) / squared
        c, s = self.cutoff**2, self.start**2
        switch = torch.where(squared < s, 1.0, (c - squared) ** 2 * (c + 2.0 * squared - 3.0 * s) / (c - s) ** 3)
        switch_slope = torch.where(squared < s, 0.0, 6.0 * (c - squared) * (s - squared) / (c - s) ** 3)
        return bare * switch, bare_slope * switch + bare * switch_slope


class LennardJonesWithHistory(LennardJones):
    """Sums pairs in an order fixed when its list was built, so rounding depends on history, as with a real list."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.order, self.age = None, 0

    def pairs(self, batch: Batch) -> torch.Tensor:
        pairs = super().pairs(batch)
        if self.order is None or self.age >= 6:
            self.order, self.age = torch.argsort(batch.positions[pairs[0], 0] * batch.positions[pairs[1], 1]), 0
        self.age += 1
        return pairs[:, self.order]


def argon_box(*, seed: int = 0, cells: int = 2, lattice: float = 5.6, noise: float = 0.1) -> System:
    """Face-centred cubic argon, slightly shaken."""
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3), axis=-1).reshape(-1, 1, 3)
    positions = ((corners + basis) * lattice).reshape(-1, 3)
    positions = positions + np.random.default_rng(seed).normal(scale=noise, size=positions.shape)
    n_atoms = len(positions)
    return System(np.full(n_atoms, 18), positions, np.eye(3) * cells * lattice, True, molecule=np.arange(n_atoms))


def gas_box(n_atoms: int, *, length: float = 20.0, seed: int = 0) -> System:
    positions = np.random.default_rng(seed).uniform(0.0, length, size=(n_atoms, 3))
    return System(np.full(n_atoms, 18), positions, np.eye(3) * length, True)


@pytest.fixture
def toys() -> SimpleNamespace:
    """Everything of this file by name (test modules cannot import each other)."""
    return SimpleNamespace(
        IdealGas=IdealGas,
        ElasticFrame=ElasticFrame,
        Tether=Tether,
        Spring=Spring,
        LennardJones=LennardJones,
        LennardJonesWithHistory=LennardJonesWithHistory,
        argon_box=argon_box,
        gas_box=gas_box,
    )
