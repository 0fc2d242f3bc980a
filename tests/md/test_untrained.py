"""Molecules that a model has never seen are refused before anything is simulated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bamboo import checkpoint
from bamboo.errors import InputError
from md.config import RunConfig
from md.model import check_molecules, load_model


def run(electrolyte: str, **model: Any) -> RunConfig:
    return RunConfig.model_validate({"electrolyte": electrolyte, "temperature": "298 K", "model": model or "default"})


@pytest.mark.parametrize(
    ("electrolyte", "unknown"),
    [
        ("1 M LiPF6 in THF", "THF"),
        ("1 m LiTFSI in EC:EMC 3:7 wt", "TFSI"),
        ("LiFSI:DME:TTE 1:1.2:3 mol", "DME, TTE"),
    ],
)
def test_the_default_refuses_what_its_data_did_not_hold(electrolyte: str, unknown: str) -> None:
    with pytest.raises(InputError, match=rf"never seen {unknown}; it knows DEC, DMC, EC, .*VC.*untrained: true"):
        load_model(run(electrolyte))


def test_what_it_knows_and_what_one_insists_on_runs() -> None:
    check_molecules(run("1 m LiPF6 in EC:DMC 30:70 wt"))
    load_model(run("1 M LiPF6 in THF", name="default", untrained=True))


def test_a_molecule_is_known_by_its_graph_not_by_its_name(tmp_path: Path, argon_model: Callable[..., Path]) -> None:
    """Dimethyl carbonate by another name and SMILES is known; a card that says nothing refuses nothing."""
    config = run("DMC").model_dump(mode="json", exclude_defaults=True)
    other = {"electrolyte": "DimethylCarbonate", "molecules": {"DimethylCarbonate": "O=C(OC)OC"}}
    check_molecules(RunConfig.model_validate(config | other))
    silent = argon_model(tmp_path / "silent.safetensors")
    assert "molecules" not in checkpoint.describe(silent)["card"]
    check_molecules(run("THF", name=str(silent)))
