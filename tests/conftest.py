"""Fixtures for all tests: seeded random structures and force fields in which every term matters."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Triton reads it when it is first imported, and several libraries import it: here, before any test module is
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ELEMENTS = ("H", "Li", "B", "C", "N", "O", "F", "Na", "P", "S", "Cl")
TERMS = ("network", "electrostatic", "electronegativity", "dispersion", "repulsion", "all")
TILTED_CELL = np.array([[7.4, 0.0, 0.0], [1.3, 6.9, 0.0], [-0.8, 1.1, 7.7]])
CLEAR = 0.012  # Å; no pair this close to the network cutoff, where the Ewald split leaves a step of 1e-5 eV


def _scatter(
    rng: np.random.Generator, n_atoms: int, cell: np.ndarray, *, pbc: bool, closest: float, cutoff: float
) -> np.ndarray:
    """Return random positions in the cell, none closer than ``closest`` and no pair near the cutoff."""
    reach = range(-2, 3) if pbc else range(1)
    images = np.array([[a, b, c] for a in reach for b in reach for c in reach]) @ cell
    placed: list[np.ndarray] = []
    for _ in range(200_000):
        trial = rng.random(3) @ cell
        others = np.array([*placed, trial] if pbc else placed).reshape(-1, 3)
        distance = np.linalg.norm(others[:, None] - trial + images, axis=-1)
        distance = distance[distance > 1e-9]
        if not ((distance < closest) | (abs(distance - cutoff) < CLEAR)).any():
            placed.append(trial)
            if len(placed) == n_atoms:
                return np.array(placed)
    raise RuntimeError(f"no room for {n_atoms} atoms at {closest} Å")


@pytest.fixture(scope="session")
def make_cluster() -> Callable[..., Any]:
    """Return a factory of random clusters (``System``)."""

    def make(seed: int = 0, *, n_atoms: int = 12, total_charge: float = 1.0, closest: float = 0.9) -> Any:
        from bamboo.elements import numbers_of
        from bamboo.system import System

        rng = np.random.default_rng(seed)
        positions = _scatter(rng, n_atoms, np.eye(3) * 2.3 * n_atoms ** (1 / 3), pbc=False, closest=closest, cutoff=5.0)
        numbers = np.array(numbers_of(rng.choice(ELEMENTS, n_atoms)))
        return System(numbers, positions - 2.0, np.zeros((3, 3)), pbc=False, total_charge=total_charge)

    return make


@pytest.fixture(scope="session")
def make_box() -> Callable[..., Any]:
    """Return a factory of random periodic boxes (``System``), triclinic and smaller than twice the cutoff."""

    def make(
        seed: int = 0,
        *,
        n_atoms: int = 16,
        cell: np.ndarray = TILTED_CELL,
        total_charge: float = 0.0,
        closest: float = 1.0,
    ) -> Any:
        from bamboo.elements import numbers_of
        from bamboo.system import System

        rng = np.random.default_rng(seed)
        positions = _scatter(rng, n_atoms, cell, pbc=True, closest=closest, cutoff=5.0)
        numbers = np.array(numbers_of(rng.choice(ELEMENTS, n_atoms)))
        return System(numbers, positions, cell.copy(), pbc=True, total_charge=total_charge)

    return make


@pytest.fixture(scope="session")
def make_force_field() -> Callable[..., Any]:
    """Return a factory of small random force fields (double precision) in which all terms, or only some, matter.

    term  one of TERMS: the others are silent ("electronegativity" includes the electrostatic energy of its charges)
    """

    def make(
        term: str = "all", *, seed: int = 0, charge_response: str = "full", attention: str = "get", **options: Any
    ) -> Any:
        from bamboo.elements import numbers_of
        from bamboo.forcefield import ForceField, ForceFieldConfig
        from bamboo.nn.get import NetworkConfig
        from bamboo.terms.d3_table import fill_d3_table
        from bamboo.terms.dispersion import DispersionConfig

        assert term in TERMS
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = {"channels": 16, "heads": 4, "layers": 3, "n_radial": 8, "attention": attention}
            config = ForceFieldConfig(
                network=NetworkConfig(**network | options.get("network", {})),
                dispersion=DispersionConfig(**{"cutoff": 7.0} | options.get("dispersion", {})),
                repulsion=term in ("repulsion", "all"),
                charge_response=charge_response,
            )
            field = ForceField(config).to_dtype(torch.float64)
            numbers = torch.tensor(numbers_of(ELEMENTS))
            field.known[numbers] = True
            charged = term in ("electrostatic", "electronegativity", "all")
            field.reference_energy[numbers] = torch.randn(len(numbers), dtype=torch.float64)
            if charged:
                field.reference_charge[numbers] = 0.4 * torch.randn(len(numbers), dtype=torch.float64)
            if term in ("electronegativity", "all"):
                field.reference_electronegativity[numbers] = 1.0 + torch.rand(len(numbers), dtype=torch.float64)
            if term in ("dispersion", "all"):
                fill_d3_table(field.dispersion)
            with torch.no_grad():
                for layer in field.network.layers:
                    layer.qkv.weight *= 2.0
                field.network.edge.weight *= 4.0
                field.energy_head[4].weight *= 20.0 * (term in ("network", "all"))
                field.charge_head[4].weight *= 8.0 * charged
                for head in (field.electronegativity_head, field.hardness_head):
                    head[4].weight *= 4.0 * (term in ("electronegativity", "all"))
                    head[4].bias *= term in ("electronegativity", "all")
                field.charge_head[4].bias *= charged
                field.energy_head[4].bias *= term in ("network", "all")
        return field.eval()

    return make


class WithoutHost(TorchDispatchMode):
    """Refuse what makes the host wait for the device, or copies from it: a CUDA graph cannot hold such steps."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "repeat_interleave", "lift")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not function.__name__.startswith(self.FORBIDDEN), function.__name__
        indices = args[1] if function.__name__.startswith("index.") else []
        assert all(index is None or index.dtype != torch.bool for index in indices), "indexing with a mask"
        return function(*args, **kwargs or {})


@pytest.fixture(scope="session")
def without_host() -> type[WithoutHost]:
    """Return the context in which nothing may wait for the device."""
    return WithoutHost


@pytest.fixture(scope="session")
def published() -> Path:
    """Return the folder with numbers of the published force field; skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "published"
    if not (folder / "weights.safetensors").is_file():
        pytest.skip("the published reference numbers (../shared/published) are not here")
    return folder
