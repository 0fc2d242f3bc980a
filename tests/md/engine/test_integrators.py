"""Integrators of constant volume against exact solutions and ensembles."""

from math import acos, cos, exp, pi, sqrt

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.system import System
from bamboo.units import BOLTZMANN, FEMTOSECOND
from md.engine.integrators import (
    Langevin,
    NoseHooverChain,
    StochasticVelocityRescaling,
    VelocityVerlet,
    rescale_velocities,
)
from md.engine.state import MDState


def run(integrator, state, evaluator, n_steps):
    for _ in range(n_steps):
        integrator.step(state, evaluator)


def deviation(integrator, state, evaluator, n_steps):
    """Largest departure of the conserved quantity from its first value over a run, (R,)."""
    start, worst = integrator.conserved_energy(state), torch.zeros(state.n_replicas)
    for _ in range(n_steps):
        integrator.step(state, evaluator)
        worst = torch.maximum(worst, (integrator.conserved_energy(state) - start).abs())
    return worst


def diatomic(stretch: float) -> System:
    """Carbon and oxygen 1.2 Å + stretch apart."""
    positions = np.array([[0.0, 0.0, 0.0], [1.2 + stretch, 0.0, 0.0]])
    return System(np.array([6, 8]), positions, np.zeros((3, 3)), pbc=False)


def test_oscillator_follows_the_exact_solution(toys):
    """x(t) = A cos(w' t) with the discrete frequency cos(w' dt) = 1 - (w dt)^2/2, which is nearly w = sqrt(k/mu)."""
    stiffness, spring = 40.0, toys.Spring(40.0, 1.2)
    state = MDState.from_systems([diatomic(0.05)], temperature_K=0.0, seed=0)
    omega = sqrt(stiffness * float((1.0 / state.masses).sum()))
    integrator = VelocityVerlet(timestep_fs=0.5)
    integrator.start(state, spring)
    discrete = acos(1.0 - 0.5 * (omega * integrator.timestep) ** 2) / integrator.timestep
    for step in range(1, 301):
        integrator.step(state, spring)
        stretch = float((state.batch.positions[1] - state.batch.positions[0]).norm()) - 1.2
        assert stretch == pytest.approx(0.05 * cos(discrete * step * integrator.timestep), abs=1e-11)
    assert discrete / omega - 1.0 == pytest.approx((omega * integrator.timestep) ** 2 / 24.0, rel=0.05)
    assert state.step == 300 and state.time_fs == pytest.approx(150.0)
    period = 2.0 * pi / omega / FEMTOSECOND
    assert 20.0 < period < 30.0  # fs: the units of mass, energy and time fit together


@pytest.mark.parametrize("bath", [VelocityVerlet, NoseHooverChain, StochasticVelocityRescaling, Langevin])
def test_error_of_the_conserved_quantity_is_of_second_order(toys, bath):
    """Half the timestep, a quarter of the error; the deterministic ones to 10 %, noise of the others averaged away."""
    bath_settings = {} if bath is VelocityVerlet else {"temperature_K": 90.0, "thermostat_time_fs": 200.0}
    errors = []
    for timestep, n_steps in ((16.0, 40), (8.0, 80)):
        state = MDState.from_systems([toys.argon_box()], temperature_K=90.0, seed=2)
        integrator = bath(timestep_fs=timestep, **bath_settings)
        integrator.start(state, toys.LennardJones())
        errors.append(deviation(integrator, state, toys.LennardJones(), n_steps))
    stochastic = bath in (StochasticVelocityRescaling, Langevin)
    ratio = float((errors[0] / errors[1]).mean())
    assert (2.5 < ratio < 6.0) if stochastic else (3.6 < ratio < 4.4)
    assert float(errors[1].max()) < 0.01 * 32 * BOLTZMANN * 90.0


@pytest.mark.parametrize("bath", [VelocityVerlet, NoseHooverChain])
def test_time_reversal(toys, bath):
    settings = {} if bath is VelocityVerlet else {"temperature_K": 200.0, "thermostat_time_fs": 100.0}
    state = MDState.from_systems([toys.argon_box()], temperature_K=90.0, seed=3)
    integrator = bath(timestep_fs=8.0, **settings)
    integrator.start(state, toys.LennardJones())
    start = state.batch.positions
    run(integrator, state, toys.LennardJones(), 40)
    assert float((state.batch.positions - start).abs().max()) > 0.1
    state.momenta = -state.momenta
    if "chain_velocity" in state.variables:
        state.variables["chain_velocity"] = -state.variables["chain_velocity"]
    run(integrator, state, toys.LennardJones(), 40)
    np.testing.assert_allclose(state.batch.positions, start, atol=1e-10)


def test_replicas_together_equal_replicas_alone(toys):
    systems = [toys.argon_box(), toys.argon_box(seed=7, lattice=5.8), toys.argon_box(seed=8, cells=1, lattice=7.0)]
    integrator = NoseHooverChain(timestep_fs=5.0, temperature_K=90.0, thermostat_time_fs=100.0)
    together = MDState.from_systems(systems, temperature_K=90.0, seed=4)
    momenta = together.momenta
    integrator.start(together, toys.LennardJones())
    run(integrator, together, toys.LennardJones(), 20)
    for replica, system in enumerate(systems):
        atoms = together.batch.system_index == replica
        alone = MDState.from_systems([system], temperature_K=0.0, seed=0)
        alone.momenta = momenta[atoms]
        integrator.start(alone, toys.LennardJones())
        run(integrator, alone, toys.LennardJones(), 20)
        np.testing.assert_allclose(alone.batch.positions, together.batch.positions[atoms], atol=1e-11)
        assert float(alone.energy[0]) == pytest.approx(float(together.energy[replica]), rel=1e-11)


@pytest.mark.parametrize("ratio", [0.05, 2.0])
def test_velocity_rescaling_propagates_the_kinetic_energy_exactly(toys, ratio):
    """From K0, after a time t, K is c K0 + (1-c) N_f kT/2 on average, with variance
    2 c (1-c) K0 kT + (1-c)^2 N_f (kT)^2/2, c = exp(-t/tau): a non-central chi-squared distribution, N_f = 3N - 3."""
    n_replicas, kT = 6000, BOLTZMANN * 300.0
    start = MDState.from_systems([toys.gas_box(3)] * n_replicas, temperature_K=900.0, seed=5, exact_temperature=True)
    start.variables = {"received_energy": torch.zeros(n_replicas, dtype=torch.float64)}
    before = start.kinetic_energy()
    directions = start.momenta / start.momenta.norm(dim=1, keepdim=True)
    rescale_velocities(start, 300.0, duration=ratio, relaxation=1.0)
    kinetic, c, freedom = start.kinetic_energy(), exp(-ratio), 6.0
    mean = c * before[0] + (1.0 - c) * freedom * kT / 2.0
    variance = 2.0 * c * (1.0 - c) * before[0] * kT + (1.0 - c) ** 2 * freedom * kT**2 / 2.0
    assert float(kinetic.mean()) == pytest.approx(float(mean), abs=4.0 * sqrt(variance / n_replicas))
    assert float(kinetic.var()) == pytest.approx(float(variance), rel=4.0 * sqrt(6.0 / n_replicas))
    np.testing.assert_allclose(start.variables["received_energy"], kinetic - before, atol=1e-14)
    after = start.momenta / start.momenta.norm(dim=1, keepdim=True)
    assert float(((after * directions).sum(dim=1).abs() - 1.0).abs().max()) < 1e-12  # directions are kept


def test_velocity_rescaling_may_turn_all_velocities_around(toys):
    """After a time long against tau nothing is left of the old signs: <p(0) p(t)> decays as in the exact process."""
    state = MDState.from_systems([toys.gas_box(2)] * 4000, temperature_K=300.0, seed=6)
    state.variables = {"received_energy": torch.zeros(4000, dtype=torch.float64)}
    before = state.momenta
    rescale_velocities(state, 300.0, duration=20.0, relaxation=1.0)
    turned = float((state.sum_by_replica((before * state.momenta).sum(dim=1)) < 0.0).double().mean())
    assert turned == pytest.approx(0.5, abs=4.0 * 0.5 / sqrt(4000))


def test_velocity_rescaling_samples_the_canonical_kinetic_energy(toys):
    """A liquid run from half the temperature ends with <K> = N_f kT/2 and var K = N_f (kT)^2/2."""
    state = MDState.from_systems(
        [toys.argon_box(cells=1, seed=s, lattice=7.0) for s in range(60)], temperature_K=60, seed=7
    )
    integrator = StochasticVelocityRescaling(timestep_fs=8.0, temperature_K=120.0, thermostat_time_fs=80.0)
    potential = toys.LennardJones()
    integrator.start(state, potential)
    run(integrator, state, potential, 60)
    samples = []
    for _ in range(20):
        run(integrator, state, potential, 10)
        samples.append(state.kinetic_energy() / (BOLTZMANN * 120.0))
    kinetic = torch.stack(samples)
    by_replica = kinetic.mean(dim=0)
    error = float(by_replica.std()) / sqrt(60)
    assert error < 0.1
    assert float(by_replica.mean()) == pytest.approx(4.5, abs=4.0 * error)
    squares = ((kinetic - 4.5) ** 2).mean(dim=0)
    assert float(squares.mean()) == pytest.approx(4.5, abs=4.0 * float(squares.std()) / sqrt(60))


def test_nose_hoover_chain_samples_the_canonical_kinetic_energy(toys):
    state = MDState.from_systems(
        [toys.argon_box(cells=1, seed=s, lattice=7.0) for s in range(60)], temperature_K=120, seed=8
    )
    integrator = NoseHooverChain(timestep_fs=8.0, temperature_K=120.0, thermostat_time_fs=80.0)
    potential = toys.LennardJones()
    integrator.start(state, potential)
    samples = []
    for _ in range(20):
        run(integrator, state, potential, 10)
        samples.append(state.kinetic_energy() / (BOLTZMANN * 120.0))
    by_replica = torch.stack(samples).mean(dim=0)
    assert float(by_replica.mean()) == pytest.approx(4.5, abs=4.0 * float(by_replica.std()) / sqrt(60))
    squares = ((torch.stack(samples) - 4.5) ** 2).mean(dim=0)
    assert float(squares.mean()) == pytest.approx(4.5, abs=4.0 * float(squares.std()) / sqrt(60))


def test_time_of_the_nose_hoover_chain(toys):
    """A free gas at twice the temperature starts to cool as K = K_0 (1 - t^2/tau^2)."""
    state = MDState.from_systems([toys.gas_box(50)], temperature_K=600.0, seed=8, exact_temperature=True)
    integrator = NoseHooverChain(timestep_fs=1.0, temperature_K=300.0, thermostat_time_fs=500.0)
    before = state.kinetic_energy()
    integrator.start(state, toys.IdealGas())
    run(integrator, state, toys.IdealGas(), 20)
    assert float(1.0 - state.kinetic_energy() / before) == pytest.approx((20.0 / 500.0) ** 2, rel=0.02)


def test_langevin_positions_of_an_oscillator_are_exact_at_a_large_timestep(toys):
    """BAOAB: <x^2> = kT/k whatever the stable timestep, here w dt = 1 where other splittings err by 20-30 %."""
    stiffness, kT = 2.0, BOLTZMANN * 300.0
    state = MDState.from_systems([toys.gas_box(1, length=0.01)] * 1500, temperature_K=300.0, seed=9)
    timestep = sqrt(float(state.masses[0]) / stiffness) / FEMTOSECOND
    integrator = Langevin(timestep_fs=timestep, temperature_K=300.0, thermostat_time_fs=timestep)
    tether = toys.Tether(stiffness)
    integrator.start(state, tether)
    assert state.degrees_of_freedom.unique().tolist() == [3.0]
    run(integrator, state, tether, 30)
    squares = []
    for _ in range(100):
        run(integrator, state, tether, 5)
        squares.append(float((state.batch.positions**2).mean()))
    standard_error = kT / stiffness * sqrt(2.0 / (4500 * 100))
    assert np.mean(squares) == pytest.approx(kT / stiffness, abs=5.0 * standard_error)


def test_langevin_momenta_relax_with_the_friction(toys):
    """Free atoms: <p(t) p(0)> = exp(-t/tau) <p(0)^2>, whatever the timestep."""
    state = MDState.from_systems([toys.gas_box(4000)], temperature_K=300.0, seed=10)
    integrator = Langevin(timestep_fs=7.0, temperature_K=300.0, thermostat_time_fs=50.0)
    integrator.start(state, toys.IdealGas())
    before = state.momenta
    run(integrator, state, toys.IdealGas(), 5)
    correlation = float((before * state.momenta).sum() / (before**2).sum())
    assert correlation == pytest.approx(exp(-35.0 / 50.0), abs=4.0 / sqrt(12000))


def test_temperature_ramp(toys):
    """The bath follows the line and stays at its end; a tightly coupled gas follows the bath."""
    integrator = StochasticVelocityRescaling(
        timestep_fs=1.0, temperature_K=300.0, thermostat_time_fs=5.0, ramp_from_K=100.0, ramp_ps=0.2
    )
    targets = [integrator.target_K(time * FEMTOSECOND) for time in (0.0, 50.0, 200.0, 500.0)]
    assert targets == pytest.approx([100.0, 150.0, 300.0, 300.0])
    state = MDState.from_systems([toys.gas_box(3000)], temperature_K=100.0, seed=11)
    integrator.start(state, toys.IdealGas())
    run(integrator, state, toys.IdealGas(), 100)
    assert float(state.temperature_K()[0]) == pytest.approx(200.0 - 5.0, abs=4.0 * 200.0 * sqrt(2.0 / 9000))


def test_settings_are_checked(toys):
    with pytest.raises(InputError, match="timestep_fs is 0"):
        VelocityVerlet(timestep_fs=0.0)
    with pytest.raises(InputError, match="ramp_from_K and ramp_ps"):
        Langevin(timestep_fs=1.0, temperature_K=300.0, ramp_from_K=10.0)
    at_rest = MDState.from_systems([toys.gas_box(3)], temperature_K=0.0, seed=0)
    with pytest.raises(InputError, match="draw_momenta"):
        StochasticVelocityRescaling(timestep_fs=1.0, temperature_K=300.0).start(at_rest, toys.IdealGas())
    single = MDState.from_systems([toys.gas_box(1)], temperature_K=0.0, seed=0)
    with pytest.raises(InputError, match="two atoms"):
        VelocityVerlet(timestep_fs=1.0).start(single, toys.IdealGas())
