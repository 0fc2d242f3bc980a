"""What every engine and every term is asked: ``evaluate`` one or several systems, compare two outputs.

Triton's kernels run on a GPU, or without one in Triton's interpreter, half a second for an evaluation: the Triton
engine is asked about the field of all terms, and not about one term at a time as well.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels.engines import ENGINES, native_status, triton_status
from bamboo.system import Batch, System


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the single terms where the engine is Triton's."""

    def single_term(item: pytest.Item) -> bool:
        choices = item.callspec.params if hasattr(item, "callspec") else {}
        return choices.get("engine") == "triton" and choices.get("term", "all") != "all"

    left_out = [item for item in items if Path(__file__).parent in item.path.parents and single_term(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=[name for name in ENGINES if name != "auto"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name of the engine under test."""
    status = {"reference": "", "native": native_status(), "triton": triton_status(_device(request.param))}
    if reason := status[request.param]:
        pytest.skip(f"the engine {request.param} cannot be tested: {reason}")
    return request.param


def _device(engine: str) -> str:
    """Return where the engine is tested; tests/conftest.py asks for Triton's interpreter where there is no GPU."""
    return "cuda" if engine == "triton" and not triton_status("cuda") else "cpu"


@pytest.fixture
def engine_options(engine: str) -> dict[str, Any]:
    """Arguments of ``Evaluator`` that choose the engine under test."""
    return {"engine": engine, "device": _device(engine)}


@pytest.fixture
def evaluate(engine_options: dict[str, Any]) -> Callable[..., ForceFieldOutput]:
    """Return ``evaluate(force_field, *systems)``, a fresh evaluation by the engine under test; results on the CPU."""

    def run(force_field: ForceField, *systems: System) -> ForceFieldOutput:
        output = Evaluator(force_field, skin=0.0, **engine_options).evaluate(Batch.from_systems(systems))
        tensors = {item.name: getattr(output, item.name) for item in fields(output) if item.name != "terms"}
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        return replace(output, **on_cpu, terms={name: term.cpu() for name, term in output.terms.items()})

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
