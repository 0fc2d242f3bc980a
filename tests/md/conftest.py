"""A liquid that simulates in seconds: argon, whose force field has a wall, dispersion, and a small network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def argon_model() -> Callable[..., Any]:
    """Return a factory that writes a model file of argon; the network's part scales with ``strength``."""

    def make(path: Path, *, seed: int = 0, strength: float = 1.0) -> Path:
        import torch

        from bamboo import checkpoint
        from bamboo.forcefield import ForceField, ForceFieldConfig
        from bamboo.nn.get import NetworkConfig
        from bamboo.terms.d3_table import fill_d3_table

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            field = ForceField(ForceFieldConfig(network=NetworkConfig(channels=16, heads=4, layers=2, n_radial=8)))
        fill_d3_table(field.dispersion)
        field.known[18] = True
        with torch.no_grad():
            field.charge_head[4].weight *= 0.0
            field.charge_head[4].bias *= 0.0
            field.energy_head[4].weight *= strength
        checkpoint.save(field, path, card={"levels": ["toy"]})
        return path

    return make


@pytest.fixture(scope="session")
def argon_clusters() -> Callable[..., Any]:
    """Return a factory that writes labelled clusters of argon, every label what a model says of them."""

    def make(path: Path, model: Path, *, count: int = 30) -> Path:
        from bamboo import checkpoint
        from bamboo.evaluator import Evaluator
        from bamboo.quantum.dataset import Frame, round_positions, write_frames
        from bamboo.quantum.labels import Labels
        from bamboo.system import Batch, System

        evaluator = Evaluator(checkpoint.load(model))
        generator = np.random.default_rng(5)
        frames = []
        for index in range(count):
            numbers = np.full(2 + index % 3, 18)
            places = 3.4 * np.array([[0, 0, 0], [1, 0, 0], [0.5, 0.9, 0], [0.5, 0.3, 0.8]])[: len(numbers)]
            positions = round_positions(places + generator.normal(scale=0.2, size=places.shape))
            system = System(numbers, positions, np.zeros((3, 3)), pbc=False)
            output = evaluator.evaluate(Batch.from_systems([system]))
            labels = Labels(
                level="toy",
                energy=float(output.energy),
                forces=output.forces.numpy(),
                charges=output.charges.numpy(),
                dipole=output.dipole[0].numpy(),
            )
            frames.append(Frame(system, labels, "neutral", "dynamics", f"trajectory-{index}", 300.0))
        write_frames(path, frames)
        return path

    return make
