"""Steps in blocks: the trajectory of single steps bit for bit, and nothing in a step that would need the host."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bamboo.checkpoint import load
from bamboo.errors import GuardError, InputError
from bamboo.evaluator import Evaluator
from bamboo.kernels.native import NativeEngine
from bamboo.structure.packing import pack_box
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.guards import MaximumTemperature
from md.engine.integrators import Langevin, NoseHooverChain, StochasticVelocityRescaling, VelocityVerlet
from md.engine.reporters import ThermoTable
from md.engine.simulation import Simulation
from md.engine.state import MDState
from md.engine.stepper import _CapturedStep

BATH = {"timestep_fs": 5.0, "temperature_K": 90.0}
INTEGRATORS = [
    VelocityVerlet(timestep_fs=5.0),
    StochasticVelocityRescaling(**BATH),
    StochasticVelocityRescaling(**BATH, ramp_from_K=50.0, ramp_ps=0.06),  # 12 steps one by one
    NoseHooverChain(**BATH),
    Langevin(timestep_fs=5.0, temperature_K=torch.tensor([80.0, 100.0], dtype=torch.float64)),
    StochasticCellRescaling(**BATH, pressure_bar=1.0),
    MartynaTobiasKlein(**BATH, pressure_bar=1.0),
    MartynaTobiasKlein(**BATH, pressure_bar=1.0, coupling="anisotropic"),
]


@pytest.fixture
def listed(toys):
    """Argon with a list: pairs are summed in the order of the last build, so every build leaves its trace."""

    class Listed(toys.LennardJones):
        def __init__(self, *, single: bool = False) -> None:
            super().__init__()
            self.single, self.builds, self.replays = single, 0, 0
            self.reset()

        def reset(self) -> None:
            self.built = None

        def hold(self, batch):
            return (batch.positions - self.built).square().sum(dim=1).max() < 0.06**2

        @property
        def layout(self):
            return None if self.single or self.built is None else 0

        def pairs(self, batch):
            pairs = super().pairs(batch)
            return pairs[:, self.order]

        def evaluate(self, batch):
            if self.built is None or not bool(self.hold(batch)):
                pairs = super().pairs(batch)
                self.order = torch.argsort(batch.positions[pairs[0], 0] * batch.positions[pairs[1], 1])
                self.built, self.builds = batch.positions.clone(), self.builds + 1
            return super().evaluate(batch)

        def evaluate_unchecked(self, batch):
            self.replays += 1
            return super().evaluate(batch), self.hold(batch)

    return Listed


def new_state(toys) -> MDState:
    boxes = [toys.argon_box(), toys.argon_box(seed=1, cells=1, lattice=7.0)]
    return MDState.from_systems(boxes, temperature_K=90.0, seed=1)


def assert_equal(one: MDState, other: MDState) -> None:
    assert one.step == other.step and one.time == other.time
    assert all(torch.equal(a, b) for a, b in zip(one.moving(), other.moving(), strict=True))
    assert torch.equal(one.generator.get_state(), other.generator.get_state())


@pytest.mark.parametrize("integrator", INTEGRATORS, ids=lambda integrator: type(integrator).__name__)
def test_blocks_give_the_trajectory_of_single_steps(toys, listed, tmp_path, integrator):
    """Lists expire inside of blocks and are forgotten between them; tables, guards and thermostats see the same."""

    def simulate(name, *, single):
        state, evaluator, table = new_state(toys), listed(single=single), ThermoTable(tmp_path / name, stride=7)
        guards = [MaximumTemperature(temperature_K=90.0, factor=9.0, stride=10)]
        simulation = Simulation(
            state, evaluator, integrator=integrator, reporters=[table], guards=guards, checkpoint_steps=20
        )
        simulation.run(33)
        simulation.run(7)
        return state, evaluator, table.path.read_text()

    (expected, singly, rows), (state, blockwise, same_rows) = (
        simulate(n, single=n == "single") for n in ("single", "x")
    )
    assert blockwise.replays > 15 and singly.replays == 0
    assert blockwise.builds == singly.builds > 4
    assert_equal(state, expected)
    assert rows == same_rows and len(rows.splitlines()) == 1 + 2 * 6


def test_blocks_of_the_shipped_model(tmp_path, monkeypatch):
    """The evaluator's own judgement of its lists, at constant pressure; a skin that lasts a few steps."""
    box = pack_box({"DMC": 2, "Li": 1, "PF6": 1}, density_g_cm3=0.6, seed=1)
    integrator = StochasticCellRescaling(timestep_fs=0.5, temperature_K=300.0, pressure_bar=1.0)
    model, builds, ends = load("default"), [], []
    build = Evaluator._build
    monkeypatch.setattr(Evaluator, "_build", lambda *args: (builds.append(len(ends)), build(*args)))
    for layout in (None, 0):
        monkeypatch.setattr(NativeEngine, "layout", layout)
        ends.append(MDState.from_systems([box], temperature_K=300.0, seed=1))
        evaluator = Evaluator(model, skin=0.1)
        Simulation(ends[-1], evaluator, integrator=integrator, checkpoint_steps=10).run(16)
    assert builds.count(1) == builds.count(2) > 3
    assert_equal(*ends)


@pytest.mark.parametrize("fault", ["overlap", "force"])
def test_a_fault_inside_a_block_stops_at_its_step(toys, listed, tmp_path, fault):
    class Faulty(listed):
        def evaluate(self, batch):
            if fault == "overlap" and not bool(self.sound(batch)):
                raise InputError("Atoms 0 and 1 are 0.100 Å apart.")
            return self.spoilt(batch, super().evaluate(batch))

        def evaluate_unchecked(self, batch):
            output, holds = super().evaluate_unchecked(batch)
            return self.spoilt(batch, output), holds & (self.sound(batch) if fault == "overlap" else True)

        def spoilt(self, batch, output):
            if fault == "force" and not bool(self.sound(batch)):
                output.forces[7] = torch.nan
            return output

        def sound(self, batch):
            """The atoms drift along x with one velocity: how far they are tells the step."""
            return batch.positions[:, 0].mean() - self.start < 13.5 * 0.001

    state, evaluator = new_state(toys), Faulty()
    evaluator.start = state.batch.positions[:, 0].mean()
    integrator = VelocityVerlet(timestep_fs=5.0)
    simulation = Simulation(state, evaluator, integrator=integrator, frame_folder=tmp_path)
    drift = torch.tensor([0.001 / integrator.timestep, 0.0, 0.0], dtype=torch.float64)
    state.momenta = state.momenta + state.masses[:, None] * drift
    match = {"overlap": r"step 13\): Atoms 0 and 1", "force": r"step 14\), replica 0: forces is not finite"}[fault]
    with pytest.raises(GuardError, match=match):
        simulation.run(40)
    assert evaluator.replays > 6


@pytest.mark.parametrize("integrator", INTEGRATORS, ids=lambda integrator: type(integrator).__name__)
def test_a_step_can_be_captured(toys, without_host, integrator):
    """No integrator asks the device for a number within a step."""

    class Wall(toys.ElasticFrame):
        layout = 0

        def evaluate_unchecked(self, batch):
            return self.evaluate(batch), torch.ones((), dtype=torch.bool)

    state, evaluator = new_state(toys), Wall([1.0, 1.0, 1.0], [11.2, 11.2, 11.2])
    integrator.start(state, evaluator)
    before = state.batch.positions
    step = _CapturedStep(state, evaluator, integrator=integrator)
    with without_host():
        step._step()
    assert int(step._done) == 1 and not torch.equal(step._tensors[0], before)


def test_what_a_step_must_not_do_is_seen(without_host):
    values = torch.arange(3.0)
    for action in (lambda: float(values.sum()), lambda: values[values > 1.0], lambda: torch.bincount(values.long())):
        with pytest.raises(AssertionError), without_host():
            action()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("integrator", INTEGRATORS, ids=lambda integrator: type(integrator).__name__)
def test_captured_steps_on_a_gpu(integrator):
    """Replays of a captured step, random numbers included, follow single steps to the rounding of unordered sums."""
    if isinstance(integrator, Langevin):
        integrator = replace(integrator, temperature_K=integrator.temperature_K.cuda())
    box = pack_box({"DMC": 6, "Li": 1, "PF6": 1}, density_g_cm3=0.6, seed=1)
    ends = []
    for single in (True, False):
        state = MDState.from_systems([box, box], temperature_K=90.0, seed=1, device="cuda")
        evaluator = Evaluator(load("default", dtype=torch.float64), device="cuda", engine="triton", skin=0.3)
        asked = SimpleNamespace(evaluate=evaluator.evaluate, reset=evaluator.reset) if single else evaluator
        Simulation(state, asked, integrator=integrator).run(30)
        ends.append(state)
    for one, other in zip(*(end.moving() for end in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(ends[0].generator.get_state(), ends[1].generator.get_state())
