"""Replicas at temperatures of their own, advanced together: each as if it were alone."""

from math import sqrt

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.system import System
from bamboo.units import BAR, BOLTZMANN
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.guards import MaximumTemperature
from md.engine.integrators import Langevin, NoseHooverChain, StochasticVelocityRescaling
from md.engine.state import MDState

TEMPERATURES = torch.tensor([150.0, 300.0, 500.0], dtype=torch.float64)
COMMON = {"timestep_fs": 2.0, "thermostat_time_fs": 20.0}


def boxes(toys) -> list[System]:
    """Boxes of different sizes, all at the density of an ideal gas at 100 bar and 300 K."""
    lengths = {n: (n * BOLTZMANN * 300.0 / (100.0 * BAR)) ** (1.0 / 3.0) for n in (400, 300, 350)}
    return [toys.gas_box(n, length=length, seed=n) for n, length in lengths.items()]


@pytest.mark.parametrize(
    "integrator",
    [
        StochasticVelocityRescaling(temperature_K=TEMPERATURES, **COMMON),
        Langevin(temperature_K=TEMPERATURES, **COMMON),
        Langevin(temperature_K=TEMPERATURES, ramp_from_K=10.0, ramp_ps=0.1, **COMMON),
        StochasticCellRescaling(temperature_K=TEMPERATURES, pressure_bar=100.0, **COMMON),
    ],
    ids=["svr", "langevin", "ramp", "c-rescale"],
)
def test_every_replica_reaches_the_temperature_of_its_bath(toys, integrator):
    """All start at 300 K; five to ten relaxation times later each differs from its target by its fluctuation only."""
    state = MDState.from_systems(boxes(toys), temperature_K=300.0, seed=1)
    gas = toys.IdealGas()
    integrator.start(state, gas)
    for _ in range(100):
        integrator.step(state, gas)
    spread = TEMPERATURES * (2.0 / state.degrees_of_freedom).sqrt()
    np.testing.assert_array_less((state.temperature_K() - TEMPERATURES).abs(), 4.0 * spread)
    integrator.conserved_energy(state)


@pytest.mark.parametrize("kind", [NoseHooverChain, MartynaTobiasKlein])
def test_deterministic_replicas_move_as_if_alone(toys, kind):
    systems = [toys.argon_box(seed=1), toys.argon_box(seed=2, cells=3)]
    targets = torch.tensor([90.0, 140.0], dtype=torch.float64)
    more = {"timestep_fs": 4.0, "thermostat_time_fs": 100.0}
    more |= {"pressure_bar": 200.0, "barostat_time_fs": 200.0} if kind is MartynaTobiasKlein else {}
    together = MDState.from_systems(systems, temperature_K=targets, seed=4)
    momenta = together.momenta.split([system.n_atoms for system in systems])
    potential = toys.LennardJones()
    integrator = kind(temperature_K=targets, **more)
    integrator.start(together, potential)
    for _ in range(5):
        integrator.step(together, potential)
    conserved = integrator.conserved_energy(together)
    for replica, (system, target) in enumerate(zip(systems, (90.0, 140.0), strict=True)):
        alone = MDState.from_systems([system], temperature_K=0.0, seed=0)
        alone.momenta = momenta[replica]
        single = kind(temperature_K=target, **more)
        single.start(alone, potential)
        for _ in range(5):
            single.step(alone, potential)
        mine = together.batch.system_index == replica
        np.testing.assert_allclose(together.batch.positions[mine], alone.batch.positions, atol=1e-11)
        np.testing.assert_allclose(together.momenta[mine], alone.momenta, atol=1e-11)
        np.testing.assert_allclose(conserved[replica], single.conserved_energy(alone)[0], rtol=1e-12)


def test_momenta_are_drawn_at_each_temperature(toys):
    exact = MDState.from_systems(boxes(toys), temperature_K=TEMPERATURES, seed=1, exact_temperature=True)
    np.testing.assert_allclose(exact.temperature_K(), TEMPERATURES, rtol=1e-12)
    drawn = MDState.from_systems(boxes(toys), temperature_K=TEMPERATURES, seed=1)
    np.testing.assert_allclose(drawn.temperature_K() / TEMPERATURES, 1.0, atol=4.0 * sqrt(2.0 / 900.0))
    at_rest = MDState.from_systems(boxes(toys), temperature_K=TEMPERATURES * 0.0, seed=1, exact_temperature=True)
    assert float(at_rest.momenta.abs().max()) == 0.0
    with pytest.raises(InputError, match="zero or more"):
        exact.draw_momenta(-TEMPERATURES)
    with pytest.raises(InputError, match=r"temperature_K is .* expected a positive number"):
        Langevin(temperature_K=TEMPERATURES - 150.0, timestep_fs=1.0)


def test_the_temperature_guard_knows_the_limit_of_each_replica(toys):
    """900 K is too hot for the replica meant to be at 150 K, not for that at 500 K."""
    guard = MaximumTemperature(temperature_K=TEMPERATURES, factor=3.0)
    hot = torch.tensor([100.0, 300.0, 1400.0], dtype=torch.float64)
    state = MDState.from_systems(boxes(toys), temperature_K=hot, seed=1, exact_temperature=True)
    assert guard.check(state) is None
    state.draw_momenta(torch.tensor([600.0, 300.0, 1400.0], dtype=torch.float64), exact=True)
    violation = guard.check(state)
    assert violation is not None and violation.replica == 0
    assert violation.what == "temperature 600 K is above 450 K"
