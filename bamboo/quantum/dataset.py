"""Labelled structures in one HDF5 file: units, level of theory and provenance travel with the numbers.

Schema (format_version 1). Atoms of all frames are stacked; frame f owns rows atom_offset[f]:atom_offset[f + 1].

    atoms/   numbers u1; positions f4 [Å]; forces f4 [eV/Å]; charges f4 [e]; molecule u2 (65535: unknown)
    frames/  atom_offset i8 (n_frames + 1); energy f8 [eV]; dipole (3) f4 [e Å]; virial (3, 3) f4 [eV];
             cell (3, 3) f8 [Å]; pbc u1; total_charge f8 [e]; temperature_K f4;
             kind, sampling, level, trajectory: UTF-8 strings

NaN marks a label that the method does not give, or a temperature that has no meaning. Every dataset carries its unit
in the attribute ``unit``; the root carries ``format``, ``format_version`` and the provenance. Positions are stored in
single precision, so label the rounded positions (``round_positions``): the label then belongs to what is stored.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from bamboo.errors import InputError
from bamboo.files import replacing
from bamboo.quantum.labels import Labels
from bamboo.system import System

FORMAT = "bamboo quantum dataset"
FORMAT_VERSION = 1
KINDS = ("neutral", "lithium", "anion", "ion_pair", "large", "periodic")
SAMPLINGS = ("dynamics", "scan", "compressed", "distorted", "packed", "liquid", "failure", "imported")
SPLITS = ("train", "validation", "test")
UNKNOWN_MOLECULE = 65535
STRING_BYTES = 96

# name: (type, shape of one row, unit)
_ATOM_FIELDS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "numbers": ("u1", (), "1"),
    "positions": ("f4", (3,), "angstrom"),
    "forces": ("f4", (3,), "eV/angstrom"),
    "charges": ("f4", (), "e"),
    "molecule": ("u2", (), "1"),
}
_FRAME_FIELDS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "energy": ("f8", (), "eV"),
    "dipole": ("f4", (3,), "e*angstrom"),
    "virial": ("f4", (3, 3), "eV"),
    "cell": ("f8", (3, 3), "angstrom"),
    "pbc": ("u1", (), "1"),
    "total_charge": ("f8", (), "e"),
    "temperature_K": ("f4", (), "K"),
    "kind": (f"S{STRING_BYTES}", (), "1"),
    "sampling": (f"S{STRING_BYTES}", (), "1"),
    "level": (f"S{STRING_BYTES}", (), "1"),
    "trajectory": (f"S{STRING_BYTES}", (), "1"),
}


@dataclass(frozen=True, eq=False)
class Frame:
    """One labelled structure.

    kind           what it is: one of ``KINDS``
    sampling       how its geometry was found: one of ``SAMPLINGS``
    trajectory     name of the run it came from, or "run/part"; frames of one run resemble each other and share a split
    temperature_K  of the dynamics that made it; NaN where there was none
    """

    system: System
    labels: Labels
    kind: str
    sampling: str
    trajectory: str
    temperature_K: float = float("nan")

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("sampling", self.sampling, SAMPLINGS)):
            if value not in known:
                raise InputError(f"{name} is '{value}', expected one of {', '.join(known)}.")
        for name, text in (("trajectory", self.trajectory), ("level", self.labels.level)):
            if not 0 < len(text.encode()) <= STRING_BYTES:
                raise InputError(f"{name} is '{text}', expected 1 to {STRING_BYTES} bytes.")

    @property
    def split(self) -> str:
        """Return train, validation or test, decided by the run's name."""
        return split_of(self.trajectory)


def split_of(trajectory: str) -> str:
    """Return train (85 %), validation (5 %) or test (10 %), decided by a hash of the run's name."""
    run = trajectory.partition("/")[0]
    draw = int.from_bytes(hashlib.sha256(run.encode()).digest()[:4], "big") / 2**32
    return "train" if draw < 0.85 else "validation" if draw < 0.90 else "test"


def trajectory_in(split: str, *, run: str) -> str:
    """Return a name for a trajectory of a run that falls into the split: names decide it, so one is sought."""
    whole = run.replace("/", " per ")
    return next(name for number in count() if split_of(name := f"{whole}, {split} {number}") == split)


def round_positions(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round positions to the single precision in which they are stored."""
    return positions.astype(np.float32).astype(np.float64)


def write_frames(path: str | Path, frames: Sequence[Frame], *, provenance: Mapping[str, str] | None = None) -> None:
    """Write frames to a new file, replacing an old one only when the new one is complete.

    provenance  attributes of the file: program versions, command, licence, ...
    """
    with replacing(Path(path)) as draft, h5py.File(draft, "w") as file:
        for name, (kind, shape, unit) in _ATOM_FIELDS.items():
            _create(file, f"atoms/{name}", kind, shape=shape, unit=unit, rows=8192)
        for name, (kind, shape, unit) in _FRAME_FIELDS.items():
            _create(file, f"frames/{name}", kind, shape=shape, unit=unit, rows=512)
        _create(file, "frames/atom_offset", "i8", shape=(), unit="1", rows=512)
        file["frames/atom_offset"].resize(1, axis=0)
        file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, **(provenance or {})})
        _extend(file, frames)


def append_frames(path: str | Path, frames: Sequence[Frame]) -> None:
    """Append frames to a file; a kill at any moment leaves either the old file or the new one, complete.

    Works on a copy, so keep files that grow often at a few MB (several shards) and merge them at the end.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file. Create it with write_frames.")
    with replacing(path) as draft:
        shutil.copyfile(path, draft)
        with _open(draft, "r+") as file:
            _extend(file, frames)


def read_frames(path: str | Path) -> list[Frame]:
    """Read all frames of a file; InputError for a missing, foreign, damaged or newer file."""
    path = Path(path)
    try:
        with _open(path, "r") as file:
            atoms = {name: file[f"atoms/{name}"][()] for name in _ATOM_FIELDS}
            columns = {name: file[f"frames/{name}"][()] for name in _FRAME_FIELDS}
            offsets = file["frames/atom_offset"][()]
    except (KeyError, OSError) as error:
        raise InputError(f"{path}: damaged dataset ({error}). Restore it from a copy.") from error
    sizes = {len(column) for column in columns.values()} | {len(offsets) - 1}
    rows = {len(column) for column in atoms.values()} | {int(offsets[-1])}
    if len(sizes) > 1 or len(rows) > 1 or (np.diff(offsets) < 1).any():
        raise InputError(f"{path}: damaged dataset (columns of different length). Restore it from a copy.")
    for name in ("positions", "forces", "charges"):
        atoms[name] = atoms[name].astype(np.float64)
    for name in ("numbers", "molecule"):
        atoms[name] = atoms[name].astype(np.int64)
    for name in ("kind", "sampling", "level", "trajectory"):
        columns[name] = np.char.decode(columns[name], "utf-8")
    return [_frame(atoms, columns, f, slice(offsets[f], offsets[f + 1])) for f in range(len(offsets) - 1)]


def read_provenance(path: str | Path) -> dict[str, str]:
    """Read the attributes of a file: format, version, and the provenance it was written with."""
    with _open(Path(path), "r") as file:
        return {name: str(value) for name, value in file.attrs.items()}


def merge_files(
    sources: Sequence[str | Path], target: str | Path, *, provenance: Mapping[str, str] | None = None
) -> list[Frame]:
    """Merge files into one compact file, trajectories sorted by name; the first file's provenance unless one is given.

    A trajectory that appears in two files is refused: its frames would count twice.
    """
    if not sources:
        raise InputError("Nothing to merge: no dataset files were given.")
    owner: dict[str, str | Path] = {}
    frames: list[Frame] = []
    for source in sources:
        loaded = read_frames(source)
        for frame in loaded:
            if owner.setdefault(frame.trajectory, source) != source:
                raise InputError(f"{source}: trajectory '{frame.trajectory}' is also in {owner[frame.trajectory]}.")
        frames += loaded
    frames.sort(key=lambda frame: frame.trajectory)
    known = read_provenance(sources[0])
    kept = {name: value for name, value in known.items() if name not in ("format", "format_version")}
    write_frames(target, frames, provenance=kept if provenance is None else provenance)
    return frames


def count_table(frames: Sequence[Frame]) -> str:
    """Return a table of the number of frames, atoms and trajectories per kind, sampling and split."""
    titles = ("kind", "sampling", "train", "valid", "test", "frames", "trajectories", "atoms")
    row = "{:<10} {:<11} {:>7} {:>6} {:>6} {:>7} {:>13} {:>8}"
    lines = [row.format(*titles)]
    groups: dict[tuple[str, str], list[Frame]] = {}
    for frame in frames:
        groups.setdefault((frame.kind, frame.sampling), []).append(frame)
    for (kind, sampling), members in [*sorted(groups.items()), (("all", ""), list(frames))]:
        train, valid, test = (sum(frame.split == split for frame in members) for split in SPLITS)
        trajectories = len({frame.trajectory for frame in members})
        atoms = sum(frame.system.n_atoms for frame in members)
        lines.append(row.format(kind, sampling, train, valid, test, len(members), trajectories, atoms))
    return "\n".join(lines)


def _create(file: h5py.File, name: str, kind: str, *, shape: tuple[int, ...], unit: str, rows: int) -> None:
    dataset = file.create_dataset(
        name, (0, *shape), kind, maxshape=(None, *shape), chunks=(rows, *shape), compression="gzip", shuffle=True
    )
    dataset.attrs["unit"] = unit


def _extend(file: h5py.File, frames: Sequence[Frame]) -> None:
    if not frames:
        return
    columns = {f"atoms/{name}": np.concatenate([_atom_rows(frame, name) for frame in frames]) for name in _ATOM_FIELDS}
    columns |= {f"frames/{name}": np.stack([_frame_row(frame, name) for frame in frames]) for name in _FRAME_FIELDS}
    sizes = np.array([frame.system.n_atoms for frame in frames])
    columns["frames/atom_offset"] = int(file["frames/atom_offset"][-1]) + np.cumsum(sizes)
    for name, values in columns.items():
        dataset = file[name]
        start = len(dataset)
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values.astype(dataset.dtype)


def _atom_rows(frame: Frame, name: str) -> NDArray[np.generic]:
    system, n_atoms = frame.system, frame.system.n_atoms
    if name in ("numbers", "positions"):
        return np.asarray(getattr(system, name))
    if name == "molecule":
        return np.full(n_atoms, UNKNOWN_MOLECULE) if system.molecule is None else system.molecule
    value = getattr(frame.labels, name)
    return np.full((n_atoms, *_ATOM_FIELDS[name][1]), np.nan) if value is None else np.asarray(value)


def _frame_row(frame: Frame, name: str) -> NDArray[np.generic]:
    if name in ("cell", "pbc", "total_charge"):
        return np.asarray(getattr(frame.system, name))
    if name in ("kind", "sampling", "trajectory"):
        return np.asarray(getattr(frame, name).encode())
    if name == "level":
        return np.asarray(frame.labels.level.encode())
    value = frame.temperature_K if name == "temperature_K" else getattr(frame.labels, name)
    return np.full(_FRAME_FIELDS[name][1], np.nan) if value is None else np.asarray(value)


def _frame(
    atoms: dict[str, NDArray[np.generic]], columns: dict[str, NDArray[np.generic]], f: int, rows: slice
) -> Frame:
    molecule = atoms["molecule"][rows]
    labels = Labels(
        level=str(columns["level"][f]),
        energy=float(columns["energy"][f]),
        forces=_present(atoms["forces"][rows]),
        charges=_present(atoms["charges"][rows]),
        dipole=_present(columns["dipole"][f].astype(np.float64)),
        virial=_present(columns["virial"][f].astype(np.float64)),
    )
    system = System(
        numbers=atoms["numbers"][rows],  # type: ignore[arg-type]
        positions=atoms["positions"][rows],  # type: ignore[arg-type]
        cell=columns["cell"][f],
        pbc=bool(columns["pbc"][f]),
        total_charge=float(columns["total_charge"][f]),
        molecule=None if molecule[0] == UNKNOWN_MOLECULE else molecule,  # type: ignore[arg-type]
    )
    names = {name: str(columns[name][f]) for name in ("kind", "sampling", "trajectory")}
    return Frame(system, labels, **names, temperature_K=float(columns["temperature_K"][f]))


def _present(values: NDArray[np.generic]) -> NDArray[np.float64] | None:
    array = np.asarray(values, dtype=np.float64)
    return None if np.isnan(array.flat[0]) else array


def _open(path: Path, mode: str) -> h5py.File:
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    try:
        file = h5py.File(path, mode)
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error}).") from error
    if file.attrs.get("format") != FORMAT:
        file.close()
        raise InputError(f"{path}: not a {FORMAT}. Convert other formats with `bamboo-md data import`.")
    version = int(file.attrs.get("format_version", 0))
    if not 1 <= version <= FORMAT_VERSION:
        file.close()
        raise InputError(f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}. Update it.")
    return file
