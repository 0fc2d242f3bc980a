"""Trajectories and thermodynamic series: what is written comes back, whatever happens to the writer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase.geometry import cellpar_to_cell

from bamboo.errors import InputError
from md.trajectory import THERMO, Ensemble, ThermoSeries, ThermoWriter, Topology, Trajectory, TrajectoryWriter

NVT = Ensemble("nvt", "svr", thermostat_time_ps=1.0)
TRICLINIC = cellpar_to_cell([20.0, 21.0, 22.0, 80.0, 85.0, 95.0])


def electrolyte() -> Topology:
    """Two waters around one lithium fluoride."""
    return Topology(
        numbers=np.array([8, 1, 1, 3, 9, 8, 1, 1]),
        masses=np.array([15.999, 1.008, 2.014, 6.94, 18.998, 15.999, 1.008, 1.008]),
        molecule=np.array([0, 0, 0, 1, 2, 3, 3, 3]),
        molecule_names=("water", "Li", "F", "water"),
        molecule_charges=np.array([0.0, 1.0, -1.0, 0.0]),
        bonds=((0, 1), (0, 2)),
    )


def frame(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(scale=30.0, size=(8, 3))


def sample(step: int, n_replicas: int) -> dict[str, np.ndarray]:
    return {name: np.full((n_replicas, *column.shape), float(step)) for name, column in THERMO.items()}


def write_both(folder: Path, steps: range, *, resume_step: int | None = None) -> None:
    with (
        TrajectoryWriter(folder / "traj.h5", electrolyte(), ensemble=NVT, resume_step=resume_step) as frames,
        ThermoWriter(folder / "thermo.h5", n_replicas=2, ensemble=NVT, resume_step=resume_step, buffer=3) as thermo,
    ):
        for step in steps:
            frames.append(step, 0.5 * step, positions=frame(step), cell=TRICLINIC)
            thermo.append(step, 0.5 * step, values=sample(step, 2))


def test_trajectory_comes_back(tmp_path: Path) -> None:
    write_both(tmp_path, range(5))
    trajectory = Trajectory.read(tmp_path / "traj.h5")
    np.testing.assert_allclose(trajectory.positions, [frame(k) for k in range(5)], rtol=1.2e-7)  # stored as float32
    np.testing.assert_allclose(trajectory.cells, np.broadcast_to(TRICLINIC, (5, 3, 3)), atol=1.0e-5)
    np.testing.assert_array_equal(trajectory.time_ps, 0.5 * np.arange(5))
    assert trajectory.interval_ps == 0.5
    assert trajectory.ensemble == NVT
    topology, expected = trajectory.topology, electrolyte()
    for name in ("numbers", "masses", "molecule", "molecule_charges"):
        np.testing.assert_array_equal(getattr(topology, name), getattr(expected, name))
    assert topology.molecule_names == expected.molecule_names and topology.bonds == expected.bonds


def test_file_follows_the_mdtraj_convention(tmp_path: Path) -> None:
    write_both(tmp_path, range(2))
    with h5py.File(tmp_path / "traj.h5") as file:
        assert file.attrs["conventions"] == "Pande" and file.attrs["conventionVersion"] == "1.1"
        assert file["coordinates"].attrs["units"] == "nanometers"
        np.testing.assert_allclose(file["coordinates"][1], frame(1) / 10.0, rtol=1.0e-6)
        np.testing.assert_allclose(file["cell_lengths"][1], [2.0, 2.1, 2.2], rtol=1.0e-6)
        np.testing.assert_allclose(file["cell_angles"][1], [80.0, 85.0, 95.0], rtol=1.0e-6)


def test_mdtraj_reads_the_file(tmp_path: Path) -> None:
    pytest.importorskip("tables", reason="mdtraj reads HDF5 through PyTables")
    mdtraj = pytest.importorskip("mdtraj")
    write_both(tmp_path, range(3))
    read = mdtraj.load(str(tmp_path / "traj.h5"))
    np.testing.assert_allclose(read.xyz[2] * 10.0, frame(2), rtol=1.0e-6)
    np.testing.assert_allclose(read.unitcell_angles[0], [80.0, 85.0, 95.0], rtol=1.0e-6)
    assert [residue.name for residue in read.topology.residues] == ["water", "Li", "F", "water"]


def test_thermo_comes_back_with_units(tmp_path: Path) -> None:
    write_both(tmp_path, range(5))  # 5 is no multiple of the buffer
    thermo = ThermoSeries.read(tmp_path / "thermo.h5")
    assert (thermo.n_samples, thermo.n_replicas) == (5, 2)
    assert thermo.pressure.shape == (5, 2, 3, 3) and thermo.charge_current.shape == (5, 2, 3)
    np.testing.assert_array_equal(thermo.pressure[:, 1, 0, 2], np.arange(5))
    np.testing.assert_array_equal(thermo.volume[:, 0], np.arange(5))
    with h5py.File(tmp_path / "thermo.h5") as file:
        assert {name: file[name].attrs["units"] for name in THERMO} == {n: c.unit for n, c in THERMO.items()}


def test_molecule_centres_are_mass_weighted(tmp_path: Path) -> None:
    write_both(tmp_path, range(3))
    trajectory = Trajectory.read(tmp_path / "traj.h5")
    topology = electrolyte()
    expected = [
        [np.average(frame(k)[topology.molecule == m], axis=0, weights=topology.masses[topology.molecule == m])
         for m in range(4)] for k in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(trajectory.molecule_centres(), expected, rtol=2.0e-5)


def test_later_part_of_a_run(tmp_path: Path) -> None:
    write_both(tmp_path, range(7))
    late = Trajectory.read(tmp_path / "traj.h5").since(1.5)
    assert late.step.tolist() == [3, 4, 5, 6] and late.cells is not None and len(late.cells) == 4
    np.testing.assert_allclose(late.positions[0], frame(3), rtol=1.2e-7)
    blocks = [block for _, block in late.since(2.0).blocks(stride=2)]
    np.testing.assert_allclose(np.concatenate(blocks), [frame(4), frame(6)], rtol=1.2e-7)
    series = ThermoSeries.read(tmp_path / "thermo.h5").since(1.5)
    assert series.volume[:, 0].tolist() == [3.0, 4.0, 5.0, 6.0] and series.n_samples == 4


def test_continuing_leaves_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    write_both(tmp_path, range(10))
    write_both(tmp_path, range(7, 12), resume_step=6)
    trajectory, thermo = Trajectory.read(tmp_path / "traj.h5"), ThermoSeries.read(tmp_path / "thermo.h5")
    np.testing.assert_array_equal(trajectory.step, np.arange(12))
    np.testing.assert_array_equal(thermo.step, np.arange(12))
    np.testing.assert_allclose(trajectory.positions[6:8], [frame(6), frame(7)], rtol=1.2e-7)
    np.testing.assert_array_equal(thermo.volume[:, 1], np.arange(12))


def test_truncating_an_open_writer(tmp_path: Path) -> None:
    with ThermoWriter(tmp_path / "thermo.h5", n_replicas=1, ensemble=NVT, buffer=4) as writer:
        for step in range(6):
            writer.append(step, float(step), values=sample(step, 1))
        writer.truncate(2)
        writer.append(3, 3.0, values=sample(30, 1))
    thermo = ThermoSeries.read(tmp_path / "thermo.h5")
    np.testing.assert_array_equal(thermo.step, [0, 1, 2, 3])
    np.testing.assert_array_equal(thermo.volume[:, 0], [0.0, 1.0, 2.0, 30.0])


def test_another_system_cannot_continue_a_file(tmp_path: Path) -> None:
    write_both(tmp_path, range(3))
    other = Topology(np.array([18]), np.array([39.95]), np.array([0]), ("Ar",), np.zeros(1))
    with pytest.raises(InputError, match=r"its topology differs"):
        TrajectoryWriter(tmp_path / "traj.h5", other, ensemble=NVT, resume_step=1)
    with pytest.raises(InputError, match=r"its ensemble differs"):
        TrajectoryWriter(tmp_path / "traj.h5", electrolyte(), ensemble=Ensemble("nve"), resume_step=1)
    with pytest.raises(InputError, match=r"exists; remove it, or continue it"):
        TrajectoryWriter(tmp_path / "traj.h5", electrolyte(), ensemble=NVT)
    assert Trajectory.read(tmp_path / "traj.h5").n_frames == 3


KILLED_WRITER = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
folder = Path(sys.argv[2])
frames = helpers.TrajectoryWriter(folder / "traj.h5", helpers.electrolyte(), ensemble=helpers.NVT)
thermo = helpers.ThermoWriter(folder / "thermo.h5", n_replicas=2, ensemble=helpers.NVT, buffer=4)
for step in range(10):
    frames.append(step, 0.5 * step, positions=helpers.frame(step), cell=helpers.TRICLINIC)
    thermo.append(step, 0.5 * step, values=helpers.sample(step, 2))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_survive_a_killed_writer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, __file__, str(tmp_path)]
    assert subprocess.run(command, env=os.environ, check=False).returncode == -signal.SIGKILL
    assert Trajectory.read(tmp_path / "traj.h5").n_frames == 10
    assert ThermoSeries.read(tmp_path / "thermo.h5").n_samples == 8  # two whole buffers of four
    write_both(tmp_path, range(6, 9), resume_step=5)
    np.testing.assert_array_equal(Trajectory.read(tmp_path / "traj.h5").step, np.arange(9))


def test_file_is_readable_while_written(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "traj.h5", electrolyte(), ensemble=NVT, periodic=False) as writer:
        writer.append(0, 0.0, positions=frame(0))
        trajectory = Trajectory.read(tmp_path / "traj.h5")
        assert trajectory.n_frames == 1 and trajectory.cells is None


def test_samples_without_a_step_are_ignored(tmp_path: Path) -> None:
    write_both(tmp_path, range(4))
    with h5py.File(tmp_path / "traj.h5", "r+") as file:
        for name in ("coordinates", "time", "cell_lengths", "cell_angles", "step"):
            file[name].resize(6, 0)  # as if killed before the new steps were written
    assert Trajectory.read(tmp_path / "traj.h5").n_frames == 4


@pytest.mark.parametrize("damage", ["text", "cut", "foreign", "absent", "lost"])
def test_unreadable_files_give_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "traj.h5"
    write_both(tmp_path, range(4))
    if damage == "text":
        path.write_text("step time\n0 0.0\n")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "absent":
        path.unlink()
    elif damage == "lost":
        with h5py.File(path, "r+") as file:
            file["step"][2] = 0
    else:
        with h5py.File(path, "w") as file:
            file["energies"] = np.zeros(3)
    with pytest.raises(InputError, match=r"traj\.h5: (no such file|not a complete bamboo-md file)") as raised:
        _ = Trajectory.read(path).positions
    assert "\n" not in str(raised.value)


def test_series_cut_short_are_refused(tmp_path: Path) -> None:
    """Copied half: HDF5 would read zeros behind the end of the file."""
    path = tmp_path / "thermo.h5"
    with ThermoWriter(path, n_replicas=2, ensemble=NVT) as writer:
        for step in range(2000):
            writer.append(step, 0.005 * step, values=sample(step, 2))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    with pytest.raises(InputError, match=r"thermo\.h5: not a complete bamboo-md file.*truncated"):
        ThermoSeries.read(path)


def test_positions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "traj.h5", electrolyte(), ensemble=NVT, periodic=False) as writer:
        writer.append(0, 0.0, positions=np.full((8, 3), np.nan))
    with pytest.raises(InputError, match="1 frames hold no positions"):
        _ = Trajectory.read(tmp_path / "traj.h5").positions


def test_writer_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path / "traj.h5", electrolyte(), ensemble=NVT)
    turned = np.roll(np.diag([10.0, 11.0, 12.0]), 1, axis=1)  # a along y: its lengths and angles look like a plain box
    with pytest.raises(InputError, match="a lies along x"):
        writer.append(0, 0.0, positions=frame(0), cell=turned)
    with pytest.raises(InputError, match="coordinates has shape"):
        writer.append(0, 0.0, positions=frame(0)[:4], cell=TRICLINIC)
    thermo = ThermoWriter(tmp_path / "thermo.h5", n_replicas=1, ensemble=NVT)
    with pytest.raises(InputError, match="pressure"):
        thermo.append(0, 0.0, values={name: value for name, value in sample(0, 1).items() if name != "pressure"})
    writer.close()
    thermo.close()


def test_uneven_times_are_refused() -> None:
    times = np.array([0.0, 1.0, 2.0, 3.5])
    trajectory = Trajectory.from_arrays(np.zeros((4, 8, 3)), electrolyte(), time_ps=times, cells=None, ensemble=NVT)
    with pytest.raises(InputError, match="not evenly spaced"):
        _ = trajectory.interval_ps


def test_topology_and_ensemble_refuse_nonsense() -> None:
    good = electrolyte()
    with pytest.raises(InputError, match="Sort the atoms by molecule"):
        Topology(good.numbers, good.masses, good.molecule[::-1], good.molecule_names, good.molecule_charges)
    with pytest.raises(InputError, match="Did you mean 'langevin'"):
        Ensemble("nvt", "langvin")
    with pytest.raises(InputError, match="there are water, Li, F"):
        good.select(element="Na")
    np.testing.assert_array_equal(good.select(element="H", species="water"), [1, 2, 6, 7])


def test_only_momentum_conserving_constant_volume_runs_carry_transport() -> None:
    assert Ensemble("nve").transport_objection is None
    assert Ensemble("nvt", "svr").transport_objection is None
    assert "Langevin" in str(Ensemble("nvt", "langevin").transport_objection)
    assert "NPT" in str(Ensemble("npt", "svr", barostat="mtk").transport_objection)
