"""Several compositions at several temperatures as one run: one batch, a folder and properties for each condition."""

import json
from io import StringIO
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from rich.console import Console

from bamboo.errors import CheckpointedStop, InputError
from md.conditions import start_box
from md.config import load_config
from md.model import Model, load_model
from md.results import mean_volume
from md.workflows import analyse_folder, check, run

CONFIG = """\
electrolyte: [DMC, EC]
temperature: [150 K, 600 K]
build: {atoms: 30, seed: 1, density: 0.5 g/cm3}
properties: [density]
stages:
  - {kind: minimise, steps: 10}
  - {kind: nvt, time: 10 fs, timestep: 0.5 fs, thermostat: langevin, damping: 20 fs, temperature: [50 K, 150 K]}
  - {kind: npt, time: 50 fs, damping: 2 fs, barostat_damping: 20 fs}
  - {kind: nvt, time: 50 fs, damping: 2 fs, volume: mean}
output: {trajectory_every: 5 fs, thermo_every: 5 fs, transport_every: 1 fs}
checkpoint: {every: 1000 s}
guards: {max_temperature: 10.0}
"""
NAMES = ["DMC-150K", "DMC-600K", "EC-150K", "EC-600K"]
STAGES = ["02-nvt", "03-npt", "04-nvt"]


def write(folder: Path, text: str = CONFIG) -> Path:
    (folder / "several.yaml").write_text(text)
    return folder / "several.yaml"


def run_quietly(text: str, folder: Path, model: Model) -> str:
    console = Console(file=StringIO(), force_terminal=False)
    run(load_config(write(folder.parent, text)), folder, model=model, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(load_config(write(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Model) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("several") / "run"
    return folder, run_quietly(CONFIG, folder, model)


def test_every_condition_has_the_folder_of_a_run(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert sorted(path.parent.name for path in folder.glob("*/resolved.yaml")) == NAMES
    for name in NAMES:
        part = folder / name
        for file in ("start.extxyz", "start.pdb", "thermo.csv", "properties.json", "CITATIONS.bib"):
            assert (part / file).exists(), f"{name}/{file}"
        n_atoms = {"DMC": 24, "EC": 30}[name.split("-")[0]]
        assert len(ase.io.read(part / "start.extxyz")) == n_atoms
        for stage in STAGES:
            with h5py.File(part / "stages" / stage / "traj.h5") as file:
                assert file["coordinates"].shape[1:] == (n_atoms, 3)
        assert len((part / "stages/04-nvt/thermo.csv").read_text().splitlines()) == 1 + 11
        assert f"{name}: packed" in output
    first, second = (ase.io.read(folder / name / "start.extxyz").positions for name in NAMES[:2])
    assert np.abs(first - second).max() > 0.1
    assert not (folder / "stages").exists() and (folder / "restart").exists()
    assert "[3/4] 03-npt  npt, 150, 600 K" in output
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["conditions"]["EC-600K"]["counts"] == {"EC": 3}


def test_every_condition_has_its_temperature_and_its_volume(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    volumes = []
    for name in NAMES:
        with h5py.File(folder / name / "stages/04-nvt/thermo.h5") as file:
            assert file["volume"].shape == (51, 1)
            mean = float(file["temperature_K"][:].mean())
            volumes.append(float(file["volume"][0, 0]))
        assert mean == pytest.approx(float(name.split("-")[1][:-1]), rel=0.2)
        expected, _ = mean_volume(folder / name / "stages/03-npt")
        assert volumes[-1] == pytest.approx(expected, rel=1.0e-9)
    assert len(set(volumes)) == 4


def test_properties_are_named_by_condition(finished: tuple[Path, str]) -> None:
    folder, output = finished
    properties = json.loads((folder / "properties.json").read_text())
    assert {f"{name}/density" for name in NAMES} <= properties.keys()
    for name in NAMES:
        part = json.loads((folder / name / "properties.json").read_text())
        assert {f"{name}/{key}": value for key, value in part.items()}.items() <= properties.items()
    found, _ = analyse_folder(folder / "EC-150K")
    assert "density" in found
    assert all(f"{name}/density" in output for name in NAMES)


def test_other_conditions_are_refused_and_the_same_repeat_nothing(finished: tuple[Path, str], model: Model) -> None:
    folder, _ = finished
    assert "04-nvt  done before" in run_quietly(CONFIG, folder, model)
    with pytest.raises(InputError, match=r"begun with other settings:\n +temperature\.1: 600 K -> 500 K"):
        run_quietly(CONFIG.replace("600 K", "500 K"), folder, model)
    with pytest.raises(InputError, match=r"electrolyte\.1: EC -> PC"):
        run_quietly(CONFIG.replace("EC", "PC"), folder, model)


def test_an_interrupted_batch_ends_where_the_whole_one_does(
    finished: tuple[Path, str], model: Model, tmp_path: Path
) -> None:
    stopped = 0
    for _ in range(40):
        try:
            run_quietly(CONFIG.replace("every: 1000 s", "every: 1000 s, wall_time: 0.2 s"), tmp_path / "run", model)
            break
        except CheckpointedStop:
            stopped += 1
    assert stopped > 0
    folder, _ = finished
    for name in NAMES:
        for stage in STAGES:
            for file in ("traj.h5", "thermo.h5"):
                part = Path(name) / "stages" / stage / file
                with h5py.File(folder / part) as whole, h5py.File(tmp_path / "run" / part) as again:
                    for key in whole:
                        np.testing.assert_array_equal(whole[key][:], again[key][:], err_msg=f"{part} {key}")


def test_check_counts_every_box_and_build_wants_one(model: Model, tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    found = check(config, model=model)
    assert list(found.boxes) == NAMES
    assert found.to_dict()["conditions"]["DMC-600K"]["n_atoms"] == 24
    with pytest.raises(InputError, match="keep one electrolyte and one temperature"):
        start_box(config)


def test_a_liquid_that_would_be_frozen_is_remarked_on(model: Model, tmp_path: Path) -> None:
    cold = """\
electrolyte: DMC
temperature: [25 K, 150 K]
build: {atoms: 12, density: 0.5 g/cm3}
properties: []
stages: [{kind: minimise, steps: 1}, {kind: nvt, time: 1 fs, temperature: [10 K, 150 K]}]
"""
    note = "25 K is colder than any liquid electrolyte. For 25 degrees Celsius, write '25 °C'."
    found = check(load_config(write(tmp_path, cold)), model=model)
    assert f"\nnote   {note}\n" in str(found) and found.to_dict()["notes"] == [note]
    run_quietly(cold, tmp_path / "run", model)
    assert f"note   {note}\n" in (tmp_path / "run/log.txt").read_text()
