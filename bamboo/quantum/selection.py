"""Which of many cheaply labelled frames deserve an expensive label: small clusters, every composition and origin."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bamboo.errors import InputError
from bamboo.quantum.dataset import Frame

SHARES = {"lithium": 0.30, "ion_pair": 0.25, "neutral": 0.30, "anion": 0.15}
MAX_PHOSPHORUS_SHARE = 0.25  # PF6- costs four times as much as the other molecules
MAX_PER_TRAJECTORY = 3
PHOSPHORUS = 15


def select_frames(
    frames: Sequence[Frame],
    *,
    count: int,
    atoms: tuple[int, int] = (6, 20),
    kinds: Sequence[str] = (),
    scores: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> list[Frame]:
    """Return ``count`` isolated clusters of ``atoms`` (smallest, largest) size, balanced from the first frames on.

    Kinds (all, or those in ``kinds``) get fixed shares; within a kind compositions and ways of sampling take turns,
    each giving a random frame or, where ``scores`` (n_frames,) are given, the one with the highest (nan: never).
    A trajectory gives at most three frames; at most a quarter of the frames contain phosphorus.

    Raises InputError for kinds that have no share, and where fewer than ``count`` frames can be had.
    """
    if unknown := set(kinds) - SHARES.keys():
        raise InputError(f"Unknown kind {', '.join(sorted(unknown))}; expected {', '.join(SHARES)}.")
    generator = np.random.default_rng(seed)
    queues: dict[str, dict[tuple[tuple[int, ...], str], list[Frame]]] = {kind: {} for kind in kinds or SHARES}
    order = generator.permutation(len(frames))
    if scores is not None:  # the last of a queue is taken first
        order = order[np.argsort(scores[order], kind="stable")]
        order = order[~np.isnan(scores[order])]
    for k in order:
        frame = frames[k]
        if frame.kind in queues and not frame.system.pbc and atoms[0] <= frame.system.n_atoms <= atoms[1]:
            group = (tuple(sorted(frame.system.numbers.tolist())), frame.sampling)
            queues[frame.kind].setdefault(group, []).append(frame)
    chosen: list[Frame] = []
    taken = dict.fromkeys(SHARES, 0)
    per_trajectory: Counter[str] = Counter()
    n_phosphorus = 0
    while len(chosen) < count:
        full = n_phosphorus + 1 > MAX_PHOSPHORUS_SHARE * (len(chosen) + 1)
        open_groups = {
            kind: [(numbers, how) for numbers, how in groups if not (full and PHOSPHORUS in numbers)]
            for kind, groups in queues.items()
        }
        kinds = [kind for kind, groups in open_groups.items() if groups]
        if not kinds:
            raise InputError(f"Only {len(chosen)} of {count} frames could be selected; give more data.")
        kind = min(kinds, key=lambda name: taken[name] / SHARES[name])  # the one furthest behind its share
        group = open_groups[kind][0]
        waiting = queues[kind].pop(group)
        frame = waiting.pop()
        if waiting:
            queues[kind][group] = waiting  # at the end: the other groups come first
        if per_trajectory[frame.trajectory] == MAX_PER_TRAJECTORY:
            continue
        chosen.append(frame)
        taken[kind] += 1
        n_phosphorus += PHOSPHORUS in group[0]
        per_trajectory[frame.trajectory] += 1
    return chosen
