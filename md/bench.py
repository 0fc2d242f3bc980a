"""How fast is it? Every ratio is measured in one run, one after the other, on the machine at hand.

``model``     one evaluation (energy, forces, virial, charges) by every engine, its growth with size, and its memory
``md``        a step of molecular dynamics with thermostat and recording, against the evaluation alone
``training``  a step of training, against plain torch that builds its batch anew in every step
``analysis``  mean squared displacements and correlations of long series, and how long the command line takes to start
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lfilter

from bamboo import checkpoint
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField
from bamboo.kernels.engines import native_status, triton_status
from bamboo.learn.fit import new_force_field
from bamboo.learn.loop import Loop, LoopConfig
from bamboo.learn.losses import LossWeights, loss_parts, total_loss
from bamboo.learn.samples import make_samples, unpack
from bamboo.nn import fused
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.structure.packing import pack_box, pack_cluster
from bamboo.system import Batch, System
from md.analysis.diffusion import mean_squared_displacement
from md.analysis.green_kubo import green_kubo
from md.composition import parse_composition, realise
from md.engine.integrators import StochasticVelocityRescaling
from md.engine.minimiser import minimise
from md.engine.simulation import Simulation
from md.engine.state import MDState
from md.recording import FrameRecorder, Portion, ThermoRecorder, build_topology
from md.trajectory import Ensemble

ELECTROLYTE = "1 m LiPF6 in EC:DMC 30:70 wt"
DENSITY_G_CM3 = 1.15
UNIT_ATOMS = 515  # of the packed box that larger ones repeat
PARTS = ("model", "md", "training", "analysis")
PUBLISHED_SECONDS = 2.87  # published TorchScript model, 4116 atoms, no reciprocal space, 2 cores of a Zen 4 server


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    part: str
    what: str
    value: float
    unit: str


def bench(parts: tuple[str, ...], *, model: str, largest: int = 100_000, device: str = "cpu") -> Iterator[Measurement]:
    """Yield measurements as they are made; ``largest`` is the number of atoms up to which growth is measured."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"Unknown part '{unknown[0]}' of the benchmark, expected some of {', '.join(PARTS)}.")
    if device not in ("cpu", "cuda"):
        raise InputError(f"Unknown device '{device}', expected cpu or cuda.")
    force_field = checkpoint.load(model)
    for part in parts:
        if part == "model":
            yield from _model(force_field, (1000, 4100, largest), device)
        elif part == "md":
            yield from _md(force_field, device)
            if device == "cuda":
                yield from _replicas(force_field, device)
        elif part == "training":
            yield from _training(force_field.config.network)
        else:
            yield from _analysis()


def table(rows: list[Measurement]) -> str:
    """Return measurements as text."""
    return "\n".join(f"{row.part:<9s} {row.what:<64s} {row.value:>10.4g} {row.unit}" for row in rows)


def to_json(rows: list[Measurement]) -> list[dict[str, str | float]]:
    """Return measurements as plain data."""
    return [asdict(row) for row in rows]


def box(n_atoms: int) -> System:
    """Return a liquid box of about so many atoms: one packed box, repeated."""
    found = realise(parse_composition(ELECTROLYTE), n_atoms=min(n_atoms, UNIT_ATOMS))
    unit = pack_box(found.counts, density_g_cm3=DENSITY_G_CM3, seed=1)
    copies = max(1, round(n_atoms / unit.n_atoms))
    shape = min(
        ((a, b, -(-copies // (a * b))) for a in range(1, 9) for b in range(1, a + 1)),
        key=lambda s: (abs(s[0] * s[1] * s[2] - copies), max(s) - min(s)),
    )
    shifts = np.array([[i, j, k] for i in range(shape[0]) for j in range(shape[1]) for k in range(shape[2])])
    return System(
        numbers=np.tile(unit.numbers, len(shifts)),
        positions=(unit.positions[None] + (shifts @ unit.cell)[:, None]).reshape(-1, 3),
        cell=unit.cell * np.array(shape)[:, None],
        pbc=True,
        total_charge=0.0,
    )


def seconds(action: Callable[[], object], *, repeats: int, device: str = "cpu") -> float:
    """Return the shortest wall time of an action [s]: other work on the machine only ever adds."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def _evaluation(force_field: ForceField, system: System, engine: str, device: str, *, repeats: int) -> float:
    evaluator, batch = Evaluator(force_field, engine=engine, device=device), Batch.from_systems([system], device=device)
    evaluator.evaluate(batch)  # lists, tables, caches
    return seconds(lambda: evaluator.evaluate(batch), repeats=repeats, device=device)


def _model(force_field: ForceField, sizes: tuple[int, ...], device: str) -> Iterator[Measurement]:
    fast = "native" if device == "cpu" else "triton"
    missing = native_status() if device == "cpu" else triton_status(device)
    engine = "reference" if missing else fast
    times = {}
    for size in sizes:
        system = box(size)
        times[system.n_atoms] = _evaluation(force_field, system, engine, device, repeats=5 if size < 20_000 else 2)
        per_atom = times[system.n_atoms] / system.n_atoms
        yield Measurement("model", f"{engine}, {system.n_atoms} atoms, one evaluation", times[system.n_atoms], "s")
        yield Measurement("model", f"{engine}, {system.n_atoms} atoms, per atom", 1e6 * per_atom, "us")
    largest, smallest = max(times), min(times)
    growth = times[largest] / largest / (times[smallest] / smallest)
    yield Measurement("model", f"time per atom, {largest} against {smallest} atoms", growth, "x")
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        yield Measurement("model", f"peak memory of the process up to {largest} atoms", peak, "GB")
    if engine == "reference":
        return
    middle = sorted(times)[len(times) // 2]
    reference = _evaluation(force_field, box(middle), "reference", device, repeats=1)
    yield Measurement("model", f"reference engine, {middle} atoms, one evaluation", reference, "s")
    yield Measurement("model", f"{engine} against the reference engine, {middle} atoms", reference / times[middle], "x")
    if device == "cpu":
        ratio = PUBLISHED_SECONDS * middle / 4116 / times[middle]
        yield Measurement("model", f"against {PUBLISHED_SECONDS} s per 4116 atoms (published, another run)", ratio, "x")


def _liquid(evaluator: Evaluator, system: System, n_replicas: int = 1) -> tuple[MDState, StochasticVelocityRescaling]:
    """Return replicas of a packed box that have begun to move as a liquid does, and what moves them."""
    state = MDState.from_systems([system] * n_replicas, temperature_K=300.0, seed=1, device=evaluator.device)
    integrator = StochasticVelocityRescaling(timestep_fs=0.5, temperature_K=300.0)
    minimise(state, evaluator, max_steps=80)  # atoms of a liquid as packed are too fast for their neighbour lists
    state.draw_momenta(300.0)
    Simulation(state, evaluator, integrator=integrator).run(200)
    return state, integrator


def _md(force_field: ForceField, device: str, *, block: int = 40) -> Iterator[Measurement]:
    found = realise(parse_composition(ELECTROLYTE), n_atoms=1000 if device == "cpu" else 4116)
    system = pack_box(found.counts, density_g_cm3=DENSITY_G_CM3, seed=1)
    evaluator = Evaluator(force_field, device=device)
    state, integrator = _liquid(evaluator, system)
    batch = Batch.from_systems(state.systems(), device=device)
    evaluator.reset()
    evaluator.evaluate(batch)
    alone = seconds(lambda: [evaluator.evaluate(batch) for _ in range(block)], repeats=8, device=device) / block
    topology = build_topology(system, found.counts)
    with tempfile.TemporaryDirectory() as name:
        ensemble = Ensemble("nvt")
        portions = [Portion(Path(name), topology, slice(0, 1))]
        frames = FrameRecorder(portions, ensemble=ensemble, stride=100)
        thermo = ThermoRecorder(portions, ensemble=ensemble, stride=4)
        simulation = Simulation(state, evaluator, integrator=integrator, reporters=(frames, thermo))
        step = seconds(lambda: simulation.run(block), repeats=8, device=device) / block
        frames.close()
        thermo.close()
    yield Measurement("md", f"{evaluator.engine}, {system.n_atoms} atoms, one NVT step with recording", step, "s")
    yield Measurement("md", "the same, steps per second", 1.0 / step, "1/s")
    yield Measurement("md", "step against evaluation with lists at hand", step / alone, "x")
    yield Measurement("md", "simulated time at 1 fs", 86400.0 / step * 1.0e-6, "ns/day")


def _replicas(force_field: ForceField, device: str, *, n_replicas: int = 64, block: int = 40) -> Iterator[Measurement]:
    """Many small boxes in one batch, which only together fill a GPU."""
    found = realise(parse_composition(ELECTROLYTE), n_atoms=1000)
    system = pack_box(found.counts, density_g_cm3=DENSITY_G_CM3, seed=1)
    evaluator = Evaluator(force_field, device=device)
    state, integrator = _liquid(evaluator, system, n_replicas)
    simulation = Simulation(state, evaluator, integrator=integrator)
    step = seconds(lambda: simulation.run(block), repeats=4, device=device) / block
    what = f"{evaluator.engine}, {n_replicas} replicas of {system.n_atoms} atoms, atom-steps"
    yield Measurement("md", what, n_replicas * system.n_atoms / step, "1/s")


def training_frames() -> list[Frame]:
    """Return a batch as training sees it: small clusters, a large one, a box; the labels are zero."""
    generator = np.random.default_rng(0)
    systems = []
    for k in range(16):
        names = generator.choice(["EC", "DMC", "EMC", "PC"], size=2)
        counts = {str(name): int((names == name).sum()) for name in names} | ({"Li": 1} if k % 2 else {})
        systems.append(pack_cluster(counts, seed=k, tolerance_A=2.1))
    systems.append(pack_cluster({"Li": 1, "PF6": 1, "EC": 4, "DMC": 5}, seed=1, tolerance_A=2.1))
    systems.append(pack_box({"Li": 1, "PF6": 1, "EC": 3, "DMC": 5}, density_g_cm3=DENSITY_G_CM3, seed=1))
    frames = []
    for k, system in enumerate(systems):
        n = system.n_atoms
        virial = np.zeros((3, 3)) if system.pbc else None
        labels = Labels("none", 0.0, np.zeros((n, 3)), np.zeros(n), np.zeros(3), virial)
        frames.append(Frame(system, labels, "periodic" if system.pbc else "neutral", "packed", f"run-{k}"))
    return frames


def _training(network: NetworkConfig, *, n_steps: int = 12) -> Iterator[Measurement]:
    frames = training_frames()
    n_atoms = sum(frame.system.n_atoms for frame in frames)
    force_field = new_force_field(network, frames)
    samples = make_samples(force_field, frames)
    edges = sum(sample.edge_index.shape[1] for sample in samples)
    config = LoopConfig(epochs=n_steps, edges_per_batch=edges + len(frames))
    loop = Loop(force_field, samples, weights=LossWeights(), config=config)
    loop.run(lambda _: None)  # warms up as well
    loop = Loop(force_field, samples, weights=LossWeights(), config=config)
    fast = seconds(lambda: loop.run(lambda _: None), repeats=1) / n_steps
    slow = _plain_training(force_field, frames, n_steps=max(2, n_steps // 4))
    yield Measurement("training", f"one step, {len(frames)} frames of {n_atoms} atoms, box included", fast, "s")
    yield Measurement("training", "the same in plain torch, its batch built in every step", slow, "s")
    yield Measurement("training", "samples per second against plain torch", slow / fast, "x")


def _plain_training(force_field: ForceField, frames: list[Frame], *, n_steps: int) -> float:
    """Return the time of a step that does what the method says and nothing to be fast [s]."""
    from torch_geometric.data import Batch as Stack

    optimizer = torch.optim.AdamW(force_field.parameters(), lr=1.0e-3)

    def step() -> None:
        data = Stack.from_data_list(make_samples(force_field, frames))
        batch, neighbors = unpack(data)
        optimizer.zero_grad()
        output = force_field(batch, neighbors, fixed_terms=False, create_graph=True)
        total_loss(loss_parts(output, data, batch.atoms_per_system), LossWeights()).backward()
        optimizer.step()

    with fused.plain():
        step()
        return seconds(step, repeats=n_steps)


def _analysis() -> Iterator[Measurement]:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(1, 6, 1_000_000))
    series = lfilter([1.0], [1.0, -0.98], noise)  # correlated over 50 samples, as pressures are
    integral = seconds(
        lambda: green_kubo(series, 1.0, interval_ps=0.002, unit="1", unit_size=1.0, models=("lorentz",)), repeats=1
    )
    tracks = np.cumsum(generator.normal(size=(10_000, 400, 3)), axis=0)
    displacement = seconds(lambda: mean_squared_displacement(tracks), repeats=1)
    yield Measurement("analysis", "Green-Kubo integral with error, 6 components of 10^6 samples", integral, "s")
    yield Measurement("analysis", "mean squared displacement, 400 ions, 10^4 frames, all origins", displacement, "s")
    for what, command in (
        ("import bamboo", [sys.executable, "-c", "import bamboo"]),
        ("bamboo-md --help", [sys.executable, "-m", "md.cli", "--help"]),
    ):
        took = seconds(lambda run=command: subprocess.run(run, capture_output=True, check=True), repeats=3)  # type: ignore[misc]
        yield Measurement("analysis", what, took, "s")
