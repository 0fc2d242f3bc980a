"""The dataset returns what was written, survives being killed, and refuses what it cannot trust."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

from bamboo.errors import InputError
from bamboo.quantum.dataset import (
    Frame,
    append_frames,
    count_table,
    merge_files,
    read_frames,
    read_provenance,
    write_frames,
)
from bamboo.quantum.labels import Labels
from bamboo.system import System


def make_frame(seed: int, *, trajectory: str = "run-0", pbc: bool = False, bare: bool = False) -> Frame:
    rng = np.random.default_rng(seed)
    n_atoms = int(rng.integers(1, 12))
    system = System(
        rng.integers(1, 20, n_atoms),
        rng.normal(size=(n_atoms, 3)).astype(np.float32).astype(np.float64),
        np.eye(3) * 7.0 + rng.normal(size=(3, 3)) if pbc else np.zeros((3, 3)),
        pbc,
        total_charge=float(rng.integers(-1, 2)),
        molecule=None if bare else rng.integers(0, 3, n_atoms),
    )
    labels = Labels(
        "GFN2-xTB",
        float(-1000.0 * rng.random()),
        forces=None if bare else rng.normal(size=(n_atoms, 3)),
        charges=None if bare else rng.normal(size=n_atoms),
        dipole=None if bare or pbc else rng.normal(size=3),
        virial=rng.normal(size=(3, 3)) if pbc and not bare else None,
    )
    return Frame(system, labels, "periodic" if pbc else "neutral", "dynamics", trajectory, temperature_K=350.0)


def same(first: Frame, second: Frame) -> None:
    for name in ("kind", "sampling", "trajectory", "temperature_K", "split"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("numbers", "positions", "cell", "pbc", "total_charge", "molecule"):
        assert np.array_equal(getattr(first.system, name), getattr(second.system, name)), name
    assert first.labels.energy == second.labels.energy and first.labels.level == second.labels.level
    for name in ("forces", "charges", "dipole", "virial"):
        written, read = getattr(first.labels, name), getattr(second.labels, name)
        assert (written is None) == (read is None), name
        if written is not None:
            assert read == pytest.approx(written, rel=1e-6, abs=1e-7)  # single precision


def test_round_trip_with_every_label_and_none(tmp_path):
    frames = [make_frame(k, pbc=k % 2 == 1, bare=k % 3 == 0, trajectory=f"run-{k}") for k in range(12)]
    write_frames(tmp_path / "a.h5", frames[:5], provenance={"licence": "CC0-1.0"})
    append_frames(tmp_path / "a.h5", frames[5:])
    read = read_frames(tmp_path / "a.h5")
    assert len(read) == 12
    for written, back in zip(frames, read, strict=True):
        same(written, back)
    assert read_provenance(tmp_path / "a.h5")["licence"] == "CC0-1.0"


def test_every_column_names_its_unit(tmp_path):
    write_frames(tmp_path / "a.h5", [make_frame(0)])
    with h5py.File(tmp_path / "a.h5") as file:
        units = {f"{group}/{name}": column.attrs["unit"] for group in file for name, column in file[group].items()}
    assert units["atoms/forces"] == "eV/angstrom" and units["frames/dipole"] == "e*angstrom"
    assert all(units.values())


def test_split_follows_the_trajectory_in_the_stated_shares():
    frame = make_frame(0)
    assert all(replace(make_frame(k), trajectory="x").split == replace(frame, trajectory="x").split for k in range(9))
    assert all(replace(frame, trajectory=f"x/{k}").split == replace(frame, trajectory="x").split for k in range(9))
    splits = [replace(frame, trajectory=f"run-{k}").split for k in range(4000)]
    # standard error of a share p of 4000 draws: sqrt(p (1 - p) / 4000) <= 0.006; four of them
    for split, share in (("train", 0.85), ("validation", 0.05), ("test", 0.10)):
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.024)


def test_reads_a_training_set_fast(tmp_path):
    write_frames(tmp_path / "a.h5", [make_frame(k % 50) for k in range(12_000)])
    begin = time.process_time()
    assert len(read_frames(tmp_path / "a.h5")) == 12_000
    assert time.process_time() - begin < 2.0


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from test_dataset import make_frame
from bamboo.quantum.dataset import append_frames
for k in range(100_000):
    append_frames({path!r}, [make_frame(k + i, trajectory=f"run-{{k}}") for i in range(7)])
    print(k, flush=True)
"""


def test_a_kill_leaves_whole_trajectories(tmp_path):
    path = tmp_path / "a.h5"
    write_frames(path, [make_frame(0, trajectory="first")] * 7)
    code = KILLED.format(folder=os.path.dirname(__file__), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        appended = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.013)  # into the next append
        process.send_signal(signal.SIGKILL)
    frames = read_frames(path)
    assert len(frames) % 7 == 0 and len(frames) >= 7 * (1 + len(appended))


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "bamboo.quantum.dataset._extend"])
def test_a_failure_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, step):
    def fail(*_):
        raise KeyboardInterrupt

    path = tmp_path / "a.h5"
    write_frames(path, [make_frame(0)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, fail)
        append_frames(path, [make_frame(1)])
    assert len(read_frames(path)) == 1
    append_frames(path, [make_frame(1)])
    assert len(read_frames(path)) == 2


def test_merge_sorts_and_refuses_duplicates(tmp_path):
    write_frames(tmp_path / "a.h5", [make_frame(1, trajectory="b")], provenance={"licence": "CC0-1.0"})
    write_frames(tmp_path / "b.h5", [make_frame(2, trajectory="a"), make_frame(3, trajectory="a", pbc=True)])
    frames = merge_files([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "all.h5")
    assert [frame.trajectory for frame in read_frames(tmp_path / "all.h5")] == ["a", "a", "b"]
    assert read_provenance(tmp_path / "all.h5")["licence"] == "CC0-1.0"
    last = count_table(frames).splitlines()[-1].split()
    assert last[0] == "all" and last[4:6] == ["3", "2"]
    write_frames(tmp_path / "c.h5", [make_frame(4, trajectory="a")])
    with pytest.raises(InputError, match="trajectory 'a' is also in"):
        merge_files([tmp_path / "b.h5", tmp_path / "c.h5"], tmp_path / "all.h5")


def test_what_cannot_be_trusted_is_refused(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(InputError, match="no such file"):
        read_frames(path)
    path.write_text("not HDF5")
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        read_frames(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="not a bamboo quantum dataset"):
        read_frames(path)
    write_frames(path, [make_frame(0), make_frame(1)])
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(InputError, match="format version 99"):
        read_frames(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 1
        file["frames/energy"].resize(1, axis=0)
    with pytest.raises(InputError, match="different length"):
        read_frames(path)
    with h5py.File(path, "r+") as file:
        del file["frames/energy"]
    with pytest.raises(InputError, match="damaged"):
        read_frames(path)


@pytest.mark.parametrize(("field", "value"), [("kind", "solid"), ("sampling", "guessing"), ("trajectory", "x" * 200)])
def test_frames_are_validated(field, value):
    with pytest.raises(InputError, match=field):
        replace(make_frame(0), **{field: value})
