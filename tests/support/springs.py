"""Frames of atoms joined by springs and a small force field, for the tests of the learning stage."""

from pathlib import Path

import numpy as np
import torch

from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.learn.loop import Loop, LoopConfig
from bamboo.learn.losses import LossWeights
from bamboo.learn.samples import (
    fit_references,
    make_samples,
)
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import System
from bamboo.terms.d3_table import fill_d3_table

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]])
LITHIUM = np.array([[0.0, 0.0, 2.0]])


def small_force_field(seed: int = 0) -> ForceField:
    torch.manual_seed(seed)
    force_field = ForceField(ForceFieldConfig(network=NetworkConfig(channels=16, heads=4, n_radial=8)))
    fill_d3_table(force_field.dispersion)
    force_field.known[[1, 3, 8]] = True
    return force_field.to_dtype(torch.float64)


def spring_frame(seed: int, *, lithium: bool) -> Frame:
    """A distorted water, with or without Li+, whose atoms are joined pairwise by springs: cheap and invariant."""
    generator = np.random.default_rng(seed)
    mean = np.concatenate([WATER, LITHIUM]) if lithium else WATER
    displacement = generator.normal(scale=0.05, size=mean.shape)
    positions = mean + displacement
    vector = positions[None] - positions[:, None]
    length = np.linalg.norm(vector, axis=-1) + np.eye(len(mean))
    stretch = length - np.linalg.norm(mean[None] - mean[:, None], axis=-1) - np.eye(len(mean))
    charges = np.array([-0.6, 0.3, 0.3, 1.0][: len(mean)])
    system = System(
        numbers=np.array([8, 1, 1, 3][: len(mean)]),
        positions=positions,
        cell=np.zeros((3, 3)),
        pbc=False,
        total_charge=1.0 if lithium else 0.0,
    )
    labels = Labels(
        level="springs",
        energy=-100.0 - 7.0 * lithium + 0.25 * 10.0 * float((stretch**2).sum()),
        forces=10.0 * ((stretch / length)[..., None] * vector).sum(1),
        charges=charges,
        dipole=charges @ system.positions,
    )
    return Frame(system, labels, "lithium" if lithium else "neutral", "dynamics", f"trajectory-{seed}", 300.0)


FRAMES = [spring_frame(seed, lithium=bool(seed % 2)) for seed in range(24)]


def run_loop(path: Path | None, *, stop_after: int | None = None) -> Loop:
    force_field = small_force_field()
    fit_references(force_field, FRAMES)
    loop = Loop(
        force_field,
        make_samples(force_field, FRAMES),
        weights=LossWeights(),
        config=LoopConfig(epochs=4, edges_per_batch=60, save_seconds=0.0),
        state_path=path,
    )
    if stop_after is not None:
        original = loop._step

        def step(data: object) -> dict[str, float]:
            if loop.step == stop_after:
                raise KeyboardInterrupt
            return original(data)  # type: ignore[arg-type]

        loop._step = step  # type: ignore[method-assign]
    return loop
