"""Two liquids with published transport coefficients, for the engine and the analysis to reproduce.

Lennard-Jones argon near its triple point, truncated at 2.5 sigma, and molten NaCl as rigid ions of Fumi and Tosi. Both
run as replicas in one batch, in stages that a repeated call continues. The potentials know cubic boxes of constant
volume, all of one size; they are compiled from reference_liquids.cpp when first used.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from math import erfc, exp, pi, sqrt
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bamboo import units
from bamboo.elements import ATOMIC_MASSES
from bamboo.errors import InputError
from bamboo.system import Batch, System
from md.engine import restart
from md.engine.integrators import Integrator, Langevin, StochasticVelocityRescaling
from md.engine.simulation import Simulation
from md.engine.state import MDState
from md.recording import FrameRecorder, Portion, ThermoRecorder, trajectory_path
from md.topology import Ensemble, Topology
from md.trajectory import ThermoSeries, Trajectory

Floats = NDArray[np.float64]
TABLE_SIZE = 2**16
SKIN = 1.2  # Å, of the list of pairs
THERMOSTAT_FS = 1000.0
JOULE = 1.0e-3 * units.KJ_PER_MOL * units.MOLE


@cache
def _library() -> ctypes.CDLL:
    """The compiled potentials, kept in the folder for temporary files under the checksum of their source."""
    source = Path(__file__).with_suffix(".cpp")
    name = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"reference-liquids-{name}.so"
    if not path.exists():
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise InputError("The reference liquids need a C++ compiler, g++ or c++.")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(source), "-o", str(draft)], check=True)
            draft.rename(path)
    return ctypes.CDLL(str(path))


@dataclass(frozen=True)
class Output:
    """What the engine reads: energy (R,), forces (n_atoms, 3), virial (R, 3, 3), charges (n_atoms,)."""

    energy: torch.Tensor
    forces: torch.Tensor
    virial: torch.Tensor
    charges: torch.Tensor


class Argon:
    """4 eps ((s/r)^12 - (s/r)^6), truncated at 2.5 s; eps = 119.8 K, s = 3.405 Å. One kind of atom."""

    EPSILON, SIGMA = 119.8 * units.BOLTZMANN, 3.405
    NUMBERS: tuple[int, ...] = (18,)
    CHARGES: tuple[float, ...] = (0.0,)
    closest = 2.0  # Å, shorter distances do not occur

    def __init__(self) -> None:
        self.cutoff = 2.5 * self.SIGMA
        self._table: Floats | None = None
        self._listed: tuple[torch.Tensor, torch.Tensor, NDArray[np.int32], NDArray[np.int32]] | None = None

    def pair(self, r: float, kinds: int) -> tuple[float, float]:
        """Return energy [eV] and -dE/dr / r of a pair at distance r [Å]; kinds: sum of the indices of its kinds."""
        sixth = (self.SIGMA / r) ** 6
        return 4.0 * self.EPSILON * sixth * (sixth - 1.0), 24.0 * self.EPSILON * sixth * (2.0 * sixth - 1.0) / r**2

    def evaluate(self, batch: Batch) -> Output:
        n_replicas, n = batch.n_systems, batch.n_atoms // batch.n_systems
        lengths = batch.cell.diagonal(dim1=1, dim2=2).contiguous()
        if n_replicas * n != batch.n_atoms or float(lengths.min()) < 2.0 * self.cutoff:
            raise InputError(f"A {lengths.min():.1f} Å box: expected equal numbers of atoms, and twice the cutoff.")
        kind = np.searchsorted(self.NUMBERS, batch.numbers.numpy()).astype(np.int32)
        result = Output(
            energy=torch.zeros(n_replicas, dtype=torch.float64),
            forces=torch.zeros(batch.n_atoms, 3, dtype=torch.float64),
            virial=torch.zeros(n_replicas, 3, 3, dtype=torch.float64),
            charges=torch.from_numpy(np.array(self.CHARGES)[kind]),
        )
        positions = batch.positions.contiguous()
        self._add_pairs(n_replicas, n, positions, kind=kind, lengths=lengths, result=result)
        self._add_waves(n_replicas, n, positions, lengths=lengths, result=result)
        return result

    def _add_pairs(
        self,
        n_replicas: int,
        n: int,
        positions: torch.Tensor,
        *,
        kind: NDArray[np.int32],
        lengths: torch.Tensor,
        result: Output,
    ) -> None:
        squared = np.linspace(self.closest**2, self.cutoff**2 * 1.0001, TABLE_SIZE)
        if self._table is None:
            rows = [[self.pair(sqrt(s), kinds) for s in squared] for kinds in range(2 * len(self.NUMBERS) - 1)]
            self._table = np.array(rows)
        starts, neighbours = self._pairs(n_replicas, n, positions, lengths=lengths)
        _library().add_pairs(
            n_replicas, n, _pointer(positions), ctypes.c_void_p(kind.ctypes.data), _pointer(lengths),
            ctypes.c_void_p(starts.ctypes.data), ctypes.c_void_p(neighbours.ctypes.data), ctypes.c_double(self.cutoff),
            ctypes.c_void_p(self._table.ctypes.data), TABLE_SIZE, ctypes.c_double(squared[0]),
            ctypes.c_double(squared[1] - squared[0]), _pointer(result.energy), _pointer(result.forces),
            _pointer(result.virial),
        )  # fmt: skip

    def _pairs(
        self, n_replicas: int, n: int, positions: torch.Tensor, *, lengths: torch.Tensor
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """List of pairs, made anew where boxes changed or an atom moved by half the skin."""
        if self._listed is not None:
            before, boxes, starts, neighbours = self._listed
            same = before.shape == positions.shape and torch.equal(boxes, lengths)
            if same and float(((positions - before) ** 2).sum(dim=1).max()) < (0.5 * SKIN) ** 2:
                return starts, neighbours
        starts, neighbours = np.empty(n_replicas * n + 1, dtype=np.int32), np.empty(0, dtype=np.int32)
        for write in (False, True):  # counted first
            if write:
                neighbours = np.empty(int(starts[-1]), dtype=np.int32)
            _library().find_pairs(
                n_replicas, n, _pointer(positions), _pointer(lengths), ctypes.c_double(self.cutoff + SKIN),
                ctypes.c_void_p(starts.ctypes.data), ctypes.c_void_p(neighbours.ctypes.data if write else None),
            )  # fmt: skip
        self._listed = positions, lengths, starts, neighbours
        return starts, neighbours

    def _add_waves(
        self, n_replicas: int, n: int, positions: torch.Tensor, *, lengths: torch.Tensor, result: Output
    ) -> None:
        """Nothing without charges."""


class MoltenSalt(Argon):
    """NaCl, A exp((s - r)/rho) - C/r^6 - D/r^8 + q q/r with Ewald's sum; kinds Na (0) and Cl (1).

    Fumi and Tosi, J. Phys. Chem. Solids 25, 31 and 45 (1964), 10.1016/0022-3697(64)90159-3.
    Rows of the parameters: Na Na, Na Cl, Cl Cl. ``accuracy``: erfc of it is what either sum leaves out.
    """

    RHO = 0.317  # Å
    A = tuple(c * 0.338e-19 * JOULE for c in (1.25, 1.0, 0.75))
    S = (2.340, 2.755, 3.170)  # Å
    C = tuple(c * 1.0e-19 * JOULE for c in (1.68, 11.2, 116.0))  # eV Å^6
    D = tuple(c * 1.0e-19 * JOULE for c in (0.8, 13.9, 233.0))  # eV Å^8
    NUMBERS, CHARGES = (11, 17), (1.0, -1.0)
    closest = 1.2

    def __init__(self, cutoff: float = 9.5, *, accuracy: float = 2.7) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.alpha = accuracy / cutoff
        self.reach = 2.0 * self.alpha * accuracy  # largest wave vector, 1/Å

    def pair(self, r: float, kinds: int) -> tuple[float, float]:
        wall = self.A[kinds] * exp((self.S[kinds] - r) / self.RHO)
        sixth, eighth = self.C[kinds] / r**6, self.D[kinds] / r**8
        product = units.COULOMB_CONSTANT * (1.0, -1.0, 1.0)[kinds]
        screened = product * erfc(self.alpha * r) / r
        slope = product * 2.0 * self.alpha / sqrt(pi) * exp(-((self.alpha * r) ** 2))
        strength = wall / (self.RHO * r) + (screened + slope - 6.0 * sixth - 8.0 * eighth) / r**2
        return wall - sixth - eighth + screened, strength

    def _add_waves(
        self, n_replicas: int, n: int, positions: torch.Tensor, *, lengths: torch.Tensor, result: Output
    ) -> None:
        _library().add_waves(
            n_replicas, n, _pointer(positions), _pointer(result.charges), ctypes.c_double(float(lengths[0, 0])),
            ctypes.c_double(self.alpha), ctypes.c_double(self.reach), ctypes.c_double(units.COULOMB_CONSTANT),
            _pointer(result.energy), _pointer(result.forces), _pointer(result.virial),
        )  # fmt: skip
        own = (result.charges**2).reshape(n_replicas, n).sum(dim=1)
        result.energy.sub_(units.COULOMB_CONSTANT * self.alpha / sqrt(pi) * own)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# -- boxes and stages --------------------------------------------------------------------------------------------


def fcc_box(numbers: Sequence[int], *, cells: int, lattice: float) -> System:
    """Face-centred cubic crystal of one element, or rock salt of two."""
    corner = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    basis = np.concatenate([corner + 0.5 * k for k in range(len(numbers))])
    cell = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    positions = ((cell + basis) * lattice).reshape(-1, 3)
    kinds = np.tile(np.repeat(numbers, 4), cells**3)
    order = np.argsort(kinds, kind="stable")
    length = cells * lattice
    return System(kinds[order], positions[order], length * np.eye(3), True, molecule=np.arange(len(order)))


@dataclass(frozen=True)
class Liquid:
    """A liquid and how it is simulated: melted at ``hot_K``, cooled, then measured at ``temperature_K``."""

    potential: Argon
    box: System
    temperature_K: float
    hot_K: float
    timestep_fs: float
    melt_ps: float
    frame_fs: float
    thermo_fs: float
    n_replicas: int

    def topology(self) -> Topology:
        kind = np.searchsorted(self.potential.NUMBERS, self.box.numbers)
        names = np.array(["Ar"] if len(self.potential.NUMBERS) == 1 else ["Na", "Cl"])
        return Topology(
            numbers=self.box.numbers, masses=ATOMIC_MASSES[self.box.numbers], molecule=np.arange(self.box.n_atoms),
            molecule_names=tuple(names[kind].tolist()), molecule_charges=np.array(self.potential.CHARGES)[kind],
        )  # fmt: skip

    def simulate(self, folder: Path, *, length_ps: float) -> tuple[list[Trajectory], ThermoSeries]:
        """Run, or go on with what a folder holds, for so long per replica; return what was recorded in equilibrium."""
        folder.mkdir(parents=True, exist_ok=True)
        common = {"timestep_fs": self.timestep_fs, "temperature_K": self.temperature_K}
        hot = Langevin(timestep_fs=self.timestep_fs, temperature_K=self.hot_K, thermostat_time_fs=500.0)
        stages: list[tuple[Integrator, float]] = [
            (hot, self.melt_ps),
            (Langevin(**common, thermostat_time_fs=500.0), self.melt_ps),
            (StochasticVelocityRescaling(**common, thermostat_time_fs=THERMOSTAT_FS), length_ps),
        ]
        saved = restart.load(folder / "restart")
        begun = int(saved.info["stage"]) if saved else -1
        state = saved.state if saved else MDState.from_systems(
            [self.box] * self.n_replicas, temperature_K=self.hot_K, seed=1
        )  # fmt: skip
        portion = Portion(folder, self.topology(), slice(0, self.n_replicas))
        ensemble = Ensemble("nvt", "svr", thermostat_time_ps=1.0e-3 * THERMOSTAT_FS)
        for index, (integrator, time_ps) in enumerate(stages):
            n_steps = round(1.0e3 * time_ps / self.timestep_fs)
            if index < begun or (index == begun and state.step >= n_steps):
                continue
            with ExitStack() as stack:
                recorders = [
                    kind([portion], ensemble=ensemble, stride=round(every / self.timestep_fs))
                    for kind, every in ((FrameRecorder, self.frame_fs), (ThermoRecorder, self.thermo_fs))
                    if index == len(stages) - 1
                ]  # fmt: skip
                for recorder in recorders:
                    stack.enter_context(closing(recorder))
                simulation = Simulation(
                    state, self.potential, integrator=integrator, reporters=recorders, resume=index == begun,
                    restart_folder=folder / "restart", checkpoint_minutes=1.0, info={"stage": index},
                )  # fmt: skip
                simulation.run(n_steps - state.step)
        since_ps = 0.1 * length_ps
        trajectories = [Trajectory.read(trajectory_path(folder, r)).since(since_ps) for r in range(self.n_replicas)]
        return trajectories, ThermoSeries.read(folder / "thermo.h5").since(since_ps)


def argon(*, cells: int = 7, n_replicas: int = 8) -> Liquid:
    """Lennard-Jones liquid at rho* = 0.8442, T* = 0.722, near the triple point."""
    sigma = Argon.SIGMA
    temperature_K = 0.722 * Argon.EPSILON / units.BOLTZMANN
    return Liquid(
        potential=Argon(), box=fcc_box((18,), cells=cells, lattice=sigma * (4.0 / 0.8442) ** (1.0 / 3.0)),
        temperature_K=temperature_K, hot_K=2.0 * temperature_K, timestep_fs=10.0, melt_ps=10.0, frame_fs=2000.0,
        thermo_fs=10.0, n_replicas=n_replicas,
    )  # fmt: skip


def molten_salt(*, cells: int = 3, n_replicas: int = 24) -> Liquid:
    """NaCl at 1100 K and 1.456 g/cm3."""
    pair_mass = float(ATOMIC_MASSES[[11, 17]].sum())
    lattice = (4.0 * pair_mass / (1.456 * units.GRAM_PER_CM3)) ** (1.0 / 3.0)
    return Liquid(
        potential=MoltenSalt(), box=fcc_box((11, 17), cells=cells, lattice=lattice), temperature_K=1100.0, hot_K=2000.0,
        timestep_fs=2.0, melt_ps=5.0, frame_fs=50.0, thermo_fs=4.0, n_replicas=n_replicas,
    )  # fmt: skip
