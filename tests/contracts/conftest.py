"""What every engine and every term is asked: ``evaluate`` one or several systems, compare two outputs."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.system import Batch, System


def _engines() -> list[str]:
    parameter = inspect.signature(Evaluator).parameters.get("engine")
    return ["reference"] if parameter is None else ["reference", "auto"]


@pytest.fixture(params=_engines())
def engine(request: pytest.FixtureRequest) -> str:
    """Name of the engine under test."""
    return request.param


@pytest.fixture
def evaluate(engine: str) -> Callable[..., ForceFieldOutput]:
    """Return ``evaluate(force_field, *systems)``, a fresh evaluation by the engine under test."""
    options: dict[str, Any] = {"engine": engine} if "engine" in inspect.signature(Evaluator).parameters else {}

    def run(force_field: ForceField, *systems: System) -> ForceFieldOutput:
        return Evaluator(force_field, skin=0.0, **options).evaluate(Batch.from_systems(systems))

    return run


@pytest.fixture
def moved() -> Callable[..., System]:
    """Return ``moved(system, matrix=..., shift=..., order=...)``: r -> r @ matrix + shift, then reordered atoms."""

    def move(
        system: System, *, matrix: np.ndarray | None = None, shift: np.ndarray | float = 0.0, order: Any = slice(None)
    ) -> System:
        matrix = np.eye(3) if matrix is None else matrix
        return System(
            system.numbers[order],
            (system.positions @ matrix + shift)[order],
            system.cell @ matrix,
            pbc=system.pbc,
            total_charge=system.total_charge,
        )

    return move
