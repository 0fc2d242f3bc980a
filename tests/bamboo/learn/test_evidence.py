"""Curves from energies whose differences are known."""

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.learn.evidence import answers_of_labels, answers_of_model, charge_table, curve_table, curves, plot
from bamboo.neighbors import find_neighbors
from bamboo.quantum.dataset import Frame
from bamboo.quantum.esp import potential_points
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System
from bamboo.terms.d3_table import fill_d3_table
from bamboo.terms.dispersion import Dispersion, DispersionConfig
from bamboo.units import DEBYE, KCAL_PER_MOL

ENERGIES = {
    "monomer:EC/0": -10.0, "monomer:Li/0": -1.0,
    "pair:EC+Li:straight/2.00": -12.0, "pair:EC+Li:straight/1.50": -11.5,
    "pair:EC+DMC:stacked/3.30": -30.0,  # no DMC alone
    "shell:Li+EC/1": -12.5, "shell:Li+EC/2": -23.5,
    "rotation:DMC/0": -5.0, "rotation:DMC/40": -4.0,
}  # fmt: skip


def frame(name: str, energy: float) -> Frame:
    system = System(np.array([3]), np.zeros((1, 3)), np.zeros((3, 3)), False, 1.0)
    return Frame(system, Labels("test", energy), "lithium", "scan", f"{name}/00007")


def test_curves_are_differences_from_parts() -> None:
    found = curves(answers_of_labels([frame(name, energy) for name, energy in ENERGIES.items()]))
    assert set(found) == {"pair:EC+Li:straight", "shell:Li+EC", "rotation:DMC"}
    pair = found["pair:EC+Li:straight"]
    assert list(pair) == [1.5, 2.0] and pair[2.0] * KCAL_PER_MOL == pytest.approx(-1.0)
    shell = found["shell:Li+EC"]
    assert [shell[n] * KCAL_PER_MOL for n in (1.0, 2.0)] == pytest.approx([-1.5, -1.0])
    assert [value * KCAL_PER_MOL for value in found["rotation:DMC"].values()] == pytest.approx([0.0, 1.0])


def test_dispersion_comes_on_top_where_the_level_has_none() -> None:
    system = System(np.array([9, 9]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 3.1]]), np.zeros((3, 3)), False, 0.0)
    levels = {"bare/1": "B3LYP/def2-SVPD", "full/1": "wB97M-V"}
    probes = [Frame(system, Labels(level, -7.0), "neutral", "scan", name) for name, level in levels.items()]
    found = answers_of_labels(probes)
    assert found["full/1"].energy == -7.0
    term = Dispersion(DispersionConfig())
    fill_d3_table(term)
    expected = term.pair_energy(torch.tensor(3.1, dtype=torch.float64), term.c6[9], term.radius[9, 9])
    assert float(expected) < -1.0e-4
    assert found["bare/1"].energy + 7.0 == pytest.approx(float(expected), rel=1e-9)


def test_table_and_picture(tmp_path) -> None:
    truth = {"pair:EC+Li:straight": {1.5: -40.0, 1.7: -45.0, 2.0: -50.0}, "pair:EC+EC:stacked": {2.2: 9.0, 2.4: -1.0}}
    model = {"pair:EC+Li:straight": {1.5: 0.0, 1.7: -42.0, 2.0: -54.0}, "pair:EC+EC:stacked": {2.2: 0.0, 2.4: -1.5}}
    sources = {"DFT": truth, "model": model, "other": {}}
    lithium, solvents = [line.split() for line in curve_table(sources, "DFT").splitlines()[1:3]]
    # walls are not compared; sqrt((3^2 + 4^2) / 2), the larger of +3 and -4
    assert lithium == ["pair:EC+Li:straight", "2", "-50.0", "3.54", "-4.00", "-"]
    assert solvents == ["pair:EC+EC:stacked", "1", "-1.0", "0.50", "-0.50", "-"]
    plot(sources, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").stat().st_size > 5000
    with pytest.raises(InputError, match="'MP2' is not among DFT, model, other"):
        curve_table(sources, "MP2")


def test_charges_are_judged_by_dipole_and_potential() -> None:
    system = System(np.array([3, 9]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.6]]), np.zeros((3, 3)), False, 0.0)
    z = np.array([0.0, 0.0, 1.0])

    def labels(charge: float) -> Labels:
        charges = charge * np.array([1.0, -1.0])
        return Labels("test", -1.0, charges=charges, dipole=-1.6 * charge * z)

    sources = {"DFT": {"pair:Li+F:x/1.60": labels(1.0)}, "model": {"pair:Li+F:x/1.60": labels(0.9)}}
    row = charge_table(sources, {"pair:Li+F:x/1.60": system}, reference="DFT").splitlines()[1].split()
    assert row[:4] == ["pair:Li+F:x", "1", f"{0.16 / DEBYE:.2f}", "0.10"]
    points = potential_points(system.numbers, system.positions)
    first, second = (np.linalg.norm(points - position, axis=1) for position in system.positions)
    expected = 332.06371 * 0.1 * np.sqrt(np.mean((1.0 / first - 1.0 / second) ** 2))  # kcal Å / (mol e^2)
    assert float(row[4]) == pytest.approx(expected, abs=0.006)


def test_model_answers_like_its_force_field(make_force_field, make_cluster) -> None:
    force_field, system = make_force_field(), make_cluster(3)
    probe = Frame(system, Labels("test", 0.0), "lithium", "scan", "monomer:X/0/00001")
    found = answers_of_model(force_field, [probe], name="mine")["monomer:X/0"]
    batch = Batch.from_systems([system])
    config = force_field.config
    expected = force_field(batch, find_neighbors(batch, config.network.cutoff, config.dispersion.cutoff))
    assert found.level == "mine" and found.energy == pytest.approx(float(expected.energy), abs=1e-8)
    assert found.charges == pytest.approx(expected.charges.numpy()) and found.charges.sum() == pytest.approx(1.0)
    assert found.dipole == pytest.approx(expected.dipole[0].numpy())
