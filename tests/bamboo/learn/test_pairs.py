"""Liquids labelled by molecules and pairs: exact where a method has no more than pairs, derivatives of one energy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField
from bamboo.learn import pairs
from bamboo.learn.pairs import PairDifference, cut_dimers, dimers_of, dispersion, fit_difference, liquid_labels
from bamboo.learn.samples import molecules_of
from bamboo.neighbors import find_pairs
from bamboo.quantum.dataset import Frame, read_frames
from bamboo.quantum.labels import Labels
from bamboo.structure.packing import pack_box
from bamboo.system import Batch, System

GOOD = "B3LYP/def2-SVPD, RI, grid 2"
TRUTH = PairDifference(np.array([[0.004, -0.003], [-0.006, 0.002], [0.05, -0.02]]))
REACH = 5.5  # Å, of the cheap method


def cheap(system: System) -> Labels:
    """Return labels of a method that knows pairs of atoms only: E = sum Z_i Z_j (1 - (r / REACH)^2)^3 / 1000."""
    batch = Batch.from_systems([system])
    found = find_pairs(batch, REACH, full=False)
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    positions = batch.positions.clone().requires_grad_()
    i, j = found.index
    vectors = found.vectors(
        positions + positions @ strain, batch.cell + batch.cell @ strain, system_index=batch.system_index
    )
    weight = batch.numbers[i] * batch.numbers[j] * 1.0e-3
    energy = (weight * (1.0 - vectors.square().sum(-1) / REACH**2) ** 3).sum()
    gradient, strain_gradient = torch.autograd.grad(energy, (positions, strain))
    virial = -strain_gradient.numpy() if system.pbc else None
    return Labels("cheap", float(energy.detach()), -gradient.numpy(), virial=virial)


def better(system: System, first: int, force_field: ForceField) -> Labels:
    """Return labels of a level without dispersion that lies TRUTH above the cheap one for two molecules."""
    low = cheap(system)
    energy, forces = low.energy, np.array(low.forces)
    if first < system.n_atoms:
        number = torch.from_numpy(system.numbers)
        positions = torch.from_numpy(system.positions).requires_grad_()
        i, j = (k.flatten() for k in torch.meshgrid(
            torch.arange(first), torch.arange(first, system.n_atoms), indexing="ij"
        ))  # fmt: skip
        more = TRUTH((positions[i] - positions[j]).norm(dim=-1), number[i], number[j]).sum()
        energy, forces = energy + float(more.detach()), forces - torch.autograd.grad(more, positions)[0].numpy()
    spread = dispersion(force_field, system)
    return Labels(GOOD, energy - spread[0], forces - spread[1])


@pytest.fixture(scope="module")
def liquid() -> System:
    return pack_box({"EC": 3, "DMC": 4}, density_g_cm3=0.9, seed=3)


@pytest.fixture(scope="module")
def labelled(liquid: System, make_force_field: Callable[..., Any]) -> list[Frame]:
    field = make_force_field()
    frames = []
    for number, system in enumerate(cut_dimers([liquid], 12, seed=1)):
        first = int((molecules_of(system) == 0).sum())
        frames.append(Frame(system, better(system, first, field), "neutral", "liquid", f"dimers-{number // 3}"))
    return frames


def test_dimers_are_neighbours_and_carry_what_lies_beyond_the_cheap_method(
    labelled: list[Frame], make_force_field: Callable[..., Any]
) -> None:
    dimers = dimers_of(labelled, make_force_field(), cheap)
    assert len(dimers) == 12
    for dimer in dimers:
        positions, n = dimer.system.positions, dimer.n_first
        assert np.linalg.norm(positions[:n, None] - positions[None, n:], axis=-1).min() < pairs.TOUCHING
        np.testing.assert_allclose(dimer.forces.sum(0), 0.0, atol=1e-9)
        assert np.abs(dimer.forces[:n].sum(0)).max() > 1e-3
    difference = fit_difference(dimers)
    size = np.sqrt(np.mean([np.square(dimer.forces[: dimer.n_first].sum(0)) for dimer in dimers]))
    assert difference.unexplained(dimers) < 0.02 * size  # what the ridge leaves
    with pytest.raises(InputError, match="one by one"):
        dimers_of([frame for k, frame in enumerate(labelled) if k % 3 == 0], make_force_field(), cheap)


def test_energy_forces_and_virial_of_a_labelled_box_belong_together(
    liquid: System, make_force_field: Callable[..., Any]
) -> None:
    field = make_force_field()

    def label(system: System) -> Labels:
        whole = replace(system, molecule=liquid.molecule)
        return liquid_labels(
            whole, force_field=field, difference=TRUTH, cheap=cheap, box=cheap(whole), level=GOOD
        )[1]  # fmt: skip

    there = label(liquid)
    assert there.level == f"{GOOD}; lifted"
    assert not there.contains_dispersion
    assert there.forces is not None and there.virial is not None
    generator = np.random.default_rng(0)
    step, stretch = 4.0e-3 * generator.normal(size=liquid.positions.shape), 1.0e-3 * generator.normal(size=(3, 3))
    moved = [replace(liquid, positions=liquid.positions + sign * step) for sign in (1, -1)]
    slope = (label(moved[0]).energy - label(moved[1]).energy) / 2.0
    assert slope == pytest.approx(-(there.forces * step).sum(), rel=1e-2)
    strained = []
    for sign in (1, -1):
        scale = np.eye(3) + sign * stretch
        strained.append(replace(liquid, positions=liquid.positions @ scale, cell=liquid.cell @ scale))
    slope = (label(strained[0]).energy - label(strained[1]).energy) / 2.0
    assert slope == pytest.approx(-(there.virial * stretch).sum(), rel=1e-2)


def test_pairs_alone_give_the_forces_of_a_method_that_has_no_more_than_pairs(
    liquid: System, make_force_field: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "FAR", pairs.NEAR)
    common: dict[str, Any] = {"force_field": make_force_field(), "difference": TRUTH, "cheap": cheap, "level": GOOD}
    _, by_pairs = liquid_labels(liquid, box=None, **common)
    _, by_box = liquid_labels(liquid, box=cheap(liquid), **common)
    assert np.isnan(by_pairs.energy) and by_pairs.virial is None
    assert by_pairs.forces is not None and by_box.forces is not None
    np.testing.assert_allclose(by_pairs.forces, by_box.forces, atol=2e-5)
    assert np.abs(by_box.forces).max() > 0.1


def test_ions_stay_as_the_model_has_them(make_force_field: Callable[..., Any]) -> None:
    """A pair of ions is no pair to be put right: with two molecules too far apart nothing but the model is left."""
    field = make_force_field()
    box = pack_box({"Li": 1, "PF6": 1, "DMC": 3}, density_g_cm3=0.7, seed=1)
    common: dict[str, Any] = {"force_field": field, "cheap": cheap, "level": GOOD}
    nothing = PairDifference(np.zeros((3, 2)))
    whole, labels = liquid_labels(box, box=None, difference=nothing, **common)
    _, moved = liquid_labels(box, box=None, difference=TRUTH, **common)
    assert labels.forces is not None and moved.forces is not None
    ions = np.isin(whole.molecule, [0, 1])
    assert {3, 15} <= set(whole.numbers[ions].tolist())
    np.testing.assert_allclose(labels.forces[ions], moved.forces[ions], atol=1e-12)
    assert np.abs(labels.forces - moved.forces)[~ions].max() > 1e-3
    with pytest.raises(InputError, match="ions"):
        liquid_labels(box, box=cheap(box), difference=nothing, **common)


def test_labelling_goes_on_where_it_stopped(
    liquid: System, make_force_field: Callable[..., Any], tmp_path: Path
) -> None:
    asked = []

    def counted(system: System) -> Labels:
        asked.append(system)
        return cheap(system)

    frames = [Frame(liquid, Labels("none", float("nan")), "periodic", "liquid", name) for name in ("a", "b")]
    common: dict[str, Any] = {
        "force_field": make_force_field(), "difference": TRUTH, "cheap": counted, "level": GOOD,
    }  # fmt: skip
    pairs.label_liquids(frames[:1], tmp_path / "liquids.h5", **common)
    once = len(asked)
    pairs.label_liquids(frames, tmp_path / "liquids.h5", **common)
    assert len(asked) == 2 * once > 0
    assert [frame.trajectory for frame in read_frames(tmp_path / "liquids.h5")] == ["a/00000", "b/00001"]
