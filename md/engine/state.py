"""The state of a simulation: everything that must be known to go on from here, and what can be read off it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError
from bamboo.system import Batch, System
from bamboo.units import BOLTZMANN, FEMTOSECOND, GRAM_PER_CM3

PerReplica = float | torch.Tensor  # one number for all replicas, or (R,), one for each


class EvaluatorOutput(Protocol):
    """What the engine reads from an evaluation; torch, eV, Å, e, float64."""

    @property
    def energy(self) -> torch.Tensor: ...  # (n_systems,)

    @property
    def forces(self) -> torch.Tensor: ...  # (n_atoms, 3)

    @property
    def virial(self) -> torch.Tensor: ...  # (n_systems, 3, 3), -dE/dstrain

    @property
    def charges(self) -> torch.Tensor: ...  # (n_atoms,)


class Evaluator(Protocol):
    """Anything that turns a batch into energies and forces.

    If it also has ``reset()``, that must forget all history (neighbour lists): it is called wherever a checkpoint may
    fall and at every restart, so that a restarted run builds its lists at the same steps as the uninterrupted one.
    On a GPU it may offer more, see ``stepper.DeviceEvaluator``.
    """

    def evaluate(self, batch: Batch) -> EvaluatorOutput: ...


@dataclass(eq=False)
class MDState:
    """R replicas at one time. Integrators replace its tensors, never change them in place.

    batch                 numbers, positions (unwrapped), cells, replica of each atom, molecules
    masses                (n_atoms,) amu
    momenta               (n_atoms, 3) amu Å / time unit
    energy, virial        (R,), (R, 3, 3) eV; virial = -dE/dstrain. NaN until the first evaluation, like the next two
    forces, charges       (n_atoms, 3) eV/Å; (n_atoms,) e
    generator             the only source of random numbers
    step, time            since the start of the stage; time in internal units
    centre_of_mass_fixed  whether the momentum of the centre of mass is held at zero; it decides the degrees of freedom
    variables             thermostat and barostat variables of the integrator, each (R, ...)
    conserved_energy      (R,) eV, the integrator's conserved quantity when last reported
    """

    batch: Batch
    masses: torch.Tensor
    momenta: torch.Tensor
    energy: torch.Tensor
    forces: torch.Tensor
    virial: torch.Tensor
    charges: torch.Tensor
    generator: torch.Generator
    conserved_energy: torch.Tensor
    step: int = 0
    time: float = 0.0
    centre_of_mass_fixed: bool = True
    variables: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_systems(
        cls,
        systems: Sequence[System],
        *,
        temperature_K: PerReplica,
        seed: int,
        exact_temperature: bool = False,
        device: torch.device | str = "cpu",
    ) -> "MDState":
        """Stack systems as replicas and draw momenta (see ``draw_momenta``); forces wait for ``integrator.start``."""
        batch = Batch.from_systems(systems, device=device)
        n_atoms, n_replicas = batch.n_atoms, batch.n_systems
        generator = torch.Generator(device=device)
        generator.manual_seed(seed)

        def unknown(*shape: int) -> torch.Tensor:
            return torch.full(shape, torch.nan, dtype=torch.float64, device=batch.positions.device)

        state = cls(
            batch=batch,
            masses=torch.from_numpy(ATOMIC_MASSES).to(device)[batch.numbers],
            momenta=torch.zeros_like(batch.positions),
            energy=unknown(n_replicas),
            forces=unknown(n_atoms, 3),
            virial=unknown(n_replicas, 3, 3),
            charges=unknown(n_atoms),
            generator=generator,
            conserved_energy=unknown(n_replicas),
        )
        state.draw_momenta(temperature_K, exact=exact_temperature)
        return state

    # -- what a step changes, so that it can be repeated on tensors that stay in place ------------------------------

    def moving(self) -> list[torch.Tensor]:
        """Return the tensors that a step replaces."""
        own = [self.momenta, self.energy, self.forces, self.virial, self.charges]
        return [self.batch.positions, self.batch.cell, *own, *self.variables.values()]

    def move(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take these tensors in the order of ``moving``."""
        positions, cell, self.momenta, self.energy, self.forces, self.virial, self.charges, *variables = tensors
        self.batch = replace(self.batch, positions=positions, cell=cell)
        self.variables = dict(zip(self.variables, variables, strict=True))

    # -- one number or tensor per replica ------------------------------------------------------------------------

    @property
    def n_replicas(self) -> int:
        return self.batch.n_systems

    @property
    def device(self) -> torch.device:
        return self.batch.positions.device

    @property
    def velocities(self) -> torch.Tensor:
        """Velocities p/m, (n_atoms, 3), Å per internal time unit."""
        return self.momenta / self.masses[:, None]

    @property
    def time_fs(self) -> float:
        return self.time / FEMTOSECOND

    @property
    def degrees_of_freedom(self) -> torch.Tensor:
        """Degrees of freedom of each replica, (R,): 3N, less 3 where the centre of mass is held fixed."""
        return 3.0 * self.batch.atoms_per_system.double() - (3.0 if self.centre_of_mass_fixed else 0.0)

    @property
    def volume(self) -> torch.Tensor:
        """Volume of each box, (R,) Å^3; NaN for clusters."""
        a, b, c = self.batch.cell.unbind(dim=1)
        volume = (a * torch.linalg.cross(b, c)).sum(dim=1).abs()
        return torch.where(self.batch.pbc, volume, torch.nan)

    @property
    def density_g_cm3(self) -> torch.Tensor:
        """Mass density of each box, (R,) g/cm^3; NaN for clusters."""
        return self.sum_by_replica(self.masses) / self.volume / GRAM_PER_CM3

    def kinetic_energy(self) -> torch.Tensor:
        """Kinetic energy of each replica, sum p^2/(2m), (R,) eV."""
        return 0.5 * self.sum_by_replica((self.momenta**2).sum(dim=1) / self.masses)

    def temperature_K(self) -> torch.Tensor:
        """Kinetic temperature of each replica, 2K / (N_f k_B), (R,) K."""
        return 2.0 * self.kinetic_energy() / (self.degrees_of_freedom * BOLTZMANN)

    def pressure_tensor(self) -> torch.Tensor:
        """Instantaneous pressure tensor, (sum p p/m + virial) / V, (R, 3, 3) eV/Å^3; NaN for clusters.

        With the centre of mass fixed the kinetic part averages to (N-1) kT/V, not N kT/V.
        """
        kinetic = self.sum_by_replica(self.momenta[:, :, None] * self.velocities[:, None, :])
        return (kinetic + self.virial) / self.volume[:, None, None]

    def pressure(self) -> torch.Tensor:
        """Instantaneous pressure (2K + trace virial) / (3V), (R,) eV/Å^3; NaN for clusters."""
        return (2.0 * self.kinetic_energy() + trace(self.virial)) / (3.0 * self.volume)

    # -- sums and broadcasts between atoms and replicas ----------------------------------------------------------

    def sum_by_replica(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the atoms of each replica: (n_atoms, ...) -> (R, ...)."""
        n_replicas = self.n_replicas
        if n_replicas == 1:
            return values.sum(dim=0, keepdim=True)
        total = torch.zeros((n_replicas, *values.shape[1:]), dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.batch.system_index, values)

    def per_atom(self, values: torch.Tensor) -> torch.Tensor:
        """Hand each atom the value of its replica: (R, ...) -> (n_atoms, ...)."""
        return values[self.batch.system_index]

    # -- what integrators do -------------------------------------------------------------------------------------

    def evaluate(self, evaluator: Evaluator) -> None:
        """Update energy, forces, virial and charges for the present positions.

        Forces on a fixed centre of mass are removed as one common acceleration, F_i <- F_i - m_i sum(F)/sum(m): mesh
        Ewald forces do not sum to zero exactly, and the momentum would wander.
        """
        output = evaluator.evaluate(self.batch)
        self.energy, self.virial, self.charges = output.energy.detach(), output.virial.detach(), output.charges.detach()
        forces = output.forces.detach()
        self.forces = self.without_net(forces) if self.centre_of_mass_fixed else forces

    def without_net(self, vectors: torch.Tensor) -> torch.Tensor:
        """Remove the sum of momenta or forces from each replica, shared out by mass."""
        net = self.sum_by_replica(vectors) / self.sum_by_replica(self.masses)[:, None]
        return vectors - self.masses[:, None] * self.per_atom(net)

    def thermal_momenta(self, temperature_K: PerReplica) -> torch.Tensor:
        """Draw momenta sqrt(m k_B T) xi, (n_atoms, 3), of zero sum where the centre of mass is fixed."""
        noise = torch.randn(self.momenta.shape, generator=self.generator, dtype=torch.float64, device=self.device)
        kT = BOLTZMANN * temperature_K
        if isinstance(kT, torch.Tensor):
            kT = self.per_atom(kT)[:, None]
        momenta = (self.masses[:, None] * kT).sqrt() * noise
        return self.without_net(momenta) if self.centre_of_mass_fixed else momenta

    def normal(self) -> torch.Tensor:
        """Draw one standard normal number per replica, (R,)."""
        return torch.randn(self.n_replicas, generator=self.generator, dtype=torch.float64, device=self.device)

    def draw_momenta(self, temperature_K: PerReplica, *, exact: bool = False) -> None:
        """Draw momenta from the Maxwell-Boltzmann distribution; ``exact`` scales each replica to its temperature."""
        target = torch.zeros_like(self.energy) + temperature_K
        if not bool((target >= 0.0).all()):
            raise InputError(f"temperature_K is {temperature_K}, expected zero or more.")
        self.momenta = self.thermal_momenta(temperature_K)
        if exact:
            factor = torch.where(target > 0.0, (target / self.temperature_K()).sqrt(), 0.0)
            self.momenta = self.momenta * self.per_atom(factor)[:, None]

    def kick(self, duration: float) -> None:
        """B: p <- p + F t."""
        self.momenta = self.momenta + self.forces * duration

    def drift(self, duration: float) -> None:
        """A: r <- r + p/m t."""
        self.batch = replace(self.batch, positions=self.batch.positions + self.velocities * duration)

    def scale_momenta(self, factor: torch.Tensor) -> None:
        """p <- factor p, factor (R,), or for each axis (R, 3)."""
        self.momenta = self.momenta * self.per_atom(factor.reshape(self.n_replicas, -1))

    def scale_box(self, factor: torch.Tensor) -> None:
        """Scale positions and cells about the origin, r <- factor r, factor (R,), or for each axis (R, 3)."""
        factor = factor.reshape(self.n_replicas, -1)
        positions = self.batch.positions * self.per_atom(factor)
        self.batch = replace(self.batch, positions=positions, cell=self.batch.cell * factor[:, None, :])

    def scale_volume(self, volume: PerReplica) -> None:
        """Give every box this volume [Å^3]: centres of mass move with the cell, molecules keep their shape.

        Molecules must be whole (positions unwrapped); where they are not known every atom counts as one.
        """
        factor = (volume / self.volume) ** (1.0 / 3.0)
        molecule = self.batch.molecule
        if molecule is None:
            molecule = torch.arange(self.batch.n_atoms, device=self.device)
        centres = torch.zeros((int(molecule.max()) + 1, 4), dtype=torch.float64, device=self.device)
        weighted = torch.cat([self.masses[:, None] * self.batch.positions, self.masses[:, None]], dim=1)
        centres.index_add_(0, molecule, weighted)
        centre = (centres[:, :3] / centres[:, 3:])[molecule]
        positions = self.batch.positions + (self.per_atom(factor)[:, None] - 1.0) * centre
        self.batch = replace(self.batch, positions=positions, cell=self.batch.cell * factor[:, None, None])

    def systems(self) -> list[System]:
        """Return the replicas as separate structures (numpy, on the host), molecules numbered from 0 in each."""
        batch = self.batch
        index, numbers, positions, cell = (
            tensor.cpu().numpy() for tensor in (batch.system_index, batch.numbers, batch.positions, batch.cell)
        )
        molecule = None if batch.molecule is None else batch.molecule.cpu().numpy()
        systems = []
        for replica in range(self.n_replicas):
            atoms = index == replica
            systems.append(
                System(
                    numbers=numbers[atoms],
                    positions=positions[atoms],
                    cell=cell[replica],
                    pbc=bool(batch.pbc[replica]),
                    total_charge=float(batch.total_charge[replica]),
                    molecule=None if molecule is None else molecule[atoms] - molecule[atoms].min(),
                )
            )
        return systems


def trace(tensors: torch.Tensor) -> torch.Tensor:
    """Trace of each matrix: (R, 3, 3) -> (R,)."""
    return tensors.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def charge_current(state: MDState, formal_charges: torch.Tensor) -> torch.Tensor:
    """Charge current of each replica from the formal charges of its molecules, (R, 3), e Å per internal time unit.

    J = sum_molecules z_m v_m, v_m the velocity of the centre of mass; formal_charges (n_molecules,) [e] in the order of
    the molecule indices of the batch. The instantaneous atomic charges are of no use here: with them, charge that flows
    inside a molecule as it vibrates would count as a current, and only integer charges give the conductivity (Grasselli
    and Baroni, Nature Physics 15, 967 (2019)).
    """
    molecule = state.batch.molecule
    if molecule is None:
        raise InputError("The charge current needs to know the molecules: give every system its `molecule` indices.")
    n_molecules = int(molecule.max()) + 1
    if formal_charges.shape != (n_molecules,):
        raise InputError(f"formal_charges have shape {tuple(formal_charges.shape)}, expected ({n_molecules},).")
    molecule_masses = torch.zeros_like(formal_charges, dtype=torch.float64).index_add_(0, molecule, state.masses)
    charge_per_mass = (formal_charges / molecule_masses)[molecule]
    return state.sum_by_replica(charge_per_mass[:, None] * state.momenta)
