"""A force field ready for repeated use: neighbour lists with a skin, and the fastest engine at hand.

The ASE calculator and the MD engine both evaluate through this class and nothing else.
"""

from dataclasses import replace

import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels.engines import choose
from bamboo.neighbors import check_geometry
from bamboo.system import Batch

SMALLEST_DISTANCE = 0.3  # Å; closer atoms are a broken input, not chemistry


class Evaluator:
    """Evaluate one force field on batches that change little from call to call.

    force_field  the model
    skin         Å; neighbour lists reach this much further and are rebuilt when an atom has moved more than half of it
    device       where the network runs; batches are moved there
    engine       "auto" (the fastest at hand), "reference" (plain torch), "native" (compiled, CPU) or "triton" (CUDA)
    """

    def __init__(
        self,
        force_field: ForceField,
        *,
        skin: float = 1.0,
        device: torch.device | str = "cpu",
        engine: str = "auto",
    ) -> None:
        if not skin >= 0:
            raise InputError(f"skin = {skin} Å, expected a length >= 0.")
        try:
            self.device = torch.device(device)
            torch.zeros(1, dtype=torch.float64, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:  # torch raises all three
            reason = str(error).split(". ")[0]
            raise InputError(f"device '{device}' cannot be used, expected 'cpu' or 'cuda': {reason}") from error
        self.force_field = force_field.to(self.device).eval()
        self.skin = skin
        self._engine = choose(self.force_field, engine, device=self.device)
        self._built: Batch | None = None

    @property
    def engine(self) -> str:
        """Name of the engine that does the work."""
        return self._engine.name

    def reset(self) -> None:
        """Forget the neighbour lists and all that depends on the past.

        What follows is then the same, bit for bit, as with a new evaluator: call it where a run is saved.
        """
        self._built = None
        self._engine.reset()

    def evaluate(self, batch: Batch) -> ForceFieldOutput:
        """Return energy, forces, virial, charges of the batch (ForceFieldOutput).

        Raises UnknownElementError for elements the model does not cover, InputError for overlapping or lost atoms.
        """
        batch = batch.to(self.device)
        if not self._still_valid(batch):
            self.force_field.check_elements(batch.numbers)
            check_geometry(batch)
            self._built = None  # should the next line fail
            self._engine.rebuild(batch, self.skin)
            # a copy: engines move atoms in place
            self._built = replace(batch, positions=batch.positions.clone(), cell=batch.cell.clone())
        output, closest = self._engine.evaluate(batch)
        if closest.distance < SMALLEST_DISTANCE:
            raise InputError(
                f"Atoms {closest.i} and {closest.j} are {closest.distance:.3f} Å apart: "
                "the structure has overlapping atoms."
            )
        return output

    def _still_valid(self, batch: Batch) -> bool:
        """Tell whether the stored lists still hold every pair within the cutoffs.

        Half the skin is shared by the motion of atoms and the change of the cell; the cell's change is measured as the
        largest relative strain times the longest cutoff.
        """
        built = self._built
        if built is None or built.n_atoms != batch.n_atoms or built.n_systems != batch.n_systems:
            return False
        same = torch.equal(built.numbers, batch.numbers) and torch.equal(built.pbc, batch.pbc)
        if not (same and torch.equal(built.system_index, batch.system_index)):
            return False
        periodic = built.pbc
        if torch.equal(built.cell[periodic], batch.cell[periodic]):
            moved = (batch.positions - built.positions).square().sum(-1).max().sqrt()
            return bool(2.0 * moved < self.skin)
        strain = torch.linalg.solve(built.cell[periodic], batch.cell[periodic]) - torch.eye(3, device=batch.cell.device)
        stretch = torch.linalg.matrix_norm(strain, ord=2).max()
        deformation = torch.zeros_like(built.cell)
        deformation[periodic] = strain
        carried = built.positions + torch.einsum("na,nab->nb", built.positions, deformation[built.system_index])
        moved = (batch.positions - carried).square().sum(-1).max().sqrt()
        longest = max(self.force_field.config.network.cutoff, self.force_field.config.dispersion.cutoff) + self.skin
        return bool(2.0 * moved + stretch * longest < self.skin)
