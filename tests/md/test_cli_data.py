"""``bamboo-md data``: from campaign folders to lifted labels, on frames small enough to follow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bamboo import checkpoint
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame, read_frames, round_positions, write_frames
from bamboo.quantum.labels import Labels
from bamboo.structure.molecules import molecule
from bamboo.system import System
from md import cli


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["data", *arguments])
    return result.exit_code, result.stdout + result.stderr


def frames(level: str, energy: float) -> list[Frame]:
    """Ethylene carbonate, slightly distorted, once per trajectory."""
    generator = np.random.default_rng(0)
    made = []
    for k in range(4):
        positions = round_positions(molecule("EC").positions + generator.normal(scale=0.02, size=(10, 3)))
        system = System(molecule("EC").numbers, positions, np.zeros((3, 3)), False, 0.0)
        made.append(Frame(system, Labels(level, energy, np.full((10, 3), 0.01)), "neutral", "dynamics", f"run-{k}"))
    return made


def model(path: Path, *, levels: list[str]) -> Path:
    torch.manual_seed(1)
    force_field = ForceField(ForceFieldConfig(network=NetworkConfig(channels=16, heads=4, n_radial=8)))
    force_field.known[[1, 6, 8]] = True
    checkpoint.save(force_field, path, card={"levels": levels})
    return path


def test_merge_select_and_lift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("campaign").mkdir()
    write_frames("campaign/shard-000.h5", frames("cheap", -1.0)[:2])
    write_frames("campaign/shard-001.h5", frames("cheap", -1.0)[2:])
    assert invoke("merge", "campaign", "--output", "cheap.h5")[0] == 0
    assert len(read_frames("cheap.h5")) == 4
    assert invoke("select", "cheap.h5", "--output", "few.h5", "--count", "3")[0] == 0
    chosen = {frame.trajectory for frame in read_frames("few.h5")}
    assert len(chosen) == 3 and chosen < {f"run-{k}" for k in range(4)}
    model(Path("one.st"), levels=["cheap"])
    arguments = ("--count", "1", "--committee", "one.st", "--committee", "one.st", "--known", "few.h5")
    assert invoke("select", "cheap.h5", "--output", "last.h5", *arguments)[0] == 0
    assert {frame.trajectory for frame in read_frames("last.h5")} == {f"run-{k}" for k in range(4)} - chosen
    assert "Only 4 of 9" in invoke("select", "cheap.h5", "--output", "few.h5", "--count", "9")[1]

    base, tuned = model(Path("base.st"), levels=["cheap"]), model(Path("tuned.st"), levels=["good", "good; lifted"])
    code, said = invoke("lift", str(base), "cheap.h5", "--tuned", str(tuned), "--output", "lifted.h5")
    assert code == 0 and "4/4 frames" in said, said
    labels = [frame.labels for frame in read_frames("lifted.h5")]
    assert [label.level for label in labels] == ["good; lifted"] * 4
    assert [label.energy for label in labels] == pytest.approx([-1.0] * 4)  # both models are the same
    both = model(Path("both.st"), levels=["good", "cheap"])
    assert (
        "name 2 levels of theory" in invoke("lift", str(base), "cheap.h5", "--tuned", str(both), "--output", "x.h5")[1]
    )
    code, said = invoke("lift", str(base), "missing.h5", "--tuned", str(tuned), "--output", "x.h5")
    assert code == 2 and "no such file" in said
