"""Liquids simulated with the current model, cut into structures worth labelling: the loop that mends its own holes.

A model meets in a liquid what its training set did not hold. ``harvest`` runs small boxes of random electrolytes at
random densities and temperatures, keeps snapshots (small boxes as they are, larger ones cut into clusters with a full
first shell), and where a guard stops a run it keeps the frames that led there. Label them, train again, repeat.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ase
import ase.io
import numpy as np

from bamboo.errors import BambooError, InputError
from bamboo.evaluator import Evaluator
from bamboo.files import replacing
from bamboo.forcefield import ForceField
from bamboo.quantum.compositions import kind_of, random_liquid
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import cut_cluster, molecule_names, pack_box
from bamboo.system import System
from md.engine.guards import Guard, IntactMolecules, MaximumTemperature, MinimumDistance
from md.engine.integrators import Langevin
from md.engine.minimiser import minimise
from md.engine.simulation import Simulation
from md.engine.state import MDState

PACKING_SCALE = 0.85  # of the experimental density: packmol succeeds and no molecules interlock
SQUEEZE_STEP = 0.005  # relative change of the box length at a time, on the way to the target density
LARGE_ATOMS = (90, 180)  # of a cluster with a full shell; others are not kept
FULL_SHELL = 5.0  # Å, radius of the cut: the cutoff of the network
SMALL_ATOMS = (5, 60)  # of a molecule with some of its neighbours
SMALL_RADII = (2.0, 4.2)  # Å, range of radii of their cuts


@dataclass(frozen=True)
class HarvestConfig:
    """What to simulate.

    n_boxes       number of independent boxes
    n_atoms       size of a box; up to 180 atoms the boxes themselves are kept, larger ones are cut into clusters
    temperature_K, density_scale   ranges to draw from; density relative to the estimated experimental one
    snapshots, interval_fs         snapshots per box and the time between them
    large_per_snapshot, small_per_snapshot   clusters of either size, for boxes that are cut
    """

    n_boxes: int = 50
    n_atoms: int = 120
    temperature_K: tuple[float, float] = (298.0, 450.0)
    density_scale: tuple[float, float] = (0.88, 1.12)
    snapshots: int = 3
    interval_fs: float = 300.0
    large_per_snapshot: int = 2
    small_per_snapshot: int = 10
    seed: int = 0


def harvest(force_field: ForceField, config: HarvestConfig, path: Path, *, say: Callable[[str], None] = print) -> int:
    """Simulate, and append structures to an extended-XYZ file that ``bamboo-md data label`` reads; return their number.

    Each carries charge, kind, sampling, trajectory and temperature_K in its comment line. Boxes already in the file are
    skipped, so the same command continues.
    """
    finished = _finished_boxes(path)
    written = stopped = 0
    for index in range(config.n_boxes):
        name = f"harvest-{config.seed}-{config.n_atoms}-{index:04d}"
        if name in finished:
            continue
        generator = np.random.default_rng([config.seed, config.n_atoms, index])
        structures, problem = _one_box(force_field, config, generator, name=name)
        if structures:
            _append(path, structures)
        written += len(structures)
        stopped += problem is not None
        say(f"box {index + 1}/{config.n_boxes}: {len(structures)} structures" + (f"; {problem}" if problem else ""))
    say(f"{written} structures written to {path}; {stopped} boxes could not be packed or were stopped")
    return written


def _finished_boxes(path: Path) -> set[str]:
    """Return the names of the boxes in a harvest file; InputError where the file is damaged or foreign."""
    frames = 0
    names = set()
    try:
        for atoms in ase.io.iread(str(path), index=":", format="extxyz") if path.exists() else ():
            names.add(str(atoms.info["trajectory"]))
            frames += 1
    except (ValueError, KeyError, IndexError, OSError, StopIteration, RuntimeError) as error:
        raise InputError(
            f"{path}: structure {frames + 1} is not one of a harvest, or was cut short. Remove it and what follows, or "
            "choose another file."
        ) from error
    return names


def _append(path: Path, structures: list[ase.Atoms]) -> None:
    """Add the structures of a box to the file all at once: a kill leaves the file as it was or complete."""
    with replacing(path) as draft:
        draft.write_bytes(path.read_bytes() if path.exists() else b"")
        ase.io.write(str(draft), structures, format="extxyz", append=True)


def _one_box(
    force_field: ForceField, config: HarvestConfig, generator: np.random.Generator, *, name: str
) -> tuple[list[ase.Atoms], str | None]:
    """Simulate one box; return its structures and, where it did not run to its end, the first line of the reason."""
    counts, density = random_liquid(generator, n_atoms=config.n_atoms, scale=config.density_scale, max_solvents=3)
    temperature_K = float(generator.uniform(*config.temperature_K))
    seed = int(generator.integers(1, 2**31 - 1))
    try:
        system = pack_box(counts, density_g_cm3=PACKING_SCALE * density, seed=seed)
    except InputError as error:
        return [], f"could not be packed: {str(error).splitlines()[0]}"
    names = molecule_names(counts)
    recent: list[System] = []
    structures: list[ase.Atoms] = []
    problem: str | None = None
    try:
        for snapshot in _snapshots(force_field, config, system, density, temperature_K, seed=seed, recent=recent):
            structures += _structures(snapshot, config, names, generator)
    except BambooError as error:
        # the last sound frames on the way to the failure are what the model must be taught
        last = [found for frame in recent[-2:] for found in _structures(frame, config, names, generator)]
        for atoms in last:
            atoms.info["sampling"] = "failure"
        structures += last
        problem = str(error).splitlines()[0]
    for atoms in structures:
        atoms.info |= {"trajectory": name, "temperature_K": temperature_K}
    return structures, problem


def _snapshots(
    force_field: ForceField,
    config: HarvestConfig,
    system: System,
    density_g_cm3: float,
    temperature_K: float,
    *,
    seed: int,
    recent: list[System],
) -> Iterator[System]:
    """Relax, squeeze to the density while warming up, then yield snapshots; ``recent`` collects frames on the way."""
    evaluator = Evaluator(force_field)
    state = MDState.from_systems([system], temperature_K=temperature_K, seed=seed)
    minimise(state, evaluator, max_steps=80)
    state.draw_momenta(temperature_K)
    integrator = Langevin(timestep_fs=0.5, temperature_K=temperature_K, thermostat_time_fs=50.0)
    guards: list[Guard] = [MaximumTemperature(temperature_K=temperature_K, factor=3.0), MinimumDistance(distance=0.6),
              IntactMolecules(systems=[system])]  # fmt: skip
    simulation = Simulation(state, evaluator, integrator=integrator, guards=guards, stage="harvest")
    squeeze(simulation, density_g_cm3, after_each=lambda: recent.append(state.systems()[0]))
    simulation.run(200)
    steps = max(1, round(config.interval_fs / integrator.timestep_fs))
    for _ in range(config.snapshots):
        for _ in range(4):
            simulation.run(max(1, steps // 4))
            recent.append(state.systems()[0])
        yield recent[-1]
        recent.clear()  # should the run stop now, what was yielded must not be kept twice


def squeeze(
    simulation: Simulation, density_g_cm3: float, *, steps: int = 30, after_each: Callable[[], None] | None = None
) -> None:
    """Shrink the one box of a simulation to a density in small steps; dynamics in between lets go of the heat."""
    state = simulation.state
    while (gap := (float(state.density_g_cm3[0]) / density_g_cm3) ** (1.0 / 3.0) - 1.0) < -1.0e-4:
        state.scale_volume(float(state.volume[0]) * (1.0 + max(gap, -SQUEEZE_STEP)) ** 3)
        state.evaluate(simulation.evaluator)
        simulation.run(steps)
        if after_each is not None:
            after_each()


def _structures(
    system: System, config: HarvestConfig, names: tuple[str, ...], generator: np.random.Generator
) -> list[ase.Atoms]:
    """Return the box itself where it is small, else clusters round random atoms: some with a full shell, some small."""
    if system.n_atoms <= LARGE_ATOMS[1]:
        atoms = system.to_atoms()
        atoms.info |= {"kind": "periodic", "sampling": "liquid"}
        return [atoms]
    found: list[ase.Atoms] = []
    for count, large in ((config.large_per_snapshot, True), (config.small_per_snapshot, False)):
        drawn = (_cluster(system, names, generator, large=large) for _ in range(8 * count))
        different = {tuple(cut): atoms for atoms, cut in (one for one in drawn if one is not None)}
        found += list(different.values())[:count]
    return found


def _cluster(
    system: System, names: tuple[str, ...], generator: np.random.Generator, *, large: bool
) -> tuple[ase.Atoms, list[int]] | None:
    """Return the molecules round a random atom and their numbers, None where they are not worth labelling."""
    if system.molecule is None:
        return None
    charges = np.array([float(molecule(name).charge) for name in names])
    wanted = "Li" if generator.random() < 0.4 and "Li" in names else str(generator.choice(names))
    centre = int(generator.choice([m for m, name in enumerate(names) if name == wanted]))
    atom = int(generator.choice(np.flatnonzero(system.molecule == centre)))
    radius_A = FULL_SHELL if large else float(generator.uniform(*SMALL_RADII))
    try:
        cluster, kept = cut_cluster(system, [atom], radius_A=radius_A, molecule_charges=charges)
    except InputError:
        return None  # a molecule touches the core through two images; another core will do
    smallest, largest = LARGE_ATOMS if large else SMALL_ATOMS
    if not smallest <= cluster.n_atoms <= largest or abs(cluster.total_charge) > 2.5:
        return None
    atoms = cluster.to_atoms()
    atoms.info |= {"kind": "large" if large else kind_of([names[m] for m in kept]), "sampling": "liquid"}
    return atoms, sorted(kept.tolist())
