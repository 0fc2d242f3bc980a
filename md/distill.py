"""``bamboo-md distill config.yaml``: several teachers simulate liquids, one student learns what they say on average.

Every teacher drives one box of every electrolyte (NPT, then NVT whose frames are kept); all teachers label every frame
(``bamboo/learn/ensemble.py``), and a student that starts from one of them is trained on the mean together with quantum
data, through the same training as any other model. The boxes of the last teacher are held out. A teacher
that contradicts the others is outvoted, frame by frame, and what finds no majority is left out.

With ``leave_one_out`` there is a student more for each teacher, taught by all others: how far these are apart, against
how far the teachers are (``bamboo-md spread``), tells what distillation is worth.

All work lies in a folder named after the output: the same command again continues, and started more than once at the
same time its processes share the work.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bamboo import checkpoint, units
from bamboo.errors import GuardError, InputError
from bamboo.evaluator import Evaluator, best_device
from bamboo.files import file_sha256, replacing, write_json
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
from md.liquid import Box, Stage, accept_settings, frames, nvt, share, simulate
from md.quantities import Duration, Pressure, Temperature, validator
from md.yaml_model import Problem, load_yaml

Say = Callable[[str], None]
LONGEST_NAME = 72  # bytes; the split is added to it
ERRORS = "errors.json"
TAUGHT = {"start", "clusters", "weights", "loop", "trained"}  # settings of students, of no simulation
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
    leave_one_out   train a student <output>-without-<teacher> for each teacher as well
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
    leave_one_out: bool = False
    seed: Annotated[int, Field(ge=0, le=10**6)] = 1

    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the teachers of each student; "" is the one that all teach, -without-NAME those of all but one.

        The student begins as the first of its teachers, and the boxes of the last are held out from it.
        """
        names = tuple(path.stem for path in self.teachers)
        others = {f"-without-{name}": names[k + 1 :] + names[:k] for k, name in enumerate(names)}
        return {"": names} | (others if self.leave_one_out else {})


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
    train_missing(config, say=say)
    settings = config.model_dump(mode="json", exclude={"output", "train", *TAUGHT})
    accept_settings(work, settings | {"sha256": [file_sha256(path) for path in config.teachers]})
    quantum = load_frames(config.data, max_force=20.0, say=say)
    runs = collect(config, quantum, work, say=say)
    for name in config.classes():
        taught = config.model_dump(mode="json", include=TAUGHT - ({"start"} if name else set()))
        accept_settings(work / f"student{name}", taught)
    students = [config.output.with_stem(config.output.stem + name) for name in config.classes()]

    def compute(k: int) -> None:
        folder = work / f"student{list(config.classes())[k]}"
        write_json(folder / ERRORS, _teach(config, list(config.classes())[k], runs, quantum, folder, say=say))
        with replacing(students[k]) as draft:  # last: where it is, all is done
            shutil.copyfile(folder / students[k].name, draft)

    share(students, compute)
    errors = {f"student{name}": json.loads((work / f"student{name}" / ERRORS).read_text()) for name in config.classes()}
    report = {
        "teachers": {str(path): file_sha256(path) for path in config.teachers},
        "runs": runs,
        "guard_trips": sum(bool(known["stopped"]) for known in runs.values()),
        "students": errors,
        "units": "eV, Å, e; pressures eV/Å^3 unless named otherwise; bulk: errors to the mean of the teachers",
    }
    write_json(work / "report.json", report)
    say(spread_table(runs))
    return report


def train_missing(config: DistillConfig, *, say: Say) -> None:
    """Train the teachers whose files do not exist, each with its own seed; an interrupted training continues."""
    if config.train is None:
        return  # all exist, or the configuration is refused
    recipe = load_yaml(config.train, TrainConfig)

    def compute(k: int) -> None:
        path, seed = config.teachers[k], recipe.seed + k
        say(f"teacher {path.stem}: training with seed {seed}")
        train(recipe.model_copy(update={"output": path, "seed": seed}), say=say)

    share(config.teachers, compute)


def collect(config: DistillConfig, quantum: Sequence[Frame], work: Path, *, say: Say) -> dict[str, dict[str, Any]]:
    """Simulate every electrolyte with every teacher and label the frames with all; return what is known of each run.

    A run has a folder with its simulation, result.json, and for each student of its teacher labels.h5 and spread.h5.
    """
    models = {path.stem: checkpoint.load(path) for path in config.teachers}
    names = [
        (f"liquid-{number:02d}-{teacher}", number, teacher)
        for number in range(len(config.electrolytes))
        for teacher in models
    ]
    places = [work / run / "result.json" for run, _, _ in names]
    if not all(place.exists() for place in places):
        some = np.random.default_rng(config.seed).permutation(len(quantum))[:N_REFERENCE_FRAMES]
        put_on_one_zero(list(models.values()), [quantum[index] for index in some])
    evaluators = {name: Evaluator(force_field, device=best_device()) for name, force_field in models.items()}

    def compute(k: int) -> None:
        run, number, teacher = names[k]
        liquid = config.electrolytes[number]
        known = _one_run(config, liquid, places[k].parent, evaluators, driver=teacher, seed=config.seed + k)
        write_json(places[k], known)
        say(
            f"{run}: {liquid.electrolyte}, {liquid.temperature:g} K, {known['frames']} frames"
            + "".join(f", {name} outvoted in {count}" for name, count in known.get("outvoted", {}).items() if count)
            + (f"; {known['stopped']}" if known["stopped"] else "")
        )

    share(places, compute)
    return {run: json.loads(place.read_text()) for (run, _, _), place in zip(names, places, strict=True)}


def _one_run(
    config: DistillConfig,
    liquid: Electrolyte,
    folder: Path,
    evaluators: Mapping[str, Evaluator],
    *,
    driver: str,
    seed: int,
) -> dict[str, Any]:
    """Simulate one liquid with one teacher, label its frames with the teachers of every student, write the files."""
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
    mixture = f"{liquid.electrolyte}, {liquid.temperature:g} K, {driver}"
    mixture = mixture if len(mixture.encode()) <= LONGEST_NAME else folder.name
    spread: dict[str, Any] = {}
    for student, names in config.classes().items():
        if driver not in names or not systems:
            continue
        n_validation = 0 if driver == names[-1] else max(1, round(VALIDATION * len(systems)))
        splits = ["test" if driver == names[-1] else "train"] * (len(systems) - n_validation)
        trajectories = [trajectory_in(split, run=mixture) for split in [*splits, *["validation"] * n_validation]]
        labels = ensemble_labels(
            {name: evaluators[name] for name in names},
            systems,
            trajectories=trajectories,
            temperature_K=liquid.temperature,
        )
        provenance = {"electrolyte": liquid.electrolyte, "teachers": ", ".join(names), "driver": driver}
        if labels.mean:
            write_frames(folder / f"spread{student}.h5", labels.spread, provenance=provenance)
            write_frames(folder / f"labels{student}.h5", labels.mean, provenance=provenance)
        if not student:
            by_teacher = dict(zip(names, (labels.pressure.mean(axis=0) / units.BAR).tolist(), strict=True))
            outvoted = dict(zip(names, (~labels.agrees).sum(axis=0).tolist(), strict=True))
            spread = {"pressure_by_teacher_bar": by_teacher, "outvoted": outvoted, **rms_spread(labels)}
    return {
        "electrolyte": liquid.electrolyte,
        "temperature_K": liquid.temperature,
        "driver": driver,
        "frames": len(systems),
        "stopped": stopped,
        **spread,
    }


def _teach(
    config: DistillConfig,
    student: str,
    runs: Mapping[str, dict[str, Any]],
    quantum: Sequence[Frame],
    folder: Path,
    *,
    say: Say,
) -> dict[str, Any]:
    """Train one student on the mean of its teachers and on quantum data; return its errors before and after."""
    names, work = config.classes()[student], folder.parent
    taught_by = {"teachers": ", ".join(names)}
    own = [run for run in runs if (work / run / f"labels{student}.h5").exists()]
    if not {runs[run]["driver"] for run in own} - {names[-1]}:
        reasons = "; ".join(f"{run}: {known['stopped']}" for run, known in runs.items() if known["stopped"])
        raise InputError(f"No teacher gave frames to train on. Train them better, or replace them. {reasons}")
    bulk = merge_files([work / run / f"labels{student}.h5" for run in own], folder / "bulk.h5", provenance=taught_by)
    merge_files([work / run / f"spread{student}.h5" for run in own], folder / "bulk-spread.h5", provenance=taught_by)
    chosen = _write_quantum(config, quantum, folder)
    files = {path.stem: path for path in config.teachers}
    liquids = ", ".join(liquid.electrolyte for liquid in config.electrolytes)
    start = str((config.start if not student else None) or files[names[0]])
    before = held_out_errors(checkpoint.load(start), [*bulk, *chosen])
    recipe = TrainConfig(
        data=[folder / "bulk.h5", folder / "quantum.h5"],
        output=folder / f"{config.output.stem}{student}{config.output.suffix}",
        start=start,
        weights=config.weights,
        loop=config.loop,
        trained=config.trained,
        seed=config.seed + list(config.classes()).index(student),
        far_pairs=0.03 if config.trained == "all" else 0.0,
        description=f"student of {taught_by['teachers']} in {liquids}",
    )
    after = train(recipe, say=say)
    for moment, errors in (("start", before), (recipe.output.stem, after)):
        say(f"held-out errors, {moment} (bulk: to the mean of the teachers)\n{error_table(errors)}")
    return {"start": start, "held_out_before": _numbers(before), "held_out_after": _numbers(after)}


def _write_quantum(config: DistillConfig, quantum: Sequence[Frame], folder: Path) -> list[Frame]:
    """Write the quantum frames of a student's training: ``clusters`` of the training part, all that is held out."""
    training = [frame for frame in quantum if frame.split == "train"]
    order = np.random.default_rng(config.seed).permutation(len(training))[: config.clusters]
    chosen = [training[index] for index in order] + [frame for frame in quantum if frame.split != "train"]
    write_frames(folder / "quantum.h5", chosen)
    return chosen


def _numbers(errors: Mapping[str, Errors]) -> dict[str, dict[str, float]]:
    names = ("forces", "energy_per_atom", "pressure_mean", "pressure", "charges")
    return {
        group: {name: value for name in names if not math.isnan(value := getattr(part, name))}
        for group, part in errors.items()
    }


def spread_table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Return how far the teachers are apart, per run: standard deviations over teachers, RMS over frames."""
    kcal = units.KCAL_PER_MOL
    lines = [f"{'run':<34}{'frames':>8}{'forces':>10}{'energy/atom':>13}{'pressure':>10}"]
    for run, known in runs.items():
        if not known["frames"]:
            lines.append(f"{run:<34}{0:>8}  {known['stopped']}")
            continue
        lines.append(
            f"{run:<34}{known['frames']:>8}{known['forces'] / kcal:>10.3f}{known['energy_per_atom'] / kcal:>13.4f}"
            f"{known['pressure'] / units.BAR:>10.0f}"
        )
    return "\n".join([*lines, "(spread of the teachers: kcal/mol/Å, kcal/mol, bar)"])
