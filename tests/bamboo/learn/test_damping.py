"""The damping length comes back from curves that were made with it."""

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.learn.damping import fit_damping
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.structure.molecules import molecule
from bamboo.system import System
from bamboo.terms.d3_table import fill_d3_table
from bamboo.terms.dispersion import Dispersion, DispersionConfig
from bamboo.units import BOHR

LENGTH = 7.2 * BOHR
DISTANCES = (2.0, 2.4, 3.0, 4.0)


def frame(name: str, energy: float, *, positions: np.ndarray, level: str) -> Frame:
    numbers = np.resize(molecule("EC").numbers, len(positions))
    system = System(numbers, positions, np.zeros((3, 3)), False, 0.0)
    return Frame(system, Labels(level, energy), "neutral", "scan", f"{name}/00001")


def dispersion_energy(one: np.ndarray, two: np.ndarray) -> float:
    """Return the energy between the molecules alone, each pair once."""
    term = Dispersion(DispersionConfig(damping_length=LENGTH))
    fill_d3_table(term)
    numbers = torch.from_numpy(molecule("EC").numbers)
    distance = torch.from_numpy(np.linalg.norm(one[:, None] - two[None], axis=-1)).flatten()
    return float(term(distance, numbers.repeat_interleave(10), numbers.repeat(10)).sum())


def scan(*, level: str, with_dispersion: bool) -> list[Frame]:
    positions = molecule("EC").positions
    frames = [frame("monomer:EC/0", -5.0, positions=positions, level=level)]
    height = np.ptp(positions[:, 2])
    for distance in DISTANCES:
        above = positions + np.array([0.0, 0.0, height + distance])
        energy = -10.0 + 3.0 * np.exp(-distance) + (dispersion_energy(positions, above) if with_dispersion else 0.0)
        if distance < 2.3:
            energy += 7.0 * with_dispersion  # a wall on which levels differ, and which does not count
        both = np.vstack([positions, above])
        frames.append(frame(f"pair:EC+EC:up/{distance:.2f}", energy, positions=both, level=level))
    return frames


def test_length_is_found() -> None:
    bare, reference = scan(level="B3LYP/def2-SVPD", with_dispersion=False), scan(level="wB97M-V", with_dispersion=True)
    fit = fit_damping(bare, reference)
    assert fit.damping_length == pytest.approx(LENGTH, rel=1.0e-3)
    assert fit.rms < 1.0e-3 and fit.n_points == 3 and set(fit.curves) == {"pair:EC+EC:up"}


def test_what_cannot_be_fitted_is_refused() -> None:
    bare, reference = scan(level="B3LYP/def2-SVPD", with_dispersion=False), scan(level="wB97M-V", with_dispersion=True)
    with pytest.raises(InputError, match="contain it already"):
        fit_damping(reference, bare)
    with pytest.raises(InputError, match="no point of a pair curve in common"):
        fit_damping(bare[:1], reference)
