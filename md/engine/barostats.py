"""Integrators of constant pressure: all atoms and the cell scale together.

Both hold the centre of mass fixed and sample p(V) proportional to V^(N-1) exp(-PV/kT) Z(V), where Z(V) is the
configurational integral in scaled coordinates: an ideal gas has <V> = N kT/P and variance N (kT/P)^2. The textbook
ensemble, in which the centre of mass moves, has one power of V more; in a liquid of bulk modulus B that shifts the mean
volume by the fraction kT/(B V), about 1e-3 for 300 atoms.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from bamboo.errors import InputError
from bamboo.units import BAR, BOLTZMANN, FEMTOSECOND
from md.engine.integrators import CHAIN_LENGTH, Chain, StochasticThermostat, Thermostat, receive, rescale_velocities
from md.engine.state import Evaluator, MDState, trace


@dataclass(frozen=True, kw_only=True)
class StochasticCellRescaling(StochasticThermostat):
    """NPT by stochastic cell rescaling with velocity rescaling, B A S A F B O: for equilibration and density.

    Bernetti and Bussi, J. Chem. Phys. 153, 114107 (2020), first-order form in lambda = sqrt(V), where the noise is
    additive: d lambda = lambda beta/(2 tau) (P_int - P + kT/(2V)) dt + sqrt(kT beta/(2 tau)) dW.
    S scales positions and cell by s = (V'/V)^(1/3) and momenta by 1/s. The volume relaxes as exp(-t/tau), without
    oscillation, if beta is the true compressibility; a wrong one only changes the relaxation time.

    pressure_bar             bar
    barostat_time_fs         fs, tau
    compressibility_per_bar  1/bar, beta; 5e-5 suits organic liquids
    """

    pressure_bar: float
    thermostat_time_fs: float = 100.0
    barostat_time_fs: float = 1000.0
    compressibility_per_bar: float = 5.0e-5

    def start(self, state: MDState, evaluator: Evaluator) -> None:
        require_boxes(state)
        super().start(state, evaluator)

    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        dt = self.timestep
        scale = self.scale(state, dt)  # from the pressure of the present positions and momenta
        virial = trace(state.virial)
        state.kick(dt / 2)  # B
        state.drift(dt / 2)  # A
        before = state.kinetic_energy()
        state.scale_box(scale)  # S
        state.scale_momenta(1.0 / scale)
        received = state.kinetic_energy() - before
        state.drift(dt / 2)  # A
        state.evaluate(evaluator)
        # the work on the potential energy, -virial d(ln s), by the trapezoidal rule: the mean makes it Stratonovich
        received = received - 0.5 * (virial + trace(state.virial)) * scale.log()
        receive(state, received)
        state.kick(dt / 2)  # B
        rescale_velocities(state, self.target_K(state.time), duration=dt, relaxation=self.thermostat_time)  # O

    def scale(self, state: MDState, duration: float) -> torch.Tensor:
        """Draw the factor of lengths for one step, (R,)."""
        kT = BOLTZMANN * self.target_K(state.time)
        rate = self.compressibility_per_bar / BAR / (2.0 * self.barostat_time_fs * FEMTOSECOND)
        volume = state.volume
        excess = state.pressure() - self.pressure_bar * BAR + kT / (2.0 * volume)
        root = volume.sqrt()
        new_root = root + root * rate * excess * duration + (kT * rate * duration) ** 0.5 * state.normal()
        return (new_root / root) ** (2.0 / 3.0)


@dataclass(frozen=True, kw_only=True)
class MartynaTobiasKlein(Thermostat):
    """NPT by the Martyna-Tobias-Klein equations with Nose-Hoover chains on particles and cell.

    With the rates v_a = d ln(L_a)/dt of the three box lengths and w = (v_x + v_y + v_z)/N_f,

        dr_a/dt = p_a/m + v_a r_a;  dp_a/dt = F_a - (v_a + w) p_a;  dL_a/dt = v_a L_a;  W dv_a/dt = G_a,
        G_a = sum p_a^2/m + virial_aa + 2K/N_f - P V,  W = (N_f + 3) kT tau^2/3, tau the barostat time,

    split as O V (scale B scale)(scale A scale) F (scale B scale) V O after Tuckerman et al., J. Phys. A 39, 5629
    (2006). Isotropic coupling ties the rates together: one v, driven by the sum of G_a with the sum of the masses W.
    Deterministic and time-reversible; the volume oscillates, so start from an equilibrated box. Conserves, while the
    target does not ramp, K + U + P V + sum W v^2/2 + both chains.

    coupling  "isotropic" or "anisotropic": the lengths of an orthorhombic box each follow their own pressure, its
              angles stay; samples V^(N-1) exp(-PV/kT) Z dL_x dL_y dL_z. For solids and interfaces: nothing holds the
              shape of a liquid, which wanders.
    """

    pressure_bar: float
    barostat_time_fs: float = 1000.0
    coupling: Literal["isotropic", "anisotropic"] = "isotropic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling not in ("isotropic", "anisotropic"):
            raise InputError(f"MartynaTobiasKlein: coupling is {self.coupling!r}, expected isotropic or anisotropic.")

    def start(self, state: MDState, evaluator: Evaluator) -> None:
        require_boxes(state)
        cell = state.batch.cell
        if self.coupling == "anisotropic" and bool((cell != torch.diag_embed(cell.diagonal(dim1=1, dim2=2))).any()):
            raise InputError("Anisotropic coupling needs orthorhombic boxes, with a, b, c along x, y, z.")
        super().start(state, evaluator)

    @property
    def n_rates(self) -> int:
        """Number of rates that move on their own: one, or three."""
        return 1 if self.coupling == "isotropic" else 3

    def initial_variables(self, state: MDState) -> dict[str, torch.Tensor]:
        chain = torch.zeros((state.n_replicas, CHAIN_LENGTH), dtype=torch.float64, device=state.device)
        return {
            "strain_rate": torch.zeros((state.n_replicas, self.n_rates), dtype=torch.float64, device=state.device),
            "chain_position": chain,
            "chain_velocity": chain.clone(),
            "cell_chain_position": chain.clone(),
            "cell_chain_velocity": chain.clone(),
        }

    def propagate(self, state: MDState, evaluator: Evaluator) -> None:
        dt = self.timestep
        self.baths(state, dt / 2)  # O
        self.accelerate_cell(state, dt / 2)  # V
        self.kick(state, dt / 2)  # B
        growth = torch.exp(state.variables["strain_rate"] * dt / 2)
        state.scale_box(growth)
        state.drift(dt)  # A
        state.scale_box(growth)
        state.evaluate(evaluator)
        self.kick(state, dt / 2)  # B
        self.accelerate_cell(state, dt / 2)  # V
        self.baths(state, dt / 2)  # O

    def kick(self, state: MDState, duration: float) -> None:
        """Kick by the forces between two halves of the drag of the moving cell."""
        rate = state.variables["strain_rate"]
        common = 3.0 * rate.mean(dim=1, keepdim=True) / state.degrees_of_freedom[:, None]
        drag = torch.exp(-(rate + common) * duration / 2)
        state.scale_momenta(drag)
        state.kick(duration)
        state.scale_momenta(drag)

    def accelerate_cell(self, state: MDState, duration: float) -> None:
        """V: v <- v + t/W times the generalised force on the logarithms of the box lengths."""
        volume = state.volume
        share = 2.0 * state.kinetic_energy() / state.degrees_of_freedom - self.pressure_bar * BAR * volume
        force = state.pressure_tensor().diagonal(dim1=1, dim2=2) * volume[:, None] + share[:, None]
        if self.coupling == "isotropic":
            force = force.sum(dim=1, keepdim=True)
        rate = state.variables["strain_rate"]
        state.variables["strain_rate"] = rate + force / self.cell_mass(state)[:, None] * duration

    def baths(self, state: MDState, duration: float) -> None:
        """O: both chains act, each on its own kinetic energy."""
        particles, cell = self.chains(state)
        v = state.variables
        scale, v["chain_position"], v["chain_velocity"] = particles.propagate(
            state.kinetic_energy(), v["chain_position"], v["chain_velocity"], duration
        )
        state.scale_momenta(scale)
        scale, v["cell_chain_position"], v["cell_chain_velocity"] = cell.propagate(
            self.cell_kinetic(state), v["cell_chain_position"], v["cell_chain_velocity"], duration
        )
        v["strain_rate"] = v["strain_rate"] * scale[:, None]

    def chains(self, state: MDState) -> tuple[Chain, Chain]:
        """Return the chain of the particles and that of the cell."""
        kT = BOLTZMANN * self.target_K(state.time)
        freedom = state.degrees_of_freedom
        cell = Chain(kT, self.barostat_time_fs * FEMTOSECOND, torch.full_like(freedom, self.n_rates))
        return Chain(kT, self.thermostat_time, freedom), cell

    def cell_mass(self, state: MDState) -> torch.Tensor:
        """Mass of each rate, (R,)."""
        kT = BOLTZMANN * self.target_K(state.time)
        return (state.degrees_of_freedom + 3.0) * kT * (self.barostat_time_fs * FEMTOSECOND) ** 2 / self.n_rates

    def cell_kinetic(self, state: MDState) -> torch.Tensor:
        """Kinetic energy of the cell, (R,) eV."""
        return 0.5 * self.cell_mass(state) * (state.variables["strain_rate"] ** 2).sum(dim=1)

    def conserved_energy(self, state: MDState) -> torch.Tensor:
        particles, cell = self.chains(state)
        v = state.variables
        chains = particles.energy(v["chain_position"], v["chain_velocity"]) + cell.energy(
            v["cell_chain_position"], v["cell_chain_velocity"]
        )
        work = self.pressure_bar * BAR * state.volume
        return state.kinetic_energy() + state.energy + work + self.cell_kinetic(state) + chains


def require_boxes(state: MDState) -> None:
    """Refuse clusters: they have no volume to control."""
    if not bool(state.batch.pbc.all()):
        raise InputError("A barostat needs periodic boxes; a replica is an isolated cluster. Use NVT for it.")
