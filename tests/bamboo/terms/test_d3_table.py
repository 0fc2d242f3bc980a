"""The committed table of dispersion coefficients, and the script that makes it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bamboo import units
from bamboo.elements import numbers_of
from bamboo.errors import InputError
from bamboo.structure.molecules import molecule, molecule_from_smiles
from bamboo.terms.d3_table import d3_elements, fill_d3_table
from bamboo.terms.dispersion import Dispersion, DispersionConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def filled():
    dispersion = Dispersion(DispersionConfig())
    dispersion.c6 += 7.0  # whatever was there is overwritten
    fill_d3_table(dispersion)
    return dispersion


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("dftd3")
    spec = importlib.util.spec_from_file_location("make_d3_table", ROOT / "data" / "dispersion" / "make_d3_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_values_known_from_the_literature(filled):
    """Hartree bohr^6: C in methane-like carbon 18.2, H bound to carbon 3.1 (Grimme et al. 2010, table II)."""
    atomic = units.HARTREE * units.BOHR**6
    hydrogen, carbon = filled.c6[1] / atomic, filled.c6[6] / atomic
    assert float(hydrogen) == pytest.approx(3.1, abs=0.1)
    assert 18.0 < float(carbon) < 22.0
    # r4r2 of D3: H 2.00735, C 3.10493 bohr; R = sqrt(3 r4r2_i r4r2_j)
    assert float(filled.radius[1, 6]) == pytest.approx(np.sqrt(3 * 2.00734898 * 3.10492822) * units.BOHR, rel=1e-6)


def test_cations_have_none_and_other_elements_stay_without(filled):
    assert {"H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Li", "Na", "K"} == set(d3_elements())
    assert filled.c6[numbers_of(["Li", "Na", "K"])].tolist() == [0.0, 0.0, 0.0]
    absent = [n for n in range(87) if n not in numbers_of(d3_elements())]
    assert not filled.c6[absent].any()
    assert torch.equal(filled.radius, filled.radius.T)
    assert float(filled.radius.min()) > 0


def test_a_model_with_an_element_outside_the_table_is_refused():
    dispersion = Dispersion(DispersionConfig())
    fill_d3_table(dispersion, elements=["H", "Li", "Si"])
    with pytest.raises(InputError, match="but not Br, I: without C6"):
        fill_d3_table(dispersion, elements=["C", "I", "Br"])


def test_table_is_what_the_script_gives(script):
    """A tenth of the molecules, one value each: the full run takes seconds and is a script's business."""
    table = json.loads(script.TABLE.read_text(encoding="utf-8"))
    for name in ("EC", "PF6", "FSI", "BF4", "ACN"):
        assert name in table["molecules"]
        each = molecule(name)
        for symbol, c6 in zip(each.symbols, script.atomic_c6(each), strict=True):
            low, high = table["elements"][symbol]["c6_range"]
            assert low * 0.999 <= c6 <= high * 1.001, symbol
            assert low <= table["elements"][symbol]["c6"] <= high
    for symbol in ("H", "C", "Li", "K"):
        assert table["elements"][symbol]["radius"] == pytest.approx(script.radius(symbol), rel=1e-5)
    assert table["units"] == {"c6": "eV Å^6", "radius": "Å"}


@pytest.mark.parametrize("name", ["EC", "DMC", "EMC", "DEC", "PC", "FEC", "TFSI", "FSI"])
def test_one_coefficient_per_element_costs_two_percent(filled, script, name):
    """Sum of C6 over the pairs of two molecules, against D3's own coefficients for every pair."""
    each = molecule(name)
    far = each.positions + np.array([script.SEPARATION, 0.0, 0.0])
    distance = np.linalg.norm(each.positions[:, None] - far[None], axis=-1)
    expected = -(script.pair_energies(each, each, power=6) * distance**6).sum()
    root = filled.c6.sqrt().numpy()[each.numbers].sum()
    assert root**2 == pytest.approx(expected, rel=0.021)


def test_silicon_comes_from_molecules_of_the_script(script):
    silane = molecule_from_smiles(script.SILANES["tetramethylsilane"])
    assert "Si" in silane.symbols
