"""Integrators of constant volume: each step is its operator splitting, each conserved quantity stands beside it.

B kicks (p <- p + F t), A drifts (r <- r + p/m t), F evaluates forces, O lets a heat bath act. All take the state of R
replicas and replace its tensors; all replicas share the timestep, each may have a temperature of its own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from math import exp, sqrt
from typing import ClassVar

import torch

from bamboo.errors import InputError
from bamboo.units import BOLTZMANN, FEMTOSECOND, PICOSECOND
from md.engine.state import Evaluator, MDState, PerReplica

CHAIN_LENGTH = 3  # thermostats in a Nose-Hoover chain


@dataclass(frozen=True, kw_only=True)
class Integrator(ABC):
    """Base of all integrators: ``start`` begins a stage, ``step`` advances one timestep.

    timestep_fs  fs; 1 fs at most with hydrogen, half that while a fresh box relaxes
    """

    timestep_fs: float
    centre_of_mass_fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            number = isinstance(value, int | float | torch.Tensor) and item.name != "pressure_bar"
            if number and not bool((torch.as_tensor(value) > 0.0).all()):
                raise InputError(f"{type(self).__name__}: {item.name} is {value}, expected a positive number.")

    @property
    def timestep(self) -> float:
        return self.timestep_fs * FEMTOSECOND

    def start(self, state: MDState, evaluator: Evaluator) -> None:
        """Begin a stage: clock to zero, own variables at their first values, first forces.

        Raises InputError where a replica is too small to have a temperature.
        """
        state.step, state.time = 0, 0.0
        state.centre_of_mass_fixed = self.centre_of_mass_fixed
        if bool((state.degrees_of_freedom <= 0.0).any()):
            raise InputError(f"{type(self).__name__} fixes the centre of mass: a replica needs two atoms or more.")
        if self.centre_of_mass_fixed:
            state.momenta = state.without_net(state.momenta)
        state.variables = self.initial_variables(state)
        state.evaluate(evaluator)

    def step(self, state: MDState, evaluator: Evaluator) -> None:
        """Advance the state by one timestep."""
        self.propagate(state, evaluator)
        state.step += 1
        state.time = state.step * self.timestep

    def initial_variables(self, state: MDState) -> dict[str, torch.Tensor]:
        """Return the integrator's own variables at the start of a stage, each (R, ...)."""
        return {}

    def is_steady(self, time: float) -> bool:
        """Tell whether all steps from a time [internal units] of the stage on are the same operations."""
        return True

    @abstractmethod
    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        """Apply the operators of one timestep; nothing in it may need a number from the device (``stepper.py``)."""

    @abstractmethod
    def conserved_energy(self, state: MDState) -> torch.Tensor:
        """Return the quantity the exact dynamics would conserve, (R,) eV."""


@dataclass(frozen=True, kw_only=True)
class VelocityVerlet(Integrator):
    """NVE, B A F B (Swope et al., J. Chem. Phys. 76, 637 (1982)); conserves K + U."""

    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        verlet(state, evaluator, self.timestep)

    def conserved_energy(self, state: MDState) -> torch.Tensor:
        return state.kinetic_energy() + state.energy


@dataclass(frozen=True, kw_only=True)
class Thermostat(Integrator):
    """Base of the integrators with a heat bath.

    temperature_K       K, of the bath, after the ramp if there is one; a tensor (R,) gives each replica its own
    thermostat_time_fs  fs, time in which the bath corrects a deviation
    ramp_from_K         K, temperature at the start of a linear ramp; None for no ramp
    ramp_ps             ps, its duration; None for no ramp
    """

    temperature_K: PerReplica
    thermostat_time_fs: float = 1000.0
    ramp_from_K: PerReplica | None = None
    ramp_ps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ramp_from_K is None) != (self.ramp_ps is None):
            raise InputError(f"{type(self).__name__}: a ramp needs both ramp_from_K and ramp_ps.")

    @property
    def thermostat_time(self) -> float:
        return self.thermostat_time_fs * FEMTOSECOND

    def is_steady(self, time: float) -> bool:
        return self.ramp_ps is None or time >= self.ramp_ps * PICOSECOND

    def target_K(self, time: float) -> PerReplica:
        """Temperature of the bath at a time [internal units] of the stage, K."""
        if self.ramp_from_K is None or self.ramp_ps is None:
            return self.temperature_K
        progress = min(1.0, time / (self.ramp_ps * PICOSECOND))
        return self.ramp_from_K + (self.temperature_K - self.ramp_from_K) * progress


@dataclass(frozen=True, kw_only=True)
class StochasticThermostat(Thermostat):
    """Base of baths that exchange energy at random: they conserve K + U - (energy received)."""

    def initial_variables(self, state: MDState) -> dict[str, torch.Tensor]:
        return {"received_energy": torch.zeros_like(state.energy)}

    def conserved_energy(self, state: MDState) -> torch.Tensor:
        return state.kinetic_energy() + state.energy - state.variables["received_energy"]


@dataclass(frozen=True, kw_only=True)
class Langevin(StochasticThermostat):
    """NVT by Langevin dynamics, B A O A F B, for warm-up: robust, but it damps momenta, so never for transport.

    O: p <- c p + sqrt((1 - c^2) m kT) xi, c = exp(-t/tau), tau the thermostat time (1/friction). The centre of mass is
    thermostatted like everything else, so 3N degrees of freedom. Leimkuhler and Matthews, J. Chem. Phys. 138, 174102
    (2013): positions of a harmonic oscillator are exact at any stable timestep.
    """

    thermostat_time_fs: float = 100.0
    centre_of_mass_fixed: ClassVar[bool] = False

    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        dt = self.timestep
        state.kick(dt / 2)  # B
        state.drift(dt / 2)  # A
        self.bath(state, dt)  # O
        state.drift(dt / 2)  # A
        state.evaluate(evaluator)
        state.kick(dt / 2)  # B

    def bath(self, state: MDState, duration: float) -> None:
        before = state.kinetic_energy()
        damping = exp(-duration / self.thermostat_time)
        noise = state.thermal_momenta(self.target_K(state.time))
        state.momenta = damping * state.momenta + sqrt(1.0 - damping**2) * noise
        receive(state, state.kinetic_energy() - before)


@dataclass(frozen=True, kw_only=True)
class StochasticVelocityRescaling(StochasticThermostat):
    """NVT by stochastic velocity rescaling, B A F B O: canonical, and gentle enough for transport at tau >= 1 ps.

    Bussi, Donadio and Parrinello, J. Chem. Phys. 126, 014101 (2007), with the exact propagator of the kinetic energy.
    Raises InputError at the start where a replica is at rest: there is nothing to rescale.
    """

    def start(self, state: MDState, evaluator: Evaluator) -> None:
        super().start(state, evaluator)
        if bool((state.kinetic_energy() <= 0.0).any()):
            raise InputError("Velocity rescaling cannot start from rest. Call draw_momenta first.")

    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        verlet(state, evaluator, self.timestep)
        rescale_velocities(state, self.target_K(state.time), duration=self.timestep, relaxation=self.thermostat_time)


@dataclass(frozen=True, kw_only=True)
class NoseHooverChain(Thermostat):
    """NVT by a Nose-Hoover chain of three thermostats, O B A F B O: deterministic, time-reversible, for transport.

    Martyna et al., Mol. Phys. 87, 1117 (1996); masses Q_1 = N_f kT tau^2, Q_k = kT tau^2. A stiff or small system may
    not be ergodic: stochastic velocity rescaling has no such weakness. Conserves, while the target does not ramp,
    K + U + sum Q_k v_k^2/2 + N_f kT eta_1 + kT (eta_2 + eta_3).
    """

    def initial_variables(self, state: MDState) -> dict[str, torch.Tensor]:
        zeros = torch.zeros((state.n_replicas, CHAIN_LENGTH), dtype=torch.float64, device=state.device)
        return {"chain_position": zeros, "chain_velocity": zeros.clone()}

    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        self.bath(state, self.timestep / 2)  # O
        verlet(state, evaluator, self.timestep)  # B A F B
        self.bath(state, self.timestep / 2)  # O

    def bath(self, state: MDState, duration: float) -> None:
        chain = Chain(BOLTZMANN * self.target_K(state.time), self.thermostat_time, state.degrees_of_freedom)
        variables = state.variables
        scale, variables["chain_position"], variables["chain_velocity"] = chain.propagate(
            state.kinetic_energy(), variables["chain_position"], variables["chain_velocity"], duration
        )
        state.scale_momenta(scale)

    def conserved_energy(self, state: MDState) -> torch.Tensor:
        chain = Chain(BOLTZMANN * self.target_K(state.time), self.thermostat_time, state.degrees_of_freedom)
        bath = chain.energy(state.variables["chain_position"], state.variables["chain_velocity"])
        return state.kinetic_energy() + state.energy + bath


def verlet(state: MDState, evaluator: Evaluator, duration: float) -> None:
    """Velocity Verlet: B A F B."""
    state.kick(duration / 2)
    state.drift(duration)
    state.evaluate(evaluator)
    state.kick(duration / 2)


def receive(state: MDState, energy: torch.Tensor) -> None:
    """Book energy (R,) that a bath gave to the replicas."""
    state.variables["received_energy"] = state.variables["received_energy"] + energy


def rescale_velocities(state: MDState, temperature_K: PerReplica, *, duration: float, relaxation: float) -> None:
    """Scale each replica's momenta to the kinetic energy that an exact Ornstein-Uhlenbeck step would have given it.

    p' = sqrt(c) p + sqrt(1 - c) sqrt(m kT) xi with c = exp(-t/tau); p <- alpha p, alpha^2 = K(p')/K(p). This is
    eq. (A7) of Bussi et al. (2007) with its normal numbers drawn per atom, so that exactly the degrees of freedom that
    move are counted. alpha takes the sign of p.p' (Bussi and Parrinello, Comput. Phys. Commun. 179, 26 (2008)); it is
    negative only for a handful of atoms or a long step.
    """
    before = state.kinetic_energy()
    c = exp(-duration / relaxation)
    after = sqrt(c) * state.momenta + sqrt(1.0 - c) * state.thermal_momenta(temperature_K)
    overlap = state.sum_by_replica((state.momenta * after).sum(dim=1) / state.masses)
    target = 0.5 * state.sum_by_replica((after**2).sum(dim=1) / state.masses)
    state.scale_momenta((target / before).sqrt() * torch.where(overlap < 0.0, -1.0, 1.0))
    receive(state, target - before)


@dataclass(frozen=True)
class Chain:
    """A Nose-Hoover chain on one kinetic energy per replica.

    kT                  eV, one or (R,)
    time                its relaxation time tau, internal units
    degrees_of_freedom  (R,), those of the kinetic energy it acts on
    """

    kT: PerReplica
    time: float
    degrees_of_freedom: torch.Tensor

    @property
    def masses(self) -> list[torch.Tensor]:
        first = self.degrees_of_freedom * self.kT * self.time**2
        return [first] + [torch.ones_like(first) * (self.kT * self.time**2)] * (CHAIN_LENGTH - 1)

    def propagate(
        self, kinetic: torch.Tensor, position: torch.Tensor, velocity: torch.Tensor, duration: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the factor of the momenta (R,), and the new positions and velocities (R, chain)."""
        v = list(velocity.unbind(dim=1))
        self._accelerate(v, kinetic, duration / 2, links=range(CHAIN_LENGTH - 1, -1, -1))
        scale = torch.exp(-v[0] * duration)
        position = position + torch.stack(v, dim=1) * duration
        self._accelerate(v, kinetic * scale**2, duration / 2, links=range(CHAIN_LENGTH))
        return scale, position, torch.stack(v, dim=1)

    def _accelerate(self, v: list[torch.Tensor], kinetic: torch.Tensor, duration: float, *, links: range) -> None:
        """Advance the velocities in place, each between two halves of the drag of the next thermostat."""
        masses = self.masses
        for k in links:
            if k == 0:
                force = (2.0 * kinetic - self.degrees_of_freedom * self.kT) / masses[0]
            else:
                force = (masses[k - 1] * v[k - 1] ** 2 - self.kT) / masses[k]
            drag = torch.exp(-v[k + 1] * duration / 2) if k + 1 < CHAIN_LENGTH else 1.0
            v[k] = (v[k] * drag + force * duration) * drag

    def energy(self, position: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Energy of the chain, (R,) eV."""
        kinetic = 0.5 * (torch.stack(self.masses, dim=1) * velocity**2).sum(dim=1)
        return kinetic + self.kT * (self.degrees_of_freedom * position[:, 0] + position[:, 1:].sum(dim=1))
