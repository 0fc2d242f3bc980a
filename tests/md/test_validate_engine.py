"""The long checks of docs/validate_engine.py, in short."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from md.analysis.estimate import Estimate

SCRIPT = Path(__file__).parents[2] / "docs" / "validate_engine.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate_engine", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["validate_engine"] = module
    spec.loader.exec_module(module)
    return module


def test_runs_of_the_shipped_model_survive_kills() -> None:
    """In a process of its own: it forks, and the threads of this one would not survive that."""
    code = "import json, validate_engine; print(json.dumps(validate_engine.kills(2)))"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    (row,) = json.loads(done.stdout)
    assert row["verdict"] == "yes", row


def test_pressure_and_integrator_of_the_shipped_model(script: ModuleType) -> None:
    assert [row["verdict"] for row in script.model_checks()] == ["yes", "yes"]


def test_a_wrong_error_bar_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "_viscosity_run", lambda seed: {"b": (Estimate(1.0, 1.0, "", None, ""), 0.0)})
    monkeypatch.setattr(script, "_ion_run", lambda seed: {"c": (Estimate(None, None, "", None, "", ("short",)), 0.0)})
    monkeypatch.setattr(script, "_current_run", lambda seed: {"d": (Estimate(3.0, 1.0, "", None, ""), 0.0)})
    mean, always, none, never = script.coverage(40)
    assert mean["verdict"] == "yes" and always["verdict"] == never["verdict"] == none["verdict"] == "NO"
    assert none["measured"].endswith("40 without value")
