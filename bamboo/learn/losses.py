"""What training minimises: weighted, robust deviations from the labels that are present.

All parts are averages over a batch in internal units (eV, Å, e). Robust means Huber's function,
H(x) = x^2 for |x| < d and d (2 |x| - d) beyond, so that a few violent contacts do not rule the gradient.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import huber_loss
from torch_geometric.data import Data

from bamboo.forcefield import ForceFieldOutput


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part; 0 leaves a label out.

    forces      per component, (eV/Å)^-2
    molecular_forces   per component of the force on a whole molecule, (eV/Å)^-2, where there are several: what moves
                liquids, and small beside the forces inside molecules
    energy      per sqrt(n_atoms): H(dE / sqrt(n)), eV^-2
    charges     e^-2
    dipole      (e Å)^-2, clusters
    virial      per sqrt(n_atoms), eV^-2, periodic boxes
    raw_charge  ((Q - sum q~)^2 / n), e^-2: makes the charges nearly right before the total charge is shared out
    molecular_virial   per sqrt(n_atoms), eV^-2, of samples that carry such a target (``learn/align.py``)
    """

    forces: float = 1.0
    molecular_forces: float = 0.2
    energy: float = 0.2
    charges: float = 0.5
    dipole: float = 0.3
    virial: float = 1.0
    raw_charge: float = 1.0
    molecular_virial: float = 1.0


# internal units
HUBER_WIDTH = {
    "forces": 1.0, "molecular_forces": 1.0, "energy": 0.05, "charges": 0.1, "dipole": 0.2, "virial": 0.2,
    "molecular_virial": 0.2,
}  # fmt: skip


def deviations(output: ForceFieldOutput, data: Data, n_atoms: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return prediction minus label for every label that is present, scaled per sqrt(n_atoms) where it is extensive.

    n_atoms (n_systems,); the values are flat tensors. Only labels are looked at for what is absent: a prediction that
    is nan must make the loss nan.
    """
    root = n_atoms.double().sqrt()
    # the dipole of a charged cluster is compared about the same origin as its label: the difference has no origin
    differences = {
        "forces": output.forces - data.forces,
        "molecular_forces": molecular_forces(output, data.molecule_index) - data.molecular_forces,
        "energy": (output.energy - data.energy) / root,
        "charges": output.charges - data.charges,
        "dipole": output.dipole - data.dipole,
        "virial": (output.virial - data.virial) / root[:, None, None],
    }
    if "molecular_virial" in data:
        target = molecular_virial(output, data.arms, data.batch)
        differences["molecular_virial"] = (target - data.molecular_virial) / root[:, None, None]
    return {name: value[~data[name].isnan()] for name, value in differences.items()}


def molecular_forces(output: ForceFieldOutput, molecule_index: torch.Tensor) -> torch.Tensor:
    """Return the force on each molecule, (n_atoms, 3) eV/Å by its number; rows that are no molecule's are zero."""
    return torch.zeros_like(output.forces).index_add(0, molecule_index.long(), output.forces)


def molecular_virial(output: ForceFieldOutput, arms: torch.Tensor, system_index: torch.Tensor) -> torch.Tensor:
    """Return W - sum_i F_i (x) a_i, (n_systems, 3, 3) eV: -dE/dstrain where molecules move as rigid bodies.

    arms  (n_atoms, 3) Å, a_i = r_i - R_m(i), each atom from the centre of mass of its molecule
    Symmetrised: its antisymmetric part is a torque on the molecules, which no pressure contains.
    """
    turned = torch.einsum("na,nb->nab", output.forces, arms)
    inside = torch.zeros_like(output.virial).index_add(0, system_index, 0.5 * (turned + turned.transpose(1, 2)))
    return output.virial - inside


def loss_parts(output: ForceFieldOutput, data: Data, n_atoms: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the unweighted parts of the loss by name; parts without labels in this batch are absent."""
    parts = {}
    for name, deviation in deviations(output, data, n_atoms).items():
        if len(deviation):
            width = HUBER_WIDTH[name]
            parts[name] = 2.0 * huber_loss(deviation, torch.zeros_like(deviation), delta=width)
    parts["raw_charge"] = ((data.total_charge - output.raw_charge).square() / n_atoms).mean()
    return parts


def total_loss(parts: dict[str, torch.Tensor], weights: LossWeights) -> torch.Tensor:
    """Return the weighted sum of the parts."""
    return torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
