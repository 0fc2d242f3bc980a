"""Trajectories and thermodynamic series in HDF5: the one language between engine and analysis.

``traj.h5`` follows the MDTraj convention (coordinates in nm, time in ps, cells as lengths and angles, topology as
JSON), one file per replica, positions unwrapped. ``thermo.h5`` holds one dataset per quantity of ``THERMO``, shape
(n_samples, n_replicas, ...), sampled every few fs. Every dataset carries its unit in the attribute ``units``.

Files are written in HDF5's single-writer mode: a process killed at any moment leaves a readable file. ``step`` is
written last, so samples without a step are unfinished and ignored.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from ase.geometry import cell_to_cellpar, cellpar_to_cell
from numpy.typing import ArrayLike, NDArray

from bamboo import __version__, units
from bamboo.errors import InputError
from bamboo.files import replacing
from md.topology import Ensemble, Floats, Topology

__all__ = ["THERMO", "Ensemble", "ThermoSeries", "ThermoWriter", "Topology", "Trajectory", "TrajectoryWriter"]

SPARE_BYTES = 2**20  # room that must be left on the disk, for chunks and tables of HDF5
BLOCK_BYTES = 2**26  # read and copied at a time


class Column(NamedTuple):
    """One growing dataset: unit, shape of one sample (per replica in thermo.h5) and storage type."""

    unit: str
    shape: tuple[int, ...]
    dtype: str


THERMO = {
    "temperature_K": Column("K", (), "f8"),
    "volume": Column("angstrom^3", (), "f8"),
    "density_g_cm3": Column("g/cm^3", (), "f8"),
    "potential_energy": Column("eV", (), "f8"),
    "kinetic_energy": Column("eV", (), "f8"),
    "conserved_energy": Column("eV", (), "f8"),
    "pressure": Column("eV/angstrom^3", (3, 3), "f4"),  # full tensor including the kinetic part
    # sum of formal molecular charge times centre-of-mass velocity; velocities in angstrom per internal time unit
    "charge_current": Column("e*sqrt(eV/amu)", (3,), "f4"),
    # sum of the molecules' dipoles about their centres of mass, from the charges of the force field
    "dipole": Column("e*angstrom", (3,), "f4"),
}
_STEP = {"step": Column("", (), "i8")}
_TIME = {"time": Column("picoseconds", (), "f8")}


class _Writer:
    """Rows appended to one HDF5 dataset per column, in single-writer mode; ``step`` goes last."""

    def __init__(
        self, path: Path, columns: Mapping[str, Column], header: Mapping[str, str], resume_step: int | None, buffer: int
    ) -> None:
        self.path, self._columns, self._header, self._buffer = Path(path), {**columns, **_STEP}, header, buffer
        self._rows: list[dict[str, ArrayLike]] = []
        if resume_step is None:
            if self.path.exists():
                raise InputError(f"{self.path} exists; remove it, or continue it with resume_step.")
            self._create(self.path).close()
        else:
            self._cut(resume_step)
        self._open()

    def _open(self) -> None:
        # single-writer mode from the first moment: a file left between opening and switching cannot be read again
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
        flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
        self._file = h5py.File(h5py.h5f.open(os.fsencode(self.path), flags, fapl=access))
        self._length = len(self._file["step"])

    def _create(self, path: Path) -> h5py.File:
        # v110: the oldest format with the single-writer mode, so that the HDF5 of other tools can read it
        file = h5py.File(path, "w", libver=("v110", "v110"))
        file.attrs.update(conventions="Pande", conventionVersion="1.1", application="bamboo-md")
        file.attrs.update(program="bamboo-md", programVersion=__version__)
        for name, text in self._header.items():
            file[name] = np.array([text.encode()])
        for name, (unit, shape, dtype) in self._columns.items():
            rows = max(1, min(1024, 65536 // max(1, 8 * int(np.prod(shape)))))
            dataset = file.create_dataset(
                name, (0, *shape), maxshape=(None, *shape), chunks=(rows, *shape), dtype=dtype,
                fillvalue=-1 if name == "step" else None,
            )  # fmt: skip
            dataset.attrs["units"] = unit
        return file

    def _cut(self, last_step: int) -> None:
        """Replace the file by a copy that ends at ``last_step``; the old one may come from a killed process."""
        if self.path.exists():
            _require_space(self.path, self.path.stat().st_size)
        with replacing(self.path) as draft, open_file(self.path) as old, self._create(draft) as new:
            for name, text in self._header.items():
                if old[name][0].decode() != text:
                    raise InputError(f"{self.path} cannot be continued: its {name} differs from that of this run.")
            step = old["step"][: _n_complete(old, self._columns)]
            keep = int(np.searchsorted(step, last_step, side="right"))
            for name, (_, shape, _) in self._columns.items():
                new[name].resize(keep, 0)
                rows = max(1, BLOCK_BYTES // max(1, 8 * int(np.prod(shape))))
                for start in range(0, keep, rows):
                    new[name][start : min(start + rows, keep)] = old[name][start : min(start + rows, keep)]

    def _append(self, row: dict[str, ArrayLike]) -> None:
        for name, value in row.items():
            if np.shape(value) != self._columns[name].shape:
                raise InputError(
                    f"{self.path}: {name} has shape {np.shape(value)}, expected {self._columns[name].shape}."
                )
        # copies, because an engine may reuse its arrays before the rows are written
        self._rows.append({name: np.array(value) for name, value in row.items()})
        if len(self._rows) >= self._buffer:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows; call before every checkpoint."""
        if not self._rows:
            return
        _require_space(self.path, sum(np.asarray(value).nbytes for row in self._rows for value in row.values()))
        start, stop = self._length, self._length + len(self._rows)
        for name in self._columns:  # step is the last one
            dataset = self._file[name]
            dataset.resize(stop, 0)
            dataset[start:stop] = np.stack([row[name] for row in self._rows])
            dataset.flush()
        self._length = stop
        self._rows.clear()

    def truncate(self, step: int) -> None:
        """Drop everything later than ``step``; the next row follows it."""
        self.close()
        self._cut(step)
        self._open()

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self.flush()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TrajectoryWriter(_Writer):
    """Writes ``traj.h5`` of one replica.

    With ``resume_step`` an existing file is cut behind that step and continued; its topology and ensemble must agree.
    """

    def __init__(
        self, path: Path, topology: Topology, *, ensemble: Ensemble, periodic: bool = True,
        resume_step: int | None = None, buffer: int = 1,
    ) -> None:  # fmt: skip
        columns = {"coordinates": Column("nanometers", (len(topology.numbers), 3), "f4"), **_TIME}
        if periodic:
            columns["cell_lengths"] = Column("nanometers", (3,), "f4")
            columns["cell_angles"] = Column("degrees", (3,), "f4")
        self._periodic = periodic
        header = {"topology": topology.to_json(), "ensemble": json.dumps(asdict(ensemble))}
        super().__init__(path, columns, header, resume_step, buffer)

    def append(self, step: int, time_ps: float, *, positions: Floats, cell: Floats | None = None) -> None:
        """Append one frame: positions (n_atoms, 3) Å, unwrapped; cell (3, 3) Å with a along x and b in the xy plane.

        InputError for other cells: the convention stores lengths and angles only, so the orientation would be lost.
        """
        row: dict[str, ArrayLike] = {"step": step, "time": time_ps, "coordinates": positions / units.NANOMETRE}
        if self._periodic:
            if cell is None:
                raise InputError(f"{self.path}: a frame of a periodic trajectory needs a cell.")
            parameters = _cell_parameters(cell)
            if not np.allclose(_cell_vectors(parameters), cell, atol=1.0e-6 * parameters[:3].max()):
                raise InputError(f"{self.path}: rotate the cell so that a lies along x, b in the xy plane; got\n{cell}")
            row |= {"cell_lengths": parameters[:3] / units.NANOMETRE, "cell_angles": parameters[3:]}
        self._append(row)


class ThermoWriter(_Writer):
    """Writes ``thermo.h5``, all replicas in one file; ``buffer`` samples are written at a time."""

    def __init__(
        self, path: Path, *, n_replicas: int, ensemble: Ensemble, resume_step: int | None = None, buffer: int = 256
    ) -> None:
        columns = {name: Column(c.unit, (n_replicas, *c.shape), c.dtype) for name, c in THERMO.items()}
        header = {"ensemble": json.dumps(asdict(ensemble))}
        super().__init__(path, {**columns, **_TIME}, header, resume_step, buffer)

    def append(self, step: int, time_ps: float, *, values: Mapping[str, ArrayLike]) -> None:
        """Append one sample: every quantity of ``THERMO`` in its unit there, with shape (n_replicas, ...)."""
        if values.keys() != THERMO.keys():
            odd = sorted(values.keys() ^ THERMO.keys())
            raise InputError(f"{self.path}: a sample needs exactly {', '.join(THERMO)}; wrong or missing: {odd}.")
        self._append({"step": step, "time": time_ps, **values})


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Frames of one replica: time_ps and step (n_frames,), cells (n_frames, 3, 3) Å or None, positions on demand."""

    topology: Topology
    ensemble: Ensemble
    time_ps: Floats
    step: NDArray[np.int64]
    cells: Floats | None
    read_positions: Callable[[slice], Floats]

    @classmethod
    def read(cls, path: Path) -> "Trajectory":
        """Open ``traj.h5``; positions stay in the file until asked for. InputError for a damaged or foreign file."""

        def positions(frames: slice) -> Floats:
            with open_file(path) as file:
                block = np.asarray(file["coordinates"][frames], dtype=np.float64) * units.NANOMETRE
            # HDF5 fills with zeros what a damaged file lacks
            present = np.isfinite(block).all(axis=(1, 2)) & block.any(axis=(1, 2))
            if not present.all():
                raise InputError(f"{path}: {(~present).sum()} frames hold no positions, or positions not finite.")
            return block

        with open_file(path) as file:
            columns = [name for name in ("coordinates", "time", "cell_lengths", "cell_angles", "step") if name in file]
            n_frames = _n_complete(file, columns)
            cells = None
            if "cell_lengths" in file:
                lengths = np.asarray(file["cell_lengths"][:n_frames], dtype=np.float64) * units.NANOMETRE
                angles = np.asarray(file["cell_angles"][:n_frames], dtype=np.float64)
                parameters = np.concatenate([lengths, angles], axis=1)
                if not (parameters > 0.0).all():
                    raise InputError(f"{path}: {(parameters <= 0.0).any(axis=1).sum()} frames hold no cell.")
                distinct, which = np.unique(parameters, axis=0, return_inverse=True)  # one in constant volume
                cells = np.array([_cell_vectors(row) for row in distinct]).reshape(-1, 3, 3)[which]
            return cls(
                topology=Topology.from_json(file["topology"][0].decode()),
                ensemble=Ensemble(**json.loads(file["ensemble"][0])),
                time_ps=np.asarray(file["time"][:n_frames]),
                step=np.asarray(file["step"][:n_frames]),
                cells=cells,
                read_positions=positions,
            )

    @classmethod
    def from_arrays(
        cls, positions: Floats, topology: Topology, *, time_ps: Floats, cells: Floats | None, ensemble: Ensemble
    ) -> "Trajectory":
        """Wrap arrays in memory: positions (n_frames, n_atoms, 3) Å, unwrapped; cells (n_frames, 3, 3) or (3, 3)."""
        n_frames = len(positions)
        if cells is not None:
            cells = np.broadcast_to(cells, (n_frames, 3, 3))
        if positions.shape != (n_frames, len(topology.numbers), 3) or time_ps.shape != (n_frames,):
            raise InputError(
                f"positions {positions.shape} and time_ps {time_ps.shape} do not fit {len(topology.numbers)} atoms."
            )
        return cls(topology, ensemble, time_ps, np.arange(n_frames), cells, lambda frames: positions[frames])

    def since(self, time_ps: float) -> "Trajectory":
        """Return the frames from a time on."""
        first = int(np.searchsorted(self.time_ps, time_ps * (1.0 - 1.0e-9)))
        return replace(
            self,
            time_ps=self.time_ps[first:],
            step=self.step[first:],
            cells=None if self.cells is None else self.cells[first:],
            read_positions=lambda frames: self.read_positions(
                slice(frames.start + first, frames.stop + first, frames.step)
            ),
        )

    @property
    def n_frames(self) -> int:
        return len(self.time_ps)

    @property
    def positions(self) -> Floats:
        """All positions, (n_frames, n_atoms, 3) Å, unwrapped. For long runs iterate over ``blocks`` instead."""
        return self.read_positions(slice(0, self.n_frames))

    @property
    def interval_ps(self) -> float:
        """Time between frames [ps]; InputError where frames are not evenly spaced."""
        return _interval(self.time_ps, "trajectory frames")

    @property
    def mean_volume(self) -> float:
        """Mean volume of the cell [Å^3]; InputError for a cluster."""
        if self.cells is None:
            raise InputError("The trajectory has no cell: this property needs a periodic box.")
        return float(np.abs(np.linalg.det(self.cells)).mean())

    def blocks(self, *, stride: int = 1) -> Iterator[tuple[slice, Floats]]:
        """Yield (frames, positions) over every ``stride``-th frame, in blocks that fit in memory."""
        rows = max(1, BLOCK_BYTES // (24 * len(self.topology.numbers))) * stride
        for start in range(0, self.n_frames, rows):
            frames = slice(start, min(start + rows, self.n_frames), stride)
            yield frames, self.read_positions(frames)

    def molecule_centres(self) -> Floats:
        """Return the centres of mass of all molecules, (n_frames, n_molecules, 3) Å, unwrapped."""
        topology = self.topology
        starts = np.flatnonzero(np.diff(topology.molecule, prepend=-1))
        centres = np.empty((self.n_frames, len(starts), 3))
        for frames, positions in self.blocks():
            centres[frames] = np.add.reduceat(positions * topology.masses[:, None], starts, axis=1)
        centres /= topology.molecule_masses[:, None]
        return centres


@dataclass(frozen=True, eq=False)
class ThermoSeries:
    """The series of ``thermo.h5``: time_ps, step (n_samples,), the rest (n_samples, n_replicas, ...), as in THERMO."""

    ensemble: Ensemble
    time_ps: Floats
    step: NDArray[np.int64]
    temperature_K: Floats
    volume: Floats
    density_g_cm3: Floats
    potential_energy: Floats
    kinetic_energy: Floats
    conserved_energy: Floats
    pressure: Floats
    charge_current: Floats
    dipole: Floats

    @classmethod
    def read(cls, path: Path) -> "ThermoSeries":
        """Read ``thermo.h5``. InputError for a damaged or foreign file; dipoles are NaN where none were recorded."""
        with open_file(path) as file:
            recorded = [name for name in THERMO if name in file or name != "dipole"]
            n_samples = _n_complete(file, [*recorded, "time", "step"])
            series = {name: np.asarray(file[name][:n_samples], dtype=np.float64) for name in recorded}
            time_ps, step = np.asarray(file["time"][:n_samples]), np.asarray(file["step"][:n_samples])
            ensemble = Ensemble(**json.loads(file["ensemble"][0]))
        for name, values in series.items():
            if not np.isfinite(values).all():
                raise InputError(f"{path}: {name} holds values that are not finite.")
        series.setdefault("dipole", np.full_like(series["charge_current"], np.nan))
        return cls(ensemble=ensemble, time_ps=time_ps, step=step, **series)

    def since(self, time_ps: float) -> "ThermoSeries":
        """Return the samples from a time on."""
        first = int(np.searchsorted(self.time_ps, time_ps * (1.0 - 1.0e-9)))
        return replace(self, **{name: getattr(self, name)[first:] for name in (*THERMO, "time_ps", "step")})

    @property
    def n_samples(self) -> int:
        return len(self.time_ps)

    @property
    def n_replicas(self) -> int:
        return int(self.volume.shape[1])

    @property
    def interval_ps(self) -> float:
        """Time between samples [ps]; InputError where samples are not evenly spaced."""
        return _interval(self.time_ps, "thermodynamic samples")


def _require_space(path: Path, n_bytes: int) -> None:
    """Raise InputError where so much more cannot be written beside a file: disk full, quota, no permission.

    Asked before HDF5 writes, for it does not survive a write that fails: it cannot even close the file any more.
    """
    try:
        if shutil.disk_usage(path.parent).free < n_bytes + SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=path.parent) as probe:  # quotas show only when something is written
            probe.write(bytes(SPARE_BYTES))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written: {reason}. Make room; the same command goes on then.") from error


def _cell_parameters(cell: Floats) -> Floats:
    """Lengths [Å] and angles [degrees] of a cell, (6,)."""
    return np.asarray(cell_to_cellpar(cell), dtype=np.float64)


def _cell_vectors(parameters: Floats) -> Floats:
    """Cell (3, 3) with a along x and b in the xy plane."""
    return np.asarray(cellpar_to_cell(parameters), dtype=np.float64)


def _interval(time_ps: Floats, what: str) -> float:
    if len(time_ps) < 2:
        raise InputError(f"There are {len(time_ps)} {what}: at least two are needed.")
    steps = np.diff(time_ps)
    interval = float(time_ps[-1] - time_ps[0]) / (len(time_ps) - 1)
    worst = int(np.argmax(np.abs(steps - interval)))
    if not interval > 0.0 or abs(steps[worst] - interval) > 1.0e-3 * interval:
        raise InputError(
            f"The {what} are not evenly spaced: {steps[worst]:g} ps after {time_ps[worst]:g} ps, else {interval:g} ps."
        )
    return interval


def _n_complete(file: h5py.File, columns: Mapping[str, Any] | list[str]) -> int:
    """Number of samples that every column holds and whose step was written; ValueError where steps do not rise."""
    step = file["step"][:]
    unfinished = np.flatnonzero(step < 0)
    n_complete = min([len(file[name]) for name in columns] + ([int(unfinished[0])] if len(unfinished) else []))
    if not (np.diff(step[:n_complete]) > 0).all():
        raise ValueError("its steps do not rise")
    return n_complete


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of ours for reading, also while it is written or after its writer was killed."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    try:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            # marked as being written, by a live process or by one that was killed; only then, because in this mode HDF5
            # reads a wrong checksum again and again, for ever, in the hope that a writer is at work
            if "already open for write" not in str(error):
                raise
            file = h5py.File(path, "r", swmr=True)
        with file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].strip("'\"")
        raise InputError(f"{path}: not a complete bamboo-md file, or damaged ({reason}).") from error
