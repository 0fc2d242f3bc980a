"""The Triton engine: the whole evaluation on a GPU, as one CUDA graph.

Sums over neighbours are Triton kernels (``triton_network.py``, ``triton_pairs.py``), matrices and the mesh are torch.
Lists are full and every atom collects its own sums; the same hand-derived backward pass as in the native engine carries
dE_network/dx and the response of the charges. Between two builds of the lists nothing waits for the host: on a GPU the
evaluation is captured once and replayed. With TRITON_INTERPRET=1 the same code runs on a CPU, slowly, for tests.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from bamboo import units
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels import triton_pairs as pairs
from bamboo.kernels.capture import captured
from bamboo.kernels.device_lists import Rows
from bamboo.kernels.mesh import MeshPlan, TorchMesh
from bamboo.kernels.native import EngineUnavailableError, fingerprint, tables
from bamboo.kernels.triton_network import INTERPRETED, Edges, Network, launch
from bamboo.neighbors import check_density
from bamboo.system import Batch
from bamboo.terms.charges import bound, system_sum
from bamboo.terms.dispersion import ROWS

LANES, WARPS = 64, 2  # of a program of ``triton_pairs`` on a GPU
_Results = tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]  # of TritonEngine._compute
VIRIAL = [0, 1, 2, 1, 3, 4, 2, 4, 5]  # where in xx xy xz yy yz zz the nine numbers are


@dataclass(frozen=True)
class _Boxes:
    """Periodic systems whose meshes have the same number of nodes: systems (R,), their atoms, the box of each atom."""

    systems: torch.Tensor
    atoms: torch.Tensor
    box_of: torch.Tensor
    mesh: TorchMesh


class _Tables:
    """The tables of a force field, on its device, and the settings of the kernels."""

    def __init__(self, force_field: ForceField) -> None:
        device, numbers = force_field.known.device, tables(force_field)

        def table(name: str) -> torch.Tensor:
            return torch.as_tensor(numbers[name], dtype=torch.float64).to(device)

        self.feature = table("feature_table")
        self.intervals = len(self.feature)
        self.chi_square, self.hardness = table("chi_square"), table("hardness")
        self.reference_charge = table("reference_charge")
        self.alpha = numbers["coulomb.alpha"]
        self.coulomb = {
            "CUTOFF": numbers["cutoff"], "STRENGTH": numbers["coulomb.strength"], "CONTACT": numbers["coulomb.contact"],
            "SHARPNESS": numbers["coulomb.sharpness"], "ALPHA": self.alpha,
        }  # fmt: skip
        c6, radius = table("dispersion.c6"), table("repulsion.covalent_radius")
        z = torch.arange(ROWS, dtype=torch.float64, device=device)
        power = z.pow(0.23)
        screening = [table("repulsion.screening_weight"), table("repulsion.screening_decay")]
        self.pairs = (
            (c6[:, None] * c6).sqrt(), numbers["dispersion.a2"] * table("dispersion.radius"), radius[:, None] + radius,
            units.COULOMB_CONSTANT * z[:, None] * z, (power[:, None] + power) / numbers["repulsion.screening_length"],
            torch.stack(screening, dim=1),
        )  # fmt: skip
        self.fixed = {
            "ROWS": ROWS, "CUTOFF": numbers["dispersion.cutoff"], "S6": numbers["dispersion.s6"],
            "A1": numbers["dispersion.a1"], "STEEPNESS": numbers["dispersion.steepness"],
            "DAMPING": numbers["dispersion.damping_length"],
            "SWITCH_START": numbers["dispersion.switch_start"] * numbers["dispersion.cutoff"],
            "SMOOTH": numbers["dispersion.smooth"], "WALL": numbers["repulsion"], "INNER": numbers["repulsion.inner"],
            "OUTER": numbers["repulsion.outer"], "TERMS": len(screening[0]),
        }  # fmt: skip


class _Plan:
    """The evaluation of one batch, and all of it that does not move: lists, meshes, constants of the atoms."""

    def __init__(self, force_field: ForceField, tables: _Tables, network: Network, batch: Batch) -> None:
        self.force_field, self.tables, self.network = force_field, tables, network
        self.batch, device = batch, batch.positions.device
        self.numbers, self.system = batch.numbers.to(torch.int32), batch.system_index.to(torch.int32)
        self.sizes = batch.atoms_per_system.double()
        self.periodic = batch.pbc.double()
        self.chi_square, self.hardness = tables.chi_square[batch.numbers], tables.hardness[batch.numbers]
        self.reference_charge = tables.reference_charge[batch.numbers]
        reference = force_field.reference_energy[batch.numbers]
        self.reference = system_sum(reference, batch.system_index, batch.n_systems)
        one = torch.ones((), dtype=torch.float64, device=device)
        self.tail = torch.stack([  # eV Å^3: dispersion beyond the cutoff, times the volume
            force_field.dispersion.tail_energy(batch.numbers[batch.system_index == system], one) * periodic
            for system, periodic in enumerate(self.periodic)
        ])  # fmt: skip
        self.virial = torch.tensor(VIRIAL, device=device)
        self.near, self.far = Rows(batch.n_atoms, device), Rows(batch.n_atoms, device)
        self.charged = self.near if bool(batch.pbc.all()) else Rows(batch.n_atoms, device)
        self.meshes = [MeshPlan() for _ in range(batch.n_systems)]
        self.mesh_sizes: list[tuple[int, ...]] | None = None
        self.boxes: list[_Boxes] = []

    def fits(self, batch: Batch) -> bool:
        """Tell whether the batch holds the same atoms in the same systems."""
        names = ("numbers", "system_index", "pbc")
        return all(torch.equal(getattr(self.batch, name), getattr(batch, name)) for name in names)

    def forget(self) -> None:
        """Choose the meshes anew when the next lists are built, without regard to the present ones."""
        self.meshes = [MeshPlan() for _ in self.meshes]

    def build_lists(self, batch: Batch, skin: float) -> bool:
        """Find the neighbours anew; return whether a tensor had to be replaced."""
        config = self.force_field.config
        near = torch.full_like(self.periodic, config.network.cutoff + skin)
        far = torch.full_like(self.periodic, config.dispersion.cutoff + skin)
        moved = [self.near.fill(batch, near), self.far.fill(batch, far)]
        if self.charged is not self.near:
            moved.append(self.charged.fill(batch, torch.where(batch.pbc, near, torch.inf)))
        if moved[0]:
            self.edges = Edges.empty(self.near, self.force_field.dtype)
        return any(moved)

    def build_meshes(self, batch: Batch) -> bool:
        """Choose the number of nodes for each cell; return whether any has changed."""
        periodic = torch.nonzero(batch.pbc).flatten().tolist()
        for system, cell in zip(periodic, batch.cell[batch.pbc].cpu().numpy(), strict=True):
            self.meshes[system].fit(cell)
        sizes = [tuple(self.meshes[system].size.tolist()) for system in periodic]
        if sizes == self.mesh_sizes:
            return False
        self.mesh_sizes = sizes
        device = batch.positions.device
        self.boxes = []
        for size in sorted(set(sizes)):
            members = [system for system, own in zip(periodic, sizes, strict=True) if own == size]
            box_of = torch.full((batch.n_systems,), -1, device=device)
            box_of[members] = torch.arange(len(members), device=device)
            atoms = torch.nonzero(box_of[batch.system_index] >= 0).flatten()
            self.boxes.append(
                _Boxes(
                    torch.tensor(members, device=device), atoms, box_of[batch.system_index[atoms]],
                    TorchMesh(size, self.tables.alpha, device),
                )
            )  # fmt: skip
        return True

    def compute(self, positions: torch.Tensor, cell: torch.Tensor, total_charge: torch.Tensor) -> _Results:
        """Evaluate; everything stays on the device. Returns the terms of the energy (6, n_systems), forces, virial,
        charges, dipole and raw charge, and the closest pair (distance, i, j).
        """
        config, batch = self.force_field.config, self.batch
        system, n_systems, limit = batch.system_index, batch.n_systems, config.charge_limit
        ledger = positions.new_zeros(pairs.LEDGER_ROWS, len(positions))
        closest = self._find_edges(positions, cell)
        energy, charge = self.network.forward(batch.numbers, self.edges)

        raw = bound(charge.double() + self.reference_charge, limit)
        raw_charge = system_sum(raw, system, n_systems)
        charges = raw + ((total_charge - raw_charge) / self.sizes)[system]
        self._coulomb(positions, cell, charges, ledger)
        potential = ledger[pairs.POTENTIAL.value]  # a view: the mesh adds its part
        electrostatic = system_sum(0.5 * charges * potential, system, n_systems)
        inverse, volume = _inverse_and_volume(cell)
        reciprocal, virial = self._add_mesh(positions, inverse, volume, charges, ledger)

        # E_chi = sum chi^2 q + J^2 q^2; dE/dq = phi + chi^2 + 2 J^2 q, then back through the shift and the bound
        chi_square, hardness = self.chi_square, self.hardness
        slope = potential + chi_square + 2.0 * hardness.square() * charges
        mean = system_sum(slope, system, n_systems) / self.sizes
        adjoint = (slope - mean[system]) * (1.0 - (raw / limit).square())
        if config.charge_response == "frozen":
            adjoint = torch.zeros_like(adjoint)
        self.edges.gradient.zero_()
        self.network.backward(adjoint.to(energy.dtype), self.edges)
        self._edge_forces(ledger)
        self._fixed(positions, cell, ledger)

        virials = pairs.VIRIAL.value
        per_atom = torch.stack([
            energy.double(), chi_square * charges + (hardness * charges).square(), ledger[pairs.DISPERSION.value],
            ledger[pairs.REPULSION.value], *(charges * positions.T), *ledger[virials : virials + 6],
        ], dim=1)  # fmt: skip
        total = system_sum(per_atom, system, n_systems)
        tail = self.tail / torch.where(batch.pbc, volume, 1.0)
        parts = torch.stack(
            [total[:, 0], electrostatic + reciprocal, total[:, 1], total[:, 2] + tail, total[:, 3], self.reference]
        )
        virial = virial + total[:, 7:][:, self.virial].view(-1, 3, 3) + torch.diag_embed(tail[:, None].expand(-1, 3))
        forces = ledger[: pairs.FORCE.value + 3].T.contiguous()
        return parts, (forces, virial, charges, total[:, 4:7], raw_charge), closest

    def _launch(self, kernel: Any, *arrays: torch.Tensor, **settings: Any) -> None:
        """Launch a kernel of ``triton_pairs``."""
        launch(kernel, self.batch.n_atoms, *arrays, lanes=LANES, warps=WARPS, **settings)

    def _find_edges(self, positions: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """Fill the edges; return the closest pair as (distance, i, j), j = -1 where no pair is within the cutoff."""
        rows, edges = self.near, self.edges
        nearest, partner = positions.new_empty(len(positions)), torch.empty_like(self.numbers)
        self._launch(
            pairs.edges_kernel, positions, cell, self.system, rows.start, rows.index, rows.shift,
            edges.kept, edges.sender, edges.interval, edges.place, nearest, partner,
            CUTOFF=self.tables.coulomb["CUTOFF"], INTERVALS=self.tables.intervals,
        )  # fmt: skip
        atom = nearest.argmin(keepdim=True)  # indexed by a number, the arrays would make the host wait for it
        return torch.cat([nearest[atom], atom.double(), partner[atom].double()])

    def _coulomb(
        self, positions: torch.Tensor, cell: torch.Tensor, charges: torch.Tensor, ledger: torch.Tensor
    ) -> None:
        """Add the real-space part of boxes and all pairs of clusters, at fixed charges."""
        rows = self.charged
        self._launch(
            pairs.coulomb_kernel, positions, cell, self.system, rows.start, rows.index, rows.shift, charges,
            self.periodic, ledger, **self.tables.coulomb,
        )  # fmt: skip

    def _edge_forces(self, ledger: torch.Tensor) -> None:
        """Add the forces of the network along the edges."""
        edges, width = self.edges, self.tables.coulomb["CUTOFF"] / self.tables.intervals
        self._launch(
            pairs.edge_forces_kernel, edges.start, edges.kept, edges.interval, edges.place, edges.gradient, ledger,
            WIDTH=width,
        )  # fmt: skip

    def _fixed(self, positions: torch.Tensor, cell: torch.Tensor, ledger: torch.Tensor) -> None:
        """Add dispersion and repulsion."""
        rows = self.far
        self._launch(
            pairs.fixed_kernel, positions, cell, self.system, rows.start, rows.index, rows.shift, self.numbers,
            *self.tables.pairs, ledger, **self.tables.fixed,
        )  # fmt: skip

    def _add_mesh(
        self, positions: torch.Tensor, inverses: torch.Tensor, volumes: torch.Tensor, charges: torch.Tensor,
        ledger: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Add the reciprocal part of the boxes with self term and neutralising background, at fixed charges.

        Adds potential and force of each atom to the ledger; returns energy (n_systems,) and virial (n_systems, 3, 3).
        """
        batch, alpha = self.batch, self.tables.alpha
        energy, virial = positions.new_zeros(batch.n_systems), positions.new_zeros(batch.n_systems, 3, 3)
        for boxes in self.boxes:
            inverse, volume = inverses[boxes.systems], volumes[boxes.systems]
            q = charges[boxes.atoms]
            waves, wave_virial, potential, gradient = boxes.mesh(
                q, positions[boxes.atoms], boxes.box_of, inverse=inverse, volume=volume
            )
            own = units.COULOMB_CONSTANT * alpha / math.sqrt(math.pi)
            background = units.COULOMB_CONSTANT * math.pi / (2.0 * volume * alpha**2)
            total, squares = (system_sum(values, boxes.box_of, len(volume)) for values in (q, q.square()))
            uniform = background * total.square()
            energy[boxes.systems] = waves - own * squares - uniform
            virial[boxes.systems] = wave_virial - torch.diag_embed(uniform[:, None].expand(-1, 3))
            potential = potential - 2.0 * own * q - 2.0 * (background * total)[boxes.box_of]
            ledger[pairs.POTENTIAL.value].index_add_(0, boxes.atoms, potential)
            ledger[: pairs.FORCE.value + 3].index_add_(1, boxes.atoms, -(q[:, None] * gradient).T)
        return energy, virial


class TritonEngine:
    """Evaluate a force field with Triton.

    Raises EngineUnavailableError where there is no GPU (and no interpreter), or the kernels do not take the network.
    """

    name = "triton"

    def __init__(self, force_field: ForceField) -> None:
        if force_field.known.device.type != "cuda" and not INTERPRETED:
            raise EngineUnavailableError("it needs a CUDA device")
        network = force_field.config.network
        if network.channels & (network.channels - 1) or network.heads & (network.heads - 1):
            raise EngineUnavailableError("no kernel for this number of channels and heads: both must be powers of two")
        self.force_field = force_field
        self._skin, self._layout, self._listed = 0.0, 0, False
        self._pack()

    def _pack(self) -> None:
        self._packed = fingerprint(self.force_field)
        with torch.no_grad():
            self._tables = _Tables(self.force_field)
            self._network = Network(self.force_field, self._tables.feature)
        self._plan: _Plan | None = None
        self._graph: _Graph | None = None

    def reset(self) -> None:
        """Forget lists and meshes; what is captured stays, for new lists go where the old ones were."""
        self._listed = False
        if self._plan is not None:
            self._plan.forget()

    @property
    def layout(self) -> int | None:
        """A number for where the lists and meshes lie; None while they are not at hand."""
        return self._layout if self._listed and self._packed == fingerprint(self.force_field) else None

    @torch.no_grad()
    def rebuild(self, batch: Batch, skin: float) -> None:
        """Build the lists; they hold while no atom moves more than half the skin [Å]."""
        if self._packed != fingerprint(self.force_field):
            self._pack()
        self._skin = skin
        reach = max(self.force_field.config.network.cutoff, self.force_field.config.dispersion.cutoff) + skin
        for size, cell in zip(
            batch.atoms_per_system[batch.pbc].tolist(), batch.cell[batch.pbc].cpu().numpy(), strict=True
        ):
            check_density(size, cell, reach)
        renewed = self._plan is None or not self._plan.fits(batch)
        if self._plan is None or renewed:
            self._plan = _Plan(self.force_field, self._tables, self._network, batch)
        moved, remeshed = self._plan.build_lists(batch, skin), self._plan.build_meshes(batch)
        if renewed or moved or remeshed:
            self._layout += 1
            self._graph = None
        self._listed = True

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[ForceFieldOutput, torch.Tensor]:
        """Return the output and the closest pair. Parameters that were changed (training) are packed anew.

        On a GPU this is the replay of a graph, or, inside the capture of a larger one, a part of that.
        """
        if self._packed != fingerprint(self.force_field):
            self.rebuild(batch, self._skin)
        if self._plan is None or not self._listed:
            raise RuntimeError("rebuild comes before evaluate")
        moving = tuple(value.contiguous() for value in (batch.positions, batch.cell, batch.total_charge))
        if batch.positions.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._graph = self._graph or _Graph(self._plan, moving)
            parts, values, closest = self._graph.replay(moving)
        else:
            parts, values, closest = self._plan.compute(*moving)
        names = ["network", "electrostatic", "electronegativity", "dispersion", "repulsion", "reference"]
        terms = dict(zip(names, parts, strict=True))
        if not self.force_field.config.repulsion:
            del terms["repulsion"]
        forces, virial, charges, dipole, raw_charge = values
        output = ForceFieldOutput(
            energy=parts.sum(0), forces=forces, virial=virial, charges=charges, dipole=dipole, raw_charge=raw_charge,
            terms=terms,
        )  # fmt: skip
        return output, closest


class _Graph:
    """One evaluation captured as a CUDA graph: it reads and writes tensors that stay in place."""

    def __init__(self, plan: _Plan, moving: tuple[torch.Tensor, ...]) -> None:
        self._plan, self._moving = plan, tuple(value.clone() for value in moving)
        self._replay = captured(self._compute, moving[0].device)

    def _compute(self) -> None:
        self._results = self._plan.compute(*self._moving)

    def replay(self, moving: tuple[torch.Tensor, ...]) -> _Results:
        """Return copies of what the evaluation gives for new positions, cells and total charges."""
        for static, value in zip(self._moving, moving, strict=True):
            static.copy_(value)
        self._replay()
        parts, values, closest = self._results
        return parts.clone(), tuple(value.clone() for value in values), closest.clone()


def _inverse_and_volume(cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows b_d (R, 3, 3) for which b_d . r is the coordinate along cell vector d, and the volume (R,).

    Without a cell the rows are not numbers.
    """
    a, b, c = cell.unbind(1)
    across_a = torch.linalg.cross(b, c)
    signed = (a * across_a).sum(1)
    across = torch.stack([across_a, torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=1)
    return across / signed[:, None, None], signed.abs()
