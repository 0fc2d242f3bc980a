"""The loop: who is called when, signals, guards and what they leave behind."""

import os
import signal
from dataclasses import replace
from io import StringIO

import ase.io
import numpy as np
import pytest
import torch
from rich.console import Console

from bamboo.errors import CheckpointedStop, GuardError, InputError
from bamboo.system import System
from md.engine import restart
from md.engine.guards import DensityRange, IntactMolecules, MaximumTemperature, MinimumDistance, check_guards
from md.engine.integrators import Langevin, NoseHooverChain, VelocityVerlet
from md.engine.reporters import ConsoleProgress, ProgressReport, ThermoTable, duration_text
from md.engine.simulation import Simulation
from md.engine.state import MDState


class Recorder:
    def __init__(self, stride: int) -> None:
        self.stride, self.steps, self.flushed, self.truncated = stride, [], 0, []

    def report(self, state: MDState) -> None:
        assert bool(torch.isfinite(state.conserved_energy).all())
        self.steps.append(state.step)

    def flush(self) -> None:
        self.flushed += 1

    def truncate(self, step: int) -> None:
        self.truncated.append(step)


def argon(toys, **kwargs) -> MDState:
    return MDState.from_systems([toys.argon_box(**kwargs)], temperature_K=90.0, seed=1)


def test_every_step_is_reported_once(toys, tmp_path):
    recorder, integrator = Recorder(5), VelocityVerlet(timestep_fs=2.0)
    settings = {"integrator": integrator, "reporters": [recorder], "restart_folder": tmp_path}
    simulation = Simulation(argon(toys), toys.LennardJones(), **settings)
    simulation.run(5)
    simulation.run(5)
    checkpoint = restart.load(tmp_path)
    assert checkpoint is not None
    Simulation(checkpoint.state, toys.LennardJones(), resume=True, **settings).run(10)
    assert recorder.steps == [0, 5, 10, 15, 20]
    assert recorder.truncated == [-1, 10] and recorder.flushed == 3


def test_another_integrator_may_not_continue(toys):
    state = argon(toys)
    Simulation(state, toys.LennardJones(), integrator=VelocityVerlet(timestep_fs=2.0)).run(1)
    chain = NoseHooverChain(timestep_fs=2.0, temperature_K=90.0)
    with pytest.raises(InputError, match="NoseHooverChain"):
        Simulation(state, toys.LennardJones(), integrator=chain, resume=True)
    Simulation(state, toys.LennardJones(), integrator=chain).run(1)
    assert state.step == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_leave_a_checkpoint(toys, tmp_path, number):
    class Signalling(toys.LennardJones):
        calls = 0

        def evaluate(self, batch):
            self.calls += 1
            if self.calls == 5 or (self.calls == 6 and number != signal.SIGINT):  # batch systems repeat themselves
                os.kill(os.getpid(), number)
            return super().evaluate(batch)

    before = signal.getsignal(number)
    simulation = Simulation(
        argon(toys), Signalling(), integrator=VelocityVerlet(timestep_fs=2.0), restart_folder=tmp_path, stage="stage 1",
        checkpoint_steps=3,
    )  # fmt: skip
    expected = KeyboardInterrupt if number == signal.SIGINT else CheckpointedStop
    with pytest.raises(expected, match="stage 1 stopped at step 6, checkpoint saved"):
        simulation.run(50)
    checkpoint = restart.load(tmp_path)
    assert checkpoint is not None and checkpoint.state.step == 6
    assert signal.getsignal(number) is before
    assert CheckpointedStop.exit_code == 75


def fails(toys, tmp_path, state, guard, evaluator=None, match="", n_steps=200):
    """Run into a guard; return the message and the frame it left."""
    simulation = Simulation(
        state,
        evaluator or toys.LennardJones(),
        integrator=Langevin(timestep_fs=4.0, temperature_K=90.0),
        guards=[guard] if guard else [],
        restart_folder=tmp_path / "restart",
        frame_folder=tmp_path / "frames",
        checkpoint_steps=5,
        checkpoint_minutes=0.0,
        stage="stage 2 (npt)",
    )
    with pytest.raises(GuardError, match=match) as caught:
        simulation.run(n_steps)
    message = str(caught.value)
    assert message.startswith(f"stage 2 (npt) stopped at {state.step * 0.004:.4g} ps (step {state.step})")
    assert "Likely cause: " in message
    assert f"Frame: {tmp_path / 'frames' / 'blowup.extxyz'}." in message
    frames = ase.io.read(tmp_path / "frames" / "blowup.extxyz", index=":")
    assert frames[0].info["step"] == state.step
    checkpoint = restart.load(tmp_path / "restart")
    assert (checkpoint is not None) == ("Last good state: " in message)
    return message, frames, checkpoint


def test_temperature_guard(toys, tmp_path):
    """Heat is pumped in through the forces; no checkpoint is written that a guard would refuse, due or not."""

    class Heater(toys.IdealGas):
        def evaluate(self, batch):
            result = super().evaluate(batch)
            noise = torch.randn(result.forces.shape, generator=torch.manual_seed(0), dtype=torch.float64)
            result.forces = 0.2 * noise
            return result

    guard = MaximumTemperature(temperature_K=90.0, factor=3.0, stride=1000)
    _, _, checkpoint = fails(toys, tmp_path, argon(toys), guard, Heater(), match="temperature [2-9].. K is above 270 K")
    assert checkpoint.state.step >= 5 and float(checkpoint.state.temperature_K()[0]) <= 270.0


def test_density_guard(toys, tmp_path):
    box = toys.argon_box()
    guard = DensityRange(minimum_g_cm3=0.5, maximum_g_cm3=1.6)
    state = MDState.from_systems([box, replace(box, cell=box.cell * 2.0)], temperature_K=90.0, seed=1)
    message, frames, _ = fails(
        toys, tmp_path, state, guard, toys.IdealGas(), match="replica 1: density 0.189 g/cm3 is below 0.5"
    )
    assert "evaporates" in message and "Last good" not in message
    np.testing.assert_allclose(frames[0].positions, box.positions, atol=1e-7)
    assert frames[0].cell[0, 0] == pytest.approx(22.4)
    dense = MDState.from_systems([toys.argon_box(lattice=5.0)], temperature_K=90.0, seed=1)
    fails(toys, tmp_path / "dense", dense, guard, toys.IdealGas(), match="above 1.6 g/cm3.*collapses")


def test_distance_guard_sees_images(toys, tmp_path):
    """Atoms 0.5 Å apart through the face of the box."""
    box = toys.argon_box(noise=0.0)
    positions = box.positions + 0.25
    positions[5] = positions[0] + [10.7, 0.0, 0.0]
    state = MDState.from_systems([replace(box, positions=positions)], temperature_K=0.0, seed=1)
    fails(
        toys, tmp_path, state, MinimumDistance(), toys.IdealGas(), match="Ar0 and Ar5 are 0.50 Å apart, less than 0.6 Å"
    )
    apart = MDState.from_systems([toys.argon_box()], temperature_K=0.0, seed=1)
    assert MinimumDistance().check(apart) is None and MinimumDistance(distance=4.0).check(apart) is not None


@pytest.mark.parametrize("change", ["break", "form"])
def test_molecule_guard(toys, tmp_path, change):
    """Two HF molecules: one is pulled apart, or their fluorines are pushed together."""
    positions = np.array([[5.0, 5.0, 5.0], [5.9, 5.0, 5.0], [5.0, 9.0, 5.0], [5.9, 9.0, 5.0]])
    start = System(np.array([9, 1, 9, 1]), positions, np.eye(3) * 12.0, True)
    guard = IntactMolecules(systems=[start], stride=1)
    state = MDState.from_systems([start], temperature_K=0.0, seed=1)
    vibrating = positions.copy()
    vibrating[1, 0] += 0.35  # 1.25 Å: stretched, not broken
    state.batch = replace(state.batch, positions=torch.from_numpy(vibrating))
    assert guard.check(state) is None
    moved = positions.copy()
    if change == "break":
        moved[1, 0] += 1.2
    else:
        moved[2:, 1] -= 2.9
    state.batch = replace(state.batch, positions=torch.from_numpy(moved))
    match = r"bond F0 - H1 has broken \(1 bonds" if change == "break" else "bond F0 - F2 has formed"
    fails(toys, tmp_path, state, guard, toys.IdealGas(), match=match)


def test_non_finite_numbers_stop_the_run_without_any_guard(toys, tmp_path):
    class Broken(toys.LennardJones):
        calls = 0

        def evaluate(self, batch):
            self.calls += 1
            result = super().evaluate(batch)
            if self.calls == 9:
                result.forces[7] = torch.nan
            return result

    _, _, checkpoint = fails(toys, tmp_path, argon(toys), None, Broken(), match=r"step 8\): forces is not finite")
    assert checkpoint.state.step == 5 and check_guards(checkpoint.state, []) is None


def test_overlap_in_the_evaluator_is_told_as_a_blow_up(toys, tmp_path):
    class Strict(toys.LennardJones):
        calls = 0

        def evaluate(self, batch):
            self.calls += 1
            if self.calls > 12:
                raise InputError("Atoms 0 and 1 are 0.100 Å apart.")
            return super().evaluate(batch)

    message, frames, _ = fails(toys, tmp_path, argon(toys), None, Strict(), match="Atoms 0 and 1 are 0.100 Å apart")
    assert len(frames) == 1 and "timestep too long" in message


def test_thermo_table(toys, tmp_path):
    box = toys.argon_box()
    state = MDState.from_systems([box, box], temperature_K=90.0, seed=1)
    table = ThermoTable(tmp_path / "sub" / "thermo.csv", stride=2)
    Simulation(state, toys.LennardJones(), integrator=VelocityVerlet(timestep_fs=5.0), reporters=[table]).run(4)
    rows = np.genfromtxt(table.path, delimiter=",", names=True)
    assert rows["step"].tolist() == [0, 0, 2, 2, 4, 4] and rows["replica"].tolist() == [0, 1] * 3
    assert rows["time_ps"][-1] == pytest.approx(0.02)
    np.testing.assert_allclose(rows["temperature_K"][-2:], state.temperature_K(), rtol=1e-9)
    np.testing.assert_allclose(rows["conserved_eV"], rows["potential_eV"] + rows["kinetic_eV"], atol=1e-8)
    assert rows["volume_A3"][0] == pytest.approx(11.2**3) and rows["density_g_cm3"][0] == pytest.approx(1.511, abs=1e-3)
    table.truncate(2)
    assert np.genfromtxt(table.path, delimiter=",", names=True)["step"].tolist() == [0, 0, 2, 2]


def report(step: int) -> ProgressReport:
    return ProgressReport(
        stage="npt",
        step=step,
        last_step=100,
        time_ps=0.5,
        temperature_K=299.0,
        pressure_bar=12.0,
        density_g_cm3=1.271,
        ns_per_day=0.42,
        eta_s=16020.0,
    )


def test_progress_in_a_log_is_plain_lines(toys):
    file = StringIO()
    display = ConsoleProgress(console=Console(file=file), plain_interval_s=60.0)
    for step in (1, 50, 100):  # the first, none within the minute, the last
        display.update(report(step))
    display.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == "npt  1 %  0.5 ps  T 299 K  P 12 bar  rho 1.271 g/cm3  0.42 ns/day  eta 4 h 27 min"
    assert len(lines) == 2 and "100 %" in lines[1] and "\x1b" not in file.getvalue()
    assert [duration_text(s) for s in (12.3, 600.0, 7260.0, 180000.0)] == ["12 s", "10 min", "2 h 1 min", "2 d 2 h"]


def test_progress_on_a_terminal_is_a_bar(toys):
    file = StringIO()
    display = ConsoleProgress(console=Console(file=file, force_terminal=True, width=140))
    simulation = Simulation(
        argon(toys), toys.LennardJones(), integrator=VelocityVerlet(timestep_fs=2.0), progress=display, stage="warm up"
    )
    simulation.run(3)
    assert "warm up  100 %" in file.getvalue() and "━" in file.getvalue()
