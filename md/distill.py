"""``bamboo-md distill config.yaml``: several teachers simulate liquids, one student learns what they say on average.

Every teacher drives one box of every electrolyte (NPT, then NVT whose frames are kept); all teachers label every frame
(``bamboo/learn/ensemble.py``), and a student that starts from one of them is trained on the mean together with quantum
data, through the same training as any other model. The boxes of the last teacher are held out.

All work lies in a folder named after the output: the same command again continues.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bamboo import checkpoint, units
from bamboo.errors import GuardError, InputError
from bamboo.evaluator import Evaluator
from bamboo.learn.ensemble import ensemble_labels, put_on_one_zero, rms_spread
from bamboo.learn.evaluate import Errors
from bamboo.learn.fit import (
    N_REFERENCE_FRAMES,
    LoopBlock,
    TrainConfig,
    WeightsBlock,
    error_table,
    held_out_errors,
    load_frames,
    train,
)
from bamboo.quantum.dataset import Frame, merge_files, trajectory_in, write_frames
from md.composition import parse_composition
from md.config import Molecules
from md.liquid import Box, Stage, accept_settings, frames, locked, nvt, simulate, stored, write_json
from md.model import file_sha256
from md.quantities import Duration, Pressure, Temperature, validator
from md.yaml_model import Problem, load_yaml

Say = Callable[[str], None]
LONGEST_NAME = 72  # bytes; the split is added to it
VALIDATION = 0.15  # share of each box, at its end, that chooses the best weights


class Electrolyte(BaseModel):
    """A liquid that the teachers simulate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    electrolyte: Annotated[str, validator(lambda text: (parse_composition(str(text)), str(text))[1])]
    temperature: Temperature = 298.15
    pressure: Pressure = units.BAR


class DistillConfig(BaseModel):
    """What ``bamboo-md distill`` reads.

    teachers   model files, three or more; those that do not exist are trained from ``train`` with their own seeds
    train      YAML file of a training (``bamboo-md train``)
    start      the student begins as this model; default: the first teacher
    data       quantum data that the student keeps learning from; ``clusters`` of its training frames are taken
    electrolytes, atoms, npt, nvt, frames   what every teacher simulates, and how many frames of each box are kept
    output     model file to write; the folder of the same name without ending takes everything else
    trained    "energy_head" or "all" weights of the student
    weights, loop   of the student's training
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    molecules: Molecules = {}
    teachers: Annotated[tuple[Path, ...], Field(min_length=3, max_length=32)]
    train: Path | None = None
    start: str | None = None
    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    electrolytes: Annotated[tuple[Electrolyte, ...], Field(min_length=1, max_length=500)]
    output: Path
    atoms: Annotated[int, Field(ge=20, le=100_000)] = 320
    npt: Duration = 10.0 * units.PICOSECOND
    nvt: Duration = 20.0 * units.PICOSECOND
    frames: Annotated[int, Field(ge=4, le=100_000)] = 40
    clusters: Annotated[int, Field(ge=1)] = 3000
    trained: Literal["energy_head", "all"] = "energy_head"
    weights: WeightsBlock = WeightsBlock()
    loop: LoopBlock = LoopBlock(epochs=20, edges_per_batch=20_000, learning_rate=1.0e-3, weight_decay=0.0)
    seed: Annotated[int, Field(ge=0, le=10**6)] = 1


def load_distill_config(path: Path) -> DistillConfig:
    """Read and check the configuration; raises InputError that lists every problem as ``file:line: key: problem``."""
    return load_yaml(path, DistillConfig, checks=_checks)


def _checks(config: DistillConfig) -> list[Problem]:
    found: list[Problem] = []
    names = [path.stem for path in config.teachers]
    for index, path in enumerate(config.teachers):
        if path.stem in names[:index]:
            found.append((("teachers", index), f"a second teacher named {path.stem}: names tell teachers apart."))
        if not path.exists() and config.train is None:
            found.append((("teachers", index), f"{path}: no such file, and no `train` to train it from."))
    liquids = [(liquid.electrolyte, liquid.temperature) for liquid in config.electrolytes]
    for index, liquid in enumerate(liquids):
        if liquid in liquids[:index]:
            found.append((("electrolytes", index), "this liquid is in the list already."))
    for key in ("data", "train"):
        given = getattr(config, key)
        for path in given if isinstance(given, tuple) else (given,):
            if path is not None and not path.exists():
                found.append(((key,), f"{path}: no such file."))
    return found


def distill(config: DistillConfig, *, say: Say = print) -> dict[str, Any]:
    """Train missing teachers, collect and label liquids, train the student; return the report, also written to a file.

    A teacher whose box does not stay sound is no error: its frames up to there are what the student must see.
    """
    work = config.output.with_suffix("")
    with locked(work):
        train_missing(config, say=say)
        settings = config.model_dump(mode="json", exclude={"output", "train", "loop", "weights", "trained"})
        accept_settings(work, settings | {"sha256": [file_sha256(path) for path in config.teachers]})
        quantum = load_frames(config.data, max_force=20.0, say=say)
        runs = collect(config, quantum, work, say=say)
        known = {"teachers": ", ".join(map(str, config.teachers))}
        bulk = merge_files([work / f"{run}.h5" for run in runs], work / "bulk.h5", provenance=known)
        merge_files([work / f"{run}-spread.h5" for run in runs], work / "bulk-spread.h5", provenance=known)
        chosen = _write_quantum(config, quantum, work)
        start = checkpoint.load(config.start or config.teachers[0])
        before = held_out_errors(start, [*bulk, *chosen])
        after = train(_student(config, work), say=say)
        report = _report(config, runs, before=before, after=after)
        write_json(work / "report.json", report)
        for moment, errors in (("start", before), ("student", after)):
            say(f"held-out errors, {moment} (bulk: to the mean of the teachers)\n{error_table(errors)}")
        say(spread_table(runs))
    return report


def train_missing(config: DistillConfig, *, say: Say) -> None:
    """Train the teachers whose files do not exist, each with its own seed; an interrupted training continues."""
    for index, path in enumerate(config.teachers):
        if path.exists() or config.train is None:
            continue
        recipe = load_yaml(config.train, TrainConfig)
        say(f"teacher {path.stem}: training with seed {recipe.seed + index}")
        train(recipe.model_copy(update={"output": path, "seed": recipe.seed + index}), say=say)


def collect(config: DistillConfig, quantum: Sequence[Frame], work: Path, *, say: Say) -> dict[str, dict[str, Any]]:
    """Simulate every electrolyte with every teacher and label the frames with all; return what is known of each run.

    A finished run has the files <run>.h5 (mean labels), <run>-spread.h5 and <run>.json.
    """
    models = {path.stem: checkpoint.load(path) for path in config.teachers}
    some = np.random.default_rng(config.seed).permutation(len(quantum))[:N_REFERENCE_FRAMES]
    names = [
        (f"liquid-{number:02d}-{teacher}", number, teacher)
        for number in range(len(config.electrolytes))
        for teacher in models
    ]
    if not all((work / f"{run}.json").exists() for run, _, _ in names):
        put_on_one_zero(list(models.values()), [quantum[index] for index in some])
    evaluators = {name: Evaluator(force_field) for name, force_field in models.items()}
    runs: dict[str, dict[str, Any]] = {}
    for index, (run, number, teacher) in enumerate(names):
        liquid = config.electrolytes[number]

        def compute(run: str = run, liquid: Electrolyte = liquid, teacher: str = teacher, index: int = index) -> Any:
            return _one_run(config, liquid, run, work, evaluators, driver=teacher, seed=config.seed + index)

        runs[run] = stored(work / f"{run}.json", compute)
        known = runs[run]
        say(
            f"{run}: {liquid.electrolyte}, {liquid.temperature:g} K, {known['frames']} frames, force spread "
            f"{known['forces'] / units.KCAL_PER_MOL:.2f} kcal/mol/Å"
            + (f"; {known['stopped']}" if known["stopped"] else "")
        )
    return runs


def _one_run(
    config: DistillConfig,
    liquid: Electrolyte,
    run: str,
    work: Path,
    evaluators: Mapping[str, Evaluator],
    *,
    driver: str,
    seed: int,
) -> dict[str, Any]:
    """Simulate one liquid with one teacher, label its frames with all of them, write both files."""
    folder = work / "runs" / run
    box = Box(liquid.electrolyte, liquid.temperature, config.atoms, seed)
    stages = [
        Stage("npt", config.npt / units.PICOSECOND, pressure_bar=liquid.pressure / units.BAR),
        nvt("nvt", config.nvt, frames=config.frames),
    ]
    stopped = ""
    try:
        simulate(box, stages, evaluators[driver], folder)
    except GuardError as error:
        stopped = str(error).splitlines()[0]
    systems = frames(folder, "nvt") if (folder / "nvt" / "traj.h5").exists() else []
    if not systems:
        raise InputError(
            f"{run} ({liquid.electrolyte}): {driver} gave no frame: {stopped} Train this teacher better, or replace it."
        )
    held_out = driver == list(evaluators)[-1]
    n_validation = 0 if held_out else max(1, round(VALIDATION * len(systems)))
    splits = ["test" if held_out else "train"] * (len(systems) - n_validation) + ["validation"] * n_validation
    mixture = f"{liquid.electrolyte}, {liquid.temperature:g} K, {driver}"
    mixture = mixture if len(mixture.encode()) <= LONGEST_NAME else run
    trajectories = [trajectory_in(split, run=mixture) for split in splits]
    labels = ensemble_labels(evaluators, systems, trajectories=trajectories, temperature_K=liquid.temperature)
    provenance = {"electrolyte": liquid.electrolyte, "teachers": ", ".join(map(str, config.teachers)), "driver": driver}
    write_frames(work / f"{run}-spread.h5", labels.spread, provenance=provenance)
    write_frames(work / f"{run}.h5", labels.mean, provenance=provenance)
    return {
        "electrolyte": liquid.electrolyte,
        "temperature_K": liquid.temperature,
        "driver": driver,
        "frames": len(systems),
        "stopped": stopped,
        "pressure_by_teacher_bar": dict(
            zip(evaluators, (labels.pressure.mean(axis=0) / units.BAR).tolist(), strict=True)
        ),
        **rms_spread(labels),
    }


def _write_quantum(config: DistillConfig, quantum: Sequence[Frame], work: Path) -> list[Frame]:
    """Write the quantum frames of the student's training: ``clusters`` of the training part, all that is held out."""
    training = [frame for frame in quantum if frame.split == "train"]
    order = np.random.default_rng(config.seed).permutation(len(training))[: config.clusters]
    chosen = [training[index] for index in order] + [frame for frame in quantum if frame.split != "train"]
    write_frames(work / "quantum.h5", chosen)
    return chosen


def _student(config: DistillConfig, work: Path) -> TrainConfig:
    liquids = ", ".join(liquid.electrolyte for liquid in config.electrolytes)
    return TrainConfig(
        data=[work / "bulk.h5", work / "quantum.h5"],
        output=config.output,
        start=str(config.start or config.teachers[0]),
        weights=config.weights,
        loop=config.loop,
        trained=config.trained,
        seed=config.seed,
        far_pairs=0.03 if config.trained == "all" else 0.0,
        description=f"student of {len(config.teachers)} teachers in {liquids}",
    )


def _report(
    config: DistillConfig,
    runs: Mapping[str, dict[str, Any]],
    *,
    before: Mapping[str, Errors],
    after: Mapping[str, Errors],
) -> dict[str, Any]:
    def numbers(errors: Mapping[str, Errors]) -> dict[str, dict[str, float]]:
        names = ("forces", "energy_per_atom", "pressure_mean", "pressure", "charges")
        return {
            group: {name: value for name in names if not math.isnan(value := getattr(part, name))}
            for group, part in errors.items()
        }

    return {
        "teachers": {str(path): file_sha256(path) for path in config.teachers},
        "runs": dict(runs),
        "guard_trips": sum(bool(known["stopped"]) for known in runs.values()),
        "held_out_before": numbers(before),
        "held_out_after": numbers(after),
        "units": "eV, Å, e; pressures eV/Å^3 unless named otherwise; bulk: errors to the mean of the teachers",
    }


def spread_table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Return how far the teachers are apart, per run: standard deviations over teachers, RMS over frames."""
    kcal = units.KCAL_PER_MOL
    lines = [f"{'run':<34}{'frames':>8}{'forces':>10}{'energy/atom':>13}{'pressure':>10}"]
    for run, known in runs.items():
        lines.append(
            f"{run:<34}{known['frames']:>8}{known['forces'] / kcal:>10.3f}{known['energy_per_atom'] / kcal:>13.4f}"
            f"{known['pressure'] / units.BAR:>10.0f}"
        )
    return "\n".join([*lines, "(spread of the teachers: kcal/mol/Å, kcal/mol, bar)"])
