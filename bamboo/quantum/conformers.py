"""A library of thermal conformers: the building blocks of packed structures."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bamboo.files import replacing
from bamboo.quantum.dynamics import langevin, prepare, relax
from bamboo.structure.molecules import conformers, molecule
from bamboo.system import System

TEMPERATURE_K = 400.0
STEPS_BETWEEN = 60


@dataclass(frozen=True)
class Library:
    """Geometries of each molecule, centred: {name: [(n_atoms, 3) Å, ...]}."""

    geometries: dict[str, list[NDArray[np.float64]]]

    @property
    def names(self) -> list[str]:
        return list(self.geometries)

    def draw(self, name: str, generator: np.random.Generator) -> NDArray[np.float64]:
        """Return one geometry at random."""
        choices = self.geometries[name]
        return choices[int(generator.integers(len(choices)))]

    def save(self, path: str | Path) -> None:
        """Write the library to a NumPy archive, one array (n_conformers, n_atoms, 3) per molecule."""
        with replacing(Path(path)) as draft:
            np.savez_compressed(draft, **{name: np.stack(choices) for name, choices in self.geometries.items()})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Library":
        """Read a library that ``save`` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            return cls({name: list(archive[name]) for name in archive.files})


def build_library(names: Iterable[str], *, seed: int, n_starts: int = 8, per_start: int = 3) -> Library:
    """Sample conformers with GFN2-xTB at 400 K, from several force-field conformers of each molecule.

    Barriers between conformers are higher than a short run can cross, hence the several starts.
    """
    generator = np.random.default_rng(seed)
    geometries: dict[str, list[NDArray[np.float64]]] = {}
    for name in names:
        member = molecule(name)
        if member.n_atoms == 1:
            geometries[name] = [np.zeros((1, 3))]
            continue
        geometries[name] = []
        for start in conformers(name, n_starts):
            system = System(member.numbers, np.array(start), np.zeros((3, 3)), False, float(member.charge))
            atoms = prepare(system)
            relax(atoms, 10)
            dynamics = langevin(atoms, temperature_K=TEMPERATURE_K, generator=generator)
            for _ in range(per_start):
                dynamics.run(STEPS_BETWEEN)
                geometries[name].append(atoms.positions - atoms.positions.mean(axis=0))
    return Library(geometries)
