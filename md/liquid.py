"""One box of one liquid, simulated in stages that resume: what distillation and density alignment do with every model.

A folder holds start.extxyz, restart/ and for each stage traj.h5 (where frames are kept) and thermo.h5. The same call
again continues exactly where the run was stopped, and returns at once where it was finished.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch

from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError, LockedError
from bamboo.files import held, replacing, write_json
from bamboo.structure.packing import bond_graph, pack_box
from bamboo.system import System
from bamboo.units import FEMTOSECOND, GRAM_PER_CM3, PICOSECOND
from md.boxes import read_atoms
from md.composition import parse_composition, realise
from md.config import folder_name
from md.engine import restart
from md.engine.barostats import StochasticCellRescaling
from md.engine.guards import DensityRange, Guard, IntactMolecules, MaximumTemperature, MinimumDistance
from md.engine.integrators import Langevin, StochasticVelocityRescaling, Thermostat
from md.engine.minimiser import minimise
from md.engine.reporters import Reporter
from md.engine.simulation import Simulation
from md.engine.state import Evaluator, MDState
from md.harvest import PACKING_SCALE, squeeze
from md.model import device_of
from md.recording import FrameRecorder, Portion, ThermoRecorder, build_topology
from md.run_folder import flatten
from md.topology import Ensemble
from md.trajectory import Trajectory

THERMO_FS = 10.0  # time between records of pressure and density
HYDROGEN_MASS = 3.0  # amu; heavy hydrogens allow a step of twice the length, and static averages know no masses
WARM_UP_STEPS = 400  # of 0.5 fs, at the density the stages begin from
DAMPING_FS = 200.0  # of the thermostat: only static averages are taken


@dataclass(frozen=True)
class Box:
    """What to simulate: a composition, about so many atoms, at a temperature; ``seed`` of packing and dynamics.

    density_g_cm3  to start from; None for the estimate by ideal mixing
    after  folder of the same box, whose last frame is the start: nothing is packed, squeezed or relaxed
    """

    electrolyte: str
    temperature_K: float
    n_atoms: int
    seed: int
    density_g_cm3: float | None = None
    after: str | None = None


@dataclass(frozen=True)
class Stage:
    """Dynamics of some length; at constant pressure where that is given [bar]; frames are kept every ``frame_ps``."""

    name: str
    time_ps: float
    pressure_bar: float | None = None
    frame_ps: float | None = None


def nvt(name: str, time: float, *, frames: int = 0) -> Stage:
    """Return a stage at constant volume; time in internal units."""
    return Stage(name, time / PICOSECOND, frame_ps=time / PICOSECOND / frames if frames else None)


def simulate(box: Box, stages: Sequence[Stage], evaluator: Evaluator, folder: Path) -> None:
    """Pack, relax, warm up at the start density, then run the stages; finished work is not repeated.

    Raises GuardError where the model left physical ground (its records stay), CheckpointedStop after SIGTERM.
    """
    accept_settings(folder, asdict(box) | {"timestep_fs": _timestep_fs(box), "hydrogen_mass": HYDROGEN_MASS})
    saved = restart.load(folder / "restart", device=device_of(evaluator))
    system, counts = _start(box, folder)
    topology = build_topology(system, counts)
    state = saved.state if saved else _prepared(box, system, evaluator, folder)
    begun = int(saved.info["stage"]) if saved else -1
    for index, stage in enumerate(stages):
        steps = round(stage.time_ps * 1000.0 / _timestep_fs(box))
        if index < begun or (index == begun and state.step >= steps):
            continue
        integrator = _integrator(box, stage)
        with ExitStack() as stack:
            reporters: list[Reporter] = []
            kinds = ((ThermoRecorder, THERMO_FS), (MolecularRecorder, THERMO_FS),
                     (FrameRecorder, 1000.0 * (stage.frame_ps or 0.0)))  # fmt: skip
            for kind, every_fs in kinds:
                if every_fs:
                    stride = max(1, round(every_fs / integrator.timestep_fs))
                    portion = Portion(folder / stage.name, topology, slice(0, 1))
                    recorder = kind([portion], ensemble=_ensemble(stage), stride=stride)
                    reporters.append(stack.enter_context(closing(recorder)))
            simulation = Simulation(
                state,
                evaluator,
                integrator=integrator,
                reporters=reporters,
                guards=guards(box, system),
                resume=index == begun,
                restart_folder=folder / "restart",
                frame_folder=folder / stage.name,
                checkpoint_minutes=2.0,
                stage=f"{box.electrolyte}, {box.temperature_K:g} K, {stage.name}",
                info={"stage": index},
            )
            simulation.run(steps - state.step)


class MolecularRecorder(ThermoRecorder):
    """Writes molecular/thermo.h5, whose pressure is that of the molecules as rigid bodies (``as_rigid``)."""

    def __init__(self, portions: Sequence[Portion], **common: Any) -> None:
        super().__init__([replace(each, folder=each.folder / "molecular") for each in portions], **common)

    def pressure(self, state: MDState) -> torch.Tensor:
        return as_rigid(state).pressure_tensor()


def as_rigid(state: MDState) -> MDState:
    """Return the state as its molecules without inner motion: their momenta, and the virial W - sum F_i (x) a_i.

    a_i is atom i from the centre of mass of its molecule. In equilibrium the pressure has the same mean; but what bonds
    and inner vibrations do, which cancels only on average, is not in it, so that its noise is a fraction.
    """
    molecule = state.batch.molecule
    if molecule is None:
        raise InputError("The molecular pressure needs to know the molecules.")

    def total(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros((int(molecule.max()) + 1, *values.shape[1:]), dtype=values.dtype, device=values.device)
        return zeros.index_add_(0, molecule, values)

    masses, positions = state.masses[:, None], state.batch.positions
    mass = total(masses)
    arms = positions - (total(masses * positions) / mass)[molecule]
    turned = state.forces[:, :, None] * arms[:, None, :]
    inside = state.sum_by_replica(0.5 * (turned + turned.transpose(1, 2)))
    return replace(state, momenta=masses * (total(state.momenta) / mass)[molecule], virial=state.virial - inside)


def heavy_hydrogens(system: System) -> torch.Tensor:
    """Return masses, (n_atoms,) amu, with ``HYDROGEN_MASS`` for hydrogen, taken from the atom it is bonded to.

    Molecules keep their masses, so that density and ideal-gas pressure stay what they are.
    """
    masses = ATOMIC_MASSES[system.numbers].copy()
    bonds = bond_graph(system)
    pairs = np.concatenate([bonds, bonds[:, ::-1]])
    pairs = pairs[(system.numbers[pairs[:, 0]] == 1) & (system.numbers[pairs[:, 1]] > 1)]
    hydrogens, first = np.unique(pairs[:, 0], return_index=True)
    gained = HYDROGEN_MASS - masses[hydrogens]
    masses[hydrogens] += gained
    np.subtract.at(masses, pairs[first, 1], gained)
    return torch.from_numpy(masses)


def frames(folder: Path, stage: str) -> list[System]:
    """Return the frames of a stage, molecules whole; the first, where the stage began, is left out."""
    start = System.from_atoms(read_atoms(folder / "start.extxyz"))
    path = folder / stage / "traj.h5"
    if not path.exists():
        return []
    trajectory = Trajectory.read(path)
    if trajectory.cells is None:
        raise InputError(f"{path}: holds no cells, expected the trajectory of a periodic box.")
    return [
        System(start.numbers, positions, cell, pbc=True, molecule=start.molecule)
        for positions, cell in zip(trajectory.positions[1:], trajectory.cells[1:], strict=True)
    ]


def guards(box: Box, system: System) -> list[Guard]:
    """Return what stops a run: heat, density, fused atoms, broken molecules."""
    return [
        MaximumTemperature(temperature_K=max(box.temperature_K, 298.0)),
        DensityRange(),
        MinimumDistance(distance=0.6),
        IntactMolecules(systems=[system]),
    ]


def box_name(number: int, name: str) -> str:
    """Return the folder of a liquid: its place in the list, and its name."""
    return f"{number:02d}-{folder_name(name)}"


def accept_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a folder, or refuse them where it was begun with others."""
    path, now = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        old, new = flatten(json.loads(path.read_text())), flatten(now)
        if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            raise InputError(
                f"{folder} was begun with other settings ({', '.join(changed)}). Restore them to continue, remove the "
                "folder, or choose another output."
            )
    else:
        write_json(path, now)


def share(places: Sequence[Path], compute: Callable[[int], None]) -> None:
    """Call ``compute(k)``, which writes ``places[k]``, for every file that is absent; return when all are there.

    Each is locked meanwhile: several processes that are called alike share the work, and what one leaves that ends
    early is taken over by another.
    """
    while missing := [k for k, place in enumerate(places) if not place.exists()]:
        waiting = True
        for k in missing:
            lock = places[k].with_name(f".{places[k].name}.lock")
            with ExitStack() as stack:
                try:
                    stack.enter_context(held(lock, what=str(places[k])))
                except LockedError:
                    continue  # another process is at it
                waiting = False
                if not places[k].exists():
                    compute(k)
        if waiting:
            time.sleep(1.0)


def _start(box: Box, folder: Path) -> tuple[System, dict[str, int]]:
    """Return the packed box and its molecules; what is read is what is used."""
    realised = realise(parse_composition(box.electrolyte), n_atoms=box.n_atoms)
    path = folder / "start.extxyz"
    if not path.exists() and box.after is not None:
        saved = restart.load(Path(box.after) / "restart")
        if saved is None:
            raise InputError(f"{box.after}: no state to go on from.")
        before = System.from_atoms(read_atoms(Path(box.after) / "start.extxyz"))
        last = saved.state.systems()[0]
        with replacing(path) as draft:
            ase.io.write(draft, replace(before, positions=last.positions, cell=last.cell).to_atoms(), format="extxyz")
    if not path.exists():
        density = PACKING_SCALE * min(box.density_g_cm3 or np.inf, realised.density_g_cm3)
        with replacing(path) as draft:
            ase.io.write(
                draft, pack_box(realised.counts, density_g_cm3=density, seed=box.seed).to_atoms(), format="extxyz"
            )
    return System.from_atoms(read_atoms(path)), realised.counts


def _prepared(box: Box, system: System, evaluator: Evaluator, folder: Path) -> MDState:
    """Relax, squeeze to the density while warming up, set it exactly; saved as what stages begin from."""
    state = MDState.from_systems(
        [system], temperature_K=box.temperature_K, seed=box.seed, exact_temperature=True, device=device_of(evaluator)
    )
    state.masses = heavy_hydrogens(system).to(state.masses.device)
    if box.after is None:
        minimise(state, evaluator, max_steps=100)
    state.draw_momenta(box.temperature_K)
    integrator = Langevin(timestep_fs=0.5, temperature_K=box.temperature_K, thermostat_time_fs=50.0)
    simulation = Simulation(state, evaluator, integrator=integrator, guards=guards(box, system), stage="warm-up")
    wanted = box.density_g_cm3 or realise(parse_composition(box.electrolyte), n_atoms=box.n_atoms).density_g_cm3
    if box.after is None:
        squeeze(simulation, wanted)
    state.scale_volume(float(state.sum_by_replica(state.masses)[0]) / (wanted * GRAM_PER_CM3))
    state.evaluate(evaluator)
    simulation.run(WARM_UP_STEPS)
    restart.save(folder / "restart", state, info={"stage": -1})
    return state


def _timestep_fs(box: Box) -> float:
    return 2.0 if box.temperature_K < 350.0 else 1.0


def _integrator(box: Box, stage: Stage) -> Thermostat:
    common: dict[str, Any] = {
        "timestep_fs": _timestep_fs(box), "temperature_K": box.temperature_K, "thermostat_time_fs": DAMPING_FS,
    }  # fmt: skip
    if stage.pressure_bar is None:
        return StochasticVelocityRescaling(**common)
    return StochasticCellRescaling(**common, pressure_bar=stage.pressure_bar, barostat_time_fs=500.0)


def _ensemble(stage: Stage) -> Ensemble:
    tau = DAMPING_FS * FEMTOSECOND / PICOSECOND
    if stage.pressure_bar is None:
        return Ensemble("nvt", thermostat="svr", thermostat_time_ps=tau)
    return Ensemble(
        "npt", thermostat="svr", barostat="c-rescale", thermostat_time_ps=tau, pressure_bar=stage.pressure_bar
    )
