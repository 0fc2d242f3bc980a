"""A whole run on a tiny box with a toy force field: files, resume after a kill, refusals, honest reports."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import ase.io
import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from bamboo.errors import CheckpointedStop, GuardError, InputError
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import pack_box
from bamboo.system import Batch
from md.analysis.estimate import Estimate, format_time, no_value
from md.config import RunConfig, load_config
from md.model import Model
from md.results import StageData, long_enough, production_properties, property_table, stage_data
from md.run_folder import RunFolder, differences
from md.status import run_status
from md.trajectory import THERMO, Ensemble, ThermoSeries
from md.workflows import run

Output = namedtuple("Output", "energy forces virial charges")


class SpringLiquid:
    """Molecules of springs between all their atoms, Lennard-Jones between molecules: a liquid for tests.

    names of the molecules in packing order; their geometries are the rest lengths. ``delay`` [s] slows every step.
    """

    def __init__(self, names: list[str], *, delay: float = 0.0) -> None:
        self.delay = delay
        rest, first, second, offset = [], [], [], 0
        for name in names:
            positions = torch.from_numpy(molecule(name).positions.copy())
            i, j = torch.triu_indices(len(positions), len(positions), 1)
            rest.append((positions[i] - positions[j]).norm(dim=1))
            first.append(i + offset)
            second.append(j + offset)
            offset += len(positions)
        self.i, self.j, self.rest = torch.cat(first), torch.cat(second), torch.cat(rest)

    def evaluate(self, batch: Batch) -> Output:
        time.sleep(self.delay)
        parts = []
        for replica in range(batch.n_systems):
            mine = batch.system_index == replica
            assert batch.molecule is not None
            parts.append(self._box(batch.positions[mine], batch.cell[replica], batch.molecule[mine]))
        energy, forces, virial = zip(*parts, strict=True)
        charges = torch.zeros(batch.n_atoms, dtype=torch.float64)
        return Output(torch.stack(energy), torch.cat(forces), torch.stack(virial), charges)

    def _box(self, positions: torch.Tensor, cell: torch.Tensor, member: torch.Tensor) -> tuple[torch.Tensor, ...]:
        strain = torch.zeros((3, 3), dtype=torch.float64, requires_grad=True)
        positions = positions.detach().clone().requires_grad_()
        moved, strained_cell = positions + positions @ strain, cell + cell @ strain
        springs = 5.0 * ((moved[self.i] - moved[self.j]).norm(dim=1) - self.rest) ** 2
        a, b = torch.triu_indices(len(positions), len(positions), 1)
        a, b = a[member[a] != member[b]], b[member[a] != member[b]]
        gap = moved[a] - moved[b]
        gap = gap - torch.round(gap.detach() @ torch.linalg.inv(cell)) @ strained_cell
        r2 = (gap**2).sum(dim=1)
        sixth = (2.8**2 / r2[r2 < 36.0]) ** 3
        energy = springs.sum() + (4.0 * 0.006 * (sixth**2 - sixth)).sum()
        forces, virial = torch.autograd.grad(-energy, (positions, strain))
        return energy.detach(), forces, virial


CONFIG = """\
composition: {counts: {DMC: 6}}
temperature: 300 K
build: {seed: 3, density: 0.6 g/cm3}
stages:
  - {kind: minimise, steps: 30}
  - kind: nvt
    name: warm-up
    time: 20 fs
    timestep: 0.5 fs
    thermostat: langevin
    damping: 100 fs
    temperature: [50 K, 300 K]
  - {kind: npt, time: 60 fs}
  - {kind: nvt, time: 50 fs, volume: mean}
output: {trajectory_every: 2 fs, thermo_every: 10 fs, transport_every: 2 fs}
checkpoint: {every: 1000 s}
"""


def write_config(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def toy_model(*, delay: float = 0.0, sha256: str = "0" * 64) -> Model:
    evaluator = SpringLiquid(["DMC"] * 6, delay=delay)
    return Model(evaluator, "toy springs", {"name": "toy", "sha256": sha256})


def run_quietly(config: RunConfig, folder: Path, *, model: Model | None = None, source: Path | None = None) -> str:
    console = Console(file=StringIO(), force_terminal=False, width=200)
    run(config, folder, model=model or toy_model(), source=source, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and console output of one complete run."""
    base = tmp_path_factory.mktemp("finished")
    path = write_config(base)
    return base / "run", run_quietly(load_config(path), base / "run", source=path)


def test_the_run_folder_holds_everything(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert "wrote" in output.splitlines()[-1] and output.splitlines()[-1].endswith("report.html")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stages = [f"stages/{name}/{file}" for name in ("02-warm-up", "03-npt", "04-nvt") for file in STAGE_FILES]
    expected = {
        "input.yaml",
        "resolved.yaml",
        "manifest.json",
        "start.extxyz",
        "start.pdb",
        "log.txt",
        "thermo.csv",
        *stages,
    }
    assert expected | {"properties.json", "CITATIONS.bib", "report.html", *FIGURES} <= present
    assert (folder / "input.yaml").read_text() == CONFIG
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == {"DMC": 6}
    assert manifest["model"]["name"] == "toy"
    assert "torch" in manifest["versions"]


FIGURES = ("figures/density.png", "figures/viscosity.png", "figures/msd.png")
STAGE_FILES = ("traj.h5", "thermo.h5", "thermo.csv")


def test_stages_have_the_asked_length_and_sampling(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with h5py.File(folder / "stages/03-npt/traj.h5") as file:
        np.testing.assert_allclose(
            file["time"][:], np.arange(0.0, 0.0601, 0.002), atol=1e-9
        )  # ps, first frame included
    with h5py.File(folder / "stages/03-npt/thermo.h5") as file:
        assert len(file["step"]) == 31
        assert np.ptp(file["volume"][:]) > 0.0
    with h5py.File(folder / "stages/02-warm-up/thermo.h5") as file:
        assert len(file["step"]) == 11  # 0.5 fs steps, every 2 fs


def test_transport_runs_at_the_mean_volume_of_the_npt_stage(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with h5py.File(folder / "stages/03-npt/thermo.h5") as npt, h5py.File(folder / "stages/04-nvt/thermo.h5") as nvt:
        volume = nvt["volume"][:]
        assert np.ptp(volume) == 0.0
        assert npt["volume"][:].min() < volume[0, 0] < npt["volume"][:].max()
        second_half = npt["volume"][len(npt["volume"]) // 2 :].mean()
        assert volume[0, 0] == pytest.approx(second_half, rel=1e-6)  # 60 fs are never equilibrated


def test_the_change_of_volume_leaves_bonds_alone(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with h5py.File(folder / "stages/03-npt/traj.h5") as npt, h5py.File(folder / "stages/04-nvt/traj.h5") as nvt:
        before, after = npt["coordinates"][-1], nvt["coordinates"][0]
        assert np.abs(nvt["cell_lengths"][0] / npt["cell_lengths"][-1] - 1.0).max() > 1e-5
    shape = [np.linalg.norm(frame[:12, None] - frame[None, :12], axis=-1) for frame in (before, after)]
    np.testing.assert_allclose(shape[1], shape[0], atol=2e-7)  # nm


def test_properties_leave_out_the_start_of_a_stage() -> None:
    """The potential energy relaxes over 100 ps after a change of volume; what is analysed begins after it."""
    n = 2000
    noise = np.random.default_rng(1).normal(size=(n, 1))
    energy = noise + 20.0 * np.exp(-np.arange(n) / 100.0)[:, None]
    columns = {name: np.zeros((n, 1, *column.shape)) for name, column in THERMO.items()}
    time_ps = 5000.0 + np.arange(n)
    series = ThermoSeries(
        ensemble=Ensemble("nve"), time_ps=time_ps, step=np.arange(n), **columns | {"potential_energy": energy}
    )
    late = StageData("04-nvt", series, ()).equilibrated()
    assert 5150.0 < late.thermo.time_ps[0] < 5800.0
    assert late.note == f"first {format_time(late.thermo.time_ps[0] - 5000.0)} discarded"
    calm = replace(series, potential_energy=noise)
    assert StageData("04-nvt", calm, ()).equilibrated().thermo.time_ps[0] < 5150.0
    drifting = replace(series, potential_energy=0.05 * time_ps[:, None] + noise)
    late = StageData("04-nvt", drifting, ()).equilibrated()
    assert late.thermo.time_ps[0] == 6000.0 and "drifts to the end" in str(late.note)


def test_sixty_femtoseconds_are_not_called_a_density(finished: tuple[Path, str]) -> None:
    folder, output = finished
    density = json.loads((folder / "properties.json").read_text())["density"]
    assert density["value"] is None and density["unit"] == "g/cm3"
    assert "run about" in density["warnings"][0]
    assert "no value: density" in output
    for name, estimate in json.loads((folder / "properties.json").read_text()).items():
        assert estimate["value"] is None, f"{name} from 50 fs"
        assert estimate["warnings"], f"{name} has neither a value nor a reason"


def test_what_a_short_stage_gives_is_withdrawn_and_a_long_one_kept() -> None:
    value = Estimate(1.0, 0.1, "mPa s", 30.0, "Green-Kubo")
    none = no_value("no ions", unit="mS/cm", method="")
    series = SimpleNamespace(time_ps=np.array([50.0, 99.0]))
    topology = SimpleNamespace(molecule_charges=np.array([1.0, -1.0]))
    data = StageData("04-nvt", series, [SimpleNamespace(topology=topology)], "first 50 ps discarded", 50.0)
    short = long_enough({"viscosity": value, "conductivity": none}, data)
    assert short["viscosity"].value is None
    assert short["viscosity"].warnings == (
        "not converged: 04-nvt lasted 99 ps, of which 49 ps are usable",
        "as a rule viscosity takes some 2 ns",
    )
    assert short["conductivity"] is none
    series.time_ps[-1] = 101.0
    assert long_enough({"viscosity": value}, data) == {"viscosity": value}
    unsure = no_value("not converged: run at least 200 ps", unit="mS/cm", method="")
    kept = long_enough({"ionicity": unsure}, replace(data, trajectories=data.trajectories * 4))["ionicity"]
    assert kept.warnings == (*unsure.warnings, "as a rule conductivity takes some 2.5 ns in each replica")
    series.time_ps[-1] = 3000.0
    assert long_enough({"ionicity": unsure}, replace(data, trajectories=data.trajectories * 4)) == {"ionicity": unsure}


def test_the_property_table_groups_reasons() -> None:
    none = no_value("too short", unit="", method="")
    table = property_table({"density": Estimate(1.0, 0.1, "g/cm3", 30.0, "NPT", ("careful",)), "a": none, "b": none})
    assert table == ["density  1.00 ± 0.10 g/cm3 (N_eff 30)", "           careful", "no value: a, b", "    too short"]


def test_the_console_shows_composition_stages_and_progress(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert "6 DMC = 72 atoms" in output
    assert "[2/4] 02-warm-up  nvt, 50 -> 300 K, 0.02 ps at 0.5 fs" in output
    assert "03-npt  100 %" in output
    assert "\x1b" not in output  # no control characters outside a terminal
    assert "[4/4] 04-nvt" in (folder / "log.txt").read_text()


def test_the_same_command_repeats_nothing(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*.h5")}
    output = run_quietly(load_config(folder.parent / "tiny.yaml"), folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "04-nvt  done before" in output


def test_a_longer_stage_continues_and_physics_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    longer = load_config(write_config(tmp_path, CONFIG.replace("time: 50 fs", "time: 80 fs")))
    assert "continued at 0.05 ps" in run_quietly(longer, folder)
    with h5py.File(folder / "stages/04-nvt/thermo.h5") as file:
        np.testing.assert_array_equal(file["step"][:], np.arange(0, 81, 2))
    hotter = load_config(write_config(tmp_path, CONFIG.replace("temperature: 300 K", "temperature: 313 K")))
    with pytest.raises(InputError, match=r"begun with other settings:\n.*temperature: 300 K -> 313 K"):
        run_quietly(hotter, folder)
    with pytest.raises(InputError, match="another file"):
        run_quietly(longer, folder, model=toy_model(sha256="1" * 64))


def test_stages_added_at_the_end_are_run_by_the_same_command(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    text = (folder / "input.yaml").read_text()
    added = "  - {kind: npt, time: 20 fs}\n  - {kind: nvt, time: 10 fs, volume: mean}\noutput:"
    output = run_quietly(load_config(write_config(tmp_path, text.replace("output:", added))), folder)
    assert "04-nvt  done before" in output and "[6/6] 06-nvt" in output
    assert (folder / "stages/05-npt/thermo.h5").exists()


def test_harmless_and_physical_changes_are_told_apart(tmp_path: Path) -> None:
    def changed(old: str, new: str, *, begun: int = 2) -> list[str]:
        first = load_config(write_config(tmp_path))
        second = load_config(write_config(tmp_path, CONFIG.replace(old, new)))
        return differences(first, second, begun=begun)

    assert changed("every: 1000 s", "every: 10 s") == []
    assert changed("temperature: 300 K", "temperature: 300 K\nproperties: [density]") == []
    assert changed("time: 60 fs", "time: 90 fs") == []
    assert changed("time: 60 fs", "time: 90 fs", begun=3) == ["stages.2.time: 0.06 ps -> 0.09 ps"]
    assert changed("volume: mean", "volume: current") == []
    assert changed("volume: mean", "volume: current", begun=3) == ["stages.3.volume: mean -> current"]
    assert changed("DMC: 6", "DMC: 7", begun=-1) == ["composition.counts.DMC: 6 -> 7"]
    assert changed("seed: 3", "seed: 4") == ["build.seed: 3 -> 4"]


def slow_run(path: str, folder: str) -> None:
    torch.set_num_threads(1)
    run_quietly(load_config(Path(path)), Path(folder), model=toy_model(delay=0.01))


def test_a_killed_run_continues_to_the_same_end(tmp_path: Path) -> None:
    """After kill -9 in the middle of a stage the same call ends where an uninterrupted run ends, bit for bit."""
    text = CONFIG.replace("every: 1000 s", "every: 0.2 s")
    path = write_config(tmp_path, text)
    child = "import runpy, sys; runpy.run_path(sys.argv[1])['slow_run'](*sys.argv[2:])"
    process = subprocess.Popen([sys.executable, "-c", child, __file__, str(path), str(tmp_path / "killed")])
    series = tmp_path / "killed/stages/03-npt/thermo.csv"
    while process.poll() is None and not (series.exists() and len(series.read_text().splitlines()) > 5):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    path = write_config(tmp_path)
    output = run_quietly(load_config(path), tmp_path / "killed")
    assert "01-minimise" not in output.split("packed")[-1] and "continued at" in output
    run_quietly(load_config(path), tmp_path / "whole")
    for name in ("02-warm-up", "03-npt", "04-nvt"):
        for file in ("traj.h5", "thermo.h5"):
            with (
                h5py.File(tmp_path / "killed/stages" / name / file) as a,
                h5py.File(tmp_path / "whole/stages" / name / file) as b,
            ):
                np.testing.assert_array_equal(a["step"][:], b["step"][:])
                key = "coordinates" if file == "traj.h5" else "potential_energy"
                np.testing.assert_array_equal(a[key][:], b[key][:])


def test_a_run_starts_from_a_structure_file(tmp_path: Path) -> None:
    """Atoms in any order, cut by the boundary; replicas share the structure, not the velocities."""
    box = pack_box({"water": 20}, density_g_cm3=0.6, seed=4)  # two ways to number its atoms, both the same springs
    order = np.random.default_rng(1).permutation(box.n_atoms)
    atoms = box.to_atoms()[order]
    del atoms.arrays["molecule"]
    atoms.wrap()
    ase.io.write(tmp_path / "box.extxyz", atoms)
    text = CONFIG.replace("composition: {counts: {DMC: 6}}", f"structure: {tmp_path}/box.extxyz")
    text = text.replace("seed: 3, density: 0.6 g/cm3", "seed: 3, replicas: 2").replace("time: 60 fs", "time: 6 fs")
    config = load_config(write_config(tmp_path, text))
    model = Model(SpringLiquid(["water"] * 20), "toy springs", {"name": "toy", "sha256": "0" * 64})
    run_quietly(config, tmp_path / "run", model=model)
    start = ase.io.read(tmp_path / "run/start.extxyz", index=":")
    assert len(start) == 2 and np.array_equal(start[0].positions, start[1].positions)
    assert start[0].numbers.tolist() == box.numbers.tolist()
    with h5py.File(tmp_path / "run/stages/04-nvt/thermo.h5") as file:
        assert np.abs(np.diff(file["potential_energy"][:], axis=1)).min() > 0.0
    atoms.rattle(0.01)
    ase.io.write(tmp_path / "box.extxyz", atoms)
    with pytest.raises(InputError, match="has changed since"):
        run_quietly(config, tmp_path / "run")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room in the middle of a stage is one clear line; with room again the run ends as if nothing had happened."""
    text = CONFIG.replace("every: 1000 s", "every: 0.01 s").replace("time: 50 fs, volume: mean", "time: 6 fs")
    config, room = load_config(write_config(tmp_path, text)), [25]

    class FullDisk:
        def __init__(self, **_: object) -> None:
            room[0] -= 1

        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, _: bytes) -> None:
            if room[0] < 0:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("md.trajectory.tempfile", SimpleNamespace(TemporaryFile=FullDisk))
    with pytest.raises(InputError, match=r"traj\.h5: cannot be written: Disk quota exceeded\. Make room; the same"):
        run_quietly(config, tmp_path / "full")
    assert not (tmp_path / "full/stages/04-nvt").exists()
    monkeypatch.undo()
    output = run_quietly(config, tmp_path / "full")
    assert "continued at" in output
    run_quietly(config, tmp_path / "whole")
    for name in ("02-warm-up", "03-npt", "04-nvt"):
        with (
            h5py.File(tmp_path / "full/stages" / name / "traj.h5") as a,
            h5py.File(tmp_path / "whole/stages" / name / "traj.h5") as b,
        ):
            np.testing.assert_array_equal(a["coordinates"][:], b["coordinates"][:])


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    with RunFolder(tmp_path / "run").locked(), pytest.raises(InputError, match=f"another run .process {os.getpid()}"):
        run_quietly(config, tmp_path / "run")


def test_wall_time_ends_with_a_checkpoint(tmp_path: Path) -> None:
    text = CONFIG.replace("every: 1000 s", "every: 1000 s, wall_time: 0.3 s")
    with pytest.raises(CheckpointedStop, match="the same command continues it"):
        run_quietly(load_config(write_config(tmp_path, text)), tmp_path / "run", model=toy_model(delay=0.01))
    assert "the same command continues it" in (tmp_path / "run/log.txt").read_text().splitlines()[-1]
    run_quietly(load_config(write_config(tmp_path)), tmp_path / "run")


def test_a_guard_stops_a_run_and_leaves_the_frame(tmp_path: Path) -> None:
    text = CONFIG.replace("build:", "guards: {density: [0.9 g/cm3, 2 g/cm3]}\nbuild:")
    with pytest.raises(GuardError, match=r"02-warm-up stopped at 0 ps.*density 0\.6 g/cm3 is below 0\.9"):
        run_quietly(load_config(write_config(tmp_path, text)), tmp_path / "run")
    assert (tmp_path / "run/stages/02-warm-up/blowup.extxyz").exists()
    status = run_status(tmp_path / "run")
    assert status.state == "stopped by a guard" and "density 0.6 g/cm3" in str(status.reason)


def test_replicas_start_from_different_boxes_and_share_the_volume(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, CONFIG.replace("seed: 3", "seed: 3, replicas: 2")))
    run_quietly(config, tmp_path / "run")
    first, second = ase.io.read(tmp_path / "run/start.extxyz", index=":")
    assert np.abs(first.positions - second.positions).max() > 1.0
    with h5py.File(tmp_path / "run/stages/04-nvt/thermo.h5") as file:
        assert file["volume"].shape == (26, 2)
        assert np.ptp(file["volume"][:]) == pytest.approx(0.0, abs=1e-6)
        assert np.abs(np.diff(file["potential_energy"][:], axis=1)).min() > 0.0
    with h5py.File(tmp_path / "run/stages/04-nvt/traj-2.h5") as file:
        assert len(file["coordinates"]) == 26


def test_the_dielectric_constant_is_among_the_properties_of_a_run(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    data = stage_data(RunFolder(folder), RunFolder(folder).read_config(), suits=lambda stage: True)
    assert data is not None
    estimate = production_properties({"dielectric"}, data)["dielectric_constant"]
    assert "dipole is zero" in estimate.warnings[0]  # springs have no charges
    assert any(name.startswith("dielectric") for name in json.loads((folder / "properties.json").read_text()))
    assert "10.1080/00268978300102721" in (folder / "CITATIONS.bib").read_text()
