"""Structure of gases, crystals and constructed shells."""

from collections.abc import Callable
from math import pi

import numpy as np
import pytest

from bamboo.errors import InputError
from md.analysis.structure import (
    RadialDistribution,
    coordination_numbers,
    ion_pairing,
    pair_distances,
    radial_distribution,
)
from md.trajectory import Ensemble, Topology, Trajectory

MakeTrajectory = Callable[..., Trajectory]
TRICLINIC = np.array([[9.0, 0.0, 0.0], [8.0, 8.0, 0.0], [-7.0, 6.0, 7.0]])  # far from a box


def test_pairs_equal_the_sum_over_images() -> None:
    rng = np.random.default_rng(0)
    first, second, r_max = rng.normal(scale=20.0, size=(4, 3)), rng.normal(scale=20.0, size=(5, 3)), 11.0
    found = sorted(zip(*(x.tolist() for x in pair_distances(first, second, cell=TRICLINIC, r_max=r_max)), strict=True))
    span = np.arange(-15, 16)
    shifts = np.stack(np.meshgrid(span, span, span, indexing="ij"), axis=-1).reshape(-1, 3) @ TRICLINIC
    expected = []
    for i in range(4):
        for j in range(5):
            distances = np.linalg.norm(second[j] - first[i] + shifts, axis=1)
            expected += [(i, j, d) for d in distances[distances < r_max]]
    expected.sort()
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([pair[2] for pair in found], [pair[2] for pair in expected], rtol=1.0e-10)


def test_ideal_gas_has_g_of_one_beyond_half_the_box(make_trajectory: MakeTrajectory) -> None:
    """Between different atoms; an atom's own images stand at lattice distances and are counted exactly."""
    rng = np.random.default_rng(1)
    n, n_frames, box = 20, 200, 10.0
    trajectory = make_trajectory(
        rng.uniform(0.0, box, size=(n_frames, 2 * n, 3)), ["Ar"] * n + ["C"] * n, cell=box * np.eye(3)
    )
    rdf = radial_distribution(trajectory, np.arange(n), second=np.arange(n, 2 * n), r_max=16.0)
    expected_pairs = n_frames * n * n * 4.0 * pi * rdf.r**2 * 0.05 / box**3
    far = expected_pairs > 20.0
    assert rdf.r[far].min() < 2.0 and rdf.r.max() > 15.9
    deviation = (rdf.g[far] - 1.0) * np.sqrt(expected_pairs[far])
    assert abs(deviation.mean()) < 0.2 and 0.8 < deviation.std() < 1.3  # images of one pair are not independent
    np.testing.assert_allclose(rdf.coordination[-1], n / box**3 * 4.0 / 3.0 * pi * 16.0**3, rtol=0.01)


def test_own_images_are_counted_but_not_the_atom_itself(make_trajectory: MakeTrajectory) -> None:
    """One atom in a cube of 4.02 Å: 6, 12 and 8 images at one, sqrt 2 and sqrt 3 times that."""
    trajectory = make_trajectory(np.full((1, 1, 3), 1.7), ["Ar"], cell=4.02 * np.eye(3))
    rdf = radial_distribution(trajectory, np.array([0]), second=np.array([0]), r_max=7.5)
    for r, count in ((3.9, 0), (4.1, 6), (5.8, 18), (7.1, 26)):
        assert rdf.coordination[np.searchsorted(rdf.r, r)] == count
    shell = 4.0 / 3.0 * pi * (4.05**3 - 4.0**3)
    assert rdf.g[80] == pytest.approx(6.0 / (shell / 4.02**3), rel=1.0e-6)


def test_own_molecule_is_left_out_but_not_its_images() -> None:
    topology = Topology(
        np.array([8, 1]), np.array([16.0, 1.0]), np.array([0, 0]), ("hydroxide",), np.array([-1.0])
    )  # fmt: skip
    positions = np.array([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    trajectory = Trajectory.from_arrays(
        positions, topology, time_ps=np.zeros(1), cells=5.0 * np.eye(3), ensemble=Ensemble("nve")
    )
    oxygen, hydrogen = np.array([0]), np.array([1])
    between = radial_distribution(trajectory, oxygen, second=hydrogen, r_max=4.5)
    every = radial_distribution(trajectory, oxygen, second=hydrogen, r_max=4.5, intermolecular=False)
    assert between.coordination[-1] == 1.0  # the hydrogen of the image to the left, at 4 Å
    assert every.coordination[-1] == 2.0


def solvated(n_frames: int, seed: int, *, oxygens: int = 4, fluorines: tuple[int, ...] = ()) -> np.ndarray:
    """Three Li 14 Å apart along x with O on a sphere of 2 Å, a second shell at 4.5 Å, and F at 1.9 Å of chosen Li.

    ``fluorines[k]`` is the number of the Li that F atom k touches, -1 for none.
    """
    rng = np.random.default_rng(seed)

    def sphere(n: int, radius: float) -> np.ndarray:
        v = rng.normal(size=(n_frames, n, 3))
        v /= np.linalg.norm(v, axis=-1, keepdims=True)
        return v * (radius + rng.normal(scale=0.08, size=(n_frames, n, 1)))

    centres = np.array([[5.0, 5.0, 5.0], [19.0, 5.0, 5.0], [33.0, 5.0, 5.0]])
    lithium = np.broadcast_to(centres, (n_frames, 3, 3))
    near = [centre + sphere(oxygens, 2.0) for centre in centres]
    far = [centre + sphere(12, 4.5) for centre in centres]
    fluorine = [
        centres[k] + sphere(1, 1.9) if k >= 0 else np.broadcast_to([12.0, 19.0, 19.0], (n_frames, 1, 3))
        for k in fluorines
    ]
    return np.concatenate([lithium, *near, *far, *fluorine], axis=1)


def test_coordination_number_of_a_constructed_shell(make_trajectory: MakeTrajectory) -> None:
    """Four O of species O at 2 Å and twelve in the second shell belonging to another species of the same element."""
    tracks = solvated(60, 2)
    names = ["Li"] * 3 + ["O"] * 12 + ["water"] * 36
    trajectory = make_trajectory(tracks, names, cell=np.diag([42.0, 24.0, 24.0]))
    results = coordination_numbers(trajectory)
    assert results["coordination_Li_O"].value == pytest.approx(4.0)
    assert results["coordination_Li_O_O"].value == pytest.approx(4.0)
    assert results["coordination_Li_O_water"].value == pytest.approx(0.0)
    cutoff = float(results["coordination_Li_O"].method.split(", ")[1].split()[0])
    assert 2.4 < cutoff < 4.0


@pytest.mark.parametrize(
    ("fluorines", "fractions"),
    [
        ((-1, -1, -1), (1.0, 0.0, 0.0)),
        ((0, 1, 2), (0.0, 1.0, 0.0)),
        ((0, 0, 1), (1 / 3, 1 / 3, 1 / 3)),
        ((0, -1, -1), (2 / 3, 1 / 3, 0.0)),
    ],
)
def test_ion_pairs_are_counted_as_built(
    make_trajectory: MakeTrajectory, fluorines: tuple[int, ...], fractions: tuple[float, ...]
) -> None:
    tracks = solvated(60, 3, fluorines=fluorines)
    names = ["Li"] * 3 + ["O"] * 48 + ["F"] * 3
    charges = [1.0] * 3 + [0.0] * 48 + [-1.0] * 3
    trajectory = make_trajectory(tracks, names, charges=charges, cell=np.diag([42.0, 24.0, 24.0]))
    results = ion_pairing(trajectory)
    values = [results[f"ion_pairing_{name}"].value for name in ("separated", "contact", "aggregate")]
    assert values == pytest.approx(list(fractions), abs=1.0e-12)


def test_bridging_anion_makes_an_aggregate(make_trajectory: MakeTrajectory) -> None:
    """One F between two Li, 1.9 Å from both; the third pair is a contact pair."""
    rng = np.random.default_rng(4)
    positions = np.zeros((60, 6, 3))
    positions[:, :3] = [[0.0, 0.0, 0.0], [3.8, 0.0, 0.0], [15.0, 0.0, 0.0]]
    positions[:, 3:] = [[1.9, 0.0, 0.0], [16.9, 0.0, 0.0], [10.0, 10.0, 10.0]]
    positions += rng.normal(scale=0.05, size=positions.shape)
    trajectory = make_trajectory(positions, ["Li"] * 3 + ["F"] * 3, charges=[1.0] * 3 + [-1.0] * 3)
    results = ion_pairing(trajectory)
    assert results["ion_pairing_aggregate"].value == pytest.approx(2 / 3)
    assert results["ion_pairing_contact"].value == pytest.approx(1 / 3)


def test_few_frames_give_no_value(make_trajectory: MakeTrajectory) -> None:
    tracks = solvated(10, 5)
    trajectory = make_trajectory(tracks, ["Li"] * 3 + ["O"] * 48, cell=np.diag([42.0, 24.0, 24.0]))
    estimate = coordination_numbers(trajectory)["coordination_Li_O"]
    assert estimate.value is None and "independent samples" in estimate.warnings[0]


def test_gas_has_no_shell_and_liquid_without_ions_no_pairs(make_trajectory: MakeTrajectory) -> None:
    gas = np.random.default_rng(6).uniform(0.0, 20.0, size=(100, 60, 3))
    trajectory = make_trajectory(gas, ["Li"] * 30 + ["O"] * 30, cell=20.0 * np.eye(3))
    estimate = coordination_numbers(trajectory)["coordination_Li_O"]
    assert estimate.value is None and estimate.warnings[0].startswith("no shell of neighbours: the g(r) of")
    with pytest.raises(InputError, match="not a species of single positive ions"):
        ion_pairing(trajectory)
    with pytest.raises(InputError, match="no anions"):
        ion_pairing(make_trajectory(gas, ["Li"] * 30 + ["O"] * 30, charges=[1.0] * 30 + [0.0] * 30))


def test_shell_is_found_where_g_is_smooth() -> None:
    """A peak at 2 Å and a dip at 3.1 Å on top of 1; and a g(r) whose only shell lies behind the solvent."""
    r = np.arange(0.025, 10.0, 0.05)
    g = np.where(r > 1.2, 1.0, 0.0) + 8.0 * np.exp(-((r - 2.0) ** 2) / 0.08) - 0.9 * np.exp(-((r - 3.1) ** 2) / 0.4)
    minimum = RadialDistribution(r, g, np.zeros_like(r)).first_minimum()
    assert minimum is not None and abs(minimum - 3.1) < 0.1
    separated = np.where((r > 4.5) & (r < 5.5), 3.0, np.where(r > 7.0, 1.1, 0.0))
    late = RadialDistribution(r, separated, np.zeros_like(r))
    assert late.first_minimum() is None
