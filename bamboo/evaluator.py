"""A force field ready for repeated use: neighbour lists with a skin, and the fastest engine at hand.

The ASE calculator and the MD engine both evaluate through this class and nothing else.
"""

from copy import deepcopy
from dataclasses import replace

import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels.engines import choose
from bamboo.neighbors import check_geometry
from bamboo.system import Batch

SMALLEST_DISTANCE = 0.3  # Å; closer atoms are a broken input, not chemistry


def best_device() -> str:
    """Return the device to compute on where none is asked for: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Evaluator:
    """Evaluate one force field on batches that change little from call to call.

    force_field  the model
    skin         Å; neighbour lists reach this much further and are rebuilt when an atom has moved more than half of it
    device       where the network runs; batches, and a copy of a model that is elsewhere, are moved there
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
            self.device = torch.zeros(1, dtype=torch.float64, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:  # torch raises all three
            reason = str(error).split(". ")[0]
            raise InputError(f"device '{device}' cannot be used, expected 'cpu' or 'cuda': {reason}") from error
        # a model elsewhere is left where it is, it may be in training; changes of one that is here count
        here = force_field.known.device == self.device
        self.force_field = force_field if here else deepcopy(force_field).to(self.device)
        self.skin = skin
        self._engine = choose(self.force_field, engine, device=self.device)
        self._built: Batch | None = None
        self._inverse = torch.empty(0)  # of the cells when the lists were built; zero for clusters

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
        if not (self._same_atoms(batch) and bool(self._lists_hold(batch))):
            self._build(batch)
        output, closest = self._engine.evaluate(batch)
        distance, i, j = closest.tolist()  # here the host waits for a GPU
        if distance < SMALLEST_DISTANCE:
            raise InputError(
                f"Atoms {i:.0f} and {j:.0f} are {distance:.3f} Å apart: the structure has overlapping atoms."
            )
        return output

    def evaluate_unchecked(self, batch: Batch) -> tuple[ForceFieldOutput, torch.Tensor]:
        """Evaluate without waiting for the device, with the lists at hand: what a CUDA graph can hold.

        batch: the atoms of the last ``evaluate``, on the device. Returns the output and whether it holds, a bool tensor
        (): if not, an atom has left its lists or atoms overlap, and ``evaluate`` is to be asked instead.
        """
        hold = self._lists_hold(batch)
        output, closest = self._engine.evaluate(batch)
        return output, hold & (closest[0] >= SMALLEST_DISTANCE)

    @property
    def layout(self) -> int | None:
        """A number that stays the same while graphs that hold ``evaluate_unchecked`` find their memory in its place.

        None while there are no lists, and always where the engine needs the host.
        """
        return None if self._built is None else self._engine.layout

    def _build(self, batch: Batch) -> None:
        self.force_field.check_elements(batch.numbers)
        check_geometry(batch)
        self._built = None  # should the next line fail
        self._engine.rebuild(batch, self.skin)
        self._inverse = torch.zeros_like(batch.cell)
        self._inverse[batch.pbc] = torch.linalg.inv(batch.cell[batch.pbc])
        # a copy: engines move atoms in place
        self._built = replace(batch, positions=batch.positions.clone(), cell=batch.cell.clone())

    def _same_atoms(self, batch: Batch) -> bool:
        built = self._built
        if built is None or built.n_atoms != batch.n_atoms or built.n_systems != batch.n_systems:
            return False
        names = ("numbers", "system_index", "pbc")
        return all(torch.equal(getattr(built, name), getattr(batch, name)) for name in names)

    def _lists_hold(self, batch: Batch) -> torch.Tensor:
        """Tell whether the stored lists still hold every pair within the cutoffs, a bool tensor ().

        Half the skin is shared by the motion of atoms and the change of the cell; the cell's change is measured as the
        largest relative strain (a bound of its norm: root of largest row sum times largest column sum) times the
        longest cutoff.
        """
        built, config = self._built, self.force_field.config
        if built is None:
            raise RuntimeError("evaluate comes before evaluate_unchecked")
        strain = self._inverse @ (batch.cell - built.cell)
        carried = torch.einsum("na,nab->nb", built.positions, strain[built.system_index])
        moved = (batch.positions - built.positions - carried).square().sum(-1).max().sqrt()
        size = strain.abs()
        stretch = (size.sum(1).amax(1) * size.sum(2).amax(1)).max().sqrt()
        longest = max(config.network.cutoff, config.dispersion.cutoff) + self.skin
        return 2.0 * moved + stretch * longest < self.skin
