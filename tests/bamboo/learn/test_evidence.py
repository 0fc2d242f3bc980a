"""Curves from energies whose differences are known."""

import numpy as np
import pytest

from bamboo.errors import InputError
from bamboo.learn.evidence import curves, energies_of_labels, evidence_table, plot
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import System
from bamboo.units import KCAL_PER_MOL

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
    found = curves(energies_of_labels([frame(name, energy) for name, energy in ENERGIES.items()]))
    assert set(found) == {"pair:EC+Li:straight", "shell:Li+EC", "rotation:DMC"}
    pair = found["pair:EC+Li:straight"]
    assert list(pair) == [1.5, 2.0] and pair[2.0] * KCAL_PER_MOL == pytest.approx(-1.0)
    shell = found["shell:Li+EC"]
    assert [shell[n] * KCAL_PER_MOL for n in (1.0, 2.0)] == pytest.approx([-1.5, -1.0])
    assert [value * KCAL_PER_MOL for value in found["rotation:DMC"].values()] == pytest.approx([0.0, 1.0])


def test_table_and_picture(tmp_path) -> None:
    truth = {"pair:EC+Li:straight": {1.5: -40.0, 2.0: -50.0}}
    model = {"pair:EC+Li:straight": {1.5: -37.0, 2.0: -54.0}}
    sources = {"DFT": truth, "model": model, "other": {}}
    line = evidence_table(sources, "DFT").splitlines()[1].split()
    assert line == ["pair:EC+Li:straight", "2", "-50.0", "3.54", "-0.50", "-"]  # sqrt((9 + 16) / 2), (3 - 4) / 2
    plot(sources, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").stat().st_size > 5000
    with pytest.raises(InputError, match="'MP2' is not among DFT, model, other"):
        evidence_table(sources, "MP2")
