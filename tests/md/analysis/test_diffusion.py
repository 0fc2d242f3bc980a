"""Diffusion of particles that move by known laws."""

import re
from collections.abc import Callable
from math import exp, pi, sqrt

import numpy as np
import pytest
from scipy.signal import lfilter

from bamboo.errors import InputError
from md.analysis.diffusion import (
    diffusive_regime,
    mean_squared_displacement,
    msd_slopes,
    ratio_of_means,
    self_diffusion,
    slope_error,
)
from md.analysis.estimate import Estimate
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


def rattle(n_frames: int, n_particles: int, *, time: float, variance: float, seed: int) -> np.ndarray:
    """Ornstein-Uhlenbeck displacements in a cage: MSD = 6 variance (1 - exp(-t / time)), time in frames."""
    decay = exp(-1.0 / time)
    noise = np.random.default_rng(seed).standard_normal((n_frames, n_particles, 3)) * sqrt(variance * (1.0 - decay**2))
    noise[0] /= sqrt(1.0 - decay**2)
    return np.asarray(lfilter([1.0], [1.0, -decay], noise, axis=0))


def slope_and_error(tracks: list[np.ndarray]) -> tuple[float, float] | None:
    slopes = msd_slopes(tracks)
    regime = diffusive_regime(slopes, scale=float(slopes.values[-1]))
    return None if regime is None else (float(slopes.values[regime.octave]), slope_error(slopes, regime))


@pytest.mark.parametrize("n_replicas", [1, 3, 8])
def test_brownian_slope_is_six_d_and_its_interval_covers(n_replicas: int) -> None:
    """And the error of most runs is near the least there is, that of lag 1: 2 (1 + 2 / 12) / steps for [1, 2]."""
    scores, errors = [], []
    for seed in range(200):
        found = slope_and_error([brownian(640, 8, diffusion=0.5, seed=1000 * seed + k) for k in range(n_replicas)])
        if found is not None:
            scores.append((found[0] - 3.0) / found[1])
            errors.append(found[1])
    assert len(scores) > 180
    assert 0.90 <= np.mean(np.abs(scores) < 1.96) <= 0.99
    assert np.median(errors) < 1.5 * 3.0 * sqrt(6.0 / (640 * 24 * n_replicas))


def test_common_motion_enters_the_error() -> None:
    """All particles share one random walk: one hundred of them know no more than one."""
    single = [msd_slopes([brownian(640, 1, diffusion=0.5, seed=seed)]) for seed in range(10)]
    many = [msd_slopes([np.repeat(brownian(640, 1, diffusion=0.5, seed=seed), 100, axis=1)]) for seed in range(10)]
    for one, hundred in zip(single, many, strict=True):
        np.testing.assert_allclose(hundred.stderr, one.stderr, rtol=1.0e-6)


def test_errors_of_the_longest_lags_are_their_scatter_over_runs() -> None:
    """Those that blocks do not have are continued from shorter ones; the widening for twelve samples is 12 %."""
    found = [msd_slopes([brownian(1000, 4, diffusion=0.5, seed=seed)]) for seed in range(200)]
    scatter = np.std([slopes.values for slopes in found], axis=0)
    claimed = np.mean([slopes.stderr for slopes in found], axis=0)
    assert ((claimed > scatter) & (claimed < 1.5 * scatter)).all()


def test_slope_is_taken_where_the_cage_is_forgotten() -> None:
    """The slope exceeds 6 D by 6 variance / time exp(-t / time): at lags of the cage's time it is not yet taken."""
    tracks = brownian(20_000, 20, diffusion=0.5, seed=2) + rattle(20_000, 20, time=50.0, variance=25.0, seed=3)
    slopes = msd_slopes([tracks])
    np.testing.assert_allclose(slopes.values[:3], 6.0, rtol=0.1)  # twice 6 D
    regime = diffusive_regime(slopes, scale=3.0)
    assert regime is not None and slopes.lags[regime.octave] >= 200 and not regime.barely
    assert abs(slopes.values[regime.octave] - 3.0) < 3.0 * slope_error(slopes, regime) < 0.9


def test_white_rattling_only_makes_the_shortest_lags_uncertain() -> None:
    """MSD = 6 a^2 + 6 D t: an intercept, but one that buries the first slopes in noise."""
    noise = np.random.default_rng(3).normal(scale=3.0, size=(20_000, 20, 3))
    slopes = msd_slopes([brownian(20_000, 20, diffusion=0.05, seed=2) + noise])
    regime = diffusive_regime(slopes, scale=0.3)
    assert regime is not None and slopes.stderr[regime.octave] < 0.2 * slopes.stderr[0]
    assert abs(slopes.values[regime.octave] - 0.3) < 3.0 * slope_error(slopes, regime)


@pytest.mark.parametrize("share", [100, 30, 10])
def test_slow_cages_are_seen_or_within_the_error(share: int) -> None:
    """A cage of 3 Å^2 that relaxes in 1/share of the run makes early slopes 4.8, 2.1 and 1.4 times 6 D."""
    misses, values = 0, 0
    for seed in range(40):
        cage = rattle(4000, 40, time=4000 / share, variance=3.0, seed=seed + 100)
        found = slope_and_error([brownian(4000, 40, diffusion=0.02, seed=seed) + cage])
        if found is not None:
            values += 1
            misses += abs(found[0] - 0.12) > 1.96 * found[1]
    assert misses <= 6  # of forty; one in twenty of purely diffusive runs
    assert values > 20


def test_barely_diffusive_motion_carries_a_warning(make_trajectory: MakeTrajectory) -> None:
    cage = rattle(4000, 40, time=133.0, variance=3.0, seed=4)
    tracks = np.concatenate([brownian(4000, 40, diffusion=0.02, seed=5) + cage, np.zeros((4000, 1, 3))], axis=1)
    trajectory = make_trajectory(tracks, ["Ar"] * 40 + ["wall"], masses=[1.0] * 40 + [WALL])
    box = self_diffusion([trajectory], temperature_K=300.0)["diffusion_Ar_box"]
    assert box.value is not None and box.stderr is not None
    assert abs(box.value / CM2_PER_S - 0.02) < 1.96 * box.stderr / CM2_PER_S
    assert re.search(r"barely diffusive: its slope changes up to \d+ ps, .* run about \d+(\.\d)? ns", box.warnings[0])


def test_motion_that_never_diffuses_has_no_coefficient(make_trajectory: MakeTrajectory) -> None:
    time = np.arange(400.0)[:, None, None]
    ballistic = np.concatenate([time * np.random.default_rng(4).normal(size=(1, 20, 3)), np.zeros((400, 1, 3))], axis=1)
    caged = np.random.default_rng(5).normal(size=(400, 21, 3))
    names, masses = ["Ar"] * 20 + ["wall"], [1.0] * 20 + [WALL]
    for tracks, reason in (
        (ballistic, r"not converged: the slope .* changes, by \+\d+% from 25 ps to 50 ps: .* run at least 1.6 ns"),
        (caged, r"not converged: .* ± .* cm2/s, run about "),
    ):
        results = self_diffusion([make_trajectory(tracks, names, masses=masses)], temperature_K=300.0)
        box = results["diffusion_Ar_box"]
        assert box.value is None and re.match(reason, box.warnings[0])
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
