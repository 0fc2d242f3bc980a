"""The force field: network, charges and physical terms composed; derivatives taken once, here.

E = E_network + E_electrostatic + E_electronegativity + E_dispersion + E_repulsion + E_reference

This is the reference implementation: plain torch, differentiable twice, the truth that every fast engine is held to.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from bamboo.elements import symbols_of
from bamboo.errors import InputError, UnknownElementError
from bamboo.neighbors import Neighbors
from bamboo.nn.get import GraphEquivariantTransformer, NetworkConfig, mlp
from bamboo.nn.radial import safe_norm
from bamboo.system import Batch
from bamboo.terms import electrostatics, ewald
from bamboo.terms.charges import bound, neutralise, system_sum
from bamboo.terms.dispersion import ROWS, Dispersion, DispersionConfig
from bamboo.terms.repulsion import LONGEST_WALL, repulsion_energy


@dataclass(frozen=True)
class ForceFieldConfig:
    """Everything but the numbers in the tensors; written into the model file.

    network           size and kind of the transformer
    dispersion        shape of the pair dispersion
    repulsion         add the fixed short-range wall (absent in imported published models)
    charge_response   "full": forces are the exact gradient, also through the charges; "frozen": charges are held
                      fixed when the energy is differentiated, in the Coulomb and the electronegativity terms, as
                      published (energy is then not conserved)
    charge_limit      e, bound of an atomic charge before the total charge is shared out (published: 2; Mulliken
                      charges of sulfur in FSI- reach 1.9 and would sit in the flat part of the tanh)
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    dispersion: DispersionConfig = field(default_factory=DispersionConfig)
    repulsion: bool = True
    charge_response: str = "full"
    charge_limit: float = 3.0

    def __post_init__(self) -> None:
        if self.charge_response not in ("full", "frozen"):
            raise InputError(f"charge_response is '{self.charge_response}', expected 'full' or 'frozen'.")
        if not self.charge_limit > 0:
            raise InputError(f"charge_limit = {self.charge_limit} e, expected a positive charge.")
        if self.repulsion and self.dispersion.cutoff < LONGEST_WALL:
            raise InputError(
                f"dispersion.cutoff = {self.dispersion.cutoff} Å, expected at least {LONGEST_WALL:.1f} Å: "
                "the repulsion reads the same list of pairs."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ForceFieldConfig":
        """Rebuild from ``to_dict``; unknown or missing keys and values of a wrong kind are refused."""
        try:
            network = NetworkConfig(**_checked(NetworkConfig(), values["network"]))
            dispersion = DispersionConfig(**_checked(DispersionConfig(), values["dispersion"]))
            rest = {name: value for name, value in values.items() if name not in ("network", "dispersion")}
            return cls(network=network, dispersion=dispersion, **_checked(cls(), rest))
        except (AttributeError, TypeError, KeyError) as error:
            raise InputError(f"The force-field settings are not valid: {error}.") from error


def _checked(defaults: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values if they are all there, each of the kind of the default and finite."""
    missing = [item.name for item in fields(defaults) if item.name not in (*values, "network", "dispersion")]
    if missing:
        raise InputError(f"The force-field setting {missing[0]} is missing.")
    for name, value in values.items():
        kind = type(getattr(defaults, name))
        good = type(value) is kind or (kind is float and type(value) is int)
        if not good or (kind is float and not math.isfinite(value)):
            raise InputError(f"The force-field setting {name} = {value!r} is not valid, expected a {kind.__name__}.")
    return values


@dataclass(frozen=True, eq=False)
class ForceFieldOutput:
    """What a force field says of a batch; float64.

    energy (n_systems,) eV; forces (n_atoms, 3) eV/Å; virial (n_systems, 3, 3) eV, -dE/dstrain; charges (n_atoms,) e;
    dipole (n_systems, 3) e Å about the origin of the coordinates (of little meaning in a periodic box);
    raw_charge (n_systems,) e, the sum of the charges before the total charge was shared out;
    terms name -> (n_systems,) eV, adding up to the energy.
    """

    energy: torch.Tensor
    forces: torch.Tensor
    virial: torch.Tensor
    charges: torch.Tensor
    dipole: torch.Tensor
    raw_charge: torch.Tensor
    terms: dict[str, torch.Tensor]


class _Gate:
    """Passes values on, but gradients only once it is open.

    Charges behind it are constants while forces are taken, and still learn from losses on those forces afterwards.
    """

    def __init__(self) -> None:
        self.open = False

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        behind = values.clone()
        if behind.requires_grad:
            behind.register_hook(self._pass)
        return behind

    def _pass(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self.open else torch.zeros_like(gradient)


class ForceField(nn.Module):
    """Graph equivariant transformer with charges, electrostatics, dispersion and repulsion."""

    def __init__(self, config: ForceFieldConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.network.channels
        self.embedding = nn.Embedding(ROWS, channels)
        self.network = GraphEquivariantTransformer(config.network)
        self.energy_head = mlp(channels)
        self.charge_head = mlp(channels)
        self.electronegativity_head = mlp(channels)  # read the element embedding alone
        self.hardness_head = mlp(channels)
        self.dispersion = Dispersion(config.dispersion)
        self.reference_energy: torch.Tensor
        self.reference_charge: torch.Tensor
        self.reference_electronegativity: torch.Tensor
        self.known: torch.Tensor
        for name in ("reference_energy", "reference_charge", "reference_electronegativity"):
            self.register_buffer(name, torch.zeros(ROWS, dtype=torch.float64))  # eV, e, sqrt(eV/e)
        self.register_buffer("known", torch.zeros(ROWS, dtype=torch.bool))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network; the physical terms are always evaluated in float64."""
        return self.embedding.weight.dtype

    @property
    def elements(self) -> list[str]:
        """Symbols of the elements the model was trained on."""
        return symbols_of(torch.nonzero(self.known).flatten().tolist())

    def to_dtype(self, dtype: torch.dtype) -> "ForceField":
        """Convert the trainable parameters (in place); the physical tables stay float64."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def check_elements(self, numbers: torch.Tensor) -> None:
        """Raise UnknownElementError if an element of the structure is not covered."""
        unknown = torch.unique(numbers[~self.known[numbers]]).tolist()
        if unknown:
            raise UnknownElementError(
                f"The model does not know {', '.join(symbols_of(unknown))}; it covers {' '.join(self.elements)}."
            )

    def forward(
        self, batch: Batch, neighbors: Neighbors, *, fixed_terms: bool = True, create_graph: bool = False
    ) -> ForceFieldOutput:
        """Return energy and its derivatives.

        fixed_terms   False leaves out what has no trainable parameter (dispersion, repulsion, reference energies)
        create_graph  True keeps the graph of the derivatives, for training on forces and virials
        """
        with torch.enable_grad():
            strain = torch.zeros_like(batch.cell).requires_grad_()
            positions = batch.positions.detach().clone().requires_grad_()
            strained = positions + torch.einsum("na,nab->nb", positions, strain[batch.system_index])
            cell = batch.cell + batch.cell @ strain
            response = _Gate()
            response.open = self.config.charge_response == "full"
            terms, charges, raw = self._terms(
                batch, strained, cell, neighbors=neighbors, response=response, twice=create_graph
            )
            if fixed_terms:
                terms |= self.fixed_terms(batch, strained, cell, neighbors=neighbors)
            energy = torch.stack(list(terms.values())).sum(0)
            gradient, strain_gradient = torch.autograd.grad(
                energy.sum(), (positions, strain), create_graph=create_graph
            )
            response.open = True
            dipole = system_sum(charges[:, None] * batch.positions, batch.system_index, batch.n_systems)
        outputs = {
            "energy": energy, "forces": -gradient, "virial": -strain_gradient,
            "charges": charges, "dipole": dipole, "raw_charge": raw,
        }  # fmt: skip
        if not create_graph:
            outputs = {name: tensor.detach() for name, tensor in outputs.items()}
        return ForceFieldOutput(**outputs, terms={name: value.detach() for name, value in terms.items()})

    def _terms(
        self,
        batch: Batch,
        positions: torch.Tensor,
        cell: torch.Tensor,
        *,
        neighbors: Neighbors,
        response: _Gate,
        twice: bool,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return each trained term (n_systems,), the charges (n_atoms,) and their raw sums (n_systems,)."""
        numbers, system_index = batch.numbers, batch.system_index
        edge_vec = neighbors.edges.vectors(positions, cell, system_index=system_index)
        embedding = self.embedding(numbers)
        h = self.network(embedding, edge_vec.to(self.dtype), neighbors.edges.index)

        def per_system(atomic: torch.Tensor) -> torch.Tensor:
            return system_sum(atomic, system_index, batch.n_systems)

        network = per_system(self.energy_head(h).squeeze(-1).double())
        free = self.charge_head(h).squeeze(-1).double() + self.reference_charge[numbers]
        raw = bound(free, self.config.charge_limit)
        charges = neutralise(raw, batch.total_charge, system_index)
        held = response(charges)
        chi, hardness = self._electronegativity(embedding, numbers)
        terms = {
            "network": network,
            "electrostatic": self._electrostatic(
                held, edge_vec, positions, cell, batch=batch, neighbors=neighbors, twice=twice
            ),
            "electronegativity": per_system(chi.square() * held + (hardness * held).square()),
        }
        return terms, charges, per_system(raw)

    def _electronegativity(self, embedding: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return chi [sqrt(eV/e)] and J [sqrt(eV)/e] per atom: E = sum chi^2 q + J^2 q^2."""
        chi = self.electronegativity_head(embedding).squeeze(-1).double() + self.reference_electronegativity[numbers]
        return chi, self.hardness_head(embedding).squeeze(-1).double()

    def _electrostatic(
        self,
        charges: torch.Tensor,
        edge_vec: torch.Tensor,
        positions: torch.Tensor,
        cell: torch.Tensor,
        *,
        batch: Batch,
        neighbors: Neighbors,
        twice: bool,
    ) -> torch.Tensor:
        """Return the Coulomb energy of each system, (n_systems,); twice, it will be differentiated twice."""
        system_index, cutoff = batch.system_index, self.config.network.cutoff
        energy = positions.new_zeros(batch.n_systems)
        ends = neighbors.cluster.index
        if ends.shape[1]:
            between = positions.index_select(0, ends[1]) - positions.index_select(0, ends[0])
            energy = energy + electrostatics.pair_sum(
                charges, between, ends, system_index=system_index, weight=torch.ones_like(energy), cutoff=None
            )
        if not bool(batch.pbc.any()):
            return energy
        energy = energy + electrostatics.pair_sum(
            charges,
            edge_vec,
            neighbors.edges.index,
            system_index=system_index,
            weight=0.5 * batch.pbc.to(energy.dtype),  # the list holds each pair twice
            cutoff=cutoff,
        )
        for system in torch.nonzero(batch.pbc).flatten().tolist():
            atoms = torch.nonzero(system_index == system).squeeze(-1)
            long_range = ewald if twice and len(atoms) <= ewald.MAX_ATOMS else electrostatics
            reciprocal = long_range.reciprocal_energy(charges[atoms], positions[atoms], cell[system], cutoff=cutoff)
            energy = energy.index_add(0, torch.tensor([system], device=energy.device), reciprocal[None])
        return energy

    def fixed_terms(
        self, batch: Batch, positions: torch.Tensor, cell: torch.Tensor, *, neighbors: Neighbors
    ) -> dict[str, torch.Tensor]:
        """Return the terms without trainable parameters, name -> (n_systems,) eV."""
        numbers, system_index = batch.numbers, batch.system_index
        zero = positions.new_zeros(batch.n_systems)
        i, j = neighbors.dispersion.index
        distance = safe_norm(neighbors.dispersion.vectors(positions, cell, system_index=system_index))
        dispersion = zero.index_add(0, system_index[i], self.dispersion(distance, numbers[i], numbers[j]))
        for system in torch.nonzero(batch.pbc).flatten().tolist():
            volume = torch.linalg.det(cell[system]).abs()
            tail = self.dispersion.tail_energy(numbers[system_index == system], volume)
            dispersion = dispersion.index_add(0, torch.tensor([system], device=zero.device), tail[None])
        terms = {"dispersion": dispersion}
        if self.config.repulsion:
            terms["repulsion"] = zero.index_add(0, system_index[i], repulsion_energy(distance, numbers[i], numbers[j]))
        terms["reference"] = system_sum(self.reference_energy[numbers], system_index, batch.n_systems)
        return terms
