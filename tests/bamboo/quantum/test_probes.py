"""Probes sit where their names say."""

import numpy as np
import pytest

from bamboo.quantum.probes import _carbonate, _face_site, _flat, _stacked, _torsion, carbonyl_site, rotated
from bamboo.structure.molecules import molecule


@pytest.mark.parametrize("name", ["EC", "DMC", "EMC"])
@pytest.mark.parametrize("angle", [0.0, 60.0])
def test_lithium_sits_at_its_distance_and_angle(name: str, angle: float) -> None:
    positions = molecule(name).positions
    carbon, oxygen, ethers = _carbonate(name)
    assert [molecule(name).symbols[k] for k in (carbon, oxygen, *ethers)] == ["C", "O", "O", "O"]
    site = carbonyl_site(name, positions, 2.0, angle=angle)
    axis, arm = positions[oxygen] - positions[carbon], site - positions[oxygen]
    assert np.linalg.norm(arm) == pytest.approx(2.0)
    assert axis @ arm / np.linalg.norm(axis) / 2.0 == pytest.approx(np.cos(np.deg2rad(angle)), abs=1e-9)
    normal = np.cross(axis, positions[ethers[0]] - positions[carbon])
    assert abs(normal @ arm) < 1e-8
    gaps = [np.linalg.norm(site - positions[ether]) for ether in ethers]
    assert gaps[0] < gaps[1] - 0.5 if angle else gaps[0] == pytest.approx(gaps[1], abs=0.3)  # towards the first ether


def test_lithium_above_a_face_of_the_anion_is_equally_far_from_three_fluorines() -> None:
    positions = molecule("PF6").positions
    distances = np.sort(np.linalg.norm(positions[1:] - _face_site(positions, 2.5), axis=1))
    assert distances[:3] == pytest.approx(distances[0], abs=1e-3) and distances[3] > distances[2] + 1.0
    assert np.linalg.norm(_face_site(positions, 2.5) - positions[0]) == pytest.approx(2.5)


def test_stacked_molecules_lie_in_parallel_planes_head_to_tail() -> None:
    first, second = _flat("EC", molecule("EC").positions), _stacked("DMC", molecule("DMC").positions, 3.3)
    for name, positions, height in (("EC", first, 0.0), ("DMC", second, 3.3)):
        group = [k for part in _carbonate(name) for k in np.atleast_1d(part)]
        assert positions[group, 2] == pytest.approx(height, abs=0.1)
    ec, dmc = _carbonate("EC"), _carbonate("DMC")
    directions = first[ec[1]] - first[ec[0]], second[dmc[1]] - second[dmc[0]]
    assert np.dot(*directions) / np.prod([np.linalg.norm(d) for d in directions]) == pytest.approx(-1.0, abs=1e-6)
    inside = np.linalg.norm(second - second[dmc[0]], axis=1)
    assert inside == pytest.approx(
        np.linalg.norm(molecule("DMC").positions - molecule("DMC").positions[dmc[0]], axis=1)
    )


@pytest.mark.parametrize("name", ["DMC", "EMC"])
def test_rotation_sets_the_torsion_and_keeps_every_bond(name: str) -> None:
    chosen, positions = molecule(name), molecule(name).positions
    carbon, oxygen, (ether, _) = _carbonate(name)
    alkyl = next(b if a == ether else a for a, b in chosen.bonds if ether in (a, b) and carbon not in (a, b))
    turned = rotated(name, positions, 75.0)
    assert _torsion(turned[[oxygen, carbon, ether, alkyl]]) == pytest.approx(75.0, abs=1e-6)
    first, second = np.array(chosen.bonds).T
    lengths = [np.linalg.norm(p[first] - p[second], axis=1) for p in (positions, turned)]
    np.testing.assert_allclose(*lengths, atol=1e-9)
    assert (np.linalg.norm(turned - positions, axis=1) > 1e-6).sum() < len(positions)
