"""From many cheap labels and a few good ones to many good ones: a short-range difference model lifts the large set.

A level of theory L gives, apart from reference energies, E_L = S_L + E_el(q_L) + D_L. The charges of two levels differ
and with them the long-range electrostatics; only the rest S_L is short-ranged, so that a network with a cutoff can
learn how it differs from level to level. Where both labels of one geometry are known, the network is given

    E = E_good - (E_cheap - D) + E_el(q_cheap),        charges and dipole of the good level,

to be fitted by S + E_el(q): a force field without dispersion and repulsion. D is the dispersion of the base model (good
labels contain none), E_el(q_cheap) the electrostatic energy of the base model, both with their exact derivatives.
Then any cheap label is lifted by E = E_cheap - D - E_el(q_cheap) + (S + E_el(q)); forces and virials likewise.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField
from bamboo.learn.samples import make_sample, unpack
from bamboo.neighbors import find_neighbors
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import Batch

LIFTED = "; lifted"  # ends the level of a lifted label


def electrostatic_part(force_field: ForceField) -> ForceField:
    """Return a copy whose only trained term is the Coulomb energy of the predicted charges."""
    part = copy.deepcopy(force_field)
    with torch.no_grad():
        for head in (part.energy_head, part.electronegativity_head, part.hardness_head):
            for parameter in head[len(head) - 1].parameters():
                parameter.zero_()
        part.reference_electronegativity.zero_()
    return part


class Remainder:
    """What is left of cheap labels without dispersion and electrostatics of the base model: E_cheap - D - E_el."""

    def __init__(self, base: ForceField) -> None:
        self.base, self.electrostatics = base, electrostatic_part(base)

    def __call__(self, frame: Frame) -> Labels:
        """Return the labels of the remainder; charges and dipole are absent."""
        batch = Batch.from_systems([frame.system])
        config = self.base.config
        neighbors = find_neighbors(batch, config.network.cutoff, config.dispersion.cutoff)
        electric = self.electrostatics(batch, neighbors, fixed_terms=False)
        strain = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
        positions = batch.positions.clone().requires_grad_()
        strained, cell = positions + positions @ strain[0], batch.cell + batch.cell @ strain
        dispersion = self.base.fixed_terms(batch, strained, cell, neighbors=neighbors)["dispersion"].sum()
        gradient, strain_gradient = torch.autograd.grad(dispersion, (positions, strain))
        labels = frame.labels
        known = electric.energy.sum() + dispersion.detach()
        return Labels(
            level=labels.level,
            energy=labels.energy - float(known),
            forces=_minus(labels.forces, electric.forces - gradient),
            virial=_minus(labels.virial, electric.virial[0] - strain_gradient[0]),
        )


def _minus(label: np.ndarray | None, known: torch.Tensor) -> np.ndarray | None:
    return None if label is None else label - known.numpy()


def _geometry(frame: Frame) -> bytes:
    system = frame.system
    return system.numbers.tobytes() + system.positions.astype(np.float32).tobytes()


def difference_frames(base: ForceField, cheap: Iterable[Frame], good: Sequence[Frame]) -> list[Frame]:
    """Return the frames that the difference model learns from, one per geometry that has both labels.

    base   the model trained on the cheap labels, whose electrostatics and dispersion are taken out of them
    Raises InputError where a good label has no cheap partner: its difference would be unknown.
    """
    partners = {_geometry(frame): frame for frame in cheap}
    missing = [frame.trajectory for frame in good if _geometry(frame) not in partners]
    if missing:
        raise InputError(f"{len(missing)} frames have no label of the cheap level, the first in '{missing[0]}'.")
    remainder = Remainder(base)
    frames = []
    for frame in good:
        low, high = remainder(partners[_geometry(frame)]), frame.labels
        forces = None if high.forces is None or low.forces is None else high.forces - low.forces
        labels = replace(
            high, level=f"{high.level} - {low.level}", energy=high.energy - low.energy, forces=forces, virial=None
        )
        frames.append(replace(frame, labels=labels))
    return frames


def lift_frames(
    base: ForceField,
    difference: ForceField,
    cheap: Sequence[Frame],
    *,
    level: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[Frame]:
    """Return cheap frames with lifted labels: the remainder plus the difference model, with its charges and dipole.

    level  of the labels that the difference model learnt from; the lifted ones are marked as such
    """
    remainder = Remainder(base)
    lifted = []
    for index, frame in enumerate(cheap):
        low, sample = remainder(frame), make_sample(difference, frame)
        high = difference(*unpack(sample))
        labels = Labels(
            level=level + LIFTED,
            energy=low.energy + float(high.energy),
            forces=_minus(low.forces, -high.forces),
            charges=high.charges.numpy(),
            dipole=None if frame.system.pbc else high.dipole[0].numpy(),
            virial=_minus(low.virial, -high.virial[0]),
        )
        lifted.append(replace(frame, labels=labels))
        if progress is not None:
            progress(index + 1, len(cheap))
    return lifted
