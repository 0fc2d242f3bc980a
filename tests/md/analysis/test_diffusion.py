"""Diffusion of particles that move by known laws."""

import re
from collections.abc import Callable
from math import pi, sqrt

import numpy as np
import pytest

from bamboo.errors import InputError
from md.analysis.diffusion import (
    block_msd,
    first_diffusive_lag,
    mean_squared_displacement,
    ratio_of_means,
    self_diffusion,
    slopes,
)
from md.analysis.estimate import Estimate
from md.analysis.statistics import spread_stderr
from md.trajectory import Ensemble, Trajectory

MakeTrajectory = Callable[..., Trajectory]
CM2_PER_S = 1.0e-4  # in Å^2/ps: 1 cm^2/s = 1e16 Å^2 / 1e12 ps
WALL = 1.0e9  # amu; a molecule at rest that holds the centre of mass


def brownian(n_frames: int, n_particles: int, *, diffusion: float, seed: int) -> np.ndarray:
    """Random walks with <|r(t) - r(0)|^2> = 6 D t, t in frames."""
    steps = np.random.default_rng(seed).normal(scale=sqrt(2.0 * diffusion), size=(n_frames, n_particles, 3))
    return np.cumsum(steps, axis=0)


def test_constant_velocity_gives_exactly_v_squared_t_squared() -> None:
    velocities = np.random.default_rng(0).normal(size=(7, 3))
    time = np.arange(200.0)
    msd = mean_squared_displacement(time[:, None, None] * velocities + 50.0)
    np.testing.assert_allclose(msd, (velocities**2).sum(axis=1).mean() * time**2, rtol=1.0e-9)


@pytest.mark.parametrize("n_frames", [1, 2, 97, 128])
def test_fft_equals_the_sum_over_pairs(n_frames: int) -> None:
    positions = brownian(n_frames, 3, diffusion=2.0, seed=1) + 100.0
    expected = np.zeros(n_frames)
    for lag in range(1, n_frames):
        expected[lag] = ((positions[lag:] - positions[:-lag]) ** 2).sum(axis=-1).mean()
    np.testing.assert_allclose(mean_squared_displacement(positions), expected, rtol=1.0e-9, atol=1.0e-9)


def test_brownian_slope_is_six_d_and_its_interval_covers() -> None:
    covered, values = [], []
    for seed in range(200):
        curves = block_msd([brownian(640, 8, diffusion=0.5, seed=seed)])
        assert first_diffusive_lag(curves) == 1
        diffusion = slopes(curves, 1) / 6.0
        values.append(diffusion.mean())
        covered.append(abs(diffusion.mean() - 0.5) < 1.96 * spread_stderr(diffusion))
    assert abs(np.mean(values) - 0.5) < 3.0 * np.std(values) / sqrt(200.0)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_common_motion_enters_the_error() -> None:
    """All particles share one random walk: one hundred of them know no more than one."""
    single = [block_msd([brownian(640, 1, diffusion=0.5, seed=seed)]) for seed in range(40)]
    many = [block_msd([np.repeat(brownian(640, 1, diffusion=0.5, seed=seed), 100, axis=1)]) for seed in range(40)]
    errors = [np.mean([spread_stderr(slopes(curves, 1)) for curves in group]) for group in (single, many)]
    assert errors[1] == pytest.approx(errors[0], rel=1.0e-6)


def test_diffusive_regime_starts_after_the_cage() -> None:
    """Random walk + rattling of amplitude a: MSD = 6 a^2 + 6 D t, whose log slope exceeds 0.9 from t = 9 a^2 / D on."""
    rattle = np.random.default_rng(3).normal(scale=1.0, size=(40_000, 20, 3))
    curves = block_msd([brownian(40_000, 20, diffusion=0.5, seed=2) + rattle])
    first = first_diffusive_lag(curves)
    assert first is not None and 8 <= first <= 32
    # the straight line has an intercept: the cage does not bias the slope
    diffusion = slopes(curves, first) / 6.0
    assert abs(diffusion.mean() - 0.5) < 3.0 * spread_stderr(diffusion)


def test_motion_that_never_diffuses_has_no_coefficient(make_trajectory: MakeTrajectory) -> None:
    time = np.arange(400.0)[:, None, None]
    ballistic = np.concatenate([time * np.random.default_rng(4).normal(size=(1, 20, 3)), np.zeros((400, 1, 3))], axis=1)
    caged = np.random.default_rng(5).normal(size=(400, 21, 3))
    names, masses = ["Ar"] * 20 + ["wall"], [1.0] * 20 + [WALL]
    for tracks, slope in ((ballistic, r"2\.00"), (caged, r"-?0\.\d\d")):
        results = self_diffusion([make_trajectory(tracks, names, masses=masses)], temperature_K=300.0)
        box = results["diffusion_Ar_box"]
        assert box.value is None and "run at least 1.6 ns" in box.warnings[0]
        assert re.match(rf"not converged: d log MSD / d log t is {slope} at ", box.warnings[0])
    few = self_diffusion([make_trajectory(ballistic[:40], names, masses=masses)], temperature_K=300.0)
    assert few["diffusion_Ar_box"].value is None and "too few frames" in few["diffusion_Ar_box"].warnings[0]


def test_self_diffusion_in_cm2_per_second(make_trajectory: MakeTrajectory) -> None:
    """Frames every 2 ps, D = 2e-5 and 0.5e-5 cm2/s; two replicas; Yeh-Hummer by hand in SI."""
    trajectories = []
    for seed in (6, 7):
        fast = brownian(1000, 15, diffusion=2.0e-5 / CM2_PER_S * 2.0, seed=seed)
        slow = brownian(1000, 25, diffusion=0.5e-5 / CM2_PER_S * 2.0, seed=seed + 10)
        tracks = np.concatenate([fast, slow, np.zeros((1000, 1, 3))], axis=1)
        names, masses = ["Li"] * 15 + ["C"] * 25 + ["wall"], [6.94] * 15 + [12.0] * 25 + [WALL]
        trajectories.append(make_trajectory(tracks, names, masses=masses, interval_ps=2.0))
    viscosity = Estimate(0.8, 0.08, "mPa s", 100.0, "given")
    results = self_diffusion(trajectories, temperature_K=298.0, viscosity=viscosity)
    for name, exact in (("Li", 2.0e-5), ("C", 0.5e-5)):
        box, infinite = results[f"diffusion_{name}_box"], results[f"diffusion_{name}"]
        assert box.unit == infinite.unit == "cm2/s"
        assert box.value is not None and box.stderr is not None and box.stderr < 0.05 * exact
        assert abs(box.value - exact) < 3.0 * box.stderr
        correction = 1.0e4 * 2.837297 * 1.380649e-23 * 298.0 / (6.0 * pi * 0.8e-3 * 30.0e-10)
        assert infinite.value is not None
        assert infinite.value - box.value == pytest.approx(correction, rel=1.0e-5)
        assert infinite.stderr == pytest.approx(sqrt(box.stderr**2 + (0.1 * correction) ** 2), rel=1.0e-5)


def test_motion_of_the_whole_box_is_not_diffusion(make_trajectory: MakeTrajectory) -> None:
    tracks = brownian(1000, 40, diffusion=0.2, seed=8)
    drift = np.cumsum(np.full((1000, 1, 3), 0.5), axis=0)
    still, moving = (
        self_diffusion([make_trajectory(t, ["Ar"] * 40)], temperature_K=300.0)["diffusion_Ar_box"]
        for t in (tracks, tracks + drift)
    )
    assert moving.value == pytest.approx(still.value, rel=1.0e-6)


def test_correction_without_a_viscosity_is_refused(make_trajectory: MakeTrajectory) -> None:
    trajectory = make_trajectory(brownian(1000, 40, diffusion=0.2, seed=9), ["Ar"] * 40)
    results = self_diffusion([trajectory], temperature_K=300.0)
    assert results["diffusion_Ar_box"].value is not None
    assert results["diffusion_Ar"].value is None and "needs the viscosity" in results["diffusion_Ar"].warnings[0]
    with pytest.raises(InputError, match="given in cP"):
        self_diffusion([trajectory], temperature_K=300.0, viscosity=Estimate(1.0, 0.1, "cP", 1.0, "given"))


@pytest.mark.parametrize(
    ("ensemble", "reason"),
    [(Ensemble("nvt", "langevin"), "Langevin friction"), (Ensemble("npt", "svr", barostat="mtk"), "NPT")],
)
def test_damped_and_constant_pressure_runs_are_refused(
    make_trajectory: MakeTrajectory, ensemble: Ensemble, reason: str
) -> None:
    trajectory = make_trajectory(brownian(1000, 4, diffusion=0.2, seed=9), ["Ar"] * 4, ensemble=ensemble)
    for estimate in self_diffusion([trajectory], temperature_K=300.0).values():
        assert estimate.value is None and reason in estimate.warnings[0]


def test_only_replicas_are_averaged(make_trajectory: MakeTrajectory) -> None:
    tracks = brownian(100, 4, diffusion=0.2, seed=9)
    one, other = make_trajectory(tracks, ["Ar"] * 4), make_trajectory(tracks, ["Ar"] * 4, interval_ps=2.0)
    with pytest.raises(InputError, match="not replicas"):
        self_diffusion([one, other], temperature_K=300.0)
    with pytest.raises(InputError, match="No trajectories"):
        self_diffusion([], temperature_K=300.0)


def test_ratio_of_correlated_means() -> None:
    """For a = 2 b in every block the ratio is exact, whatever b scatters."""
    b = np.array([1.0, 2.0, 3.0, 4.0])
    assert ratio_of_means(2.0 * b, b) == (2.0, 0.0)
    rng = np.random.default_rng(11)
    covered = []
    for _ in range(1000):
        a, b = rng.normal(1.0, 0.1, 8), rng.normal(2.0, 0.1, 8)
        value, stderr = ratio_of_means(a, b)
        covered.append(abs(value - 0.5) < 1.96 * stderr)
    assert abs(np.mean(covered) - 0.95) < 0.02
