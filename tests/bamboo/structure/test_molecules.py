"""Known molecules have the right composition, charge and geometry; what is wrong is refused with a hint."""

from dataclasses import replace

import numpy as np
import pytest

from bamboo.errors import InputError
from bamboo.structure.molecules import (
    FULL_NAMES,
    IONS,
    SALTS,
    SOLVENTS,
    check_geometry,
    conformers,
    define,
    molecule,
    molecule_from_smiles,
    salt,
    with_short_names,
)


@pytest.mark.parametrize("name", [*SOLVENTS, *IONS])
def test_every_known_molecule_is_connected_and_well_formed(name):
    member = molecule(name)
    assert member.positions.shape == (member.n_atoms, 3)
    # A connected acyclic graph has n - 1 bonds; each ring adds one. Reachability proves there is one piece.
    reached = {0}
    while grown := {b for pair in member.bonds for b in pair if reached & set(pair)} - reached:
        reached |= grown
    assert reached == set(range(member.n_atoms))
    check_geometry(member)


@pytest.mark.parametrize(
    ("name", "mass", "charge"),
    # IUPAC 2021 abridged atomic weights: H 1.008, Li 6.94, C 12.011, N 14.007, O 15.999, F 18.998, P 30.974, S 32.06
    [
        ("EC", 3 * 12.011 + 4 * 1.008 + 3 * 15.999, 0),
        ("DMC", 3 * 12.011 + 6 * 1.008 + 3 * 15.999, 0),
        ("Li+", 6.94, 1),
        ("PF6-", 30.974 + 6 * 18.998, -1),
        ("FSI", 14.007 + 2 * 32.06 + 4 * 15.999 + 2 * 18.998, -1),
        ("TFSI", 14.007 + 2 * 32.06 + 4 * 15.999 + 6 * 18.998 + 2 * 12.011, -1),
        ("BOB", 10.81 + 4 * 12.011 + 8 * 15.999, -1),
    ],
)
def test_molar_mass_and_charge(name, mass, charge):
    assert molecule(name).molar_mass == pytest.approx(mass, abs=0.01)
    assert molecule(name).charge == charge


def test_hexafluorophosphate_is_an_octahedron():
    ion = molecule("PF6")
    bonds = ion.positions[1:] - ion.positions[0]
    lengths = np.linalg.norm(bonds, axis=1)
    assert lengths == pytest.approx(1.63, abs=1e-12)
    cosines = (bonds @ bonds.T / lengths[:, None] / lengths)[np.triu_indices(6, 1)]
    assert np.sort(np.round(cosines, 12)).tolist() == [-1.0] * 3 + [0.0] * 12


def test_tetrafluoroborate_is_a_tetrahedron():
    bonds = (ion := molecule("BF4")).positions[1:] - ion.positions[0]
    cosines = (bonds @ bonds.T)[np.triu_indices(4, 1)] / 1.41**2
    assert cosines == pytest.approx(-1.0 / 3.0)


def test_geometry_is_deterministic_and_read_only():
    again = molecule_from_smiles.__wrapped__(SOLVENTS["DEC"], name="DEC")
    assert np.array_equal(again.positions, molecule("DEC").positions)
    with pytest.raises(ValueError, match="read-only"):
        again.positions[0] = 0.0


def test_conformers_differ_and_start_with_the_lowest():
    shapes = conformers("DEC", 6)
    assert np.array_equal(shapes[0], conformers("DEC", 6)[0])
    spans = [np.linalg.norm(shape[:, None] - shape[None], axis=2).max() for shape in shapes]
    assert max(spans) - min(spans) > 0.3


def test_salts_are_neutral():
    for name in SALTS:
        assert sum(count * molecule(ion).charge for ion, count in salt(name).items()) == 0
    assert salt("LiPF6") == {"Li": 1, "PF6": 1}


def test_full_names_belong_to_what_is_known_and_to_nothing_a_user_named(monkeypatch):
    assert set(FULL_NAMES.values()) <= {*SOLVENTS, *IONS}
    assert with_short_names("sulfolane") == "SL"
    monkeypatch.setattr("bamboo.structure.molecules.SOLVENTS", {**SOLVENTS})
    define("sulfolane", "C1CCOC1")
    assert with_short_names("sulfolane") == "sulfolane"


def test_bad_geometry_is_refused():
    broken = molecule("PF6").positions.copy()
    broken[2] = broken[1] + [0.0, 0.9, 0.0]  # two fluorine atoms 0.9 Å apart, as RDKit builds them
    with pytest.raises(InputError, match=r"F1-F2 of 'PF6' is 0\.90 Å"):
        check_geometry(replace(molecule("PF6"), positions=broken))
    stretched = molecule("EC").positions * 1.4
    with pytest.raises(InputError, match=r"Bond .* of 'EC'"):
        check_geometry(replace(molecule("EC"), positions=stretched))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: molecule("TFSl"), "Did you mean 'TFSI'"),
        (lambda: molecule("LiPF6"), "is a salt; its ions are Li and PF6"),
        (lambda: molecule("Dimethyl carbonate"), "Did you mean 'DMC'"),
        (lambda: salt("lithium triflate"), "Did you mean 'LiOTf'"),
        (lambda: salt("LiPF"), "Did you mean 'LiPF6'"),
        (lambda: molecule_from_smiles("C1CC"), "Cannot read SMILES"),
        (lambda: molecule_from_smiles("[Li+].[F-]"), "several molecules"),
    ],
)
def test_errors_name_the_remedy(call, message):
    with pytest.raises(InputError, match=message):
        call()
