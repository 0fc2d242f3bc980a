"""How far a force field is from labels it was not trained on."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField
from bamboo.learn.losses import molecular_forces
from bamboo.learn.samples import EdgeBudgetSampler, unpack
from bamboo.quantum.dataset import Frame
from bamboo.system import Batch

MODERATE_FORCE = 150.0  # kcal/mol/Å: frames beyond are reported apart
MODERATE_TEMPERATURE = 600.0  # K


@dataclass(frozen=True)
class Errors:
    """Root mean square errors over a set of frames, internal units (eV, Å, e); nan where no label is present.

    forces per component; molecular_forces per component of the force on a whole molecule, where there are several;
    energy per atom; charges; dipole per component; pressure: mean signed and RMS error [eV/Å^3] of periodic frames;
    raw_charge: RMS of Q - sum q~ per cluster.
    """

    n_frames: int
    n_atoms: int
    forces: float
    molecular_forces: float
    energy_per_atom: float
    charges: float
    dipole: float
    pressure_mean: float
    pressure: float
    raw_charge: float


def evaluate(
    force_field: ForceField,
    samples: Sequence[Data],
    groups: Sequence[str],
    *,
    edges_per_batch: int = 12000,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Errors]:
    """Return the errors of each group of samples and of all ("all"); ``groups`` names the group of each sample.

    Raises InputError where a prediction is not finite: left out, it would flatter the model.
    """
    sampler = EdgeBudgetSampler([s.edge_index.shape[1] for s in samples], budget=edges_per_batch, seed=0, shuffle=False)
    collected: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    done = 0
    for members, data in zip(
        sampler.batches(),
        DataLoader(list(samples), batch_sampler=sampler),
        strict=True,
    ):
        batch, neighbors = unpack(data)
        output = force_field(batch, neighbors, fixed_terms=False)
        for name in ("energy", "forces", "virial", "charges"):
            if not bool(torch.isfinite(getattr(output, name)).all()):
                where = f"held-out frames {members[0]} to {members[-1]}"
                raise InputError(f"The model predicts {name} that are not finite in {where}: its weights are broken.")
        sizes = batch.atoms_per_system
        on_molecules = molecular_forces(output, data.molecule_index) - data.molecular_forces
        volume = np.abs(np.linalg.det(data.cell.numpy()))
        for position, index in enumerate(members):
            atoms = (batch.system_index == position).numpy()
            virial = np.trace((output.virial - data.virial)[position].numpy())
            error = {
                "forces": (output.forces - data.forces).numpy()[atoms].ravel(),
                "molecular_forces": on_molecules.numpy()[atoms].ravel(),
                "energy_per_atom": (output.energy - data.energy).numpy()[position : position + 1]
                / int(sizes[position]),
                "charges": (output.charges - data.charges).numpy()[atoms],
                "dipole": (output.dipole - data.dipole).numpy()[position],
                "pressure": np.array([virial / (3.0 * volume[position])]) if bool(batch.pbc[position]) else np.empty(0),
                "raw_charge": (output.raw_charge - data.total_charge).numpy()[position : position + 1],
            }
            for name, values in error.items():
                collected[groups[index]][name].append(values)
                collected["all"][name].append(values)
        done += len(members)
        if progress is not None:
            progress(done, len(samples))
    return {group: _summary(parts) for group, parts in sorted(collected.items())}


def _summary(parts: dict[str, list[np.ndarray]]) -> Errors:
    def rms(name: str) -> float:
        values = np.concatenate(parts[name])
        values = values[~np.isnan(values)]  # labels that are absent
        return float(np.sqrt(np.mean(values**2))) if len(values) else float("nan")

    pressure = np.concatenate(parts["pressure"])
    pressure = pressure[~np.isnan(pressure)]
    return Errors(
        n_frames=len(parts["energy_per_atom"]),
        n_atoms=sum(len(values) for values in parts["charges"]),
        forces=rms("forces"),
        molecular_forces=rms("molecular_forces"),
        energy_per_atom=rms("energy_per_atom"),
        charges=rms("charges"),
        dipole=rms("dipole"),
        pressure_mean=float(pressure.mean()) if len(pressure) else float("nan"),
        pressure=rms("pressure"),
        raw_charge=rms("raw_charge"),
    )


def disagreement(
    models: Sequence[ForceField], frames: Sequence[Frame], *, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.float64]:
    """Return, per frame, the largest standard deviation over models of the force on an atom [eV/Å], (n_frames,)."""
    evaluators = [Evaluator(model) for model in models]
    largest = np.empty(len(frames))
    for index, frame in enumerate(frames):
        batch = Batch.from_systems([frame.system])
        forces = torch.stack([evaluator.evaluate(batch).forces for evaluator in evaluators])
        largest[index] = float(forces.var(dim=0).sum(-1).max().sqrt())
        if progress is not None:
            progress(index + 1, len(frames))
    return largest
