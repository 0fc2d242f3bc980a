"""Trajectories of other programs: LAMMPS dumps, DCD, XTC and what ASE reads, converted once, then analysed as ours.

A file is read frame by frame, its molecules are recognised in the first, its atoms sorted by molecule, its coordinates
unwrapped. What frames alone allow follows: density, diffusion, conductivity by Einstein, coordination, ion pairing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import ase
import ase.io
import numpy as np
from ase.data import atomic_numbers
from ase.geometry import cell_to_cellpar, cellpar_to_cell
from numpy.typing import NDArray

from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import BambooError, InputError, suggest
from bamboo.structure.molecules import define, molecule
from bamboo.structure.packing import make_whole
from bamboo.structure.recognition import recognise
from bamboo.system import System
from bamboo.units import GRAM_PER_CM3, NANOMETRE, PICOSECOND
from md.analysis.density import density
from md.analysis.estimate import Estimate
from md.boxes import read_atoms
from md.quantities import parse_quantity
from md.recording import trajectory_path
from md.results import (
    FEWEST_FRAMES,
    StageData,
    long_enough,
    production_properties,
    property_table,
    write_properties,
)
from md.run_folder import RunFolder
from md.topology import Ensemble, Floats, Topology
from md.trajectory import THERMO, ThermoSeries, Trajectory, TrajectoryWriter

LARGEST_STEP = 0.3  # of a cell edge between frames, beyond which nobody can tell which image an atom has moved to
LARGEST_COORDINATE = 1.0e6  # Å, also of atoms that have wandered off through many images
HEIGHTS = (2.0, 1.0e4)  # Å, of a cell
CONSTANT_VOLUME = 1.0e-4  # relative change of the volume that is still none
ENSEMBLES = {
    "nve": Ensemble("nve"),
    "nvt": Ensemble("nvt"),
    "langevin": Ensemble("nvt", "langevin"),
    "npt": Ensemble("npt", barostat="unknown"),
}
# columns of a dump: whether they are scaled by the cell, and unwrapped
COORDINATES = {
    "xu yu zu": (False, True),
    "xsu ysu zsu": (True, True),
    "x y z": (False, False),
    "xs ys zs": (True, False),
}


class Frame(NamedTuple):
    """One frame as its file holds it: positions (n, 3) and cell (3, 3) in Å, whether they are known to be unwrapped.

    numbers (n,) and charges (n,) [e] are None where the file does not say.
    """

    positions: Floats
    cell: Floats
    unwrapped: bool = False
    numbers: NDArray[np.int64] | None = None
    charges: Floats | None = None


# -- reading -----------------------------------------------------------------------------------------------------


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a LAMMPS dump (text), a DCD, an XTC, or any file of ASE; InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    with open(path, "rb") as file:
        is_dump = file.read(5) == b"ITEM:"
    reader = {".dcd": _dcd_frames, ".xtc": _xtc_frames}.get(path.suffix.lower(), _ase_frames)
    with _one_line(path):
        for index, frame in enumerate((_dump_frames if is_dump else reader)(path)):
            if not (np.abs(frame.positions) < LARGEST_COORDINATE).all() or not _is_box(frame.cell):
                raise InputError(
                    f"{path}: frame {index} holds absurd positions, or no cell between {HEIGHTS[0]:g} and "
                    f"{HEIGHTS[1]:g} Å high."
                )
            yield frame


def _is_box(cell: Floats) -> bool:
    """Tell whether a cell is one that a liquid can have: finite, and its faces neither too near nor too far apart."""
    if not np.isfinite(cell).all() or not abs(np.linalg.det(cell)) > 0.0:
        return False
    heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    return bool((heights > HEIGHTS[0]).all() and (heights < HEIGHTS[1]).all())


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what readers raise over a damaged file into one line that names it."""
    try:
        yield
    except BambooError:
        raise
    except Exception as error:  # readers raise whatever their parsing meets
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a trajectory that can be read ({reason}).") from error


def _ase_frames(path: Path) -> Iterator[Frame]:
    for atoms in ase.io.iread(path, index=":"):
        if not atoms.pbc.all():
            raise InputError(f"{path}: pbc={atoms.pbc.tolist()}, expected a periodic box in every frame.")
        yield Frame(atoms.positions, atoms.cell.array, numbers=atoms.numbers, charges=_charges_of(atoms))


def _charges_of(atoms: ase.Atoms) -> Floats | None:
    return atoms.get_initial_charges() if atoms.has("initial_charges") else None


def _dcd_frames(path: Path) -> Iterator[Frame]:
    from mdtraj.formats import DCDTrajectoryFile

    with DCDTrajectoryFile(str(path)) as file:
        while True:
            block, lengths, angles = file.read(n_frames=100)
            if len(block) == 0:
                return
            if lengths is None or not (np.asarray(lengths) > 0.0).all():
                raise InputError(f"{path}: its frames hold no cell. Write them with one.")
            for positions, parameters in zip(block, np.concatenate([lengths, angles], axis=1), strict=True):
                yield Frame(np.asarray(positions, dtype=np.float64), cellpar_to_cell(parameters))


def _xtc_frames(path: Path) -> Iterator[Frame]:
    from mdtraj.formats import XTCTrajectoryFile

    with XTCTrajectoryFile(str(path)) as file:
        while True:
            block, _, _, cells = file.read(n_frames=100)
            if len(block) == 0:
                return
            for positions, cell in zip(block, cells, strict=True):
                yield Frame(NANOMETRE * positions.astype(np.float64), NANOMETRE * cell.astype(np.float64))


def _dump_frames(path: Path) -> Iterator[Frame]:
    """Frames of a text dump sorted by id; a last frame cut off in the middle is left out."""
    steps: list[int] = []
    with open(path, encoding="utf-8") as file:
        while (frame := _dump_sections(file)) is not None:
            steps = [*steps[-2:], int(frame["TIMESTEP"][0])]
            if len(steps) == 3 and steps[2] - steps[1] != steps[1] - steps[0]:
                raise InputError(f"{path}: timesteps {steps} are not evenly spaced. Analyse the parts on their own.")
            yield _dump_frame(path, frame)


def _dump_sections(file: Any) -> dict[str, Any] | None:
    """The sections of one frame by name, with the header of BOX BOUNDS and ATOMS; None where the file ends in it."""
    sections: dict[str, Any] = {}
    while True:
        words = file.readline().split()
        if not words:
            return None
        if words[:2] == ["ITEM:", "ATOMS"]:
            n_atoms = int(sections["NUMBER OF ATOMS"][0])
            rows: list[list[str]] = []
            while len(rows) < n_atoms:  # row by row: a damaged number may be of any size
                rows.append(file.readline().split())
                if len(rows[-1]) < len(words) - 2:
                    return None
            return sections | {"columns": words[2:], "rows": rows}
        if words[:3] == ["ITEM:", "BOX", "BOUNDS"]:
            sections |= {"flags": words[3:], "bounds": [file.readline().split() for _ in range(3)]}
        else:
            sections[" ".join(words[1:])] = [file.readline().strip()]


def _dump_frame(path: Path, frame: dict[str, Any]) -> Frame:
    if frame.get("UNITS", ["real"])[0] not in ("real", "metal"):
        raise InputError(f"{path}: units {frame['UNITS'][0]}, expected real or metal, whose lengths are Å.")
    if frame["flags"][-3:] != ["pp"] * 3:
        raise InputError(f"{path}: boundaries {' '.join(frame['flags'])}, expected a periodic box: pp pp pp.")
    origin, cell = _dump_cell(np.array(frame["bounds"], dtype=np.float64))
    columns, rows = frame["columns"], np.array(frame["rows"])
    if "id" in columns:
        rows = rows[np.argsort(rows[:, columns.index("id")].astype(np.int64))]
    table = {name: rows[:, index] for index, name in enumerate(columns)}
    kinds = [kind for kind in COORDINATES if all(name in table for name in kind.split())]
    if not kinds:
        raise InputError(
            f"{path}: no coordinates among the columns {' '.join(columns)}; expected x y z, xu, xs or xsu."
        )
    scaled, unwrapped = COORDINATES[kinds[0]]
    positions = np.stack([table[name].astype(np.float64) for name in kinds[0].split()], axis=1)
    positions = positions @ cell if scaled else positions - origin
    if not unwrapped and all(name in table for name in ("ix", "iy", "iz")):
        positions = positions + np.stack([table[name].astype(np.float64) for name in ("ix", "iy", "iz")], axis=1) @ cell
        unwrapped = True
    numbers = None
    if "element" in table:
        numbers = np.array([atomic_numbers.get(symbol, 0) for symbol in table["element"]], dtype=np.int64)
    charges = table["q"].astype(np.float64) if "q" in table else None
    return Frame(positions, cell, unwrapped, numbers, charges)


def _dump_cell(bounds: Floats) -> tuple[Floats, Floats]:
    """Origin and cell from the lines of BOX BOUNDS; those of tilted cells bound the box that contains them."""
    if bounds.shape[1] == 2:
        return bounds[:, 0], np.diag(bounds[:, 1] - bounds[:, 0])
    xy, xz, yz = bounds[:, 2]
    low = bounds[:, 0] - [min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0]
    high = bounds[:, 1] - [max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0]
    a, b, c = high - low
    return low, np.array([[a, 0.0, 0.0], [xy, b, 0.0], [xz, yz, c]])


def read_structure(path: Path) -> tuple[NDArray[np.int64], Floats | None]:
    """Return the atomic numbers, and the charges where there are any, of a LAMMPS data file or any file of ASE."""
    if path.suffix.lower() in (".data", ".lmp", ".lammps"):
        if not path.is_file():
            raise InputError(f"{path}: no such file.")
        with _one_line(path):
            atoms = next(iter(ase.io.iread(path, index=":", format="lammps-data")))
    else:
        atoms = read_atoms(path)
    return atoms.numbers, _charges_of(atoms)


# -- converting --------------------------------------------------------------------------------------------------


def convert(
    path: Path, target: Path, *, interval_ps: float, ensemble: str = "nvt", structure: Path | None = None,
    charges: str = "formal",
) -> Trajectory:  # fmt: skip
    """Write a foreign trajectory as one of ours and return it.

    interval_ps  time between frames
    ensemble     "nve", "nvt", "langevin" (nvt by friction, whose transport is refused), "npt"
    structure    file with the elements, where the trajectory holds none: DCD, XTC, dumps without `element`
    charges      of molecules: "formal", or "file", the sum of the atoms' there

    Coordinates that jump from one side of the box to the other are unwrapped by the nearest image of the frame before.
    Raises InputError where that is not certain, without cell or elements, for molecules that are not known by name, and
    where the volume changes in an ensemble that fixes it.
    """
    frames = read_frames(path)
    first = next(frames, None)
    if first is None:
        raise InputError(f"{path}: holds no complete frame.")
    topology, order, shift = _recognised(path, first, structure=structure, charges=charges)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    before, step, jumped, volume = None, 0.0, False, abs(np.linalg.det(first.cell))
    with TrajectoryWriter(target, topology, ensemble=ENSEMBLES[ensemble], buffer=50) as writer:
        for index, frame in enumerate(chain([first], frames)):
            if len(frame.positions) != len(order):
                raise InputError(f"{path}: frame {index} has {len(frame.positions)} atoms, the first {len(order)}.")
            if ensemble != "npt" and abs(abs(np.linalg.det(frame.cell)) / volume - 1.0) > CONSTANT_VOLUME:
                raise InputError(f"{path}: the volume changes at frame {index}, so this is no {ensemble} run but npt.")
            fractional = (frame.positions @ np.linalg.inv(frame.cell))[order]
            if before is not None and not frame.unwrapped:
                images = np.round(fractional - before)
                shift = shift - images
                jumped = jumped or bool(images.any())
                step = max(step, float(np.abs(fractional - before - images).max()))
            before = fractional
            cell = np.asarray(cellpar_to_cell(cell_to_cellpar(frame.cell)))  # a along x, b in the xy plane
            writer.append(index, index * interval_ps, positions=(fractional + shift) @ cell, cell=cell)
    if jumped and step > LARGEST_STEP:
        target.unlink()
        raise InputError(
            f"{path}: coordinates are wrapped into the cell, and atoms move by up to {step:.2f} of an edge between "
            f"frames: their images cannot be told. Write frames more often, or unwrapped (LAMMPS: xu yu zu)."
        )
    return Trajectory.read(target)


def _recognised(
    path: Path, first: Frame, *, structure: Path | None, charges: str
) -> tuple[Topology, NDArray[np.int64], Floats]:
    """Topology of the first frame, the order of its atoms by molecule, and the images that make molecules whole."""
    numbers, atomic_charges = first.numbers, first.charges
    if structure is not None:
        numbers, found = read_structure(structure)
        atomic_charges = found if atomic_charges is None else atomic_charges
    if numbers is None:
        raise InputError(f"{path}: does not say which elements its atoms are. Name a file that does with --structure.")
    if len(numbers) != len(first.positions):
        raise InputError(f"{structure}: {len(numbers)} atoms, but {path} has {len(first.positions)}.")
    if (numbers < 1).any():
        raise InputError(f"{path}: {(numbers < 1).sum()} atoms are of no known element. Correct them, or --structure.")
    try:
        names, order = recognise(System(numbers, first.positions, first.cell, True))
    except InputError as error:
        raise InputError(f"{path}: {error} (On the command line: --molecule NAME=SMILES.)") from None
    index = np.repeat(np.arange(len(names)), [molecule(name).n_atoms for name in names])
    arranged = System(numbers[order], first.positions[order], first.cell, True, molecule=index)
    shift: Floats = np.rint((make_whole(arranged).positions - arranged.positions) @ np.linalg.inv(first.cell))
    if charges == "formal":
        molecule_charges = np.array([molecule(name).charge for name in names], dtype=np.float64)
    elif atomic_charges is not None:
        molecule_charges = np.round(np.bincount(index, weights=atomic_charges[order]), 6)
    else:
        raise InputError(f"{path}: holds no charges of atoms. Use the formal ones, or a --structure that has them.")
    masses = ATOMIC_MASSES[numbers[order]]
    return Topology(numbers[order], masses, index, names, molecule_charges), order, shift


def frame_series(trajectories: Sequence[Trajectory], *, temperature_K: float) -> ThermoSeries:
    """Return the series that frames contain: volume and density, at a temperature that is taken for granted."""
    n_frames = min(trajectory.n_frames for trajectory in trajectories)
    first, shape = trajectories[0], (n_frames, len(trajectories))
    cells = np.stack([t.cells[:n_frames] for t in trajectories if t.cells is not None], axis=1)
    volume = np.abs(np.linalg.det(cells))
    columns: dict[str, Any] = {name: np.zeros((*shape, *column.shape)) for name, column in THERMO.items()}
    columns |= {"temperature_K": np.full(shape, temperature_K), "volume": volume}
    columns["density_g_cm3"] = first.topology.masses.sum() / volume / GRAM_PER_CM3
    return ThermoSeries(
        ensemble=first.ensemble, time_ps=first.time_ps[:n_frames], step=first.step[:n_frames], **columns
    )


# -- analysing ---------------------------------------------------------------------------------------------------


def file_options(
    interval: str | None, *, temperature: str | None, ensemble: str, charges: str, since: str
) -> dict[str, Any]:  # fmt: skip
    """Return the options of ``analyse_files`` from what people write; InputError for what is missing or unknown."""
    if interval is None or temperature is None:
        raise InputError("Files of trajectories need --interval '1 ps' (between frames) and --temperature '298 K'.")
    for option, given, known in (("ensemble", ensemble, tuple(ENSEMBLES)), ("charges", charges, ("formal", "file"))):
        if given not in known:
            raise InputError(f"--{option} '{given}' is not one of {', '.join(known)}.{suggest(given, known)}")
    interval_ps, since_ps = (parse_quantity(text, dimension="time") / PICOSECOND for text in (interval, since))
    temperature_K = parse_quantity(temperature, dimension="temperature")
    if not (0.0 < interval_ps < 1.0e6 and since_ps >= 0.0 and 0.0 < temperature_K < 1.0e5):
        raise InputError(f"--interval {interval}, --since {since}, --temperature {temperature}: out of range.")
    return {
        "interval_ps": interval_ps, "temperature_K": temperature_K, "ensemble": ensemble, "charges": charges,
        "since_ps": since_ps,
    }  # fmt: skip


def define_molecules(definitions: Sequence[str]) -> None:
    """Make molecules known by name from texts NAME=SMILES; InputError for anything else."""
    for text in definitions:
        name, equals, smiles = text.partition("=")
        if not (name and equals and smiles):
            raise InputError(f"--molecule '{text}' is not NAME=SMILES, for example FB=Fc1ccccc1.")
        define(name, smiles)


def analyse_files(
    paths: Sequence[Path], folder: Path, *, interval_ps: float, temperature_K: float, ensemble: str = "nvt",
    structure: Path | None = None, charges: str = "formal", since_ps: float = 0.0,
) -> tuple[dict[str, Estimate], list[str]]:  # fmt: skip
    """Convert foreign trajectories, replicas of one liquid, and return their properties and the table of them.

    Writes traj.h5 (traj-2.h5, ...), properties.json and figures to ``folder``. ``since_ps``: what comes before is not
    equilibrium and left out; frames alone do not show it. See ``convert`` for the rest.
    """
    from md.figures import frame_figures  # imported here: it loads matplotlib

    run = RunFolder(folder)
    trajectories = [
        convert(path, trajectory_path(folder, replica), interval_ps=interval_ps, ensemble=ensemble,
                structure=structure, charges=charges).since(since_ps)
        for replica, path in enumerate(paths)
    ]  # fmt: skip
    fewest = min(trajectory.n_frames for trajectory in trajectories)
    if fewest < FEWEST_FRAMES:
        raise InputError(f"{fewest} frames are too few for any analysis, expected {FEWEST_FRAMES} or more.")
    data = StageData(paths[0].name, frame_series(trajectories, temperature_K=temperature_K), trajectories)
    properties = frame_properties(data)
    write_properties(run, properties)
    frame_figures(run, data, properties)
    return properties, property_table(properties)


def frame_properties(data: StageData) -> dict[str, Estimate]:
    """Return what frames alone allow; viscosity and Green-Kubo integrals need stresses and currents every few fs."""
    if data.thermo.ensemble.name == "npt":
        found = density(data.thermo)
        properties = {name: found[name] for name in ("density", "isothermal_compressibility")}
    else:
        fixed = Estimate(float(data.thermo.density_g_cm3.mean()), None, "g/cm3", None, "fixed by the cell")
        properties = {"density": fixed}
    measured = production_properties({"conductivity", "diffusion", "coordination"}, data)
    return properties | {name: e for name, e in long_enough(measured, data).items() if "green_kubo" not in name}
