"""Selected frames: balanced from the first on, small, few of one trajectory, and never more than there are."""

from collections import Counter

import numpy as np
import pytest

from bamboo.errors import InputError
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.quantum.selection import MAX_PER_TRAJECTORY, select_frames
from bamboo.system import System

ELEMENTS = {"neutral": [6, 8, 1], "lithium": [3, 6, 8], "anion": [15, 9, 9], "ion_pair": [3, 15, 9]}


def frame(kind: str, n_atoms: int, *, trajectory: str, sampling: str = "dynamics") -> Frame:
    numbers = np.resize(ELEMENTS[kind], n_atoms)
    positions = np.arange(3.0 * n_atoms).reshape(n_atoms, 3)
    system = System(numbers, positions, np.zeros((3, 3)), False, 0.0)
    return Frame(system, Labels("GFN2-xTB", 0.0, np.zeros((n_atoms, 3))), kind, sampling, trajectory)


@pytest.fixture(scope="module")
def pool() -> list[Frame]:
    """Mostly one composition of one kind, from long trajectories, as a campaign gives them."""
    frames = [frame("neutral", 10, trajectory=f"n{k // 20}") for k in range(600)]
    for kind in ELEMENTS:
        frames += [frame(kind, 6 + k % 14, trajectory=f"{kind}{k}", sampling="liquid") for k in range(150)]
        frames += [frame(kind, 6 + k % 14, trajectory=f"s{kind}{k}", sampling="scan") for k in range(50)]
    return [*frames, *(frame("lithium", size, trajectory=f"x{size}") for size in (5, 21, 90))]


def test_shares_sizes_and_trajectories(pool: list[Frame]) -> None:
    chosen = select_frames(pool, count=200)
    assert len({id(member) for member in chosen}) == len(chosen) == 200
    assert {member.system.n_atoms for member in chosen} <= set(range(6, 21))
    assert max(Counter(member.trajectory for member in chosen).values()) <= MAX_PER_TRAJECTORY
    assert len({member.system.n_atoms for member in chosen if member.kind == "neutral"}) == 14
    with_phosphorus = sum(15 in member.system.numbers for member in chosen)
    assert 0.2 * 200 <= with_phosphorus <= 0.25 * 200
    kinds = Counter(member.kind for member in chosen)
    assert kinds["lithium"] == pytest.approx(kinds["neutral"], abs=2)


def test_beginning_is_balanced_and_does_not_depend_on_the_length(pool: list[Frame]) -> None:
    short, long = (select_frames(pool, count=count) for count in (40, 200))
    assert [id(member) for member in short] == [id(member) for member in long[:40]]
    assert set(Counter(member.kind for member in short)) == set(ELEMENTS)
    assert {"scan", "liquid"} <= {member.sampling for member in short}


def test_highest_scores_come_first_and_nan_never(pool: list[Frame]) -> None:
    scores = np.random.default_rng(0).random(len(pool))
    scores[:300] = np.nan
    rank = {id(member): score for member, score in zip(pool, scores, strict=True)}
    chosen = select_frames(pool, count=150, scores=scores)
    assert not any(np.isnan(rank[id(member)]) for member in chosen)
    neutral = [member for member in pool if member.kind == "neutral" and member.sampling == "dynamics"]
    best = [rank[id(member)] for member in chosen if member.kind == "neutral" and member.sampling == "dynamics"]
    assert best and best == sorted(best, reverse=True)
    assert best[0] == max(rank[id(member)] for member in neutral if not np.isnan(rank[id(member)]))
    assert Counter(m.kind for m in chosen) == Counter(m.kind for m in select_frames(pool[300:], count=150))


def test_only_the_kinds_asked_for(pool: list[Frame]) -> None:
    chosen = select_frames(pool, count=60, kinds=("lithium", "neutral"))
    assert Counter(member.kind for member in chosen) == {"lithium": 30, "neutral": 30}  # their shares are equal
    with pytest.raises(InputError, match="Unknown kind metal"):
        select_frames(pool, count=1, kinds=("metal",))


def test_too_few_frames_are_an_error(pool: list[Frame]) -> None:
    with pytest.raises(InputError, match="could be selected"):
        select_frames(pool, count=5000)
    with pytest.raises(InputError, match="Only 0 of 1"):
        select_frames(pool, count=1, atoms=(30, 45))
