"""Contacts that form and break at known rates."""

from collections.abc import Callable

import numpy as np
import pytest

from md.analysis.residence import _residence, residence_times
from md.trajectory import Trajectory

LOSS, GAIN = 0.02, 0.005  # per frame


def telegraph(shape: tuple[int, ...], n_frames: int, seed: int, *, loss: float = LOSS) -> np.ndarray:
    """Independent pairs that switch at the two rates, from equilibrium, (*shape, n_frames)."""
    generator = np.random.default_rng(seed)
    states = np.empty((*shape, n_frames), dtype=bool)
    states[..., 0] = generator.random(shape) < GAIN / (GAIN + loss)
    for frame in range(1, n_frames):
        now, draw = states[..., frame - 1], generator.random(shape)
        states[..., frame] = np.where(now, draw >= loss, draw < GAIN)
    return states


def test_the_rate_of_loss_is_found_whatever_the_rate_of_gain() -> None:
    """tau = 1/loss; in discrete time the decay per frame is 1 - loss - gain."""
    contacts = [telegraph((12, 8), 3000, seed) for seed in (1, 2)]
    estimate = _residence(contacts, interval_ps=0.5, method="")
    lost = -np.log(1.0 - LOSS - GAIN) * LOSS / (LOSS + GAIN)
    assert estimate.value == pytest.approx(0.5 / lost, abs=3.0 * estimate.stderr)
    assert 0.02 < estimate.stderr / estimate.value < 0.15
    assert estimate.unit == "ps"


def test_error_bars_cover_the_truth() -> None:
    exact = -1.0 / (np.log(1.0 - LOSS - GAIN) * LOSS / (LOSS + GAIN))
    inside = 0
    for seed in range(60):
        interval = _residence([telegraph((16, 4), 1500, seed)], interval_ps=1.0, method="").interval()
        assert interval is not None
        inside += interval[0] <= exact <= interval[1]
    assert inside >= 51  # 95 % of 60 is 57; below 51 has probability 0.003


def test_slow_and_fast_exchange_have_no_value() -> None:
    slow = _residence([telegraph((12, 4), 300, 1, loss=1.0e-3)], interval_ps=1.0, method="")
    assert slow.value is None and slow.warnings[0].startswith("not converged: contacts last longer than 30 ps")
    fast = _residence([telegraph((12, 4), 3000, 1, loss=0.7)], interval_ps=1.0, method="")
    assert fast.value is None and "write frames more often" in fast.warnings[0]


def test_contacts_are_seen_through_the_boundary(make_trajectory: Callable[..., Trajectory]) -> None:
    """Oxygen at 2 Å from lithium, through the face of the box, or far away; switched by a known series."""
    n_ions, n_frames = 6, 1200
    states = telegraph((n_ions,), n_frames, 3)
    lithium = np.stack([[0.5, 5.0 * k, 5.0] for k in range(n_ions)]) + np.zeros((n_frames, 1, 3))
    offset = np.where(states.T[:, :, None], [-2.0, 0.0, 0.0], [9.0, 0.0, 0.0])
    tracks = np.concatenate([lithium, lithium + offset], axis=1)
    trajectory = make_trajectory(tracks, ["Li"] * n_ions + ["O"] * n_ions, cell=30.0 * np.eye(3))
    estimate = residence_times([trajectory], cation="Li")["residence_time_Li_O"]
    pairs = np.zeros((n_ions, n_ions, n_frames), dtype=bool)
    pairs[np.arange(n_ions), np.arange(n_ions)] = states
    expected = _residence([pairs], interval_ps=1.0, method="")
    assert (estimate.value, estimate.stderr) == pytest.approx((expected.value, expected.stderr))
    nothing = make_trajectory(tracks[:50, : n_ions + 1] + 0.0, ["Li"] * n_ions + ["C"], cell=30.0 * np.eye(3))
    assert "no shell of neighbours" in residence_times([nothing], cation="Li")["residence_time_Li_C"].warnings[0]
