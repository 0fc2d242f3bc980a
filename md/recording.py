"""Reporters that write a stage's HDF5 files, and the start structure for eyes and other programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols
from ase.geometry import cell_to_cellpar

from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError
from bamboo.files import write_text
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import formal_bonds, molecule_names
from bamboo.system import System
from md.engine.state import MDState, charge_current
from md.topology import Topology
from md.trajectory import Ensemble, ThermoWriter, TrajectoryWriter


def build_topology(system: System, counts: dict[str, int]) -> Topology:
    """Return the topology of a packed box: names, formal charges and bonds of its molecules in packing order."""
    names = molecule_names(counts)
    if system.molecule is None or int(system.molecule[-1]) + 1 != len(names):
        raise ValueError("The box does not hold the molecules it was packed from.")
    return Topology(
        numbers=system.numbers,
        masses=ATOMIC_MASSES[system.numbers],
        molecule=system.molecule,
        molecule_names=names,
        molecule_charges=np.array([molecule(name).charge for name in names], dtype=np.float64),
        bonds=tuple((int(i), int(j)) for i, j in formal_bonds(names)),
    )


def trajectory_path(folder: Path, replica: int) -> Path:
    """Return the trajectory file of a replica: traj.h5, traj-2.h5, traj-3.h5, ..."""
    return folder / ("traj.h5" if replica == 0 else f"traj-{replica + 1}.h5")


def molecular_dipole(state: MDState) -> torch.Tensor:
    """Return the sum of the dipoles of all molecules of each replica, (R, 3), e Å.

    M = sum_i q_i (r_i - R_m), R_m the centre of mass of the molecule of atom i: what charge a molecule has in excess of
    neutrality counts as sitting there. Charges of the latest evaluation; molecules whole (positions unwrapped).
    """
    molecule = state.batch.molecule
    if molecule is None:
        raise InputError("The dipole needs to know the molecules: give every system its `molecule` indices.")
    weighted = torch.cat([state.masses[:, None] * state.batch.positions, state.masses[:, None]], dim=1)
    sums = weighted.new_zeros((int(molecule.max()) + 1, 4)).index_add_(0, molecule, weighted)
    centres = (sums[:, :3] / sums[:, 3:])[molecule]
    return state.sum_by_replica(state.charges[:, None] * (state.batch.positions - centres))


@dataclass(frozen=True)
class Portion:
    """Consecutive replicas of a batch, all of one topology, that are recorded in one folder."""

    folder: Path
    topology: Topology
    replicas: slice

    @property
    def n_replicas(self) -> int:
        return int(self.replicas.stop - self.replicas.start)


class FrameRecorder:
    """Writes unwrapped frames of all replicas, one ``traj.h5`` each."""

    def __init__(self, portions: Sequence[Portion], *, ensemble: Ensemble, stride: int) -> None:
        self.stride = stride
        self._portions, self._ensemble = portions, ensemble
        self._writers: list[TrajectoryWriter] = []

    def truncate(self, step: int) -> None:
        for portion in self._portions:
            portion.folder.mkdir(parents=True, exist_ok=True)
            for replica in range(portion.n_replicas):
                path = trajectory_path(portion.folder, replica)
                resume_step = _prepare(path, step)
                writer = TrajectoryWriter(path, portion.topology, ensemble=self._ensemble, resume_step=resume_step)
                self._writers.append(writer)

    def report(self, state: MDState) -> None:
        for writer, system in zip(self._writers, state.systems(), strict=True):
            writer.append(state.step, state.time_fs / 1000.0, positions=system.positions, cell=system.cell)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        while self._writers:
            self._writers.pop().close()


class ThermoRecorder:
    """Writes ``thermo.h5``: pressure tensor, charge current, dipole and thermodynamic series of all replicas."""

    def __init__(self, portions: Sequence[Portion], *, ensemble: Ensemble, stride: int) -> None:
        self.stride = stride
        self._portions, self._ensemble = portions, ensemble
        charges = [np.tile(portion.topology.molecule_charges, portion.n_replicas) for portion in portions]
        self._charges = torch.from_numpy(np.concatenate(charges))
        self._writers: list[ThermoWriter] = []

    def truncate(self, step: int) -> None:
        for portion in self._portions:
            path = portion.folder / "thermo.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            resume_step = _prepare(path, step)
            writer = ThermoWriter(path, n_replicas=portion.n_replicas, ensemble=self._ensemble, resume_step=resume_step)
            self._writers.append(writer)

    def pressure(self, state: MDState) -> torch.Tensor:
        """Return the pressure tensor to write, (n_replicas, 3, 3) eV/Å^3."""
        return state.pressure_tensor()

    def report(self, state: MDState) -> None:
        values = {
            "temperature_K": state.temperature_K(),
            "volume": state.volume,
            "density_g_cm3": state.density_g_cm3,
            "potential_energy": state.energy,
            "kinetic_energy": state.kinetic_energy(),
            "conserved_energy": state.conserved_energy,
            "pressure": self.pressure(state),
            "charge_current": charge_current(state, self._charges.to(state.device)),
            "dipole": molecular_dipole(state),
        }
        host = {name: value.detach().cpu().numpy() for name, value in values.items()}
        for writer, portion in zip(self._writers, self._portions, strict=True):
            mine = {name: value[portion.replicas] for name, value in host.items()}
            writer.append(state.step, state.time_fs / 1000.0, values=mine)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        while self._writers:
            self._writers.pop().close()


def _prepare(path: Path, step: int) -> int | None:
    """Return the step to resume a file behind, or None, with an old file removed, where the stage starts afresh."""
    if step >= 0:
        if not path.exists():
            raise InputError(
                f"{path} is gone, and the run is in the middle of it. Restore it, or begin in a new folder."
            )
        return step
    path.unlink(missing_ok=True)
    return None


def write_pdb(path: Path, system: System, topology: Topology) -> None:
    """Write one structure as PDB; molecules are residues. Fixed columns hold 99999 atoms, larger numbers wrap."""
    a, b, c, *angles = cell_to_cellpar(system.cell)
    lines = [f"CRYST1{a:9.3f}{b:9.3f}{c:9.3f}" + "".join(f"{angle:7.2f}" for angle in angles) + " P 1           1"]
    for index, (number, position) in enumerate(zip(system.numbers, system.positions, strict=True)):
        residue = int(topology.molecule[index])
        symbol = chemical_symbols[number]
        x, y, z = position
        lines.append(
            f"HETATM{(index + 1) % 100000:5d} {symbol:<4s} {topology.molecule_names[residue][:3]:>3s} A"
            f"{(residue + 1) % 10000:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00          {symbol:>2s}"
        )
    write_text(path, "\n".join([*lines, "END"]) + "\n")
