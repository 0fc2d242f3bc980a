"""Density alignment: a liquid's pressure is shifted by a wanted amount, and all else is held where it was.

What must change. In equilibrium P V = (N_mol - 1) k T + tr(W_mol) / 3, with the centre of mass of the box at rest, and
the molecular virial, symmetrised,

    W_mol = W - sum_i F_i (x) (r_i - R_m(i)),      W = -dE/dstrain,  R_m the centre of mass of atom i's molecule,

the derivative of the energy as molecules move apart without changing shape. So P changes by s where W_mol changes by
V s on the diagonal. The whole W is not the thing to shift: stiffer bonds could take the shift up, and the next
simulation would give it back as they relax. Neither is a sum over edges between molecules needed (the published
choice): W_mol follows from forces and virial, holds whatever many-body terms there are, and is exact.

The loss. Over frames of the liquids, with the present model's own predictions as labels (index 0), and over clusters,
with what quantum chemistry says of them,

    L = w_P H((W_mol - W_mol,0 - V s 1) / sqrt(n)) + w_F H(F - F_0) + w_E H((E - E_0) / sqrt(n)) + w_q H(q - q_0) + ...

(H and the averages of ``learn/losses.py``; the first term for liquids only). In a liquid nothing moves that the
pressure does not ask for, and among the ways to shift it the clusters choose the one that is nearest to the truth: with
the model's own predictions as their labels too, errors of clusters added up from round to round (docs/alignment.md).
For s = 0 the present model is returned as it is. The liquid answers the shift by moving, so measure again and repeat
(``md/align.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Batch as Stack
from torch_geometric.data import Data

from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError
from bamboo.forcefield import ForceField
from bamboo.learn.fit import choose_trained
from bamboo.learn.loop import Loop, LoopConfig, Progress
from bamboo.learn.losses import LossWeights, molecular_virial
from bamboo.learn.samples import make_sample, unpack
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import System


@dataclass(frozen=True)
class Liquid:
    """Frames of one liquid (boxes with known, whole molecules) and the wanted change of its pressure [eV/Å^3]."""

    systems: Sequence[System]
    shift: float


def arms(system: System) -> np.ndarray:
    """Return r_i - R_m(i), (n_atoms, 3) Å: each atom from the centre of mass of its molecule, which must be whole."""
    if system.molecule is None:
        raise InputError("Alignment needs to know the molecules: give every system its `molecule` indices.")
    mass = ATOMIC_MASSES[system.numbers]
    total = np.bincount(system.molecule, weights=mass)
    centre = np.stack([np.bincount(system.molecule, weights=mass * x) / total for x in system.positions.T], axis=1)
    return np.asarray(system.positions - centre[system.molecule])


def shifted_sample(force_field: ForceField, system: System, shift: float) -> Data:
    """Return a frame of a liquid whose labels are the model's own predictions, its pressure shifted [eV/Å^3]."""
    frame = Frame(system, Labels(level="own prediction", energy=0.0), "periodic", "liquid", "own")
    sample = Stack.from_data_list([make_sample(force_field, frame)])
    output = force_field(*unpack(sample), fixed_terms=False)
    sample = sample.to_data_list()[0]
    sample.energy, sample.forces, sample.charges = output.energy, output.forces, output.charges
    sample.arms = torch.from_numpy(arms(system))
    own = molecular_virial(output, sample.arms, torch.zeros(system.n_atoms, dtype=torch.int64))
    sample.molecular_virial = own + system.volume * shift * torch.eye(3, dtype=torch.float64)
    return sample


def cluster_sample(force_field: ForceField, frame: Frame) -> Data:
    """Return a labelled frame in a form that stacks with frames of liquids; its molecular virial has no label."""
    sample = make_sample(force_field, frame)
    sample.arms = torch.zeros(frame.system.n_atoms, 3, dtype=torch.float64)
    sample.molecular_virial = torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
    return sample


def shift_pressures(
    force_field: ForceField,
    liquids: Sequence[Liquid],
    *,
    clusters: Sequence[Frame],
    trained: str,
    weights: LossWeights,
    config: LoopConfig,
    state_path: Path | None = None,
    listener: Callable[[Progress], None] = lambda _: None,
) -> ForceField:
    """Return the force field fine-tuned so that the pressure of each liquid shifts as wanted; see the module's text.

    clusters    labelled frames, which keep energies, forces, charges and dipoles true
    trained     weights that may move: "energy_head" or "all"
    state_path  where the state of the optimisation is kept, so that a second call continues

    With every shift zero the same object comes back, its weights untouched.
    """
    if not any(liquid.shift for liquid in liquids):
        return force_field
    force_field = force_field.train()
    samples = [shifted_sample(force_field, system, liquid.shift) for liquid in liquids for system in liquid.systems]
    samples += [cluster_sample(force_field, frame) for frame in clusters]
    choose_trained(force_field, trained)
    loop = Loop(force_field, samples, weights=weights, config=config, state_path=state_path)
    loop.run(listener)
    return loop.averaged.eval()


def molecular_pressure(force_field: ForceField, systems: Sequence[System]) -> np.ndarray:
    """Return tr(W_mol) / (3 V) of each system, (n_systems,) eV/Å^3, without terms that are not trained."""
    pressures = []
    for system in systems:
        virial = shifted_sample(force_field, system, 0.0).molecular_virial[0]
        pressures.append(float(virial.diagonal().sum()) / (3.0 * system.volume))
    return np.array(pressures)
