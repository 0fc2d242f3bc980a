"""The mesh of the P3M: how many nodes, the influence function, and the sum itself in torch; in C++ it is mesh.h."""

from math import comb, factorial

import numpy as np
import torch
from numpy.typing import NDArray

from bamboo import units

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


def spline_polynomials() -> NDArray[np.float64]:
    """Return c (ORDER, ORDER): the cardinal B-spline at w + k, 0 <= w < 1, is sum_a c[a, k] w^a.

    M_p(x) = 1/(p-1)! sum_s (-1)^s (p over s) (x - s)_+^(p-1), expanded in w at x = w + k.
    """
    degree = ORDER - 1
    return np.array([
        [
            sum((-1) ** s * comb(ORDER, s) * comb(degree, a) * (k - s) ** (degree - a) for s in range(k + 1))
            / factorial(degree)
            for k in range(ORDER)
        ]
        for a in range(ORDER)
    ])  # fmt: skip


class TorchMesh:
    """The P3M of R boxes with the same number of nodes, in torch: what ``source/mesh.h`` does, on any device.

    E = 1/2 sum_k G(k) |S(k)|^2 with S the transform of the charges spread by B-splines, and
    G = (4 pi k_e / V) exp(-k^2 / 4 alpha^2) / k^2 c0 c1 c2, c from ``influence_factor``; the last waves of an even mesh
    have no definite direction and are left out. size: nodes along each cell vector; alpha [1/Å].
    """

    def __init__(self, size: tuple[int, ...], alpha: float, device: torch.device) -> None:
        self.size, self.alpha = size, alpha
        waves = [np.fft.fftfreq(n, 1.0 / n) for n in size[:2]] + [np.fft.rfftfreq(size[2], 1.0 / size[2])]
        parts = [influence_factor(n)[: len(m)] * (2 * np.abs(m) < n) for n, m in zip(size, waves, strict=True)]
        factor = parts[0][:, None, None] * parts[1][:, None] * parts[2]
        factor[0, 0, 0] = 0.0
        both = np.where(waves[2] == 0.0, 0.5, 1.0)  # every k with m_2 > 0 stands for -k as well
        m = np.stack(np.meshgrid(*waves, indexing="ij"), axis=-1)

        def on_device(values: NDArray[np.float64]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        self._m, self._both = on_device(m.reshape(-1, 3)), on_device(np.broadcast_to(both, factor.shape).ravel())
        self._factor = on_device(4.0 * np.pi * units.COULOMB_CONSTANT * factor.ravel())
        powers, coefficients = np.arange(ORDER, dtype=np.float64), spline_polynomials()[:, ::-1]
        self._powers = on_device(powers)
        slopes = np.zeros_like(coefficients)
        slopes[:-1] = coefficients[1:] * powers[1:, None]
        self._splines = on_device(np.concatenate([coefficients, slopes], axis=1))  # values and slopes of the 8 nodes
        self._stencil = torch.arange(1 - ORDER, 1, device=device)
        self._size = torch.tensor(size, device=device)

    def __call__(
        self, charges: torch.Tensor, positions: torch.Tensor, box: torch.Tensor, *, inverse: torch.Tensor,
        volume: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return energy (R,) eV, virial (R, 3, 3) eV, potential (n,) eV/e, its gradient (n, 3) eV/e/Å.

        charges (n,), positions (n, 3), box (n,) which box an atom is in; inverse (R, 3, 3): row d times r is the
        coordinate along cell vector d; volume (R,).
        """
        n_boxes, (n0, n1, n2) = len(volume), self.size
        fraction = torch.einsum("nda,na->nd", inverse[box], positions)
        u = (fraction - fraction.floor()) * self._size
        below = u.floor()
        splines = (u - below)[..., None].pow(self._powers) @ self._splines  # (n, 3, 2 ORDER)
        weight, slope = splines[..., :ORDER], splines[..., ORDER:]
        node = (below.long()[..., None] + self._stencil) % self._size[:, None]  # (n, 3, ORDER)
        plane = box[:, None] * n0 + node[:, 0]
        flat = ((plane[:, :, None] * n1 + node[:, 1, None, :])[..., None] * n2 + node[:, 2, None, None, :]).flatten()
        shares = torch.einsum("n,na,nb,nc->nabc", charges, weight[:, 0], weight[:, 1], weight[:, 2])
        nodes = torch.zeros(n_boxes * n0 * n1 * n2, dtype=torch.float64, device=charges.device)
        nodes = nodes.index_add(0, flat, shares.flatten()).view(n_boxes, n0, n1, n2)
        spectrum = torch.fft.rfftn(nodes, dim=(1, 2, 3)).view(n_boxes, -1)

        k = 2.0 * torch.pi * (self._m @ inverse)  # (R, waves, 3)
        square = k.square().sum(-1)
        safe = torch.where(square > 0, square, 1.0)
        influence = self._factor / volume[:, None] * torch.exp(-square / (4.0 * self.alpha**2)) / safe
        per_wave = self._both * influence * (spectrum.real.square() + spectrum.imag.square())
        energy = per_wave.sum(1)
        stretch = 2.0 * per_wave * (1.0 / safe + 0.25 / self.alpha**2)
        virial = -(k * stretch[..., None]).transpose(1, 2) @ k
        virial = virial + energy[:, None, None] * torch.eye(3, dtype=torch.float64, device=energy.device)

        spectrum = (influence * spectrum).view(n_boxes, n0, n1, n2 // 2 + 1)
        potential = torch.fft.irfftn(spectrum, s=self.size, dim=(1, 2, 3), norm="forward")
        at_nodes = potential.flatten()[flat].view(len(charges), ORDER, ORDER, ORDER)
        ends = torch.stack([weight[:, 2], slope[:, 2]], dim=-1)  # (n, ORDER, 2)
        along_2 = torch.einsum("nabc,ncz->nzab", at_nodes, ends)
        in_plane = torch.einsum("nzab,nb->nza", along_2, weight[:, 1])
        turned = torch.einsum("nab,nb->na", along_2[:, 0], slope[:, 1])
        along = [(in_plane[:, 0], slope[:, 0]), (turned, weight[:, 0]), (in_plane[:, 1], weight[:, 0])]
        slopes = torch.stack([(one * other).sum(1) for one, other in along], dim=1)
        value = (in_plane[:, 0] * weight[:, 0]).sum(1)
        return energy, virial, value, torch.einsum("nd,nda->na", slopes * self._size, inverse[box])
