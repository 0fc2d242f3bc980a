"""A restarted run equals the uninterrupted one, bit for bit; a torn checkpoint costs one checkpoint."""

import json

import pytest
import torch

from bamboo.checkpoint import load
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.structure.packing import pack_box
from md.engine import restart
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.integrators import Langevin, NoseHooverChain, StochasticVelocityRescaling, VelocityVerlet
from md.engine.reporters import ThermoTable
from md.engine.simulation import Simulation
from md.engine.state import MDState

INTEGRATORS = [
    VelocityVerlet(timestep_fs=5.0),
    StochasticVelocityRescaling(timestep_fs=5.0, temperature_K=90.0, ramp_from_K=50.0, ramp_ps=0.15),
    NoseHooverChain(timestep_fs=5.0, temperature_K=90.0),
    Langevin(timestep_fs=5.0, temperature_K=90.0),
    StochasticCellRescaling(timestep_fs=5.0, temperature_K=90.0, pressure_bar=1.0),
    MartynaTobiasKlein(timestep_fs=5.0, temperature_K=90.0, pressure_bar=1.0),
]


def new_state(toys) -> MDState:
    return MDState.from_systems(
        [toys.argon_box(), toys.argon_box(seed=1, cells=1, lattice=7.0)], temperature_K=90.0, seed=1
    )


def tensors_of(state: MDState) -> dict[str, torch.Tensor]:
    names = ("masses", "momenta", "energy", "forces", "virial", "charges")
    tensors = {name: getattr(state, name) for name in names} | state.variables
    return tensors | {"positions": state.batch.positions, "cell": state.batch.cell, "rng": state.generator.get_state()}


@pytest.mark.parametrize("integrator", INTEGRATORS, ids=lambda integrator: type(integrator).__name__)
def test_twenty_and_twenty_steps_equal_forty(toys, tmp_path, integrator):
    """Rounding depends on the history of the evaluator's lists, which is forgotten at the same steps in all runs,
    whether a checkpoint falls there (by wall time: none, all) or not."""

    evaluator = toys.LennardJonesWithHistory()

    def simulate(folder, state, n_steps, resume, minutes=None):
        evaluator.evaluate(new_state(toys).batch)  # history that must be forgotten
        table = ThermoTable(folder / "thermo.csv", stride=4)
        simulation = Simulation(
            state,
            evaluator,
            integrator=integrator,
            reporters=[table],
            resume=resume,
            restart_folder=folder / "restart",
            checkpoint_minutes=minutes,
            checkpoint_steps=20,
            info={"stage": 2},
        )
        simulation.run(n_steps)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unbroken = new_state(toys)
    simulate(whole, unbroken, 40, False)
    simulate(parts, new_state(toys), 20, False)
    often = new_state(toys)
    simulate(tmp_path / "often", often, 40, False, minutes=0.0)
    assert torch.equal(often.batch.positions, unbroken.batch.positions)
    with open(parts / "thermo.csv", "a") as file:  # records after the checkpoint, the last cut short by the crash
        file.write("24,0.12,0,1,1,1,1,1,1,1\n28,0.1")
    checkpoint = restart.load(parts / "restart")
    assert checkpoint is not None and checkpoint.info == {"stage": 2} and checkpoint.state.step == 20
    simulate(parts, checkpoint.state, 20, True)
    restarted = checkpoint.state
    assert restarted.step == unbroken.step == 40 and restarted.time == unbroken.time
    for name, tensor in tensors_of(unbroken).items():
        assert torch.equal(tensor, tensors_of(restarted)[name]), name
    assert (whole / "thermo.csv").read_text() == (parts / "thermo.csv").read_text()
    assert len((whole / "thermo.csv").read_text().splitlines()) == 1 + 2 * 11


def stepped(toys, folder, steps):
    """Save a state at each of the steps; the slots hold the last two."""
    state = new_state(toys)
    for step in steps:
        state.step = step
        state.momenta = state.momenta + 1.0
        restart.save(folder, state)


def rewrite(folder, header):
    """Replace the JSON of slot a, checksum included."""
    header["sha256"] = restart._digest(header, (folder / "a.safetensors").read_bytes())
    (folder / "a.json").write_text(json.dumps(header))


def test_newest_slot_is_read(toys, tmp_path):
    for n in range(1, 6):
        stepped(toys, tmp_path / str(n), range(n))
        checkpoint = restart.load(tmp_path / str(n))
        assert checkpoint is not None and checkpoint.state.step == n - 1
    assert restart.load(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "step", "old tensors"])
def test_torn_slot_falls_back(toys, tmp_path, damage):
    stepped(toys, tmp_path, [10, 20])
    newest = next(slot for slot in "ab" if json.loads((tmp_path / f"{slot}.json").read_text())["state"]["step"] == 20)
    data = tmp_path / f"{newest}.safetensors"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[-50] ^= 1
        data.write_bytes(content)
    elif damage == "json":
        (tmp_path / f"{newest}.json").write_text('{"sha256": "12')
    elif damage == "step":  # a number that still reads
        path = tmp_path / f"{newest}.json"
        path.write_text(path.read_text().replace('"step": 20', '"step": 29'))
    else:  # crash between the renames of the two files
        restart.save(tmp_path / "other", new_state(toys))
        data.write_bytes((tmp_path / "other" / "a.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        checkpoint = restart.load(tmp_path)
    assert checkpoint is not None and checkpoint.state.step == 10
    checkpoint.state.step = 30
    restart.save(tmp_path, checkpoint.state)  # overwrites the torn slot, keeps the sound one
    for slot, step in ((newest, 30), ("ab".replace(newest, ""), 10)):
        assert json.loads((tmp_path / f"{slot}.json").read_text())["state"]["step"] == step
    reloaded = restart.load(tmp_path)
    assert reloaded is not None and reloaded.state.step == 30


def test_all_slots_torn_or_newer(toys, tmp_path):
    stepped(toys, tmp_path, [10])
    header = json.loads((tmp_path / "a.json").read_text())
    rewrite(tmp_path, header | {"format_version": 99})
    with pytest.raises(InputError, match="format 99"):
        restart.load(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no undamaged checkpoint"):
        restart.load(tmp_path)
    assert not restart.exists(tmp_path)


def test_random_numbers_go_on_reproducibly_on_another_kind_of_device(toys, tmp_path):
    """Generators of CPU and GPU do not understand each other's state: the course is new, but the same each time."""
    stepped(toys, tmp_path, [10])
    header = json.loads((tmp_path / "a.json").read_text())
    same = restart.load(tmp_path)
    rewrite(tmp_path, header | {"device": "cuda"})
    first, second = restart.load(tmp_path), restart.load(tmp_path)
    assert same is not None and first is not None and second is not None
    draws = [checkpoint.state.normal() for checkpoint in (same, first, second)]
    assert torch.equal(draws[1], draws[2]) and not torch.equal(draws[0], draws[1])


def test_checkpoints_of_the_shipped_model_leave_no_trace(tmp_path):
    """Native lists and meshes round differently by age: saved often, once or never, the trajectory must be the same."""
    box = pack_box({"DMC": 3, "Li": 1, "PF6": 1}, density_g_cm3=0.6, seed=1)
    evaluator = Evaluator(load("default"))
    ends = []
    for name, minutes in (("never", None), ("often", 0.0)):
        state = MDState.from_systems([box], temperature_K=300.0, seed=1)
        integrator = StochasticCellRescaling(timestep_fs=0.5, temperature_K=300.0, pressure_bar=1.0)
        simulation = Simulation(
            state,
            evaluator,
            integrator=integrator,
            restart_folder=tmp_path / name,
            checkpoint_minutes=minutes,
            checkpoint_steps=5,
        )
        simulation.run(20)
        ends.append(state)
    assert torch.equal(ends[0].batch.positions, ends[1].batch.positions)
