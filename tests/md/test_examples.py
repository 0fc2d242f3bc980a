"""Every example runs as a user would run it, shortened by SMOKE=1, and leaves behind what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest

from bamboo import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that looks like the repository to the examples; what they write stays in it."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("examples", "data"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def execute(desk: Path, name: str) -> str:
    """Run an example and return what it printed."""
    environment = os.environ | {"SMOKE": "1"}
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py"],
        cwd=desk,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def pooled(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"^pooled\s+([\d.]+)", text, flags=re.MULTILINE)]


def test_single_point_binds_lithium(desk: Path) -> None:
    text = execute(desk, "1_single_point")
    energy, distance = map(float, re.findall(r"with (-[\d.]+) kcal/mol at ([\d.]+) Å", text)[0])
    assert -75.0 < energy < -35.0  # B3LYP: about -50
    assert 1.6 < distance < 2.1
    charges = [float(value) for value in re.findall(r"[A-Z][a-z]?([+-][\d.]+)", text.partition("charges")[2])]
    assert len(charges) == 11
    assert sum(charges) == pytest.approx(1.0, abs=0.06)  # eleven numbers of two digits


def test_ase_dynamics_writes_a_trajectory(desk: Path) -> None:
    text = execute(desk, "2_ase_md")
    frames = ase.io.read(desk / "ase_md.traj", index=":")
    assert len(frames) == 2
    assert len(frames[0]) == 132
    assert 0.001 < np.abs(frames[1].positions - frames[0].positions).max() < 0.5
    assert "132 atoms in a box" in text


def test_run_leaves_a_run_folder(desk: Path) -> None:
    execute(desk, "3_run")
    properties = json.loads((desk / "runs/smoke/properties.json").read_text())
    assert properties["density"]["value"] is None  # a hundred femtoseconds are no result
    assert "run about" in properties["density"]["warnings"][0]


def test_learning_stages(desk: Path) -> None:
    before, after = pooled(execute(desk, "4_train"))
    assert after < 0.8 * before
    assert "learnt" in checkpoint.describe("gfn2")["card"]["description"]
    execute(desk, "5_distill")
    students = [desk / f"runs/distilled/{name}.safetensors" for name in ("teacher-0", "teacher-1", "student")]
    first, second, student = (checkpoint.load(path).energy_head[4].weight for path in students)
    assert not first.equal(second)
    assert not student.equal(first)


def test_align_measures_the_density_error(desk: Path) -> None:
    text = execute(desk, "6_align")
    assert "DMC, 298.15 K" in text
    assert (desk / "runs/aligned/aligned.safetensors").exists()
