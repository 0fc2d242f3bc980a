"""Composition text and integer counts, against numbers worked out by hand from molar masses and definitions."""

import re

import pytest

from bamboo.errors import InputError
from bamboo.structure.densities import PURE_DENSITY, ideal_density
from md.composition import (
    Amount,
    Composition,
    moles_per_kg_solvent,
    parse_amount,
    parse_composition,
    realise,
)

# g/mol, sums of standard atomic weights: C 12.011, H 1.008, O 15.999, Li 6.94, P 30.974, F 18.998
EC, DMC, LIPF6 = 88.062, 90.078, 151.902


def test_parts_basis_and_salts_are_read() -> None:
    composition = parse_composition("1 m LiPF6 in EC:DMC 30:70 wt")
    assert composition.solvents == {"EC": 30.0, "DMC": 70.0}
    assert composition.basis == "wt"
    assert composition.salts == {"LiPF6": Amount(1.0, "mol/kg")}


@pytest.mark.parametrize(
    "text",
    ["1M LiPF6 in EC:DMC 3:7wt", "1 mol/L LiPF6 in EC:DMC 3:7 wt", "  1.0  M  LiPF6   in EC:DMC   3:7  wt "],
)
def test_spellings_of_the_same_composition(text: str) -> None:
    assert parse_composition(text) == Composition({"EC": 3.0, "DMC": 7.0}, "wt", {"LiPF6": Amount(1.0, "mol/L")})


def test_a_single_solvent_needs_no_ratio_and_no_salt() -> None:
    assert parse_composition("DMC") == Composition({"DMC": 1.0}, "wt")
    assert parse_composition("0.8 m LiPF6 + 0.2 m LiFSI in PC").salts == {
        "LiPF6": Amount(0.8, "mol/kg"),
        "LiFSI": Amount(0.2, "mol/kg"),
    }


@pytest.mark.parametrize(
    ("spelling", "basis"),
    [
        *(("3:7 wt%", "wt"), ("3:7 w/w", "wt"), ("3:7 wt.%", "wt"), ("3:7wt %", "wt"), ("(3:7 by", None)),
        *(("3:7 v/v", "vol"), ("(3:7, v/v)", "vol"), ("3:7 (v/v)", "vol"), ("3:7 vol%", "vol"), ("3:7 mol%", "mol")),
    ],
)
def test_usual_spellings_of_a_basis(spelling: str, basis: str | None) -> None:
    if basis is None:
        with pytest.raises(InputError, match=re.escape("Unknown basis 'by'. Write 3:7 wt, 3:7 mol or 3:7 vol.")):
            parse_composition(f"EC:DMC {spelling}")
    else:
        assert parse_composition(f"EC:DMC {spelling}") == Composition({"EC": 3.0, "DMC": 7.0}, basis)  # type: ignore[arg-type]


def test_additives_are_percentages_of_the_whole_solvent() -> None:
    found = parse_composition("1 m LiPF6 in EC:EMC 3:7 wt + 2 wt% VC")
    assert found.solvents == pytest.approx({"EC": 29.4, "EMC": 68.6, "VC": 2.0}) and found.basis == "wt"
    assert found.salts == {"LiPF6": Amount(1.0, "mol/kg")}
    for spelling in ("+2% wt VC", "+ 2wt.% vinylene carbonate", "+ 2 w/w% VC", "+ 2 % w/w VC"):
        assert parse_composition(f"EC:EMC 3:7 wt {spelling}").solvents == found.solvents
    two = parse_composition("DMC + 5 vol% FEC + 5 vol% VC")
    assert two.basis == "vol"
    # 1 cm3 of DMC, as 90 % of the volume, whatever basis a single solvent has
    assert two.solvents == pytest.approx({"DMC": 90.0, "FEC": 5.0, "VC": 5.0})
    mixed = parse_composition("EC:EMC 3:7 vol + 2 wt% VC")
    grams_ec, grams_emc = 3.0 * PURE_DENSITY["EC"][0], 7.0 * PURE_DENSITY["EMC"][0]
    assert mixed.basis == "wt" and mixed.solvents["VC"] == 2.0
    assert mixed.solvents["EC"] == pytest.approx(98.0 * grams_ec / (grams_ec + grams_emc))
    moles = moles_per_kg_solvent(parse_composition("EC:EMC 3:7 wt + 10 mol% DMC"))
    assert moles["DMC"] / sum(moles.values()) == pytest.approx(0.1)
    assert moles["EC"] * EC / (moles["EMC"] * 104.105) == pytest.approx(3.0 / 7.0, rel=1e-4)


NOTE = "EC:EMC 30:60: the parts sum to 90, not 100, and are taken as a ratio, 33.3:66.7."


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("EC:EMC 30:60 wt", NOTE),
        ("EC:EMC 30:60 wt + 2 wt% VC", NOTE),
        *(("EC:EMC:DMC 33:33:33 wt", ""), ("EC:EMC 30:70 wt", ""), ("EC:EMC 1:1 wt", ""), ("EC:EMC 100:100 wt", "")),
    ],
)
def test_parts_that_look_like_percentages_and_are_none_are_noted(text: str, note: str) -> None:
    assert parse_composition(text).note == note


@pytest.mark.parametrize(
    ("full", "short"),
    [
        (
            "1 m lithium hexafluorophosphate in ethylene  carbonate:Dimethyl Carbonate 3:7 wt",
            "1 m LiPF6 in EC:DMC 3:7 wt",
        ),
        ("2 M sodium bis(fluorosulfonyl)imide in 1,2-dimethoxyethane", "2 M NaFSI in DME"),
        ("fluoroethylene carbonate:vinyl ethylene carbonate 1:1 mol", "FEC:VEC 1:1 mol"),
        ("ethyl methyl carbonate:methyl acetate:γ-butyrolactone 1:1:1 vol", "EMC:MA:GBL 1:1:1 vol"),
    ],
)
def test_full_names_stand_for_short_ones(full: str, short: str) -> None:
    assert parse_composition(full) == parse_composition(short)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EC:dimethyl carbonat 3:7 wt", "Unknown solvent 'dimethyl'. Did you mean 'dimethyl carbonate'?"),
        ("chloroethylene carbonate", "Unknown solvent 'chloroethylene'."),  # a full name inside another is none
        ("EC:EMC 3:7 wt + 2% VC", '"2% VC" has no basis. Write + 2 wt% VC, by weight of the whole solvent.'),
        ("EC:EMC 3:7 wt + VC 2 wt%", '"VC 2 wt%" is not an additive. Write, for example, + 2 wt% VC'),
        ("1 m LiPF6 in EC + 1 wt% LiBOB", "LiBOB is a salt: give its amount before ' in '"),
        ("EC:EMC 3:7 wt + 2 wt% EC", "named twice"),
        ("EC + 2 wt% VC + 1 mol% FEC", "several bases"),
        ("EC + 60 wt% VC + 40 wt% FEC", "leave no room"),
        ("LiFSI:DME 1:2 mol + 2 wt% VC", "give the additives in the ratio"),
        ("EC + 2 wt% VCC", "Unknown solvent 'VCC'. Did you mean 'VC'?"),
        ("2-methyl tetrahydrofuran", "is incomplete"),
        ("EC:DMC 3:7", '"EC:DMC 3:7" has no basis. Write 3:7 wt, 3:7 mol or 3:7 vol.'),
        ("EC:DMC", '"EC:DMC" has no ratio. Write, for example, EC:DMC 1:1 wt.'),
        ("1 m LiPF in DMC", "Unknown salt 'LiPF'. Did you mean 'LiPF6'?"),
        ("EC:DMCC 1:1 wt", "Unknown solvent 'DMCC'. Did you mean 'DMC'?"),
        ("LiPF6", "Unknown solvent 'LiPF6'. A salt needs an amount"),
        ("1 mM LiPF6 in DMC", "Unknown unit 'mM' in \"1 mM\". Did you mean 'm'?"),
        ("EC:DMC 3:7 w", "Unknown basis 'w'. Did you mean 'wt'?"),
        ("EC:DMC 3:7:1 wt", "names 2 solvents and gives 3 parts"),
        ("EC:EC 1:1 wt", "names a solvent twice"),
        ("1 m LiPF6 + 1 m LiPF6 in EC", "Salt 'LiPF6' is given twice."),
        ("EC:DMC 0:1 wt", "every part must lie in 0..1e6"),
        ("1e9 m LiPF6 in EC", "the amount must lie in 0..50 mol/kg"),
        ("0 m LiPF6 in EC", "Leave out a salt you do not want"),
        ("LiPF6 in EC", '"LiPF6" is not an amount of salt'),
        ("1 m LiPF6", "is incomplete. Write, for example"),
        ("", "is incomplete"),
        ("1.2.3 m LiPF6 in EC", "'1.2.3' is not a number."),
    ],
)
def test_errors_name_the_part_and_the_remedy(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_composition(text)


def test_amounts_in_all_units() -> None:
    assert [parse_amount(text) for text in ("1 m", "2 mol/kg", "3 M", "4 mol/L")] == [
        Amount(1.0, "mol/kg"),
        Amount(2.0, "mol/kg"),
        Amount(3.0, "mol/L"),
        Amount(4.0, "mol/L"),
    ]


def test_moles_by_mass_by_amount_and_by_volume() -> None:
    by_mass = moles_per_kg_solvent(parse_composition("1 m LiPF6 in EC:DMC 30:70 wt"))
    assert by_mass == pytest.approx({"EC": 300.0 / EC, "DMC": 700.0 / DMC, "LiPF6": 1.0}, rel=1e-4)
    by_amount = moles_per_kg_solvent(parse_composition("EC:DMC 30:70 mol"))
    per_mole = 1000.0 / (0.3 * EC + 0.7 * DMC)
    assert by_amount == pytest.approx({"EC": 0.3 * per_mole, "DMC": 0.7 * per_mole}, rel=1e-4)
    by_volume = moles_per_kg_solvent(parse_composition("EC:DMC 30:70 vol"))
    grams_ec, grams_dmc = 30.0 * PURE_DENSITY["EC"][0], 70.0 * PURE_DENSITY["DMC"][0]
    assert by_volume["EC"] / by_volume["DMC"] == pytest.approx(grams_ec / EC / (grams_dmc / DMC), rel=1e-4)


def test_molarity_with_a_known_density() -> None:
    """1 L at 1.25 g/cm3 holds 1 mol of salt, 151.902 g, and therefore 1098.098 g of solvent."""
    given = Composition({"DMC": 1.0}, "wt", {"LiPF6": Amount(1.0, "mol/L")}, density_g_cm3=1.25)
    assert moles_per_kg_solvent(given)["LiPF6"] == pytest.approx(1.0 / 1.098098, rel=1e-5)


def test_molarity_by_ideal_mixing_is_consistent_with_the_density_it_implies() -> None:
    mixed = parse_composition("1.2 M LiPF6 + 0.3 m LiFSI in EC:DMC 1:1 wt")
    moles = moles_per_kg_solvent(mixed)
    grams = 1000.0 + moles["LiPF6"] * LIPF6 + moles["LiFSI"] * 187.07
    litres = grams / ideal_density(moles) / 1000.0
    assert moles["LiPF6"] / litres == pytest.approx(1.2, rel=1e-4)
    assert moles["LiFSI"] == 0.3


@pytest.mark.parametrize(
    ("text", "density"),  # measured, doi 10.1038/s42256-025-01009-7 (table of the 2025 release)
    [
        ("DMC", 1.06),
        ("1.0 M LiPF6 in DMC:EC 70:30 wt", 1.228),
        ("1.5 M LiPF6 in DMC:EC 70:30 wt", 1.268),
        ("2.22 m LiFSI in DMC", 1.27),
        ("1.14 m LiFSI in EC", 1.43),
    ],
)
def test_guessed_density_is_within_two_percent_of_experiment(text: str, density: float) -> None:
    assert realise(parse_composition(text), n_atoms=5000).density_g_cm3 == pytest.approx(density, rel=0.02)


def test_too_much_salt_leaves_no_room() -> None:
    with pytest.raises(InputError, match="leaves no room for solvent"):
        moles_per_kg_solvent(parse_composition("25 M LiTFSI in DMC"))


def test_volume_basis_needs_a_tabulated_density() -> None:
    with pytest.raises(InputError, match="density of pure SN is not tabulated"):
        moles_per_kg_solvent(parse_composition("EC:SN 1:1 vol"))


def test_counts_are_the_nearest_integers() -> None:
    """1000 g of 30:70 solvent with 1 LiPF6 hold 3.4067 EC and 7.7710 DMC, 135.32 mol of atoms in all;
    scaled to 5000 atoms that is 125.9, 287.1, 36.95."""
    box = realise(parse_composition("1 m LiPF6 in EC:DMC 30:70 wt"), n_atoms=5000)
    assert box.formula == {"EC": 126, "DMC": 287, "LiPF6": 37}
    assert box.counts == {"EC": 126, "DMC": 287, "Li": 37, "PF6": 37}
    assert box.n_atoms == 126 * 10 + 287 * 12 + 37 * 8
    assert box.got["LiPF6", "mol/kg"] == pytest.approx(37.0 / ((126 * EC + 287 * DMC) / 1000.0), rel=1e-4)
    assert box.got["EC", "% wt"] == pytest.approx(100.0 * 126 * EC / (126 * EC + 287 * DMC), rel=1e-4)
    assert "asked 1" in str(box)
    assert box.worst[1] < 0.002


def test_an_amount_is_told_in_the_unit_it_was_asked_in() -> None:
    box = realise(parse_composition("1 M LiPF6 in EC:DMC 30:70 wt"), n_atoms=5000)
    grams = sum(box.formula[name] * mass for name, mass in (("EC", EC), ("DMC", DMC), ("LiPF6", LIPF6)))
    molar = box.formula["LiPF6"] / (grams / box.density_g_cm3 / 1000.0)
    assert box.asked["LiPF6", "mol/L"] == pytest.approx(1.0)
    assert box.got["LiPF6", "mol/L"] == pytest.approx(molar, rel=1e-4)
    assert ("LiPF6", "mol/kg") in box.got and ("LiPF6", "mol/kg") not in box.asked
    told = f"LiPF6 {molar:.3g} mol/L (asked 1) at {box.density_g_cm3:.4g} g/cm3 by ideal mixing, LiPF6 "
    assert told in str(box) and "g/cm3" not in str(realise(parse_composition("1 m LiPF6 in DMC"), n_atoms=500))
    known = Composition({"DMC": 1.0}, "wt", {"LiPF6": Amount(1.0, "mol/L")}, density_g_cm3=1.25)
    box = realise(known, n_atoms=5000)
    assert box.asked["LiPF6", "mol/L"] == pytest.approx(1.0) and "(asked 1) at 1.25 g/cm3 as given" in str(box)


def test_a_small_box_trades_size_for_composition() -> None:
    """At 500 atoms rounding alone gives 13 EC, 29 DMC, 4 LiPF6 (1.066 m); 9 % more atoms hit 0.994 m."""
    box = realise(parse_composition("1 m LiPF6 in EC:DMC 30:70 wt"), n_atoms=500)
    assert box.formula == {"EC": 14, "DMC": 31, "LiPF6": 4}
    assert box.worst[1] < 0.03


@pytest.mark.parametrize("n_atoms", [1, 30, 100, 333, 1000, 12345, 10_000_000])
def test_every_component_is_present_and_the_box_neutral(n_atoms: int) -> None:
    box = realise(parse_composition("0.1 m LiPF6 + 0.9 m LiFSI in EC:EMC:DMC 1:1:8 vol"), n_atoms=n_atoms)
    assert min(box.counts.values()) >= 1
    assert box.counts["Li"] == box.counts["PF6"] + box.counts["FSI"]
    if n_atoms >= 1000:
        assert abs(box.n_atoms / n_atoms - 1.0) < 0.12


def test_exact_counts_are_kept_and_must_be_neutral() -> None:
    box = realise(Composition(counts={"EC": 5, "LiPF6": 2}), n_atoms=1)
    assert box.counts == {"EC": 5, "Li": 2, "PF6": 2}
    assert realise(Composition(counts={"EC": 5, "Li": 2, "PF6": 2}), n_atoms=1).counts == box.counts
    with pytest.raises(InputError, match=re.escape("15 Li 14 PF6 make +1 e")):
        realise(Composition(counts={"EC": 5, "Li": 15, "PF6": 14}), n_atoms=1)


def test_salt_in_a_mole_ratio() -> None:
    """A localised concentrated electrolyte is written as a ratio of all its parts."""
    asked = parse_composition("LiFSI:DME:TTE 1:1.2:3 mol")
    box = realise(asked, n_atoms=2000)
    counts = box.formula
    assert counts["DME"] / counts["LiFSI"] == pytest.approx(1.2, rel=0.03)
    assert counts["TTE"] / counts["LiFSI"] == pytest.approx(3.0, rel=0.03)
    assert box.counts["Li"] == box.counts["FSI"] == counts["LiFSI"]
    # mol of salt per kg of the solvents
    kg = (1.2 * 90.122 + 3.0 * 232.07) / 1000.0
    assert box.asked["LiFSI", "mol/kg"] == pytest.approx(1.0 / kg, rel=1e-3)
    equal_masses = realise(parse_composition("LiFSI:DME 1:1 wt"), n_atoms=2000).formula
    assert equal_masses["DME"] / equal_masses["LiFSI"] == pytest.approx(187.07 / 90.122, rel=0.03)
    with pytest.raises(InputError, match="give all salts in the ratio"):
        realise(parse_composition("1 m LiPF6 in LiFSI:DME 1:2 mol"), n_atoms=500)
    with pytest.raises(InputError, match="density of pure LiFSI"):
        realise(parse_composition("LiFSI:DME 1:2 vol"), n_atoms=500)
