"""The conditions of a run: which boxes stand together in its batch, and where each begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import torch

from bamboo.errors import InputError
from bamboo.files import replacing
from bamboo.structure.packing import pack_box
from bamboo.system import System
from bamboo.units import GRAM_PER_CM3
from md import protocol
from md.boxes import read_box
from md.composition import Realisation, realise
from md.config import RunConfig
from md.engine.state import PerReplica
from md.recording import Portion, build_topology, write_pdb
from md.run_folder import RunFolder
from md.run_log import RunLog


@dataclass(frozen=True)
class Condition:
    """One composition at one temperature: replicas that stand side by side in the batch and are analysed together.

    name    of its folder in the run; '' where it is the only one, whose folder is that of the run
    config  of a run of this condition alone
    first   its first replica in the batch
    """

    name: str
    config: RunConfig
    folder: RunFolder
    box: Realisation
    first: int

    @property
    def title(self) -> str:
        """What a line about it begins with."""
        return f"{self.name}: " if self.name else ""

    @property
    def n_replicas(self) -> int:
        return self.config.build.replicas

    @property
    def n_atoms(self) -> int:
        """Number of atoms of all replicas."""
        return self.n_replicas * self.box.n_atoms


def conditions_of(config: RunConfig, folder: Path) -> list[Condition]:
    """Return the conditions of a run in the order of its batch."""
    conditions: list[Condition] = []
    for name, alone in config.each_condition().items():
        box = realise(alone.what(), n_atoms=alone.build.atoms)
        first = sum(before.n_replicas for before in conditions)
        conditions.append(Condition(name, alone, RunFolder(folder / name), box, first))
    return conditions


def per_replica(conditions: Sequence[Condition], values: Sequence[float], *, device: torch.device) -> PerReplica:
    """Return a value of each condition as one number where all agree, else as one for each replica."""
    if len(set(values)) == 1:
        return values[0]
    repeats = torch.tensor([condition.n_replicas for condition in conditions])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(repeats).to(device)


def portions(conditions: Sequence[Condition], systems: Sequence[System], *, stage: str) -> list[Portion]:
    """Return which replicas write to which folder in a stage."""
    return [
        Portion(
            each.folder.stage(stage),
            build_topology(systems[each.first], each.box.counts),
            slice(each.first, each.first + each.n_replicas),
        )
        for each in conditions
    ]


def start_systems(conditions: Sequence[Condition], *, log: RunLog) -> list[System]:
    """Pack the boxes, or read those packed before; what is read is what is used, so that both are the same."""
    systems: list[System] = []
    for condition in conditions:
        folder, structure = condition.folder, condition.config.structure
        if not folder.start.exists():
            _write_start(condition, log=log)
        systems += [System.from_atoms(atoms) for atoms in ase.io.read(folder.start, index=":", format="extxyz")]
        if structure is not None:
            given, start = read_box(structure)[1].positions, systems[condition.first].positions
            if given.shape != start.shape or not np.allclose(given, start, atol=1.0e-6):
                raise InputError(f"{structure} has changed since {folder.path} was begun. Choose another folder.")
    return systems


def start_box(config: RunConfig) -> tuple[Realisation, System]:
    """Return the counts and one box of a configuration of one condition: packed, or of its structure file."""
    if len(config.each_condition()) > 1:
        raise InputError("Several conditions have several boxes: keep one electrolyte and one temperature.")
    box = realise(config.what(), n_atoms=config.build.atoms)
    if config.structure is not None:
        return box, read_box(config.structure)[1]
    return box, _pack(config, box, seed=config.build.seed)


def packing_density(config: RunConfig, box: Realisation) -> float:
    """Return the density to pack at [g/cm3]."""
    if config.build.density is not None:
        return config.build.density / GRAM_PER_CM3
    return protocol.PACKING_FRACTION * box.density_g_cm3


def _pack(config: RunConfig, box: Realisation, *, seed: int) -> System:
    density = packing_density(config, box)
    return pack_box(box.counts, density_g_cm3=density, seed=seed, tolerance_A=config.build.tolerance)


def _write_start(condition: Condition, *, log: RunLog) -> None:
    """Write the boxes a condition starts from, all at once, and the first as PDB; every box has its own seed."""
    config, box, folder = condition.config, condition.box, condition.folder
    if config.structure is not None:
        systems = [read_box(config.structure)[1]] * condition.n_replicas
        log.line(f"{condition.title}start from {config.structure}")
    else:
        first = config.build.seed + condition.first
        systems = [_pack(config, box, seed=first + replica) for replica in range(condition.n_replicas)]
        log.line(
            f"{condition.title}packed {systems[0].volume ** (1.0 / 3.0):.2f} Å box at "
            f"{packing_density(config, box):.3f} g/cm3 (liquid, by ideal mixing: {box.density_g_cm3:.3f} g/cm3)"
        )
    with replacing(folder.start) as draft:
        ase.io.write(draft, [system.to_atoms() for system in systems], format="extxyz")
    write_pdb(folder.path / "start.pdb", systems[0], build_topology(systems[0], box.counts))
