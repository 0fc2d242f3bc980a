"""Damaged files of every kind: an answer or one clear error, never a traceback, a hang or another exception."""

import warnings
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest

from bamboo import checkpoint
from bamboo.errors import BambooError
from bamboo.structure.packing import pack_box
from md.boxes import read_box
from md.engine import restart
from md.engine.state import MDState
from md.trajectory import THERMO, Ensemble, ThermoSeries, ThermoWriter, Topology, Trajectory, TrajectoryWriter

WORDS = (b"", b"nan", b"-1", b"1e999", b"\x00", b"9" * 40, b"\xff\xfe", b"'", b"]", b" ", b"\n", b"Zz", b"T F T")


def damage(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip, cut, double, zero or overwrite parts, as disks, editors and transfers do."""
    content = bytearray(data)
    for _ in range(int(generator.integers(1, 4))):
        n = max(len(content), 1)
        start = int(generator.integers(n))
        length = int(generator.integers(1, max(2, n // 10)))
        match int(generator.integers(6)):
            case 0:
                content[start : start + 1] = bytes([int(generator.integers(256))])
            case 1:
                del content[start:]
            case 2:
                content[start:start] = content[start : start + length]
            case 3:
                content[start : start + length] = bytes(len(content[start : start + length]))
            case 4:
                word = WORDS[int(generator.integers(len(WORDS)))]
                content[start : start + len(word)] = word
            case 5:
                del content[start : start + length]
    return bytes(content)


def fuzz(path: Path, read: Callable[[Path], object], *, count: int, seed: int) -> int:
    """Read ``count`` damaged versions of a file; return how many were refused."""
    original, generator, refused = path.read_bytes(), np.random.default_rng(seed), 0
    target = path.with_name("damaged" + path.suffix)
    for number in range(count):
        target.write_bytes(damage(original, generator))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(target)
            except BambooError as error:
                refused += 1
                assert str(error).strip()
            except Exception as error:
                pytest.fail(f"version {number}: {type(error).__name__}: {error}")
    return refused


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trajectory, a series, a checkpoint and structures of a small box."""
    folder = tmp_path_factory.mktemp("files")
    box = pack_box({"water": 3, "Li": 1, "PF6": 1}, density_g_cm3=0.3, seed=1)
    topology = Topology(
        numbers=box.numbers, masses=np.ones(box.n_atoms), molecule=box.molecule,
        molecule_names=("water",) * 3 + ("Li", "PF6"), molecule_charges=np.array([0.0, 0.0, 0.0, 1.0, -1.0]),
    )  # fmt: skip
    with TrajectoryWriter(folder / "traj.h5", topology, ensemble=Ensemble("nve")) as frames:
        for step in range(5):
            frames.append(step, 0.1 * step, positions=box.positions, cell=box.cell)
    with ThermoWriter(folder / "thermo.h5", n_replicas=1, ensemble=Ensemble("nve")) as series:
        for step in range(5):
            series.append(step, 0.1 * step, values={name: np.ones((1, *c.shape)) for name, c in THERMO.items()})
    ase.io.write(folder / "box.extxyz", box.to_atoms())
    ase.io.write(folder / "box.cif", box.to_atoms())
    ase.io.write(folder / "box.pdb", box.to_atoms())
    restart.save(folder / "restart", MDState.from_systems([box], temperature_K=300.0, seed=1))
    return folder


def read_trajectory(path: Path) -> None:
    trajectory = Trajectory.read(path)
    assert np.isfinite(trajectory.positions).all() and len(trajectory.topology.numbers) > 0


def test_trajectories(files: Path) -> None:
    assert fuzz(files / "traj.h5", read_trajectory, count=400, seed=1) > 50


def test_series(files: Path) -> None:
    assert fuzz(files / "thermo.h5", ThermoSeries.read, count=400, seed=2) > 50


@pytest.mark.parametrize("name", ["box.extxyz", "box.cif", "box.pdb"])
def test_structures(files: Path, name: str) -> None:
    assert fuzz(files / name, read_box, count=150, seed=3) > 50


def test_checkpoints(files: Path) -> None:
    """Either slot damaged, tensors or JSON: passed over or refused, and what is read is what was written."""
    saved = restart.load(files / "restart")
    assert saved is not None

    def read(path: Path) -> None:
        name = "a" + path.suffix
        other = files / "other"
        other.mkdir(exist_ok=True)
        for file in ("a.json", "a.safetensors"):
            (other / file).write_bytes(path.read_bytes() if file == name else (files / "restart" / file).read_bytes())
        loaded = restart.load(other)
        assert loaded is None or np.array_equal(loaded.state.momenta, saved.state.momenta)

    for name in ("a.json", "a.safetensors"):
        (files / name).write_bytes((files / "restart" / name).read_bytes())
        assert fuzz(files / name, read, count=150, seed=4) > 50


def test_models(files: Path) -> None:
    """The header and the edges of a model file; weights themselves carry no checksum."""
    from bamboo.forcefield import ForceField

    original = checkpoint.zoo()["default"].read_bytes()
    size = 8 + int.from_bytes(original[:8], "little")
    generator, refused = np.random.default_rng(5), 0
    for _ in range(60):
        path = files / "damaged.safetensors"
        path.write_bytes(damage(original[:size], generator) + original[size:])
        try:
            assert isinstance(checkpoint.load(path), ForceField)
        except BambooError:
            refused += 1
    assert refused > 30
