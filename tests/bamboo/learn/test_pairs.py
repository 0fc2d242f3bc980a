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
from bamboo.learn.pairs import PairDifference, cut_dimers, dimers_of, dispersion_of, fit_difference, liquid_labels
from bamboo.learn.samples import molecules_of
from bamboo.neighbors import find_pairs
from bamboo.quantum.dataset import Frame, read_frames
from bamboo.quantum.labels import Labels
from bamboo.structure.packing import pack_box
from bamboo.system import Batch, System

GOOD = "B3LYP/def2-SVPD, RI, grid 2"
COEFFICIENTS = np.array([[0.004, -0.003], [-0.006, 0.002], [0.01, -0.02], [0.05, 0.01], [-0.03, 0.02], [0.01, 0.0]])
REACH = 5.5  # Å, of the cheap method


def difference_of(force_field: ForceField, size: float = 1.0) -> PairDifference:
    return PairDifference(size * COEFFICIENTS, size * 0.6, force_field.dispersion)


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


def interaction(system: System, first: int, force_field: ForceField) -> tuple[float, np.ndarray]:
    """Return energy and forces of ``difference_of`` between the first atoms and the others."""
    number, positions = torch.from_numpy(system.numbers), torch.from_numpy(system.positions).requires_grad_()
    distance = (positions[:first, None] - positions[None, first:]).norm(dim=-1)
    pair = torch.broadcast_tensors(number[:first, None], number[None, first:])
    energy = difference_of(force_field)(distance.flatten(), pair[0].flatten(), pair[1].flatten()).sum()
    return float(energy.detach()), -torch.autograd.grad(energy, positions)[0].numpy()


def better(system: System, first: int, force_field: ForceField) -> Labels:
    """Return labels of a level without dispersion that lies ``difference_of`` above the cheap one for two molecules."""
    low = cheap(system)
    more, push = interaction(system, first, force_field)
    energy, forces = low.energy + more, np.array(low.forces) + push
    spread = dispersion_of(force_field, system)
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
        energy, forces = interaction(dimer.system, n, make_force_field())
        assert dimer.energy == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(dimer.forces, forces, atol=1e-9)
    difference = fit_difference(dimers, make_force_field().dispersion)
    size = np.sqrt(np.mean([np.square(dimer.forces[: dimer.n_first].sum(0)) for dimer in dimers]))
    assert difference.unexplained(dimers) < 0.1 * size  # what the ridge leaves
    with pytest.raises(InputError, match="one by one"):
        dimers_of([frame for k, frame in enumerate(labelled) if k % 3 == 0], make_force_field(), cheap)


def test_energy_forces_and_virial_of_a_labelled_box_belong_together(
    liquid: System, make_force_field: Callable[..., Any]
) -> None:
    field = make_force_field(dispersion={"s6": 20.0})  # what is small here would hide

    def label(system: System) -> Labels:
        whole = replace(system, molecule=liquid.molecule)
        return liquid_labels(
            whole, force_field=field, difference=difference_of(field, 30.0), cheap=cheap, box=cheap(whole), level=GOOD
        )[1]  # fmt: skip

    there = label(liquid)
    assert there.level == f"{GOOD}; lifted"
    assert not there.contains_dispersion
    assert there.forces is not None and there.virial is not None
    generator = np.random.default_rng(0)
    spread = dispersion_of(field, liquid)[1]
    step, stretch = 4.0e-3 * spread / np.abs(spread).max(), 1.0e-3 * generator.normal(size=(3, 3))
    moved = [replace(liquid, positions=liquid.positions + sign * step) for sign in (1, -1)]
    slope = (label(moved[0]).energy - label(moved[1]).energy) / 2.0
    assert slope == pytest.approx(-(there.forces * step).sum(), abs=0.1 * (spread * step).sum())
    strained = []
    for sign in (1, -1):
        scale = np.eye(3) + sign * stretch
        strained.append(replace(liquid, positions=liquid.positions @ scale, cell=liquid.cell @ scale))
    slope = (label(strained[0]).energy - label(strained[1]).energy) / 2.0
    assert slope == pytest.approx(-(there.virial * stretch).sum(), rel=2e-3)


def test_pairs_alone_give_the_forces_of_a_method_that_has_no_more_than_pairs(
    liquid: System, make_force_field: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "FAR", pairs.NEAR)
    field = make_force_field()
    common: dict[str, Any] = {
        "force_field": field, "difference": difference_of(field), "cheap": cheap, "level": GOOD,
    }  # fmt: skip
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
    nothing = difference_of(field, 0.0)
    whole, labels = liquid_labels(box, box=None, difference=nothing, **common)
    _, moved = liquid_labels(box, box=None, difference=difference_of(field), **common)
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
    field = make_force_field()
    common: dict[str, Any] = {
        "force_field": field, "difference": difference_of(field), "cheap": counted, "level": GOOD,
    }  # fmt: skip
    pairs.label_liquids(frames[:1], tmp_path / "liquids.h5", **common)
    once = len(asked)
    pairs.label_liquids(frames, tmp_path / "liquids.h5", **common)
    assert len(asked) == 2 * once > 0
    assert [frame.trajectory for frame in read_frames(tmp_path / "liquids.h5")] == ["a/00000", "b/00001"]
