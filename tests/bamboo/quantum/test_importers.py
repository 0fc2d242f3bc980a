"""The same frames written in other units, keys and stress forms come back the same; errors name file and frame."""

import numpy as np
import pytest
from ase.units import Bohr, Debye, Hartree, kcal, mol

from bamboo.errors import InputError
from bamboo.quantum.importers import import_extxyz

POSITIONS = np.array([[0.0, 0.0, 0.1], [0.9, 0.1, 0.0], [-0.3, 0.95, 0.0]])
FORCES = np.array([[0.5, -1.0, 0.25], [-0.75, 0.5, 0.0], [0.25, 0.5, -0.25]])
CHARGES = [-0.6, 0.35, 0.25]
STRESS = np.array([[0.01, 0.002, -0.001], [0.002, 0.02, 0.003], [-0.001, 0.003, -0.015]])
CELL = np.diag([8.0, 9.0, 10.0])


def write(path, comment, *, energy=1.0, length=1.0, n_frames=1, columns="species:S:1:pos:R:3:forces:R:3:charges:R:1"):
    lines = []
    for _ in range(n_frames):
        lines += ["3", f"Properties={columns} {comment}"]
        for symbol, r, f, q in zip("OHH", POSITIONS / length, FORCES * length / energy, CHARGES, strict=True):
            numbers = " ".join(f"{value:.14g}" for value in (*r, *f, q))
            lines.append(f"{symbol} {numbers}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("units", "energy", "length", "dipole"),
    [
        ("eV,Å", 1.0, 1.0, 1.0),
        ("kcal/mol,Å,Debye", kcal / mol, 1.0, Debye),
        ("Hartree,bohr,au", Hartree, Bohr, Bohr),
    ],
)
def test_units(tmp_path, units, energy, length, dipole):
    moment = " ".join(str(value / dipole) for value in (0.3, -0.2, 0.5))
    comment = f'energy={-50.0 / energy!r} dipole="{moment}" charge=1'
    (frame,) = import_extxyz(write(tmp_path / "a.xyz", comment, energy=energy, length=length), units=units, level="DFT")
    assert frame.labels.energy == pytest.approx(-50.0, rel=1e-12)
    assert frame.system.positions == pytest.approx(POSITIONS, abs=1e-12)
    assert frame.labels.forces == pytest.approx(FORCES, abs=1e-12)
    assert frame.labels.charges == pytest.approx(CHARGES)
    assert frame.labels.dipole == pytest.approx([0.3, -0.2, 0.5])
    assert frame.system.total_charge == 1.0 and frame.labels.level == "DFT" and frame.labels.virial is None


@pytest.mark.parametrize("form", ["virial", "stress", "voigt"])
def test_virial_is_minus_volume_times_stress(tmp_path, form):
    expected = -STRESS * 720.0  # eV; the cell is 8 x 9 x 10 Å
    factor = Hartree / Bohr**3
    if form == "virial":
        text = f'virial="{" ".join(map(str, (expected / Hartree).ravel()))}"'
    elif form == "stress":
        text = f'stress="{" ".join(map(str, (STRESS / factor).ravel()))}"'
    else:
        voigt = STRESS[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / factor
        text = f'pressure_tensor="{" ".join(map(str, voigt))}"'
    lattice = " ".join(map(str, (CELL / Bohr).ravel()))
    path = write(tmp_path / "a.xyz", f'energy=-1 Lattice="{lattice}" pbc="T T T" {text}', energy=Hartree, length=Bohr)
    keys = {"stress": "pressure_tensor"} if form == "voigt" else None
    (frame,) = import_extxyz(path, units="Hartree,bohr", level="DFT", keys=keys)
    assert frame.system.cell == pytest.approx(CELL)
    assert frame.labels.virial == pytest.approx(expected, rel=1e-9)
    assert frame.kind == "periodic" and frame.labels.dipole is None


def test_other_keys_and_absent_labels(tmp_path):
    path = write(tmp_path / "a.xyz", "dft_energy=-3.5", columns="species:S:1:pos:R:3:dft_forces:R:3:ignored:R:1")
    keys = {"energy": "dft_energy", "forces": "dft_forces"}
    (frame,) = import_extxyz(path, units="eV,Å", level="DFT", keys=keys)
    assert frame.labels.energy == -3.5 and frame.labels.forces == pytest.approx(FORCES)
    assert frame.labels.charges is None and frame.labels.dipole is None


def test_consecutive_frames_share_a_trajectory(tmp_path):
    path = write(tmp_path / "run.xyz", "energy=-1", n_frames=5)
    names = [frame.trajectory for frame in import_extxyz(path, units="eV,Å", level="DFT", block=2)]
    assert names == ["run-00000", "run-00000", "run-00001", "run-00001", "run-00002"]
    path = write(tmp_path / "run.xyz", "energy=-1 trajectory=mine", n_frames=2)
    assert {frame.trajectory for frame in import_extxyz(path, units="eV,Å", level="DFT")} == {"mine"}


@pytest.mark.parametrize(
    ("comment", "options", "message"),
    [
        ("energy=-1", {"units": "eV"}, "expected 'energy,length'"),
        ("energy=-1", {"units": "kcal,Å"}, "Did you mean 'kcal/mol'"),
        ("energy=-1", {"units": "eV,Å", "keys": {"energie": "x"}}, "Did you mean 'energy'"),
        ("Energy=-1", {"units": "eV,Å"}, r"a\.xyz: frame 0: no energy\. Found: Energy"),
        ("energy=-1", {"units": "eV,Å", "keys": {"forces": "f"}}, "no 'f' \\(for forces\\)"),
        ("energy=nan", {"units": "eV,Å"}, "not finite"),
        ('energy=-1 dipole="1 2"', {"units": "eV,Å"}, "'dipole' has shape"),
        ("energy=-1", {"units": "Hartree,nm"}, None),
        ('energy=-1 pbc="T T F" Lattice="9 0 0 0 9 0 0 0 9"', {"units": "eV,Å"}, "partly periodic"),
    ],
)
def test_errors(tmp_path, comment, options, message):
    path = write(tmp_path / "a.xyz", comment)
    if message is None:  # wrong units make absurd forces: 1 Hartree/nm is 2.7 eV/Å, so the file is scaled up
        path = write(tmp_path / "a.xyz", comment, energy=1e-3)
        message = "Check the units"
    with pytest.raises(InputError, match=message):
        import_extxyz(path, level="DFT", **options)


def test_broken_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        import_extxyz(tmp_path / "none.xyz", units="eV,Å", level="DFT")
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(InputError, match="no frames"):
        import_extxyz(tmp_path / "empty.xyz", units="eV,Å", level="DFT")
    path = write(tmp_path / "cut.xyz", "energy=-1", n_frames=2)
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(InputError, match="frame 1 is not valid extended XYZ"):
        import_extxyz(path, units="eV,Å", level="DFT")
