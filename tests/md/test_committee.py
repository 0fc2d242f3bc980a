"""Several models of one committee: each runs the protocol, the others watch, properties get their spread."""

import json
from io import StringIO
from math import sqrt
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from bamboo import checkpoint
from bamboo.errors import GuardError, InputError
from bamboo.units import KCAL_PER_MOL
from md.analysis.estimate import Estimate, no_value
from md.config import dump_config, load_config
from md.results import over_models
from md.workflows import analyse_folder, run

CONFIG = """\
electrolyte: DMC
temperature: 200 K
model: {{name: {0}/first.safetensors, committee: [{0}/second.safetensors]}}
build: {{atoms: 24, seed: 1, density: 0.5 g/cm3}}
properties: [density]
stages:
  - {{kind: minimise, steps: 5}}
  - {{kind: npt, time: 10 fs}}
output: {{trajectory_every: 5 fs, thermo_every: 5 fs, transport_every: 1 fs}}
"""


def write(folder: Path, text: str) -> Path:
    (folder / "committee.yaml").write_text(text)
    return folder / "committee.yaml"


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shipped model under two names, the second with slightly different weights."""
    folder = tmp_path_factory.mktemp("committee")
    field = checkpoint.load("default")
    checkpoint.save(field, folder / "first.safetensors")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in field.parameters():
            weight *= 1.0 + 0.002 * torch.randn(weight.shape, generator=generator)
    checkpoint.save(field, folder / "second.safetensors")
    return folder


def run_quietly(text: str, folder: Path) -> tuple[dict[str, Estimate], str]:
    console = Console(file=StringIO(), force_terminal=False)
    properties = run(load_config(write(folder.parent, text)), folder, console=console)
    return properties, console.file.getvalue()  # type: ignore[attr-defined]


def test_every_model_runs_in_its_folder(committee: Path, tmp_path: Path) -> None:
    text = CONFIG.format(committee)
    _, output = run_quietly(text, tmp_path / "run")
    assert "mean of the models first, second" in output
    energies = []
    for name in ("first", "second"):
        folder = tmp_path / "run" / name
        assert load_config(folder / "resolved.yaml").model.committee == ()
        assert json.loads((folder / "manifest.json").read_text())["model"]["name"].endswith(f"{name}.safetensors")
        with h5py.File(folder / "stages/02-npt/thermo.h5") as file:
            assert len(file["step"]) == 11
            energies.append(file["potential_energy"][0, 0])
    assert energies[0] != energies[1]
    again, _ = analyse_folder(tmp_path / "run")
    assert again.keys() == json.loads((tmp_path / "run/properties.json").read_text()).keys()
    assert "density" in again
    _, output = run_quietly(text, tmp_path / "run")
    assert output.count("02-npt  done before") == 2
    with pytest.raises(InputError, match=r"model\.committee\.0: .*second\.safetensors -> absent"):
        run_quietly(text.replace(f"[{committee}/second.safetensors]", "[]"), tmp_path / "run")


def test_disagreement_stops_a_run(committee: Path, tmp_path: Path) -> None:
    text = CONFIG.format(committee) + "guards: {disagreement: 1e-4 kcal/mol/A}\n"
    with pytest.raises(GuardError, match=r"02-npt stopped at 0 ps.*the models disagree on the force on .*label the"):
        run_quietly(text, tmp_path / "run")
    assert (tmp_path / "run/first/stages/02-npt/blowup.extxyz").exists()


def test_the_configuration_of_a_committee(committee: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, CONFIG.format(committee)))
    assert list(config.each_member()) == ["first", "second"] and config.guards.disagreement == 1.0
    assert load_config(write(tmp_path, dump_config(config))) == config
    units = load_config(write(tmp_path, "electrolyte: DMC\nguards: {disagreement: 10 kcal/mol/A}\n"))
    assert units.guards.disagreement == pytest.approx(10.0 * KCAL_PER_MOL)
    for names in ("a/x.safetensors, b/x.safetensors", "default", "x, x"):
        with pytest.raises(InputError, match=r"model\.committee: two models have the same name"):
            load_config(write(tmp_path, f"electrolyte: DMC\nmodel: {{committee: [{names}]}}\n"))


def test_the_spread_stands_beside_the_sampling_error() -> None:
    """Values 1.0, 1.2, 1.4: mean 1.2, standard deviation 0.2; errors of 0.03 leave 0.03/sqrt(3) in the mean."""
    results = {str(k): {"density": Estimate(1.0 + 0.2 * k, 0.03, "g/cm3", 10.0, "NPT", ("w",))} for k in range(3)}
    mean = over_models(results)["density"]
    assert mean.value == pytest.approx(1.2) and mean.spread_over_models == pytest.approx(0.2)
    assert mean.stderr == pytest.approx(0.03 / sqrt(3.0)) and mean.n_effective == 30.0
    assert mean.warnings == ("w",) and mean.unit == "g/cm3"
    assert str(mean) == "1.200 ± 0.017 g/cm3 (N_eff 30), spread over models 0.2"
    assert mean.to_dict()["spread_over_models"] == pytest.approx(0.2)
    assert "spread_over_models" not in results["0"]["density"].to_dict()


def test_models_without_a_value_are_told() -> None:
    value = Estimate(2.0, None, "mPa s", None, "Green-Kubo")
    none = no_value("too short", unit="mPa s", method="Green-Kubo")
    mean = over_models({"a": {"viscosity": value}, "b": {"viscosity": none}, "c": {"viscosity": value}})["viscosity"]
    assert mean.value == 2.0 and mean.stderr is None and np.isclose(mean.spread_over_models or 0.0, 0.0)
    assert mean.warnings == ("mean of 2 of 3 models, the others give no value",)
    mean = over_models({"a": {"viscosity": value}, "b": {"viscosity": none}})["viscosity"]
    assert mean.value is None and mean.warnings == ("1 of 2 models give a value (b: too short)",)
