"""Distillation of argon: three teachers simulate and label, a student learns their mean; what is done stays done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import md.distill
import md.liquid
from bamboo import checkpoint
from bamboo.errors import GuardError, InputError
from bamboo.evaluator import Evaluator
from bamboo.learn.fit import held_out_errors
from bamboo.quantum.dataset import read_frames
from bamboo.system import Batch
from md.distill import distill, load_distill_config
from md.spread import load_spread_config

TEXT = """
molecules: {{argon: "[Ar]"}}
teachers: [{folder}/t0.safetensors, {folder}/t1.safetensors, {folder}/t2.safetensors]
train: {folder}/train.yaml
data: [{folder}/clusters.h5]
output: {folder}/student.safetensors
electrolytes:
- {{electrolyte: argon, temperature: 340 K, pressure: 2000 bar}}
atoms: 24
npt: 50 fs
nvt: 200 fs
frames: 8
trained: all
loop: {{epochs: 30, edges_per_batch: 20000, learning_rate: 3.0e-3, weight_decay: 0.0, ema_decay: 0.9}}
"""
TRAIN = """
data: [{folder}/clusters.h5]
output: {folder}/none.safetensors
start: {folder}/t0.safetensors
loop: {{epochs: 1}}
seed: 7
"""


@pytest.fixture
def toy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argon_model: Callable[..., Path],
    argon_clusters: Callable[..., Path],
) -> Path:
    monkeypatch.setattr(md.liquid, "guards", lambda *_: [])  # atoms of a gas that meet look like a new bond
    monkeypatch.setattr(md.liquid, "WARM_UP_STEPS", 50)
    for seed in range(2):  # the third is trained
        argon_model(tmp_path / f"t{seed}.safetensors", seed=seed, strength=3.0)
    argon_clusters(tmp_path / "clusters.h5", tmp_path / "t0.safetensors")
    (tmp_path / "train.yaml").write_text(TRAIN.format(folder=tmp_path))
    path = tmp_path / "distill.yaml"
    path.write_text(TEXT.format(folder=tmp_path))
    return path


def test_student_learns_the_mean_and_a_second_call_repeats_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    report = distill(load_distill_config(toy), say=said.append)
    bulk = read_frames(tmp_path / "student" / "student" / "bulk.h5")
    spread = read_frames(tmp_path / "student" / "student" / "bulk-spread.h5")
    assert len(bulk) == len(spread) == 24
    assert all(frame.trajectory.startswith("argon, 340 K, t") for frame in bulk)  # frames carry their mixture's name
    assert {frame.split for frame in bulk if ", t2, " in frame.trajectory} == {"test"}
    assert {frame.split for frame in bulk if ", t2, " not in frame.trajectory} == {"train", "validation"}

    # the forces in the file are the mean of what the teacher files say
    evaluators = [Evaluator(checkpoint.load(tmp_path / f"t{k}.safetensors")) for k in range(3)]
    batch = Batch.from_systems([bulk[0].system])
    forces = np.stack([evaluator.evaluate(batch).forces.numpy() for evaluator in evaluators])
    assert bulk[0].labels.forces == pytest.approx(forces.mean(0), abs=1e-5)
    assert spread[0].labels.forces == pytest.approx(forces.std(0, ddof=1), abs=1e-5)

    student = report["students"]["student"]
    before, after = student["held_out_before"]["bulk"], student["held_out_after"]["bulk"]
    assert after["forces"] < 0.7 * before["forces"]
    assert after["pressure"] < before["pressure"]
    published = held_out_errors(checkpoint.load(tmp_path / "student.safetensors"), bulk)["bulk"]
    assert after["forces"] == pytest.approx(published.forces, rel=1e-4)
    student_began_as = held_out_errors(checkpoint.load(tmp_path / "t0.safetensors"), bulk)["bulk"]
    assert before["forces"] == pytest.approx(student_began_as.forces, rel=1e-6)
    assert {"bulk", "neutral"} <= set(student["held_out_after"]) and report["guard_trips"] == 0
    assert any("teacher t2: training with seed 9" in line for line in said)
    assert "spread of the teachers" in said[-1]

    monkeypatch.setattr(md.distill, "simulate", lambda *_: pytest.fail("simulated again"))
    monkeypatch.setattr(md.distill, "train_missing", lambda *_, **__: None)
    assert distill(load_distill_config(toy), say=said.append) == report
    learnt = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "student.safetensors").unlink()  # is put back from the finished training
    assert distill(load_distill_config(toy), say=said.append) == report
    assert (tmp_path / "student.safetensors").read_bytes() == learnt
    with pytest.raises(InputError, match=r"begun with other settings \(frames\)"):
        distill(load_distill_config(toy).model_copy(update={"frames": 9}), say=said.append)


def test_without_one_teacher_each_students_learn_from_the_others_only(toy: Path, tmp_path: Path) -> None:
    text = toy.read_text().replace("epochs: 30", "epochs: 1")
    toy.write_text(text + "leave_one_out: true\n")
    report = distill(load_distill_config(toy), say=lambda _: None)
    assert set(report["students"]) == {"student", *(f"student-without-t{k}" for k in range(3))}
    evaluators = [Evaluator(checkpoint.load(tmp_path / f"t{k}.safetensors")) for k in range(3)]
    for k in range(3):
        others, name = [(k + 1) % 3, (k + 2) % 3], f"student-without-t{k}"
        assert (tmp_path / f"{name}.safetensors").exists()
        assert report["students"][name]["start"].endswith(f"t{others[0]}.safetensors")
        bulk = read_frames(tmp_path / "student" / name / "bulk.h5")
        assert len(bulk) == 16 and not any(f", t{k}, " in frame.trajectory for frame in bulk)
        assert {frame.split for frame in bulk if f", t{others[1]}, " in frame.trajectory} == {"test"}
        batch = Batch.from_systems([bulk[0].system])
        mean = np.mean([evaluators[j].evaluate(batch).forces.numpy() for j in others], axis=0)
        assert bulk[0].labels.forces == pytest.approx(mean, abs=1e-5)


def test_a_teacher_that_fails_leaves_its_frames(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that stops a run is counted, the frames up to there are labelled; a student without any is refused."""
    original, stages = md.distill.simulate, []

    def stops(*arguments: Any) -> None:
        original(*arguments)
        stages.append(arguments)
        raise GuardError("nvt stopped: too hot")

    monkeypatch.setattr(md.distill, "simulate", stops)

    def untaught(recipe: Any, **_: Any) -> dict[str, Any]:  # all teachers are there
        recipe.output.write_bytes((tmp_path / "t0.safetensors").read_bytes())
        return {}

    monkeypatch.setattr(md.distill, "train", untaught)
    config = load_distill_config(toy).model_copy(update={"teachers": (tmp_path / "t0.safetensors",) * 1 + (
        tmp_path / "t1.safetensors", tmp_path / "t1b.safetensors")})  # fmt: skip
    (tmp_path / "t1b.safetensors").write_bytes((tmp_path / "t1.safetensors").read_bytes())
    report = distill(config, say=lambda _: None)
    assert report["guard_trips"] == len(stages) == 3
    assert {known["frames"] for known in report["runs"].values()} == {8}

    def never(*_: Any) -> None:
        raise GuardError("npt stopped: too hot")

    monkeypatch.setattr(md.distill, "simulate", never)
    with pytest.raises(InputError, match=r"No teacher gave frames .* liquid-00-t0: npt stopped: too hot"):
        distill(config.model_copy(update={"output": tmp_path / "other.safetensors"}), say=lambda _: None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train: ", "train: /nowhere", "train: .*no such file"),
        ("/t1.safetensors", "/t0.safetensors", "a second teacher named t0"),
        (", {folder}/t2.safetensors]", "]", "at least 3 items"),
        ("electrolyte: argon", "electrolyte: argone", "Unknown solvent 'argone'"),
        ("temperature: 340 K", "temperature: 340", "has no unit"),
    ],
)
def test_bad_configurations_are_refused(toy: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = {"folder": tmp_path}
    toy.write_text(toy.read_text().replace(old.format(**folder), new.format(**folder)))
    with pytest.raises(InputError, match=rf"distill.yaml:\d+: .*{message}"):
        load_distill_config(toy)


def test_a_missing_teacher_needs_a_recipe(toy: Path) -> None:
    toy.write_text("".join(line for line in toy.read_text().splitlines(keepends=True) if not line.startswith("train:")))
    with pytest.raises(InputError, match=r"teachers.2: .*no such file, and no `train`"):
        load_distill_config(toy)


def test_the_recipe_of_the_proof_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its students are those that its comparison names, and its liquids are those they were taught in."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    config = load_distill_config(root / "data/distillation/distill.yaml")
    monkeypatch.setattr(Path, "exists", lambda _: True)  # no model is trained here
    spread = load_spread_config(root / "data/distillation/spread.yaml")
    students = {f"{config.output.stem}{name}" for name in config.classes() if name}
    assert {path.stem for path in spread.groups["students"]} == students
    assert set(spread.groups["teachers"]) == set(config.teachers)
    assert [row.electrolyte for row in spread.liquids] == [liquid.electrolyte for liquid in config.electrolytes]
