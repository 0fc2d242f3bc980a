"""What every engine and every term is asked: ``evaluate`` one or several systems, compare two outputs."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.system import Batch, System


def _engine_names() -> list[str]:
    """Return the engines of this installation; before there is a choice, the one there is."""
    if "engine" not in inspect.signature(Evaluator).parameters:
        return ["reference"]
    from bamboo.kernels.engines import ENGINES

    # without a GPU Triton is interpreted, seconds for an evaluation: test_triton.py holds it to the reference
    return [name for name in ENGINES if name not in ("auto", "triton")]


@pytest.fixture(params=_engine_names())
def engine(request: pytest.FixtureRequest) -> str:
    """Name of the engine under test."""
    if request.param == "native":
        from bamboo.kernels.engines import native_status

        if reason := native_status():
            pytest.skip(reason)
    return request.param


@pytest.fixture
def engine_options(engine: str) -> dict[str, Any]:
    """Arguments of ``Evaluator`` that choose the engine under test."""
    return {"engine": engine} if "engine" in inspect.signature(Evaluator).parameters else {}


@pytest.fixture
def evaluate(engine_options: dict[str, Any]) -> Callable[..., ForceFieldOutput]:
    """Return ``evaluate(force_field, *systems)``, a fresh evaluation by the engine under test."""

    def run(force_field: ForceField, *systems: System) -> ForceFieldOutput:
        return Evaluator(force_field, skin=0.0, **engine_options).evaluate(Batch.from_systems(systems))

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
